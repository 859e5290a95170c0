"""sparse_adamw_: AdamW on selected elements. Index and moments are streamed; of weights and gradients a 32-byte sector
is the least a GPU moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fishertune_kernels as fk
from fishertune_kernels.sparse_adamw import reference

from ..compare import (
    FLOATS,
    LAYOUTS,
    ODD_SHAPES,
    WINDOW,
    Case,
    Outputs,
    beyond,
    doubles,
    error,
    read_only,
    short,
    window,
    written,
    wrong,
)
from ..measure import Bench, Shape, count, elements
from ..operator import Call, Operator, Timed
from ..race import Work, tiles, with_variants

NAME = "sparse_adamw_"
FRACTION = 0.05
ADAMW: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


# Right? ---------------------------------------------------------------------------------------------------------------


def cases(bench: Bench) -> Iterator[Case]:
    for dtype in FLOATS:
        yield _step(bench, short(dtype), dtype)
        yield _step(bench, f"{short(dtype)}, gated, master copy", dtype, gated=True, master=True)
    yield _step(bench, "bf16, int64 indices, gated", torch.bfloat16, torch.int64, gated=True)
    for layout in LAYOUTS[1:]:
        yield _step(bench, f"bf16, {layout}", torch.bfloat16, layout=layout, master=True)
    yield _stochastic(bench)
    yield _compact_gradients(bench)


def _stochastic(bench: Bench) -> Case:
    """Steps of a tenth of a unit in the last place: rounded to nearest none is seen, at random all are on average."""
    params = [p.clamp(min=0.5).to(torch.bfloat16) for p in bench.positives(ODD_SHAPES)]
    grads = [torch.ones_like(p) for p in params]
    indices = bench.selection(ODD_SHAPES, 0.3)
    compact: list[Shape] = [tuple(index.shape) for index in indices]
    options = {**ADAMW, "lr": 4e-4, "step": 1}
    exact, moments = doubles(params), [bench.zeros(compact, torch.float64) for _ in range(2)]
    reference.sparse_adamw_(exact, doubles(grads), indices, *moments, **options)
    at = _selected(exact, indices)

    def run() -> Outputs:
        moved, state = written(params, "contiguous"), [bench.zeros(compact) for _ in range(2)]
        fk.sparse_adamw_(moved, grads, indices, *state, **options, rounding="stochastic", seed=7)
        return moved

    def off(actual: Outputs) -> float:
        units = (_selected(actual, indices).double() - at) / torch.exp2(at.log2().floor() - 7)
        # A draw is off by less than a unit (beside float32's own rounding), its standard deviation at most one half.
        largest = float(units.abs().max()) / 1.001
        mean = float(units.sum().abs()) / (5 * 0.5 * math.sqrt(units.numel()))
        rest = [tensor.clone() for tensor in actual]
        for tensor, before, index in zip(rest, params, indices, strict=True):
            tensor.view(-1)[index.long()] = before.view(-1)[index.long()]
        return max(largest, mean, wrong(rest, params))

    return Case("bf16, stochastic rounding", run, off)


def _selected(tensors: Outputs, indices: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten()[index.long()] for tensor, index in zip(tensors, indices, strict=True)])


def _compact_gradients(bench: Bench) -> Case:
    """Gradients of the selected elements alone, and their factor on the device, give the bits of dense ones."""
    params, grads = bench.normals(ODD_SHAPES, torch.bfloat16), bench.normals(ODD_SHAPES, torch.bfloat16)
    indices = bench.selection(ODD_SHAPES, 0.3)
    compact: list[Shape] = [tuple(index.shape) for index in indices]
    options = {**ADAMW, "lr": 0.01, "step": 1}

    def step(**gradients: Any) -> list[Tensor]:
        moved, state = written(params, "contiguous"), [bench.zeros(compact) for _ in range(2)]
        given = gradients.pop("grads")
        fk.sparse_adamw_(moved, given, indices, *state, **options, **gradients)
        return [*moved, *state[0], *state[1]]

    expected = step(grads=grads, grad_scale=0.5)
    factor = torch.full((), 0.5, device=bench.device)

    def run() -> Outputs:
        return step(grads=torch.cat(fk.gather_values(grads, indices)), compact_grads=True, grad_scale=factor)

    return Case("bf16, compact gradients, factor on the device", run, lambda actual: wrong(actual, expected))


def _step(
    bench: Bench, name: str, dtype: torch.dtype, index_dtype: torch.dtype = torch.int32, *,
    layout: str = "contiguous", gated: bool = False, master: bool = False,
) -> Case:  # fmt: skip
    """The third step of a run: every moment holds something."""
    params, grads = bench.normals(ODD_SHAPES, dtype), bench.normals(ODD_SHAPES, dtype)
    indices = bench.selection(ODD_SHAPES, 0.3, index_dtype)
    compact: list[Shape] = [tuple(index.shape) for index in indices]
    mean, square = bench.normals(compact), bench.positives(compact)
    copies = [p.flatten()[i.long()].float() for p, i in zip(params, indices, strict=True)] if master else []
    scores = bench.normals(compact) if gated else []
    options: dict[str, Any] = {
        "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5, "step": 3,
        "active_threshold": 0.2 if gated else None,
    }  # fmt: skip

    expected = [doubles(tensors) for tensors in (params, mean, square, copies)]
    reference.sparse_adamw_(
        expected[0], doubles(grads), indices, expected[1], expected[2], **options,
        scores=doubles(scores) or None, master=expected[3] or None,
    )  # fmt: skip

    def run() -> Outputs:
        state = [written(tensors, layout) for tensors in (params, mean, square, copies)]
        fk.sparse_adamw_(
            state[0], read_only(grads, layout), indices, state[1], state[2], **options,
            scores=read_only(scores, layout) or None, master=state[3] or None,
        )  # fmt: skip
        return [tensor for tensors in state for tensor in tensors]

    def off(actual: Outputs) -> float:
        flat = [tensor for tensors in expected for tensor in tensors]
        # A moment decays by sums that can cancel; a weight of order one gets a step of about 0.1 whose roundings, like
        # its own, are below 1e-6.
        return error(actual, flat, rtol=1e-6, atol=1e-6)

    return Case(name, run, off)


def large(bench: Bench) -> Iterator[Case]:
    n = beyond(bench)
    params, grads = (torch.zeros(n, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    window(grads).copy_(bench.normal((WINDOW,)))
    index = (window(grads) > 0.5).nonzero().squeeze(1) + (n - WINDOW)
    options = {**ADAMW, "lr": 0.1, "step": 1}
    expected = [torch.zeros(WINDOW, dtype=torch.float64, device=bench.device)]
    moments = [torch.zeros(index.numel(), dtype=torch.float64, device=bench.device) for _ in range(2)]
    near = [index - (n - WINDOW)]
    reference.sparse_adamw_(expected, [window(grads).double()], near, moments[:1], moments[1:], **options)

    def run() -> Outputs:
        moved = params.clone()
        state = [torch.zeros(index.numel(), device=bench.device) for _ in range(2)]
        fk.sparse_adamw_(moved, grads, index, *state, **options)
        return [window(moved).clone(), moved[:-WINDOW].any().view(1).float()]

    zero = torch.zeros(1, device=bench.device)
    yield Case("bf16, int64 indices", run, lambda actual: error(actual, [*expected, zero], atol=1e-6))


# Fast? ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    params: list[Tensor]
    grads: list[Tensor]
    indices: list[Tensor]

    @property
    def compact(self) -> list[Shape]:
        return [tuple(index.shape) for index in self.indices]


def _zeros(problem: Step) -> list[list[Tensor]]:
    device = problem.params[0].device
    return [[torch.zeros(shape, device=device) for shape in problem.compact] for _ in range(2)]


def ours(problem: Step) -> Callable[[], list[Tensor]]:
    state = _zeros(problem)

    def call() -> list[Tensor]:
        fk.sparse_adamw_(problem.params, problem.grads, problem.indices, *state, **ADAMW, step=1)
        return problem.params

    return call


def with_master(problem: Step) -> Callable[[], list[Tensor]]:
    state = _zeros(problem)
    master = [p.flatten()[i.long()].float() for p, i in zip(problem.params, problem.indices, strict=True)]

    def call() -> list[Tensor]:
        fk.sparse_adamw_(problem.params, problem.grads, problem.indices, *state, **ADAMW, step=1, master=master)
        return problem.params

    return call


def stochastically_rounded(problem: Step) -> Callable[[], list[Tensor]]:
    state = _zeros(problem)

    def call() -> list[Tensor]:
        options = {**ADAMW, "step": 1, "rounding": "stochastic", "seed": 7}
        fk.sparse_adamw_(problem.params, problem.grads, problem.indices, *state, **options)
        return problem.params

    return call


def torch_fused_dense(problem: Step) -> Callable[[], list[Tensor]]:
    """Steps every element, with moments in the parameters' dtype."""
    dense = [torch.nn.Parameter(p) for p in problem.params]
    for parameter, grad in zip(dense, problem.grads, strict=True):
        parameter.grad = grad
    optimizer = torch.optim.AdamW(dense, **ADAMW, fused=True)

    def call() -> list[Tensor]:
        optimizer.step()
        return [parameter.detach() for parameter in dense]

    return call


