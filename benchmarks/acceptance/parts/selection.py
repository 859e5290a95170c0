"""key_histogram, select_threshold, compact: the exact k largest of many scores and where they are.

The threshold needs one read of the scores, compaction two (to count, to write) and the indices written.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

import fishertune_kernels as fk
from fishertune_kernels.select_threshold import reference

from ..compare import (
    FLOATS,
    LAYOUTS,
    ODD_SHAPES,
    WINDOW,
    Case,
    Outputs,
    beyond,
    read_only,
    short,
    window,
    wrong,
)
from ..measure import Bench, Shape, count, elements
from ..operator import Operator, Timed
from ..race import CHUNKS, Work, tiles, with_backend, with_variants

THRESHOLD, COMPACT = "select_threshold", "compact"
FRACTION = 0.05
SHAPES: list[Shape] = [*ODD_SHAPES, (601, 1001)]
"""Enough scores that a selection may sample them first."""


# Right? ---------------------------------------------------------------------------------------------------------------


def cases(bench: Bench) -> Iterator[Case]:
    for dtype, layout in [*itertools.product(FLOATS, ("contiguous",)), *((torch.bfloat16, la) for la in LAYOUTS[1:])]:
        rounded = [torch.round(tensor * 8) / 8 for tensor in bench.normals(ODD_SHAPES, dtype)]
        low = [torch.where(tensor < -2, -math.inf, tensor) for tensor in rounded]
        for name, scores in {
            "as drawn": bench.normals(SHAPES if layout == "contiguous" else ODD_SHAPES, dtype),
            "ties and −∞": low,
            "all equal": [torch.zeros_like(s) for s in low],
        }.items():
            yield _selects(f"{name} {short(dtype)}, {layout}", read_only(scores, layout))
    for dtype, bits in itertools.product(FLOATS, (8, 11)):
        yield _counts(f"{bits}-bit digits {short(dtype)}", bench.normals(ODD_SHAPES, dtype), bits)
    for dtype in FLOATS:
        yield _brackets(f"bracket {short(dtype)}", bench.normals(ODD_SHAPES, dtype))


def _selects(name: str, scores: list[Tensor]) -> Case:
    flat = torch.cat([tensor.flatten() for tensor in scores]).double()
    ks = (0, 1, flat.numel() // 20, flat.numel())
    order = flat.neg().sort(stable=True).indices
    expected: list[Tensor] = []
    for k in ks:
        chosen, starts = order[:k].sort().values, [0, *itertools.accumulate(tensor.numel() for tensor in scores)]
        expected += [chosen[(chosen >= low) & (chosen < high)] - low for low, high in itertools.pairwise(starts)]

    def run() -> Outputs:
        return [index for k in ks for index in fk.compact(scores, fk.select_threshold(scores, k))]

    return Case(name, run, lambda actual: wrong(actual, expected))


def _counts(name: str, scores: list[Tensor], bits: int) -> Case:
    scores[-1].view(-1)[7] = math.nan
    first = {"shift": 32 - bits, "bits": bits, "prefix_mask": 0, "prefix": 0}
    top = (1 << bits) - 1 << 32 - bits
    second = {"shift": 32 - 2 * bits, "bits": bits, "prefix_mask": top, "prefix": 0xBF800000 & top}  # near 1.0
    expected = [reference.key_histogram(scores, **digit) for digit in (first, second)]
    return Case(
        name,
        lambda: [fk.key_histogram(scores, **digit) for digit in (first, second)],
        lambda actual: wrong(actual, expected),
    )


def _brackets(name: str, scores: list[Tensor]) -> Case:
    """Keys of the scores from 0.5 to 1.5, in any order, and none of them where they are more than asked for."""
    bracket = {"low": 0xBF000000, "high": 0xBFC00000}
    counts, candidates = reference.collect_bracket(scores, **bracket, capacity=scores[-1].numel())

    def run() -> Outputs:
        found = fk.collect_bracket(scores, **bracket, capacity=scores[-1].numel())
        return [found[0], found[1].sort().values, *fk.collect_bracket(scores, **bracket, capacity=10)]

    nothing = candidates[:0]
    return Case(name, run, lambda actual: wrong(actual, [counts, candidates.sort().values, counts, nothing]))


def large(bench: Bench) -> Iterator[Case]:
    scores = torch.zeros(beyond(bench), dtype=torch.bfloat16, device=bench.device)
    window(scores).copy_(bench.normal((WINDOW,)).abs())
    n_positive = int((window(scores) > 0).sum())
    expected = (window(scores) > 0).nonzero().squeeze(1) + (scores.numel() - WINDOW)
    yield Case(
        "bf16",
        lambda: fk.compact(scores, fk.select_threshold(scores, n_positive)),
        lambda actual: wrong(actual, [expected]),
    )


# Fast? ----------------------------------------------------------------------------------------------------------------


class Scores(NamedTuple):
    scores: list[Tensor]
    k: int
    flat: Tensor
    """The same scores in one tensor, which the rivals need."""


def _problem(bench: Bench, shapes: list[Shape]) -> Scores:
    flat = bench.normal((count(shapes),))
    parts = flat.split([math.prod(shape) for shape in shapes])
    # Every tensor begins where an allocation of its own would.
    scores = [part.clone().view(shape) for part, shape in zip(parts, shapes, strict=True)]
    return Scores(scores, int(FRACTION * flat.numel()), flat)


def threshold(problem: Scores) -> Callable[[], list[Tensor]]:
    return lambda: [torch.tensor([fk.select_threshold(problem.scores, problem.k).value])]


def topk(problem: Scores) -> Callable[[], list[Tensor]]:
    return lambda: [torch.topk(problem.flat, problem.k, sorted=False).values.amin().view(1)]


def kthvalue(problem: Scores) -> Callable[[], list[Tensor]]:
    return lambda: [torch.kthvalue(problem.flat, problem.flat.numel() - problem.k + 1).values.view(1)]


def sort(problem: Scores) -> Callable[[], list[Tensor]]:
    return lambda: [torch.sort(problem.flat).values[-problem.k].view(1)]


def same_value(actual: Outputs, expected: Outputs) -> float:
    return wrong([tensor.cpu() for tensor in actual], [tensor.cpu() for tensor in expected])


def threshold_work(bench: Bench) -> Work[Scores]:
    shapes, reduced = bench.backbone(bytes_per_element=8 + 4)
    n = count(shapes)
    return Work(
        THRESHOLD, "5 %", f"fp32, 5 % of {elements(shapes)} scores", lambda: _problem(bench, ODD_SHAPES),
        lambda: _problem(bench, shapes), threshold, same_value,
        {"torch.topk": topk, "torch.kthvalue": kthvalue, "torch.sort": sort},
        n_bytes=4 * n, flops=4 * n, reduced=reduced,  # a key takes three operations, its count one
    )  # fmt: skip


def compact(problem: Scores) -> Callable[[], list[Tensor]]:
    found = fk.select_threshold(problem.scores, problem.k)
    return lambda: fk.compact(problem.scores, found)


def nonzero(problem: Scores) -> Callable[[], list[Tensor]]:
    """With distinct scores there are no ties to count, which torch could not do in the same pass."""
    value = fk.select_threshold(problem.scores, problem.k).value
    return lambda: [(problem.flat >= value).nonzero()]


def same_places(actual: Outputs, expected: Outputs) -> float:
    """nonzero's indices run through all tensors."""
    starts = itertools.accumulate([0, *(math.prod(shape) for shape in ODD_SHAPES[:-1])])
    ours = torch.cat([index.long() + start for index, start in zip(expected, starts, strict=True)])
    return wrong([actual[0].flatten()], [ours])


