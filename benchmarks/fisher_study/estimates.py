"""The estimates: exact sums over two samples, squared batch gradients, posterior estimators; all kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishertune.files import load_tensors, save_tensors
from fishertune.fisher.per_sample import PerSampleSquares
from fishertune.fisher.posterior import make_estimator

from .problem import Problem

BATCH = 8
SHRINKAGE = 40


@dataclass(frozen=True)
class Posterior:
    """A posterior estimator and its settings. γ is set so that γτ⁻² is the exact Fisher's own threshold: below that
    value the prior hides a weight, above it the data decide. No user knows it; it is the kindest choice there is.
    """

    label: str
    kind: str
    tau: float
    options: dict[str, Any] = field(default_factory=dict)


POSTERIORS = (
    Posterior("natural, tau 0.001", "natural", 0.001, {"beta": 0.02}),
    Posterior("natural, tau 0.01", "natural", 0.01, {"beta": 0.02}),
    Posterior("local, antithetic", "local", 0.01, {"antithetic": True}),
    Posterior("sgvb, antithetic", "sgvb", 0.01, {"antithetic": True}),
    Posterior("natural, tau 0.1", "natural", 0.1, {"beta": 0.02}),
    Posterior("local", "local", 0.01),
    Posterior("sgvb", "sgvb", 0.01),
)
SQUARED_BATCHES = (8, 32)


def boundaries(counts: Sequence[int], total: int, group: int) -> list[int]:
    """Where sums are cut: at every count asked for and at the end of every replicate."""
    cuts = {count for count in counts if count <= total} | set(range(group, total + 1, group)) | {total}
    return sorted(cuts)


class ExactSums:
    """Σ_n (∂L_n/∂θ)² of a sample, in pieces on disk; a piece that is there is not computed again."""

    def __init__(self, problem: Problem, folder: Path, sample: str, cuts: Sequence[int], labels: str) -> None:
        self._problem, self._sample, self._labels = problem, sample, labels
        self._folder = folder / f"exact-{sample}-{labels}"
        # Of labels drawn from the model: the same after a resume, and never the same in two samples, which could then
        # agree on more than the Fisher.
        self._seed = 1_000_000 * list(problem.samples).index(sample)
        self.pieces = list(zip([0, *cuts[:-1]], cuts, strict=True))

    def _path(self, piece: tuple[int, int]) -> Path:
        return self._folder / f"{piece[0]:05d}-{piece[1]:05d}.safetensors"

    def compute(self, advance: Callable[[int], None]) -> None:
        for piece in self.pieces:
            if not self._path(piece).is_file():
                save_tensors(self._path(piece), {"sum": self._sum(*piece, advance)}, {})
            else:
                advance(piece[1] - piece[0])

    def _sum(self, start: int, stop: int, advance: Callable[[int], None]) -> Tensor:
        problem = self._problem
        with PerSampleSquares(problem.model, problem.names) as squares:
            for first in range(start, stop, BATCH):
                last = min(first + BATCH, stop)
                problem.loss.generator.manual_seed(self._seed + first)
                batch = problem.images(self._sample, first, last)
                squares.backward(problem.loss(problem.model, batch, labels=self._labels))
                advance(last - first)
        return problem.flat(squares.accumulators)

    def sum(self, start: int, stop: int) -> Tensor:
        """The sum over images ``start`` to ``stop`` − 1, both on a boundary."""
        total: Tensor | None = None
        for piece in self.pieces:
            if start <= piece[0] and piece[1] <= stop:
                part = load_tensors(self._path(piece))[0]["sum"]
                total = part if total is None else total.add_(part)
        assert total is not None, f"no piece between {start} and {stop}"
        return total


def shrunk(problem: Problem, total: Tensor, images: int) -> Tensor:
    """The exact sums, drawn towards what rows and columns say: (1 − w)·F + w·(row mean · column mean / mean).

    One image tells little about one weight, but much about a whole row (an output's gradient) and a whole column (an
    input's size), and their product has the scale of F. w = 40/(40 + images): the more images, the less is borrowed. 40
    was chosen on the reference sample of DINOv2-S on CamVid alone. Same quantity, no further pass.
    """
    weight = SHRINKAGE / (SHRINKAGE + images)
    values = problem.split(total.clone())
    for item in problem.parts:
        part = item.view(values[item.name])
        if part.dim() == 2:
            product = part.mean(1, keepdim=True) * part.mean(0, keepdim=True) / part.mean().clamp_min(1e-30)
            part.lerp_(product, weight)
    return torch.cat([value.flatten() for value in values.values()])


def image_weights(problem: Problem, count: int, advance: Callable[[int], None]) -> tuple[Tensor, Tensor]:
    """Σ_θ (∂L_n/∂θ)² of each of the first images, how much it weighs in the sum, and its loss L_n."""
    traces, values = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for n in range(count):
        with PerSampleSquares(problem.model, problem.names) as squares:
            losses = problem.loss(problem.model, problem.images("estimate", n, n + 1))
            squares.backward(losses)
        values[n] = losses.item()
        traces[n] = sum(value.sum(dtype=torch.float64) for value in squares.accumulators.values())
        advance(1)
    return traces, values


def squared_batches(
    problem: Problem, counts: Sequence[int], advance: Callable[[int], None]
) -> Iterator[tuple[str, int, Tensor]]:
    """(label, images used, Σ over batches of the squared mean gradient) for each batch size, from one run over the
    images: the gradient of a large batch is the mean of those of the small ones it consists of."""
    model, small = problem.model, SQUARED_BATCHES[0]
    parameters = [dict(model.named_parameters())[name] for name in problem.names]
    sums = {size: [torch.zeros_like(p) for p in parameters] for size in SQUARED_BATCHES}
    open_batch = {size: [torch.zeros_like(p) for p in parameters] for size in SQUARED_BATCHES}
    for first in range(0, max(counts) - small + 1, small):
        done = first + small
        losses = problem.loss(model, problem.images("estimate", first, done))
        grads = torch.autograd.grad(losses.mean(), parameters, allow_unused=True, materialize_grads=True)
        for size in SQUARED_BATCHES:
            torch._foreach_add_(open_batch[size], grads, alpha=small / size)
            if done % size == 0:
                torch._foreach_addcmul_(sums[size], open_batch[size], open_batch[size])
                torch._foreach_zero_(open_batch[size])
        advance(small)
        for count in counts:
            for size in SQUARED_BATCHES:
                used = count - count % size
                if used == done:
                    yield (
                        f"batch-squared, {size} images",
                        used,
                        problem.flat(dict(zip(problem.names, sums[size], strict=True))),
                    )


def posterior_estimates(
    problem: Problem,
    settings: Posterior,
    threshold: float,
    counts: Sequence[int],
    path: Path,
    advance: Callable[[int], None],
) -> Iterator[tuple[int, Tensor]]:
    """(images used, excess over all parameters) whenever a count is reached; the state is kept in ``path``."""
    estimator = make_estimator(
        settings.kind,
        gamma=threshold * settings.tau**2,
        tau=settings.tau,
        params=problem.candidate_names,
        seed=0,
        **settings.options,
    )
    if path.is_file():
        tensors, metadata = load_tensors(path)
        estimator.load_state_dict({"tensors": tensors, **metadata})
        advance(estimator.samples)
    stops = {count - count % BATCH for count in counts}
    for first in range(estimator.samples, max(stops), BATCH):
        batch = problem.images("estimate", first, first + BATCH)
        estimator.update(problem.model, problem.loss, batch)
        advance(BATCH)
        if estimator.samples in stops:
            yield estimator.samples, problem.flat(estimator.excess)
            state = estimator.state_dict()
            save_tensors(path, state.pop("tensors"), state)