def gather_fused_scatter(problem: Step) -> Callable[[], list[Tensor]]:
    """What plain torch can do: gather the selected elements, step them densely, scatter them back."""
    rows = [index.long() for index in problem.indices]
    pairs = list(zip(problem.params, problem.grads, rows, strict=True))
    gathered = [torch.nn.Parameter(p.view(-1)[i].float()) for p, _, i in pairs]
    optimizer = torch.optim.AdamW(gathered, **ADAMW, fused=True)

    def call() -> list[Tensor]:
        for parameter, (p, g, i) in zip(gathered, pairs, strict=True):
            parameter.data = p.view(-1)[i].float()
            parameter.grad = g.view(-1)[i].float()
        optimizer.step()
        for parameter, (p, _, i) in zip(gathered, pairs, strict=True):
            p.view(-1)[i] = parameter.data.to(p.dtype)
        return problem.params

    return call


def differs(actual: Outputs, expected: Outputs) -> float:
    """One step of 1e-5 beside weights of order one: in fp32 seven roundings of 6e-8, in bf16 the neighbour."""
    return error(actual, expected, atol=1e-6)


def work(bench: Bench, dtype: torch.dtype, layout: str) -> Work[Step]:
    shapes, reduced = bench.backbone(bytes_per_element=6 * dtype.itemsize)

    def problem(shapes: list[Shape]) -> Step:
        params, grads = bench.normals(shapes, dtype), bench.normals(shapes, dtype)
        if layout == "random":
            return Step(params, grads, bench.selection(shapes, FRACTION))
        rows = bench.selection([(shape[0],) for shape in shapes], FRACTION, torch.int64)
        return Step(params, grads, [_of_rows(r, p) for r, p in zip(rows, params, strict=True)])

    n, size = count(shapes), dtype.itemsize
    # With 5 % at random 1 − 0.95^(elements a sector) of the sectors are touched, of whole rows 5 %.
    sectors = 1 - (1 - FRACTION) ** (32 // size) if layout == "random" else FRACTION
    return Work(
        NAME, f"{short(dtype)} {layout} 5 %", f"{short(dtype)}, {layout} 5 % of {elements(shapes)}",
        lambda: problem([shape for shape in ODD_SHAPES if shape[0]]), lambda: problem(shapes), ours, differs,
        {"gather, fused, scatter": gather_fused_scatter}, {"torch fused AdamW, dense": torch_fused_dense},
        n_bytes=(4 + 16) * FRACTION * n + sectors * 3 * size * n, flops=15 * FRACTION * n, reduced=reduced,
    )  # fmt: skip


def _of_rows(rows: Tensor, param: Tensor) -> Tensor:
    """Flat indices of whole rows, as when a few output channels matter."""
    width = param.numel() // param.shape[0]
    offsets = torch.arange(width, device=param.device)
    return (rows[:, None] * width + offsets).flatten().to(torch.int32)


def goal_works(bench: Bench) -> Iterator[Work[Step]]:
    yield work(bench, torch.bfloat16, "random")


def other_works(bench: Bench) -> Iterator[Work[Step]]:
    yield work(bench, torch.float32, "random")
    yield work(bench, torch.bfloat16, "clustered")


def variants(bench: Bench) -> Iterator[Work[Step]]:
    configs = [{"BLOCK": block, "num_warps": warps} for block, warps in ((256, 2), (512, 4), (1024, 8), (2048, 8))]
    rivals = {**tiles("sparse_adamw", ours, configs), "with fp32 master copy": with_master}
    rivals["stochastic rounding"] = stochastically_rounded
    yield with_variants(work(bench, torch.bfloat16, "random"), rivals)


def calls(bench: Bench) -> Iterator[Call]:
    params = bench.normals(ODD_SHAPES) + bench.normals(ODD_SHAPES, torch.bfloat16)
    problem = Step(params, [torch.ones_like(p) for p in params], bench.selection(ODD_SHAPES * 2, 0.3))
    yield Call("fp32 and bf16 parameters", 2, ours(problem))


OPERATOR = Operator(
    NAME, (NAME,), cases, large, 13 << 31,
    (Timed("bf16 random 5 %", goal_works, goal=True), Timed("other", other_works, seconds=12)), variants, calls,
    check_seconds=20,
)  # fmt: skip
