"""gather_values, scatter_values_: read and write selected elements, bit for bit, in sectors of 32 bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fishertune_kernels as fk

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
    written,
    wrong,
)
from ..measure import Bench, Shape, count, elements
from ..operator import Call, Operator, Timed
from ..race import CHUNKS, Work, tiles, with_variants

GATHER, SCATTER = "gather_values", "scatter_values_"
FRACTION = 0.05
SECTORS = 1 - (1 - FRACTION) ** 16
"""Share of the 32-byte sectors of 2-byte elements that random 5 % touch."""


def cases(bench: Bench) -> Iterator[Case]:
    for dtype in FLOATS:
        yield _moves(bench, short(dtype), dtype, torch.int32, "contiguous")
    yield _moves(bench, "int16, int64 indices", torch.int16, torch.int64, "contiguous")
    for layout in LAYOUTS[1:]:
        yield _moves(bench, f"bf16, {layout}", torch.bfloat16, torch.int32, layout)


def _moves(bench: Bench, name: str, dtype: torch.dtype, index_dtype: torch.dtype, layout: str) -> Case:
    tensors = [t.mul_(1000).to(dtype) for t in bench.normals(ODD_SHAPES)]
    indices = bench.selection(ODD_SHAPES, 0.3, index_dtype)
    values = [t.flatten()[i.long()] for t, i in zip(tensors, indices, strict=True)]
    targets = [torch.ones_like(t) for t in tensors]
    expected = [target.clone() for target in targets]
    for target, index, value in zip(expected, indices, values, strict=True):
        target.view(-1)[index.long()] = value

    def run() -> Outputs:
        layout_ = layout if dtype.is_floating_point else "contiguous"
        result = written(targets, layout_)
        gathered = fk.gather_values(read_only(tensors, layout_), indices)
        fk.scatter_values_(result, indices, read_only(values, layout_))
        buffer = torch.empty(sum(index.numel() for index in indices), dtype=dtype, device=bench.device)
        fk.gather_values(read_only(tensors, layout_), indices, out=buffer)
        again = written(targets, layout_)
        fk.scatter_values_(again, indices, buffer)
        return [*gathered, *result, buffer, *again]

    return Case(name, run, lambda actual: wrong(actual, [*values, *expected, torch.cat(values), *expected]))


def large(bench: Bench) -> Iterator[Case]:
    n = beyond(bench)
    tensor = torch.zeros(n, dtype=torch.bfloat16, device=bench.device)
    window(tensor).copy_(bench.normal((WINDOW,)))
    index = torch.arange(0, WINDOW, 3, device=bench.device) + (n - WINDOW)
    values = window(tensor)[::3].clone()
    expected = torch.zeros(WINDOW, dtype=torch.bfloat16, device=bench.device)
    expected[::3] = values

    def run() -> Outputs:
        target = torch.zeros_like(tensor)
        fk.scatter_values_(target, index, values)
        return [*fk.gather_values(tensor, index), window(target).clone(), target[:-WINDOW].any().view(1)]

    zero = torch.zeros(1, dtype=torch.bool, device=bench.device)
    yield Case("bf16, int64 indices", run, lambda actual: wrong(actual, [values, expected, zero]))


class Selected(NamedTuple):
    tensors: list[Tensor]
    indices: list[Tensor]
    values: list[Tensor]


def gather(problem: Selected) -> Callable[[], list[Tensor]]:
    return lambda: fk.gather_values(problem.tensors, problem.indices)


def scatter(problem: Selected) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        fk.scatter_values_(problem.tensors, problem.indices, problem.values)
        return problem.tensors

    return call


def torch_indexing(problem: Selected) -> Callable[[], list[Tensor]]:
    rows = [index.long() for index in problem.indices]
    return lambda: [t.view(-1)[row] for t, row in zip(problem.tensors, rows, strict=True)]


def torch_index_put(problem: Selected) -> Callable[[], list[Tensor]]:
    rows = [index.long() for index in problem.indices]

    def call() -> list[Tensor]:
        for tensor, row, value in zip(problem.tensors, rows, problem.values, strict=True):
            tensor.view(-1)[row] = value
        return problem.tensors

    return call


def works(bench: Bench) -> Iterator[Work[Selected]]:
    shapes, reduced = bench.backbone(bytes_per_element=2 + 1)

    def problem(shapes: list[Shape]) -> Selected:
        indices = bench.selection(shapes, FRACTION)
        values = bench.normals([tuple(index.shape) for index in indices], torch.bfloat16)
        return Selected(bench.normals(shapes, torch.bfloat16), indices, values)

    n = count(shapes)
    size = f"bf16, random 5 % of {elements(shapes)}"
    yield Work(
        GATHER, "gather", size, lambda: problem(ODD_SHAPES), lambda: problem(shapes), gather, wrong,
        {"torch indexing": torch_indexing}, n_bytes=(4 + 2) * FRACTION * n + SECTORS * 2 * n, reduced=reduced,
    )  # fmt: skip
    yield Work(
        SCATTER, "scatter", size, lambda: problem(ODD_SHAPES), lambda: problem(shapes), scatter, wrong,
        {"torch index_put": torch_index_put}, n_bytes=(4 + 2) * FRACTION * n + SECTORS * 4 * n, reduced=reduced,
    )  # fmt: skip


def variants(bench: Bench) -> Iterator[Work[Selected]]:
    gathering, scattering = works(bench)
    yield with_variants(gathering, tiles("values", gather, CHUNKS))
    yield with_variants(scattering, tiles("values", scatter, CHUNKS))


def calls(bench: Bench) -> Iterator[Call]:
    tensors = bench.normals(ODD_SHAPES) + bench.normals(ODD_SHAPES, torch.bfloat16)
    indices = bench.selection(ODD_SHAPES * 2, 0.3)
    values = fk.gather_values(tensors, indices)
    yield Call("gather, fp32 and bf16", 2, lambda: fk.gather_values(tensors, indices))
    yield Call("scatter, fp32 and bf16", 2, lambda: fk.scatter_values_(tensors, indices, values))


OPERATOR = Operator(
    "values", (GATHER, SCATTER), cases, large, 9 << 31, (Timed("5 %", works),), variants, calls,
)  # fmt: skip
