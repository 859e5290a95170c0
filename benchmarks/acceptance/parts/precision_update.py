"""precision_update_natural_, precision_update_sgvb_: one step on the posterior precision, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fishertune_kernels as fk
from fishertune_kernels.precision_update import reference

from ..compare import (
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
    window,
    written,
)
from ..measure import Bench, Shape, count, elements
from ..operator import Call, Operator, Timed
from ..race import CHUNKS, Work, tiles, with_variants

NATURAL, SGVB = "precision_update_natural_", "precision_update_sgvb_"
STEP: dict[str, Any] = {
    "lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "gamma": 0.7, "prior_precision": 0.01, "seed": 5,
}  # fmt: skip
OFFSETS = [0, 2, 7, 11, 2**33, 5, 12]
# The gradient of log Λ is of order ten times ε, whose error gaussian_perturb's check explains.
SGVB_TOLERANCE = {"rtol": 2e-5, "atol": 2e-4}


# Natural --------------------------------------------------------------------------------------------------------------


def natural_cases(bench: Bench) -> Iterator[Case]:
    for name, dtype, layout in dtypes_and_layouts():
        excess, squared = bench.positives(ODD_SHAPES), bench.positives(ODD_SHAPES, dtype)
        expected = [0.9 * e.double() + 0.1 / 3 * s.double() for e, s in zip(excess, squared, strict=True)]

        def run(excess: list[Tensor] = excess, squared: list[Tensor] = squared, layout: str = layout) -> Outputs:
            result = written(excess, layout)
            fk.precision_update_natural_(result, read_only(squared, layout), beta=0.1, gamma=3.0)
            return result

        yield Case(name, run, close(expected))


def natural_large(bench: Bench) -> Iterator[Case]:
    squared = torch.zeros(beyond(bench), dtype=torch.bfloat16, device=bench.device)
    window(squared).copy_(bench.positive((WINDOW,)))

    def run() -> Outputs:
        excess = torch.zeros(squared.numel(), device=bench.device)
        fk.precision_update_natural_(excess, squared, beta=0.1, gamma=1.0)
        return [window(excess).clone(), excess[:-WINDOW].any().view(1).float()]

    yield Case("bf16", run, close([0.1 * window(squared).double(), torch.zeros(1, device=bench.device)]))


class Pair(NamedTuple):
    excess: list[Tensor]
    squared: list[Tensor]


def natural(problem: Pair) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        fk.precision_update_natural_(problem.excess, problem.squared, beta=0.01, gamma=1.0)
        return problem.excess

    return call


def torch_foreach_lerp(problem: Pair) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        torch._foreach_lerp_(problem.excess, problem.squared, 0.01)
        return problem.excess

    return call


def natural_work(bench: Bench) -> Work[Pair]:
    shapes, reduced = bench.backbone(bytes_per_element=8)

    def problem(shapes: list[Shape]) -> Pair:
        return Pair(bench.positives(shapes), bench.positives(shapes))

    n = count(shapes)
    return Work(
        NATURAL, "stream", f"fp32, {elements(shapes)} elements",
        lambda: problem(ODD_SHAPES), lambda: problem(shapes), natural, error,
        {"torch foreach lerp": torch_foreach_lerp},
        n_bytes=12 * n, flops=3 * n, reduced=reduced,
    )  # fmt: skip


def natural_calls(bench: Bench) -> Iterator[Call]:
    excess = bench.positives(ODD_SHAPES * 2)
    squared = bench.positives(ODD_SHAPES) + bench.positives(ODD_SHAPES, torch.bfloat16)
    yield Call("fp32 and bf16 squares", 2, lambda: fk.precision_update_natural_(excess, squared, beta=0.1, gamma=1.0))


# SGVB -----------------------------------------------------------------------------------------------------------------


def sgvb_cases(bench: Bench) -> Iterator[Case]:
    for name, dtype, layout in dtypes_and_layouts():
        state = bench.positives(ODD_SHAPES), bench.zeros(ODD_SHAPES), bench.zeros(ODD_SHAPES)
        grads = [bench.normals(ODD_SHAPES, dtype) for _ in range(2)]
        wide = [doubles(tensors) for tensors in state]
        for step in (1, 2):
            options = {**STEP, "noise_step": 100 + step, "step": step, "offsets": OFFSETS}
            reference.precision_update_sgvb_(wide[0], doubles(grads[step - 1]), wide[1], wide[2], **options)

        def run(
            state: tuple[list[Tensor], ...] = state, grads: list[list[Tensor]] = grads, layout: str = layout
        ) -> Outputs:
            excess, mean, square = (written(tensors, layout) for tensors in state)
            for step in (1, 2):
                options = {**STEP, "noise_step": 100 + step, "step": step, "offsets": OFFSETS}
                fk.precision_update_sgvb_(excess, read_only(grads[step - 1], layout), mean, square, **options)
            return [*excess, *mean, *square]

        yield Case(name, run, close([*wide[0], *wide[1], *wide[2]], **SGVB_TOLERANCE))


def sgvb_large(bench: Bench) -> Iterator[Case]:
    n = beyond(bench)
    grads = torch.zeros(n, dtype=torch.bfloat16, device=bench.device)
    window(grads).copy_(bench.normal((WINDOW,)))
    wide = [torch.ones(WINDOW, device=bench.device, dtype=torch.float64) * value for value in (1, 0, 0)]
    options = {**STEP, "noise_step": 3, "step": 1}
    reference.precision_update_sgvb_(
        [wide[0]], [window(grads).double()], [wide[1]], [wide[2]], **options, offsets=[n - WINDOW]
    )

    def run() -> Outputs:
        state = [torch.full((n,), value, device=bench.device) for value in (1.0, 0.0, 0.0)]
        fk.precision_update_sgvb_(state[0], grads, state[1], state[2], **options)
        return [window(tensor).clone() for tensor in state]

    yield Case("bf16", run, close(wide, **SGVB_TOLERANCE))


class State(NamedTuple):
    excess: list[Tensor]
    grads: list[Tensor]
    mean: list[Tensor]
    square: list[Tensor]


def sgvb(problem: State) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        fk.precision_update_sgvb_(*problem, **STEP, noise_step=1, step=10)
        return problem.excess

    return call


def torch_eager(problem: State) -> Callable[[], list[Tensor]]:
    """Our reference with torch's own generator in place of Philox, which plain torch would spend all its time on."""
    beta1, beta2 = STEP["betas"]

    def call() -> list[Tensor]:
        for e, g, m, v in zip(*problem, strict=True):
            precision = e + STEP["prior_precision"]
            noise = torch.randn_like(e)
            log_grad = -0.5 * noise * torch.rsqrt(precision) * g + 0.5 * STEP["gamma"] * e / precision
            m.lerp_(log_grad, 1 - beta1)
            v.mul_(beta2).addcmul_(log_grad, log_grad, value=1 - beta2)
            delta = -STEP["lr"] / (1 - beta1**10) * m / ((v / (1 - beta2**10)).sqrt() + STEP["eps"])
            e.add_(precision * torch.expm1(delta)).clamp_(min=-STEP["prior_precision"] * (1 - 2.0**-23))
        return problem.excess

    return call


