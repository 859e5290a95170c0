"""gaussian_perturb: θ' = θ̂ + Λ^−½ε, ε from (seed, step, global index). Reads θ̂ and E, writes θ'."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fishertune_kernels as fk
from fishertune_kernels.gaussian_perturb import reference

from ..compare import (
    ODD_SHAPES,
    WINDOW,
    Case,
    Outputs,
    beyond,
    doubles,
    dtypes_and_layouts,
    error,
    ratios,
    read_only,
    window,
)
from ..measure import Bench, Shape, count, elements
from ..operator import Call, Operator, Timed
from ..race import CHUNKS, Work, tiles, with_variants

NAME = "gaussian_perturb"
OFFSETS = [17, 2**35 + 2, 5, 11, 2**34 - 4, 7, 1001]
DRAW: dict[str, Any] = {"prior_precision": 1e-2, "seed": 2**63 - 1, "step": 2**40 + 3}


def off(actual: Outputs, expected: Outputs) -> float:
    # ε is multiplied by at most 1e-2**-0.5 = 10. In float32 its uniform u is off by up to 2⁻²⁵, and √(−2 ln u) by that
    # over itself: 2.5e-4 at most, but 3e-6 wherever the root is above 0.01, all but 5e-5 of the draws.
    worst = error(actual, expected, atol=10 * 2.5e-4)
    outside = sum(int((ratios(a, e, atol=10 * 3e-6) > 1).sum()) for a, e in zip(actual, expected, strict=True))
    return max(worst, outside / sum(a.numel() for a in actual) / 1e-3)


def cases(bench: Bench) -> Iterator[Case]:
    for name, dtype, layout in dtypes_and_layouts():
        params, excess = bench.normals(ODD_SHAPES, dtype), bench.positives(ODD_SHAPES)
        expected = reference.gaussian_perturb(doubles(params), doubles(excess), **DRAW, offsets=OFFSETS, sign=-1.0)

        def run(params: list[Tensor] = params, excess: list[Tensor] = excess, layout: str = layout) -> Outputs:
            inputs = read_only(params, layout), read_only(excess, layout)
            return fk.gaussian_perturb(*inputs, **DRAW, offsets=OFFSETS, sign=-1.0)

        yield Case(name, run, partial(off, expected=expected))


def large(bench: Bench) -> Iterator[Case]:
    n = beyond(bench)
    params = torch.zeros(n, dtype=torch.bfloat16, device=bench.device)
    excess = torch.ones(n, device=bench.device)
    window(excess).copy_(bench.positive((WINDOW,)))
    tail = window(params).double(), window(excess).double()
    expected = reference.gaussian_perturb([tail[0]], [tail[1]], **DRAW, offsets=[n - WINDOW])

    def run() -> Outputs:
        return [window(fk.gaussian_perturb(params, excess, **DRAW)[0]).clone()]

    yield Case("bf16", run, partial(off, expected=expected))


class Posterior(NamedTuple):
    params: list[Tensor]
    excess: list[Tensor]


def ours(problem: Posterior) -> Callable[[], list[Tensor]]:
    return lambda: fk.gaussian_perturb(problem.params, problem.excess, prior_precision=1e-3, seed=1, step=1)


def torch_eager(problem: Posterior) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        pairs = zip(problem.params, problem.excess, strict=True)
        return [(p + torch.rsqrt(e + 1e-3) * torch.randn_like(e)).to(p.dtype) for p, e in pairs]

    return call


def differs(actual: Outputs, expected: Outputs) -> float:
    """torch's noise is another, so only its size can be held to ours: of 136 k normal draws over Λ the sums of
    squares agree within 5 %, several times their standard error."""
    sizes = [sum(float(t.double().square().sum()) for t in tensors) for tensors in (actual, expected)]
    return abs(math.log(sizes[0] / sizes[1])) / 0.05


def work(bench: Bench) -> Work[Posterior]:
    shapes, reduced = bench.backbone(bytes_per_element=2 + 4 + 2)

    def problem(shapes: list[Shape]) -> Posterior:
        return Posterior(bench.normals(shapes, torch.bfloat16), bench.positives(shapes))

    n = count(shapes)
    return Work(
        NAME, "stream", f"bf16, {elements(shapes)} elements",
        lambda: problem([(369, 369)]), lambda: problem(shapes), ours, differs, {"torch eager": torch_eager},
        # Ten rounds of two multiplications and some xors for four words, Box–Muller's sine, root and logarithm: about
        # 40 operations an element, counted for the picture only.
        n_bytes=(2 + 4 + 2) * n, flops=40 * n, reduced=reduced,
    )  # fmt: skip


def works(bench: Bench) -> Iterator[Work[Posterior]]:
    yield work(bench)


def variants(bench: Bench) -> Iterator[Work[Posterior]]:
    yield with_variants(work(bench), tiles("gaussian_perturb", ours, CHUNKS))


def calls(bench: Bench) -> Iterator[Call]:
    params = bench.normals(ODD_SHAPES) + bench.normals(ODD_SHAPES, torch.bfloat16)
    excess = bench.positives(ODD_SHAPES * 2)
    yield Call("fp32 and bf16 parameters", 2, lambda: fk.gaussian_perturb(params, excess, **DRAW))


OPERATOR = Operator(
    NAME, (NAME,), cases, large, 20 << 31, (Timed("stream", works, goal=True),), variants, calls,
)  # fmt: skip
