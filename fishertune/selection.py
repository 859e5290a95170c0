"""Which elements are tuned: exactly k of them, ranked globally, and how many take part at each step.

One ranking serves the whole run. The elements with the k largest scores are selected once; a growth schedule only moves
the score an element needs to take part at a step. The sets of two steps are therefore nested, and optimizer state is
allocated once, for the largest of them.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fishertune.files import load_tensors, save_tensors
from fishertune_kernels import compact, gather_values, select_threshold

_FORMAT = "fishertune.selection"
_VERSION = 1
# Below this share of the budget, ties at the threshold are the ordinary coincidences of fp32 scores.
_TIES_WORTH_A_WARNING = 0.01


def budget(fraction: float, base: int) -> int:
    """How many elements ``fraction`` of ``base`` elements is: Python's ``round`` of the exact product.

    The product is taken in rational numbers, of the fraction as it is written in decimals: 0.07 × 50 is 3.5 and not
    3.5000000000000004. A product half-way between two integers goes to the even one, as ``round`` does.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must lie in [0, 1] (0.05 is 5 %), got {fraction}.")
    return round(Fraction(repr(float(fraction))) * base)


@dataclass(frozen=True)
class Selection:
    """The selected elements of named parameters, as :func:`select` found them.

    Every scored parameter is present, also one without a selected element (its tensors are then empty). Under a
    process group the tensors hold this rank's elements, while ``k``, ``base``, ``candidates`` and ``threshold`` are
    global.
    """

    indices: dict[str, Tensor]
    """Flat (row-major) positions per parameter: 1-D, strictly ascending, int32 (int64 beyond 2³¹ elements)."""
    scores: dict[str, Tensor]
    """Scores of those elements in the same order, 1-D fp32."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every scored parameter."""
    threshold: float
    """The k-th largest score; +inf if k is 0."""
    k: int
    """Number of elements selected over all ranks."""
    base: int
    """Number of parameters a fraction refers to: ``k = budget(fraction, base)``."""
    candidates: int
    """Number of elements that could have been selected (score above −inf), over all ranks."""

    def __len__(self) -> int:
        """Number of selected elements held here."""
        return sum(index.numel() for index in self.indices.values())

    def numel(self) -> int:
        """Number of elements of all scored parameters, selected or not."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def mask(self, name: str) -> Tensor:
        """Bool tensor of the parameter's shape, True where it is selected.

        Raises:
            ValueError: if no parameter of that name was scored.
        """
        if name not in self.indices:
            raise ValueError(f"No parameter '{name}' in this selection.{_nearest(name, self.indices)}")
        index = self.indices[name]
        mask = torch.zeros(math.prod(self.shapes[name]), dtype=torch.bool, device=index.device)
        return mask.index_fill_(0, index.long(), True).view(self.shapes[name])

    def shares(self) -> dict[str, float]:
        """Selected part of every parameter, 0 to 1 (0 for a parameter without elements)."""
        return {name: index.numel() / max(math.prod(self.shapes[name]), 1) for name, index in self.indices.items()}

    def save(self, path: str | Path) -> None:
        """Writes the selection as one safetensors file, whole or not at all: 8 bytes per selected element."""
        tensors = {f"indices/{name}": index for name, index in self.indices.items()}
        tensors |= {f"scores/{name}": score for name, score in self.scores.items()}
        metadata = {
            "format": _FORMAT,
            "version": _VERSION,
            "shapes": [[name, list(shape)] for name, shape in self.shapes.items()],
            "threshold": self.threshold,
            "k": self.k,
            "base": self.base,
            "candidates": self.candidates,
        }
        save_tensors(path, tensors, metadata)

    @staticmethod
    def load(path: str | Path) -> Selection:
        """Reads a file of :meth:`save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no selection, was written by a newer version, or its tensors do not fit its metadata.
        """
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path} holds no selection (format {metadata.get('format')!r}, expected {_FORMAT!r}). "
                "Pass a file written by Selection.save."
            )
        if metadata.get("version") != _VERSION:
            raise ValueError(
                f"{path} is a selection of version {metadata.get('version')}, this program reads version {_VERSION}. "
                "Update fishertune, or select again."
            )
        try:
            shapes = {name: tuple(shape) for name, shape in metadata["shapes"]}
            numbers: dict[str, Any] = {key: metadata[key] for key in ("threshold", "k", "base", "candidates")}
            selection = Selection(
                indices={name: tensors.pop(f"indices/{name}") for name in shapes},
                scores={name: tensors.pop(f"scores/{name}") for name in shapes},
                shapes=shapes,
                **numbers,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error} is missing or malformed. Select again.") from error
        problem = f"unexpected tensor {next(iter(tensors))!r}" if tensors else _inconsistency(selection)
        if problem:
            raise ValueError(f"{path} is damaged: {problem}. Select again.")
        return selection

    def digest(self) -> str:
        """SHA-256 over names, shapes and positions: equal for two selections of the same elements."""
        sha = hashlib.sha256()
        for name, index in self.indices.items():
            sha.update(f"{name}{list(self.shapes[name])}{index.numel()};".encode())
            sha.update(index.cpu().to(torch.int64).numpy().tobytes())
        return sha.hexdigest()


def _inconsistency(selection: Selection) -> str | None:
    for name, index in selection.indices.items():
        score = selection.scores[name]
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
            return f"the indices of '{name}' are {index.dtype} of shape {tuple(index.shape)}"
        if score.dtype != torch.float32 or score.shape != index.shape:
            return f"'{name}' has {index.numel()} indices but scores {score.dtype} of shape {tuple(score.shape)}"
        if index.numel() == 0:
            continue
        if index[0] < 0 or index[-1] >= math.prod(selection.shapes[name]) or bool((index[1:] <= index[:-1]).any()):
            return f"the indices of '{name}' are not ascending positions in shape {selection.shapes[name]}"
        if not bool((score >= selection.threshold).all()):
            return f"'{name}' has scores below the threshold {selection.threshold}"
    if len(selection) > selection.k:
        return f"{len(selection)} elements are listed, but k is {selection.k}"
    return None


def select(
    scores: Mapping[str, Tensor],
    *,
    fraction: float | None = None,
    k: int | None = None,
    base: int | None = None,
    group: dist.ProcessGroup | None = None,
    allow_ties: bool = False,
) -> Selection:
    """Selects exactly k elements: those with the largest scores over all parameters (and ranks).

    Elements tied at the threshold are taken by lowest global flat index; the order of ``scores`` is the order of
    parameters in that index. The answer does not depend on the number of ranks.

    Args:
        scores: name → score of every element, any shape, fp32, bf16 or fp16 (widened exactly) or fp64 (ranked in
            fp32). −inf marks an element that may not be selected.
        fraction: share of ``base`` to select, k = :func:`budget`\\ (fraction, base). Give this or ``k``.
        k: number of elements to select over all ranks; 0 selects nothing.
        base: number of parameters that ``fraction`` refers to, over all ranks; by default all elements of ``scores``.
            A fraction of the whole backbone, spent on some of its parameters, needs it.
        group: process group over which ``scores`` is sharded; every rank calls with the same names.
        allow_ties: accept scores that rank nothing, such as all-equal ones: the first k in flat order are then taken.

    Raises:
        TypeError: if scores are not floating-point tensors by name.
        ValueError: if a score is NaN; if k exceeds the number of candidates; if a fraction selects nothing; if the
            scores are all zero or so tied that every selected element would be an arbitrary choice (unless
            ``allow_ties``).

    Warns:
        UserWarning: if more than 1 % of the selection was chosen among equal scores by index.
    """
    prepared = _prepare(scores)
    numel = sum(score.numel() for score in prepared.values())
    nans = {name: int(score.isnan().sum()) for name, score in prepared.items()}
    candidates = sum(int((score > -math.inf).sum()) for score in prepared.values())
    device = next(iter(prepared.values())).device
    total, n_nan, candidates = _sum_over_ranks([numel, sum(nans.values()), candidates], group, device)
    if n_nan:
        where = ", ".join(f"{count} in '{name}'" for name, count in nans.items() if count) or "on another rank"
        raise ValueError(
            f"{n_nan} scores are NaN ({where}), and NaN has no rank. Look for NaN in the gradients or the loss the "
            "scores were computed from."
        )
    base = total if base is None else base
    k = _count_to_select(fraction, k, base)
    if k > candidates:
        raise ValueError(
            f"{k} elements were asked for, but only {candidates} of {total} are candidates (score above −inf). "
            "Lower the fraction, or let more parameters be candidates."
        )

    tensors = list(prepared.values())
    threshold = select_threshold(tensors, k, group=group)
    ties = sum(int((score == threshold.value).sum()) for score in tensors) if k else 0
    n_greater, kept, ties = _sum_over_ranks([threshold.n_greater, threshold.n_ties_kept, ties], group, device)
    if ties > kept and not allow_ties:
        _judge_ties(threshold.value, k, kept=kept, ties=ties, n_greater=n_greater)

    indices = compact(tensors, threshold)
    values = gather_values(tensors, indices)
    return Selection(
        indices=dict(zip(prepared, indices)),
        scores={name: value.float() for name, value in zip(prepared, values)},
        shapes={name: tuple(score.shape) for name, score in prepared.items()},
        threshold=float(threshold.value),
        k=k,
        base=base,
        candidates=candidates,
    )


def _prepare(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be a dict of name → tensor, got {type(scores).__name__}.")
    if not scores:
        raise ValueError("scores is empty: give the scores of at least one parameter.")
    prepared = {}
    for name, score in scores.items():
        if not isinstance(score, Tensor) or not score.is_floating_point():
            kind = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise TypeError(f"The scores of '{name}' must be a floating-point tensor, got {kind}.")
        plain = score.detach().contiguous()
        prepared[name] = plain.float() if plain.dtype == torch.float64 else plain
    return prepared


def _count_to_select(fraction: float | None, k: int | None, base: int) -> int:
    if (fraction is None) == (k is None):
        raise ValueError(f"Give either fraction or k, got fraction={fraction} and k={k}.")
    if k is not None:
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}.")
        return int(k)
    assert fraction is not None
    k = budget(fraction, base)
    if k == 0 and fraction > 0:
        raise ValueError(f"fraction={fraction} of {base} parameters rounds to 0 elements. Raise it, or give k.")
    return k


def _sum_over_ranks(counts: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    if group is None:
        return list(counts)
    summed = torch.tensor(counts, dtype=torch.int64, device=device)
    dist.all_reduce(summed, group=group)
    return [int(count) for count in summed.tolist()]


def _judge_ties(value: float, k: int, *, kept: int, ties: int, n_greater: int) -> None:
    if n_greater == 0:
        what = "All the best scores are zero" if value == 0 else f"The {ties} best scores all equal {value:g}"
        raise ValueError(
            f"{what}: {ties} elements tie for {k} places, so the choice would be arbitrary. A Fisher of zeros means "
            "that no gradient reached these parameters: check requires_grad, the loss and the data. Pass "
            "allow_ties=True to take the first ones in flat order."
        )
    if kept > _TIES_WORTH_A_WARNING * k:
        warnings.warn(
            f"{kept} of {k} selected elements were taken by position from {ties} that tie at the score {value:g}; "
            f"only {n_greater} rank above. Select a smaller fraction, or compute the scores from more data.",
            stacklevel=3,
        )


class ActiveThreshold:
    """The score an element needs to take part, as a function of the step: what a schedule's ``bind`` returns.

    Steps count from 1 as Algorithm 1 of the paper does; step 0 is the state before the first. Steps past the end of the
    schedule have the threshold of its last step. Elements that tie at the threshold take part together.
    """

    def __init__(self, thresholds: Tensor) -> None:
        self._thresholds = thresholds

    def __call__(self, step: int) -> float:
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}.")
        return float(self._thresholds[min(step, self._thresholds.numel() - 1)])


class Schedule(Protocol):
    """What :class:`fishertune.optim.SparseAdamW` expects as ``growth``."""

    def bind(self, selection: Selection) -> ActiveThreshold: ...


_SHAPES = ("exponential", "linear", "constant")


@dataclass(frozen=True)
class Growth:
    """Grows the tuned fraction from ``start`` to ``end``, which is reached exactly at step ``steps``.

    With s = step / steps the fraction is
        exponential: start + (end − start)·(1 − e⁻ˢ)/(1 − e⁻¹)    the mirror of Eq. 16, scaled to reach the end
        linear:      start + (end − start)·s
        constant:    end, from the first step on

    Both fractions refer to the base of the selection, and the selection is the set of the end: select it with
    ``fraction=end``.

    Raises:
        ValueError: unless 0 ≤ start ≤ end ≤ 1, steps ≥ 1 and the shape is known.
    """

    start: float
    end: float
    steps: int
    shape: str = "exponential"

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"Growth needs 0 ≤ start ≤ end ≤ 1 (0.05 is 5 %), got start={self.start}, end={self.end}.")
        _check_steps(self.steps)
        if self.shape not in _SHAPES:
            known = ", ".join(_SHAPES)
            raise ValueError(f"Growth has no shape '{self.shape}'.{_nearest(self.shape, _SHAPES)} Known: {known}.")

    def fraction(self, step: int) -> float:
        """Fraction of the base that takes part at ``step``."""
        s = step / self.steps
        if s >= 1.0 or self.shape == "constant":
            return self.end
        rise = s if self.shape == "linear" else math.expm1(-s) / math.expm1(-1.0)
        return self.start + (self.end - self.start) * rise

    def bind(self, selection: Selection) -> ActiveThreshold:
        """Turns fractions into scores of ``selection``: sorts its scores once and keeps one number per step.

        Raises:
            ValueError: if the end of the schedule is not the size of the selection.
        """
        counts = [budget(self.fraction(step), selection.base) for step in range(self.steps + 1)]
        if counts[-1] != selection.k:
            raise ValueError(
                f"The schedule ends at {self.end} of {selection.base} = {counts[-1]} elements, but {selection.k} are "
                "selected. Select with fraction=end (and the same base)."
            )
        return _bind(selection, counts)


@dataclass(frozen=True)
class PaperThreshold:
    """Eq. 16 as printed: an element takes part while its score exceeds δ_min + (δ_max − δ_min)·e^(−t/T).

    The scores of the equation are normalised here to their quantile among the candidates (the share of candidates that
    score no higher, so the best has 1): the two δ then mean the same whatever the scale of the scores. The threshold
    falls from δ_max and ends at δ_min + 0.37 (δ_max − δ_min): with 0.94 and 0.99 from the best 1 % of the candidates to
    the best 4.2 %.

    Raises:
        ValueError: unless 0 ≤ delta_min ≤ delta_max ≤ 1 and steps ≥ 1.
    """

    delta_min: float
    delta_max: float
    steps: int

    def __post_init__(self) -> None:
        if not 0.0 <= self.delta_min <= self.delta_max <= 1.0:
            raise ValueError(
                "PaperThreshold needs quantiles 0 ≤ delta_min ≤ delta_max ≤ 1 (0.95 lets the best 5 % take part), "
                f"got {self.delta_min} and {self.delta_max}."
            )
        _check_steps(self.steps)

    def quantile(self, step: int) -> float:
        """The threshold of Eq. 16 at ``step``."""
        t = min(step, self.steps)
        return self.delta_min + (self.delta_max - self.delta_min) * math.exp(-t / self.steps)

    def bind(self, selection: Selection) -> ActiveThreshold:
        """Turns quantiles into scores of ``selection``: sorts its scores once and keeps one number per step.

        Raises:
            ValueError: if more candidates pass at the end of the schedule than the selection holds.
        """
        # q > θ with q = (n − rank + 1)/n holds for the first n − ⌊θn⌋ ranks
        n = selection.candidates
        counts = [n - math.floor(self.quantile(step) * n) for step in range(self.steps + 1)]
        if counts[-1] > selection.k:
            raise ValueError(
                f"At its end the schedule lets {counts[-1]} of {n} candidates take part (quantile above "
                f"{self.quantile(self.steps):.4f}), but only {selection.k} are selected. Select with k={counts[-1]}."
            )
        return _bind(selection, counts)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"A schedule needs at least one step, got steps={steps}.")


def _bind(selection: Selection, counts: Sequence[int]) -> ActiveThreshold:
    if len(selection) != selection.k:
        raise ValueError(
            f"This selection holds {len(selection)} of {selection.k} elements, one rank's share, and cannot be ranked "
            "without the others. Bind a selection that was made without a process group."
        )
    flat = [score.flatten() for score in selection.scores.values()]
    descending = torch.cat(flat).cpu().numpy()
    descending.sort()
    descending = descending[::-1]
    return ActiveThreshold(
        torch.tensor([descending[count - 1] if count else math.inf for count in counts], dtype=torch.float32)
    )


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean '{close[0]}'?" if close else ""