def compact_work(bench: Bench) -> Work[Scores]:
    shapes, reduced = bench.backbone(bytes_per_element=8 + 2)
    n = count(shapes)
    return Work(
        COMPACT, "5 %", f"fp32, 5 % of {elements(shapes)} scores", lambda: _problem(bench, ODD_SHAPES),
        lambda: _problem(bench, shapes), compact, same_places, {"torch.nonzero": nonzero},
        n_bytes=(2 * 4 + 4 * FRACTION) * n, flops=4 * n, reduced=reduced,
    )  # fmt: skip


def threshold_works(bench: Bench) -> Iterator[Work[Scores]]:
    yield threshold_work(bench)


def compact_works(bench: Bench) -> Iterator[Work[Scores]]:
    yield compact_work(bench)


def variants(bench: Bench) -> Iterator[Work[Scores]]:
    """Other ways to select: add a row to these dictionaries."""
    cuda = "select_threshold=cuda,compact=cuda"
    thresholds = {"CUDA C++": with_backend(threshold, cuda), **tiles("select_threshold", threshold, CHUNKS)}
    yield with_variants(threshold_work(bench), thresholds)
    compactions = {"CUDA C++": with_backend(compact, cuda), **tiles("compact", compact, CHUNKS)}
    yield replace(with_variants(compact_work(bench), compactions), differs=wrong)


OPERATOR = Operator(
    THRESHOLD, (THRESHOLD, "key_histogram", "collect_bracket", COMPACT), cases, large, 7 << 31,
    (Timed("5 %", threshold_works, seconds=20, goal=True), Timed("compact", compact_works)), variants,
    check_seconds=20,
)  # fmt: skip
