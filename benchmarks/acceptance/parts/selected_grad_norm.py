"""selected_grad_norm: √Σ g² over the selected elements of many gradients, for clipping without waiting for the host.

Reads the indices and the touched sectors of the gradients; a second, tiny launch adds the chunks' partial sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import fishertune_kernels as fk

from ..compare import (
    ODD_SHAPES,
    WINDOW,
    Case,
    Outputs,
    beyond,
    close,
    dtypes_and_layouts,
    error,
    read_only,
    short,
    window,
)
from ..measure import Bench, Shape, count, elements
from ..operator import Operator, Timed
from ..race import CHUNKS, Work, tiles, with_variants
from .sparse_adamw import FRACTION, Step

NAME = "selected_grad_norm"
# All terms are positive: a sum in chunks of chunks loses some tens of roundings of 6e-8, and its root half of that.
RTOL = 2e-6


def cases(bench: Bench) -> Iterator[Case]:
    for name, dtype, layout in dtypes_and_layouts():
        grads = bench.normals(ODD_SHAPES, dtype)
        yield _norm(name, grads, read_only(grads, layout), bench.selection(ODD_SHAPES, 0.3))
        yield _norm(f"{name}, every element", grads, read_only(grads, layout), None)
    for factor in (1e25, 1e-30):
        grads = [grad * factor for grad in bench.normals(ODD_SHAPES)]
        yield _norm(f"fp32 × {factor:.0e}", grads, grads, bench.selection(ODD_SHAPES, 0.3, torch.int64))


def _norm(name: str, grads: list[Tensor], given: list[Tensor], indices: list[Tensor] | None) -> Case:
    flat = [grad.flatten().double() for grad in grads]
    if indices is not None:
        flat = [grad[index.long()] for grad, index in zip(flat, indices, strict=True)]
    expected = torch.cat(flat).norm().view(1)
    return Case(name, lambda: [fk.selected_grad_norm(given, indices).view(1)], close([expected], rtol=RTOL))


def large(bench: Bench) -> Iterator[Case]:
    grads = torch.zeros(beyond(bench), dtype=torch.bfloat16, device=bench.device)
    window(grads).copy_(bench.normal((WINDOW,)))
    index = torch.arange(0, WINDOW, 3, device=bench.device) + (grads.numel() - WINDOW)
    expected = [window(grads).double().norm().view(1), window(grads)[::3].double().norm().view(1)]

    def run() -> Outputs:
        return [fk.selected_grad_norm(grads).view(1), fk.selected_grad_norm(grads, index).view(1)]

    yield Case("bf16", run, close(expected, rtol=RTOL))


def ours(problem: Step) -> Callable[[], list[Tensor]]:
    return lambda: [fk.selected_grad_norm(problem.grads, problem.indices).view(1)]


def gather_norm(problem: Step) -> Callable[[], list[Tensor]]:
    rows = [index.long() for index in problem.indices]

    def call() -> list[Tensor]:
        selected = [grad.view(-1)[row].float() for grad, row in zip(problem.grads, rows, strict=True)]
        return [torch.stack(torch._foreach_norm(selected)).norm().view(1)]

    return call


def dense_norm(problem: Step) -> Callable[[], list[Tensor]]:
    """As ``clip_grad_norm_`` takes it, of every element."""
    return lambda: [torch.stack(torch._foreach_norm(problem.grads)).norm().view(1)]


def work(bench: Bench) -> Work[Step]:
    shapes, reduced = bench.backbone(bytes_per_element=4)

    def problem(shapes: list[Shape]) -> Step:
        return Step([], bench.normals(shapes, torch.bfloat16), bench.selection(shapes, FRACTION))

    n = count(shapes)
    sectors = 1 - (1 - FRACTION) ** 16
    return Work(
        NAME, "random 5 %", f"{short(torch.bfloat16)}, random 5 % of {elements(shapes)}", lambda: problem(ODD_SHAPES),
        lambda: problem(shapes), ours, lambda actual, expected: error(actual, expected, rtol=2 * RTOL),
        {"gather, foreach norm": gather_norm}, {"foreach norm, dense": dense_norm},
        n_bytes=4 * FRACTION * n + sectors * 2 * n, flops=2 * FRACTION * n, reduced=reduced,
    )  # fmt: skip


def works(bench: Bench) -> Iterator[Work[Step]]:
    yield work(bench)


def variants(bench: Bench) -> Iterator[Work[Step]]:
    yield with_variants(work(bench), tiles(NAME, ours, CHUNKS))


OPERATOR = Operator(
    NAME, (NAME,), cases, large, 5 << 31, (Timed("random 5 %", works),), variants
)  # fmt: skip
