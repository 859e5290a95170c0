"""squared_grad_accumulate_: acc += w·g². Reads g, reads and writes acc."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fishertune_kernels as fk

from ..compare import (
    ODD_SHAPES,
    Case,
    Outputs,
    beyond,
    close,
    dtypes_and_layouts,
    error,
    read_only,
    window,
    written,
)
from ..measure import Bench, count, elements
from ..operator import Call, Operator, Timed
from ..race import CHUNKS, Work, tiles, with_variants

NAME = "squared_grad_accumulate_"


def cases(bench: Bench) -> Iterator[Case]:
    for name, dtype, layout in dtypes_and_layouts():
        sums, grads = bench.positives(ODD_SHAPES), bench.normals(ODD_SHAPES, dtype)
        expected = [s.double() + 0.3 * g.double() ** 2 for s, g in zip(sums, grads, strict=True)]

        def run(sums: list[Tensor] = sums, grads: list[Tensor] = grads, layout: str = layout) -> Outputs:
            result = written(sums, layout)
            fk.squared_grad_accumulate_(result, read_only(grads, layout), 0.3)
            return result

        yield Case(name, run, close(expected))


def large(bench: Bench) -> Iterator[Case]:
    grads = torch.zeros(beyond(bench), dtype=torch.bfloat16, device=bench.device)
    window(grads).copy_(bench.normal(window(grads).shape))

    def run() -> Outputs:
        sums = torch.zeros(grads.numel(), device=bench.device)
        fk.squared_grad_accumulate_(sums, grads)
        return [window(sums).clone(), sums[: -window(sums).numel()].any().view(1).float()]

    yield Case("bf16", run, close([window(grads).double() ** 2, torch.zeros(1, device=bench.device)]))


class Sums(NamedTuple):
    sums: list[Tensor]
    grads: list[Tensor]


def ours(problem: Sums) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        fk.squared_grad_accumulate_(problem.sums, problem.grads)
        return problem.sums

    return call


def torch_foreach(problem: Sums) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        wide = [grad.float() for grad in problem.grads]
        torch._foreach_addcmul_(problem.sums, wide, wide)
        return problem.sums

    return call


def work(bench: Bench) -> Work[Sums]:
    shapes, reduced = bench.backbone(bytes_per_element=6)

    def problem(shapes: list[tuple[int, ...]]) -> Sums:
        return Sums(bench.positives(shapes), bench.normals(shapes, torch.bfloat16))

    n = count(shapes)
    return Work(
        NAME, "stream", f"bf16 gradients, {elements(shapes)} elements",
        lambda: problem(ODD_SHAPES), lambda: problem(shapes), ours, error, {"torch foreach": torch_foreach},
        n_bytes=(2 + 8) * n, flops=3 * n, reduced=reduced,
    )  # fmt: skip


def works(bench: Bench) -> Iterator[Work[Sums]]:
    yield work(bench)


def variants(bench: Bench) -> Iterator[Work[Sums]]:
    yield with_variants(work(bench), tiles("squared_grad_accumulate", ours, CHUNKS))


def calls(bench: Bench) -> Iterator[Call]:
    shapes = ODD_SHAPES * 2
    sums = bench.positives(shapes)
    grads = bench.normals(ODD_SHAPES) + bench.normals(ODD_SHAPES, torch.bfloat16)
    yield Call("fp32 and bf16 gradients", 2, lambda: fk.squared_grad_accumulate_(sums, grads))


OPERATOR = Operator(
    NAME, (NAME,), cases, large, 13 << 31, (Timed("stream", works, goal=True),), variants, calls,
)  # fmt: skip