def sgvb_differs(actual: Outputs, expected: Outputs) -> float:
    """torch's noise is another, so only the size of the step away from one can be held to ours: of 136 k elements,
    within 5 %, several times its standard error."""
    sizes = [sum(float((t.double() - 1).square().sum()) for t in tensors) for tensors in (actual, expected)]
    return abs(math.log(sizes[0] / sizes[1])) / 0.05


def sgvb_work(bench: Bench) -> Work[State]:
    shapes, reduced = bench.backbone(bytes_per_element=2 + 12)

    def problem(shapes: list[Shape]) -> State:
        ones = [torch.ones(shape, device=bench.device) for shape in shapes]
        return State(ones, bench.normals(shapes, torch.bfloat16), bench.zeros(shapes), bench.zeros(shapes))

    n = count(shapes)
    return Work(
        SGVB, "stream", f"bf16 gradients, {elements(shapes)} elements",
        lambda: problem([(369, 369)]), lambda: problem(shapes), sgvb, sgvb_differs, {"torch eager": torch_eager},
        n_bytes=(2 + 24) * n, flops=65 * n, reduced=reduced,  # the noise's 40 and Adam's 25
    )  # fmt: skip


def sgvb_calls(bench: Bench) -> Iterator[Call]:
    shapes = ODD_SHAPES * 2
    excess, mean, square = bench.positives(shapes), bench.zeros(shapes), bench.zeros(shapes)
    grads = bench.normals(ODD_SHAPES) + bench.normals(ODD_SHAPES, torch.bfloat16)
    yield Call(
        "fp32 and bf16 gradients", 2,
        lambda: fk.precision_update_sgvb_(excess, grads, mean, square, **STEP, noise_step=1, step=1),
    )  # fmt: skip


def natural_works(bench: Bench) -> Iterator[Work[Pair]]:
    yield natural_work(bench)


def natural_variants(bench: Bench) -> Iterator[Work[Pair]]:
    table = lambda module: module.NATURAL_CONFIG  # noqa: E731
    yield with_variants(natural_work(bench), tiles("precision_update", natural, CHUNKS, table))


def sgvb_works(bench: Bench) -> Iterator[Work[State]]:
    yield sgvb_work(bench)


def sgvb_variants(bench: Bench) -> Iterator[Work[State]]:
    table = lambda module: module.SGVB_CONFIG  # noqa: E731
    yield with_variants(sgvb_work(bench), tiles("precision_update", sgvb, CHUNKS, table))


OPERATORS = (
    Operator(
        NATURAL, (NATURAL,), natural_cases, natural_large, 13 << 31, (Timed("stream", natural_works, goal=True),),
        natural_variants, natural_calls,
    ),
    Operator(
        SGVB, (SGVB,), sgvb_cases, sgvb_large, 29 << 31, (Timed("stream", sgvb_works, goal=True),), sgvb_variants,
        sgvb_calls,
    ),
)  # fmt: skip
