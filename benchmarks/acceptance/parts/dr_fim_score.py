"""dr_fim_score, dr_fim_score_: the scores of Eq. 4, 5, 7, 15 and their running mean. Reads F and F', writes scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fishertune_kernels as fk
from fishertune_kernels.dr_fim_score import reference

from ..compare import (
    FLOATS,
    ODD_SHAPES,
    WINDOW,
    Case,
    Outputs,
    beyond,
    close,
    doubles,
    dtypes_and_layouts,
    error,
    read_only,
    short,
    window,
    written,
    wrong,
)
from ..measure import Bench, Shape, count, elements
from ..operator import Call, Operator, Timed
from ..race import CHUNKS, Work, tiles, with_variants
from .selection import FRACTION, SHAPES

NAME = "dr_fim_score"
KINDS = ("f", "delta_f", "dr_fim", "dr_fim_variational")
DR_FIM: dict[str, Any] = {"kind": "dr_fim", "c": 0.5}
# F and F' are given exactly, so their difference is rounded once and nothing cancels: six roundings of 6e-8, a division
# that a GPU may take to a few units in the last place, and the running mean's three more.
TOLERANCE = {"rtol": 2e-6}


def cases(bench: Bench) -> Iterator[Case]:
    for name, dtype, layout in dtypes_and_layouts():
        fisher, shifted = bench.positives(ODD_SHAPES, dtype), bench.positives(ODD_SHAPES, dtype)
        for kind in KINDS if layout == "contiguous" else ("dr_fim",):
            options: dict[str, Any] = {"kind": kind, "c": 0.7, "gamma": 2.0, "prior_precision": 1e-3, "eps": 1e-8}
            expected = reference.dr_fim_score(doubles(fisher), doubles(shifted), **options)

            def run(
                fisher: list[Tensor] = fisher, shifted: list[Tensor] = shifted, layout: str = layout,
                options: dict[str, Any] = options,
            ) -> Outputs:  # fmt: skip
                inputs = read_only(fisher, layout), read_only(shifted, layout)
                alone = fk.dr_fim_score(*inputs, **options)
                mean = written([torch.full_like(f, math.nan, dtype=torch.float32) for f in fisher], layout)
                for number in (1, 2):  # the mean of a score and itself is that score
                    fk.dr_fim_score_(mean, *inputs, count=number, **options)
                return [*alone, *mean]

            yield Case(f"{kind} {name}", run, close([*expected, *expected], **TOLERANCE))
    for dtype in FLOATS:
        yield _with_threshold(bench, dtype)


def _with_threshold(bench: Bench, dtype: torch.dtype) -> Case:
    """Scores and threshold in one pass: the scores are right, and the selection is that of these very scores."""
    fisher, shifted = bench.positives(SHAPES, dtype), bench.positives(SHAPES, dtype)
    k = count(SHAPES) // 20
    expected = reference.dr_fim_score(doubles(fisher), doubles(shifted), **DR_FIM)

    def run() -> Outputs:
        scores = [torch.full_like(f, math.nan, dtype=torch.float32) for f in fisher]
        threshold = fk.dr_fim_threshold_(scores, fisher, shifted, k, count=1, **DR_FIM)
        return [*scores, *fk.compact(scores, threshold)]

    def off(actual: Outputs) -> float:
        scores, indices = actual[: len(expected)], actual[len(expected) :]
        top = torch.cat([score.flatten() for score in scores]).neg().sort(stable=True).indices[:k].sort().values
        starts = itertools.accumulate([0, *(math.prod(shape) for shape in SHAPES[:-1])])
        found = torch.cat([index.long() + start for index, start in zip(indices, starts, strict=True)])
        return max(error(scores, expected, **TOLERANCE), wrong([found], [top]))

    return Case(f"with its threshold, {short(dtype)}", run, off)


def large(bench: Bench) -> Iterator[Case]:
    fisher, shifted = (torch.zeros(beyond(bench), dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    for tensor in (fisher, shifted):
        window(tensor).copy_(bench.positive((WINDOW,)))
    expected = reference.dr_fim_score([window(fisher).double()], [window(shifted).double()], **DR_FIM)

    def run() -> Outputs:
        (scores,) = fk.dr_fim_score(fisher, shifted, **DR_FIM)
        return [window(scores).clone(), scores[:-WINDOW].any().view(1).float()]

    yield Case("bf16", run, close([*expected, torch.zeros(1, device=bench.device)], **TOLERANCE))


class Fishers(NamedTuple):
    fisher: list[Tensor]
    shifted: list[Tensor]
    mean: list[Tensor]


def ours(problem: Fishers) -> Callable[[], list[Tensor]]:
    return lambda: fk.dr_fim_score(problem.fisher, problem.shifted, **DR_FIM)


def torch_eager(problem: Fishers) -> Callable[[], list[Tensor]]:
    return lambda: reference.dr_fim_score(problem.fisher, problem.shifted, **DR_FIM)


def running_mean(problem: Fishers) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        fk.dr_fim_score_(problem.mean, problem.fisher, problem.shifted, count=2, **DR_FIM)
        return problem.mean

    return call


def torch_eager_mean(problem: Fishers) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        reference.dr_fim_score_(problem.mean, problem.fisher, problem.shifted, 2, **DR_FIM)
        return problem.mean

    return call


def mean_and_threshold(problem: Fishers) -> Callable[[], list[Tensor]]:
    k = int(FRACTION * sum(mean.numel() for mean in problem.mean))

    def call() -> list[Tensor]:
        found = fk.dr_fim_threshold_(problem.mean, problem.fisher, problem.shifted, k, count=2, **DR_FIM)
        return [torch.tensor([found.value])]

    return call


def mean_then_threshold(problem: Fishers) -> Callable[[], list[Tensor]]:
    k = int(FRACTION * sum(mean.numel() for mean in problem.mean))

    def call() -> list[Tensor]:
        fk.dr_fim_score_(problem.mean, problem.fisher, problem.shifted, count=2, **DR_FIM)
        return [torch.tensor([fk.select_threshold(problem.mean, k).value])]

    return call


def works(bench: Bench) -> Iterator[Work[Fishers]]:
    shapes, reduced = bench.backbone(bytes_per_element=16)

    def problem(shapes: list[Shape]) -> Fishers:
        return Fishers(bench.positives(shapes), bench.positives(shapes), bench.zeros(shapes))

    def differs(actual: Outputs, expected: Outputs) -> float:
        return error(actual, expected, **TOLERANCE)

    n, what = count(shapes), f"fp32, {elements(shapes)} elements"
    yield Work(
        NAME, "stream", what, lambda: problem(ODD_SHAPES), lambda: problem(shapes), ours, differs,
        {"torch eager": torch_eager}, n_bytes=12 * n, flops=6 * n, reduced=reduced,
    )  # fmt: skip
    yield Work(
        NAME, "running mean", f"running mean, {what}", lambda: problem(ODD_SHAPES), lambda: problem(shapes),
        running_mean, differs, {"torch eager": torch_eager_mean}, n_bytes=16 * n, flops=9 * n, reduced=reduced,
    )  # fmt: skip
    yield Work(
        NAME, "with threshold", f"running mean and threshold, {what}", lambda: problem(SHAPES),
        lambda: problem(shapes), mean_and_threshold, wrong, {"two calls": mean_then_threshold}, n_bytes=16 * n,
        flops=13 * n, reduced=reduced,
    )  # fmt: skip


def variants(bench: Bench) -> Iterator[Work[Fishers]]:
    yield with_variants(next(works(bench)), tiles("dr_fim_score", ours, CHUNKS))


def calls(bench: Bench) -> Iterator[Call]:
    fisher = bench.positives(ODD_SHAPES) + bench.positives(ODD_SHAPES, torch.bfloat16)
    mean = bench.zeros(ODD_SHAPES * 2)
    yield Call("fp32 and bf16 Fishers", 2, lambda: fk.dr_fim_score(fisher, fisher, **DR_FIM))
    yield Call(
        "running mean, fp32 and bf16 Fishers", 2, lambda: fk.dr_fim_score_(mean, fisher, fisher, count=2, **DR_FIM)
    )


OPERATOR = Operator(
    NAME, (NAME, "dr_fim_score_", "dr_fim_threshold_"), cases, large, 17 << 31,
    (Timed("stream", works, goal=True, seconds=15),), variants, calls,
)  # fmt: skip
