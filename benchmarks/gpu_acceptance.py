"""Is every kernel right and fast on this NVIDIA GPU? One command, a table last, one JSON file.

    python benchmarks/gpu_acceptance.py                 # benchmarks/results/<gpu>-<date>-<commit>.json
    python benchmarks/gpu_acceptance.py --quick         # the same code paths on a CPU at toy sizes; no GPU figures

Right: every operator against its float64 reference, on fresh random data (the seed is printed and can be given), with
outputs allocated over NaN. Fast: CUDA events, median and 10th–90th percentile, beside the strongest rival in torch and
beside this card's own measured copy bandwidth and bf16 matrix product rate. Needs torch, triton and this repository.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fishertune_kernels as fk
from fishertune_kernels import dispatch
from fishertune_kernels.dr_fim_score import reference as score_reference
from fishertune_kernels.gaussian_perturb import reference as perturb_reference
from fishertune_kernels.precision_update import reference as precision_reference
from fishertune_kernels.sparse_adamw import reference as adamw_reference

RESULTS = Path(__file__).parent / "results"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ODD_SHAPES = [(0,), (1,), (3, 5), (4096,), (129, 333), (100_003,)]
# One float32 rounding is 6e-8; the elementwise formulas chain about eight. Half outputs may fall to the neighbour.
RTOL = {torch.float32: 5e-7, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


# What is measured on -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Sizes of the timed work."""

    width: int
    blocks: int
    samples: int
    tokens: int
    repeats: int
    copy_bytes: int
    product: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The linear layers of a ViT's blocks."""
        w = self.width
        return [(3 * w, w), (3 * w,), (w, w), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)] * self.blocks


VIT_L = Scale(width=1024, blocks=24, samples=8, tokens=1024, repeats=25, copy_bytes=1 << 30, product=8192)
TOY = Scale(width=32, blocks=2, samples=2, tokens=16, repeats=3, copy_bytes=1 << 16, product=64)


@dataclass
class Check:
    operator: str
    case: str
    error: float
    """Largest error as a share of the tolerance."""

    @property
    def passed(self) -> bool:
        return self.error <= 1  # NaN fails


@dataclass
class Timing:
    operator: str
    what: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    of_limit: float | None = None
    """Share of the measured copy bandwidth or product rate that the work's bytes or operations amount to."""
    rivals: dict[str, float] = field(default_factory=dict)
    """Name → median in ms."""


class Bench:
    """The device, its random data and its clock."""

    def __init__(self, device: torch.device, scale: Scale, seed: int):
        self.device, self.scale = device, scale
        self.generator = torch.Generator(device).manual_seed(seed)
        self.bytes_per_ms = self.flops_per_ms = math.nan

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def positive(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """Over six decades, as Fisher values are."""
        exponent = torch.rand(shape, generator=self.generator, device=self.device) * 6 - 6
        return (10**exponent).to(dtype)

    def normals(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [self.normal(shape, dtype) for shape in shapes]

    def positives(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [self.positive(shape, dtype) for shape in shapes]

    def zeros(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype, device=self.device) for shape in shapes]

    def times(self, work: Callable[[], object], repeats: int | None = None) -> tuple[float, float, float]:
        """Median, 10th and 90th percentile in ms, after three runs that do not count."""
        for _ in range(3):
            work()
        samples = sorted(self._time(work) for _ in range(repeats or self.scale.repeats))
        last = len(samples) - 1
        return statistics.median(samples), samples[round(0.1 * last)], samples[round(0.9 * last)]

    def _time(self, work: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return (time.perf_counter() - start) * 1e3
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def measure_limits(self) -> None:
        n = self.scale.copy_bytes
        source, target = torch.ones(n // 4, device=self.device), torch.empty(n // 4, device=self.device)
        self.bytes_per_ms = 2 * n / self.times(lambda: target.copy_(source))[0]
        m = self.scale.product
        a, b = self.normal((m, m), torch.bfloat16), self.normal((m, m), torch.bfloat16)
        self.flops_per_ms = 2 * m**3 / self.times(lambda: a @ b)[0]

    def timing(
        self,
        operator: str,
        what: str,
        work: Callable[[], object],
        rivals: dict[str, Callable[[], object]],
        *,
        n_bytes: float | None = None,
        flops: float | None = None,
    ) -> Timing:
        median, p10, p90 = self.times(work)
        share = None
        if n_bytes is not None:
            share = n_bytes / median / self.bytes_per_ms
        elif flops is not None:
            share = flops / median / self.flops_per_ms
        return Timing(operator, what, median, p10, p90, share, {n: self.times(r)[0] for n, r in rivals.items()})


# Right? ---------------------------------------------------------------------------------------------------------------


def doubles(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def ratios(actual: Tensor, expected: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> Tensor:
    """|actual − expected| over its tolerance atol + (rtol + that of actual's dtype)·|expected|; NaN is infinite."""
    allowed = atol + (rtol + RTOL[actual.dtype]) * expected.double().abs()
    ratio = (actual.double() - expected.double()).abs() / allowed
    return torch.where(actual == expected, 0.0, ratio.nan_to_num(nan=math.inf, posinf=math.inf))


def error(actual: list[Tensor], expected: list[Tensor], *, rtol: float = 0.0, atol: float = 0.0) -> float:
    """The largest of the :func:`ratios`."""
    pairs = zip(actual, expected, strict=True)
    return max((float(ratios(a, e, rtol=rtol, atol=atol).max()) for a, e in pairs if a.numel()), default=0.0)


def wrong(actual: list[Tensor], expected: list[Tensor]) -> float:
    """For answers that are right or wrong: 0 or infinity."""
    same = all(torch.equal(a.long(), e.long()) for a, e in zip(actual, expected, strict=True))
    return 0.0 if same else math.inf


def checks(bench: Bench) -> Iterator[Check]:
    for dtype in FLOATS:
        name = str(dtype).removeprefix("torch.")
        yield Check("squared_grad_accumulate_", name, _squared_grad_accumulate(bench, dtype))
        yield Check("per_sample_squared_grad_", name, _per_sample_squared_grad(bench, dtype))
        yield Check("gaussian_perturb", name, _gaussian_perturb(bench, dtype))
        yield Check("precision_update_natural_", name, _natural(bench, dtype))
        yield Check("precision_update_sgvb_", name, _sgvb(bench, dtype))
        yield Check("dr_fim_score", name, _score(bench, dtype))
        yield Check("select_threshold, compact", name, _selection(bench, dtype))
        yield Check("sparse_adamw_", name, _sparse_adamw(bench, dtype))
        yield Check("gather_values, scatter_values_", name, _values(bench, dtype))
    if bench.device.type == "cuda":
        needed = 5 << 32  # bfloat16 gradients, float32 sums and a copy on the way
        if torch.cuda.mem_get_info()[0] > needed:
            yield Check("squared_grad_accumulate_, compact", "more than 2**31 elements", _beyond_int32(bench))
        else:
            print(f"skipped: more than 2**31 elements needs {needed >> 30} GiB of free GPU memory", file=sys.stderr)


def _squared_grad_accumulate(bench: Bench, dtype: torch.dtype) -> float:
    sums, grads = bench.positives(ODD_SHAPES), bench.normals(ODD_SHAPES, dtype)
    expected = [s.double() + 0.3 * g.double() ** 2 for s, g in zip(sums, grads, strict=True)]
    fk.squared_grad_accumulate_(sums, grads, 0.3)
    return error(sums, expected)


def _per_sample_squared_grad(bench: Bench, dtype: torch.dtype) -> float:
    worst = 0.0
    for N, T, O, I in ((3, 100, 200, 136), (2, 33, 129, 257), (1, 1, 1, 1), (4, 64, 128, 128)):  # noqa: E741
        x, dy = bench.normal((N, T, I), dtype), bench.normal((N, T, O), dtype)
        F, b = bench.positive((O, I)), bench.positive((O,))
        grads = torch.einsum("nto,nti->noi", dy.double(), x.double())
        expected = [F + 0.5 * grads.square().sum(0), b + 0.5 * dy.double().sum(1).square().sum(0)]
        fk.per_sample_squared_grad_(F, x, dy, 0.5, b)
        # Sums of T products of order one: their rounding stays where they cancel, beside results of order T.
        worst = max(worst, error([F, b], expected, rtol=5e-6, atol=T * 5e-6))
    return worst


def _gaussian_perturb(bench: Bench, dtype: torch.dtype) -> float:
    params, excess = bench.normals(ODD_SHAPES, dtype), bench.positives(ODD_SHAPES)
    offsets = [17, 2**35 + 2, 5, 2**34 - 4, 7, 1001]
    actual = fk.gaussian_perturb(params, excess, prior_precision=1e-2, seed=2**63 - 1, step=2**40 + 3, offsets=offsets)
    wide = doubles(params), doubles(excess)
    expected = perturb_reference.gaussian_perturb(*wide, 1e-2, 2**63 - 1, 2**40 + 3, offsets)
    # ε is multiplied by at most 1e-2**-0.5 = 10. In float32 its uniform u is off by up to 2⁻²⁵, and √(−2 ln u) by that
    # over itself: 2.5e-4 at most, but 3e-6 wherever the root is above 0.01, all but 5e-5 of the draws.
    worst = error(actual, expected, atol=10 * 2.5e-4)
    outside = sum(int((ratios(a, e, atol=10 * 3e-6) > 1).sum()) for a, e in zip(actual, expected, strict=True))
    return max(worst, outside / sum(a.numel() for a in actual) / 1e-3)


def _natural(bench: Bench, dtype: torch.dtype) -> float:
    excess, squared = bench.positives(ODD_SHAPES), bench.positives(ODD_SHAPES, dtype)
    expected = [0.9 * e.double() + 0.1 / 3 * s.double() for e, s in zip(excess, squared, strict=True)]
    fk.precision_update_natural_(excess, squared, beta=0.1, gamma=3.0)
    return error(excess, expected)


def _sgvb(bench: Bench, dtype: torch.dtype) -> float:
    state = bench.positives(ODD_SHAPES), bench.zeros(ODD_SHAPES), bench.zeros(ODD_SHAPES)
    wide = [doubles(tensors) for tensors in state]
    for step in (1, 2):
        grads = bench.normals(ODD_SHAPES, dtype)
        options = {
            "lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "gamma": 0.7, "prior_precision": 0.01, "seed": 5,
            "noise_step": 100 + step, "step": step, "offsets": [0, 2, 7, 2**33, 5, 12],
        }  # fmt: skip
        fk.precision_update_sgvb_(state[0], grads, state[1], state[2], **options)
        precision_reference.precision_update_sgvb_(wide[0], doubles(grads), wide[1], wide[2], **options)
    # The gradient of log Λ is of order ten times ε, whose error gaussian_perturb's check explains.
    return max(error(actual, expected, rtol=2e-5, atol=2e-4) for actual, expected in zip(state, wide, strict=True))


def _score(bench: Bench, dtype: torch.dtype) -> float:
    fisher, shifted = bench.positives(ODD_SHAPES, dtype), bench.positives(ODD_SHAPES, dtype)
    worst = 0.0
    for kind in ("f", "delta_f", "dr_fim", "dr_fim_variational"):
        options = {"kind": kind, "c": 0.7, "gamma": 2.0, "prior_precision": 1e-3, "eps": 1e-8}
        expected = score_reference.dr_fim_score(doubles(fisher), doubles(shifted), **options)
        worst = max(worst, error(fk.dr_fim_score(fisher, shifted, **options), expected, rtol=2e-6, atol=1e-6))
        mean = [torch.full_like(tensor, math.nan) for tensor in bench.zeros(ODD_SHAPES)]
        for count in (1, 2):
            fk.dr_fim_score_(mean, fisher, shifted, count=count, **options)
        worst = max(worst, error(mean, expected, rtol=2e-6, atol=1e-6))
    return worst


def _selection(bench: Bench, dtype: torch.dtype) -> float:
    scores = [torch.round(tensor * 8) / 8 for tensor in bench.normals(ODD_SHAPES, dtype)]
    flat = torch.cat([tensor.flatten() for tensor in scores]).double()
    worst = 0.0
    for k in (0, 1, flat.numel() // 20, flat.numel()):
        indices = fk.compact(scores, fk.select_threshold(scores, k))
        chosen = flat.neg().sort(stable=True).indices[:k].sort().values
        starts = [0]
        for tensor in scores:
            starts.append(starts[-1] + tensor.numel())
        expected = [chosen[(chosen >= start) & (chosen < end)] - start for start, end in itertools.pairwise(starts)]
        worst = max(worst, wrong(indices, expected))
    return worst


def _sparse_adamw(bench: Bench, dtype: torch.dtype) -> float:
    worst = 0.0
    for gated in (False, True):
        params, grads = bench.normals(ODD_SHAPES, dtype), bench.normals(ODD_SHAPES, dtype)
        indices = _random_selection(bench, ODD_SHAPES, 0.3)
        compact_shapes = [tuple(index.shape) for index in indices]
        state = bench.zeros(compact_shapes), bench.zeros(compact_shapes)
        scores = bench.normals(compact_shapes)
        master = [p.flatten()[i.long()].float() for p, i in zip(params, indices, strict=True)]
        options = {
            "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": 1, "grad_scale": 0.5,
            "active_threshold": 0.2 if gated else None,
        }  # fmt: skip
        wide = [doubles(tensors) for tensors in (params, grads, *state, scores, master)]
        fk.sparse_adamw_(params, grads, indices, *state, **options, scores=scores, master=master)
        adamw_reference.sparse_adamw_(
            wide[0], wide[1], indices, wide[2], wide[3], **options, scores=wide[4], master=wide[5]
        )
        worst = max(worst, error(params, wide[0], atol=1e-6), error(master, wide[5], atol=1e-6))
        worst = max(worst, error(state[0], wide[2]), error(state[1], wide[3]))
    return worst


def _random_selection(bench: Bench, shapes: list[tuple[int, ...]], fraction: float) -> list[Tensor]:
    return [
        (torch.rand(math.prod(shape), generator=bench.generator, device=bench.device) < fraction)
        .nonzero()
        .squeeze(1)
        .to(torch.int32)
        for shape in shapes
    ]


def _values(bench: Bench, dtype: torch.dtype) -> float:
    tensors, indices = bench.normals(ODD_SHAPES, dtype), _random_selection(bench, ODD_SHAPES, 0.3)
    values = fk.gather_values(tensors, indices)
    expected = [tensor.flatten()[index.long()] for tensor, index in zip(tensors, indices, strict=True)]
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    fk.scatter_values_(copies, indices, values)
    written = [copy.flatten()[index.long()] for copy, index in zip(copies, indices, strict=True)]
    sums = [abs(copy.double().sum() - e.double().sum()).reshape(1) for copy, e in zip(copies, expected, strict=True)]
    exact = all(torch.equal(a, e) for a, e in zip((*values, *written), (*expected, *expected), strict=True))
    return 0.0 if exact and float(torch.cat(sums).max()) < 1e-6 else math.inf


def _beyond_int32(bench: Bench) -> float:
    n = 2**31 + 4099
    grads = torch.zeros(n, dtype=torch.bfloat16, device=bench.device)
    tail = bench.normal((8000,), torch.bfloat16)
    grads[-8000:] = tail
    sums = torch.zeros(n, device=bench.device)
    fk.squared_grad_accumulate_(sums, grads)
    squares = tail.double() ** 2
    worst = max(error([sums[-8000:]], [squares]), math.inf if sums[:-8000].any() else 0.0)
    (index,) = fk.compact(sums, fk.select_threshold(sums, 8000 - int((tail == 0).sum())))
    expected = (tail != 0).nonzero().squeeze(1) + (n - 8000)
    return max(worst, wrong([index], [expected]))


# Fast? ----------------------------------------------------------------------------------------------------------------


def timings(bench: Bench) -> Iterator[Timing]:
    yield from _time_products(bench)
    yield from _time_streams(bench)
    yield from _time_selection(bench)
    yield from _time_steps(bench)


def _time_products(bench: Bench) -> Iterator[Timing]:
    scale = bench.scale
    for O, I in ((3 * scale.width, scale.width), (4 * scale.width, scale.width), (scale.width, 4 * scale.width)):  # noqa: E741
        x = bench.normal((scale.samples, scale.tokens, I), torch.bfloat16)
        dy = bench.normal((scale.samples, scale.tokens, O), torch.bfloat16)
        F = torch.zeros(O, I, device=bench.device)
        flat_x, flat_dy = x.flatten(0, 1), dy.flatten(0, 1)
        yield bench.timing(
            "per_sample_squared_grad_",
            f"bf16 N={scale.samples} T={scale.tokens} O={O} I={I}",
            lambda F=F, x=x, dy=dy: fk.per_sample_squared_grad_(F, x, dy),
            {"weight-gradient matmul": lambda a=flat_dy, b=flat_x: a.T @ b},
            flops=2 * scale.samples * scale.tokens * O * I,
        )


def _time_streams(bench: Bench) -> Iterator[Timing]:
    shapes = bench.scale.shapes
    n = sum(math.prod(shape) for shape in shapes)
    what = f"{n / 1e6:.4g} M elements"
    sums, grads = bench.positives(shapes), bench.normals(shapes, torch.bfloat16)

    def foreach_accumulate() -> None:
        wide = [grad.float() for grad in grads]
        torch._foreach_addcmul_(sums, wide, wide)

    yield bench.timing(
        "squared_grad_accumulate_", f"bf16, {what}", lambda: fk.squared_grad_accumulate_(sums, grads),
        {"torch foreach": foreach_accumulate}, n_bytes=(2 + 8) * n,
    )  # fmt: skip

    def eager_perturb() -> list[Tensor]:
        return [(p + torch.rsqrt(e + 1e-3) * torch.randn_like(e)).to(p.dtype) for p, e in zip(grads, sums, strict=True)]

    yield bench.timing(
        "gaussian_perturb", f"bf16, {what}",
        lambda: fk.gaussian_perturb(grads, sums, prior_precision=1e-3, seed=1, step=1),
        {"torch eager": eager_perturb}, n_bytes=(2 + 4 + 2) * n,
    )  # fmt: skip
    squared = bench.positives(shapes)
    yield bench.timing(
        "precision_update_natural_", f"fp32, {what}",
        lambda: fk.precision_update_natural_(sums, squared, beta=0.01, gamma=1.0),
        {"torch foreach lerp": lambda: torch._foreach_lerp_(sums, squared, 0.01)}, n_bytes=12 * n,
    )  # fmt: skip
    mean, square = bench.zeros(shapes), bench.zeros(shapes)
    sgvb = {
        "lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "gamma": 1.0, "prior_precision": 1e-3, "seed": 1,
        "noise_step": 1, "step": 10,
    }  # fmt: skip
    yield bench.timing(
        "precision_update_sgvb_", f"bf16, {what}",
        lambda: fk.precision_update_sgvb_(sums, grads, mean, square, **sgvb), {}, n_bytes=(2 + 24) * n,
    )  # fmt: skip
    score = {"kind": "dr_fim", "c": 0.5}

    def eager_score() -> list[Tensor]:
        return score_reference.dr_fim_score(sums, squared, **score)

    yield bench.timing(
        "dr_fim_score", f"fp32, {what}", lambda: fk.dr_fim_score(sums, squared, **score),
        {"torch eager": eager_score}, n_bytes=12 * n,
    )  # fmt: skip


def _time_selection(bench: Bench) -> Iterator[Timing]:
    scores = bench.normals(bench.scale.shapes)
    n = sum(score.numel() for score in scores)
    k = n // 20
    what = f"fp32, {n / 1e6:.4g} M scores, 5 %"
    flat = torch.cat([score.flatten() for score in scores])
    yield bench.timing(
        "select_threshold", what, lambda: fk.select_threshold(scores, k),
        {
            "torch.topk": lambda: torch.topk(flat, k, sorted=False),
            "torch.kthvalue": lambda: torch.kthvalue(flat, n - k + 1),
        },
        n_bytes=4 * n,
    )  # fmt: skip
    threshold = fk.select_threshold(scores, k)
    yield bench.timing(
        "compact", what, lambda: fk.compact(scores, threshold),
        {"torch.nonzero": lambda: (flat >= threshold.value).nonzero()}, n_bytes=(2 * 4 + 0.05 * 4) * n,
    )  # fmt: skip


def _time_steps(bench: Bench) -> Iterator[Timing]:
    shapes = bench.scale.shapes
    params, grads = bench.normals(shapes, torch.bfloat16), bench.normals(shapes, torch.bfloat16)
    indices = _random_selection(bench, shapes, 0.05)
    wide_indices = [index.long() for index in indices]
    compact_shapes = [tuple(index.shape) for index in indices]
    n, k = sum(p.numel() for p in params), sum(i.numel() for i in indices)
    mean, square = bench.zeros(compact_shapes), bench.zeros(compact_shapes)
    adamw = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    what = f"bf16, random 5 % of {n / 1e6:.4g} M"

    dense = [torch.nn.Parameter(p.clone()) for p in params]
    for parameter, grad in zip(dense, grads, strict=True):
        parameter.grad = grad
    dense_optimizer = torch.optim.AdamW(dense, **adamw, fused=True)
    gathered = [torch.nn.Parameter(p.flatten()[i].float()) for p, i in zip(params, wide_indices, strict=True)]
    gathered_optimizer = torch.optim.AdamW(gathered, **adamw, fused=True)

    def gather_fused_scatter() -> None:
        for parameter, p, grad, index in zip(gathered, params, grads, wide_indices, strict=True):
            parameter.grad = grad.view(-1)[index].float()
            parameter.data.copy_(p.view(-1)[index])
        gathered_optimizer.step()
        for parameter, p, index in zip(gathered, params, wide_indices, strict=True):
            p.view(-1)[index] = parameter.data.to(p.dtype)

    # Index and moments are streamed; of weights and gradients a 32-byte sector is the least a GPU moves. With 5 % of
    # random 2-byte elements 1 − 0.95¹⁶ = 56 % of the sectors are touched.
    sectors = 1 - 0.95**16
    yield bench.timing(
        "sparse_adamw_", what,
        lambda: fk.sparse_adamw_(params, grads, indices, mean, square, **adamw, step=10),
        {"torch fused AdamW, dense": dense_optimizer.step, "gather, fused, scatter": gather_fused_scatter},
        n_bytes=(4 + 16) * k + sectors * (2 + 4) * n,
    )  # fmt: skip
    values = fk.gather_values(params, indices)

    def index_loop() -> list[Tensor]:
        return [p.view(-1)[i] for p, i in zip(params, wide_indices, strict=True)]

    def index_put_loop() -> None:
        for p, i, v in zip(params, wide_indices, values, strict=True):
            p.view(-1)[i] = v

    yield bench.timing(
        "gather_values", what, lambda: fk.gather_values(params, indices), {"torch indexing": index_loop},
        n_bytes=(4 + 2) * k + sectors * 2 * n,
    )  # fmt: skip
    yield bench.timing(
        "scatter_values_", what, lambda: fk.scatter_values_(params, indices, values),
        {"torch index_put": index_put_loop}, n_bytes=(4 + 2) * k + sectors * 4 * n,
    )  # fmt: skip


# Report ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an output element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def backends(device: torch.device) -> dict[str, str]:
    operators = (
        "squared_grad_accumulate", "per_sample_squared_grad", "gaussian_perturb", "precision_update", "dr_fim_score",
        "select_threshold", "compact", "sparse_adamw", "values",
    )  # fmt: skip
    modules = {name: dispatch.implementation(name, device, {torch.float32}) for name in operators}
    return {name: module.__name__.rpartition(".")[2] for name, module in modules.items()}


def versions() -> dict[str, str | None]:
    try:
        import triton

        triton_version: str | None = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
    }


def commit() -> str:
    """Short hash of the checkout, ``unknown`` outside one, ``-dirty`` behind it where tracked files differ."""
    try:
        command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def summary(checked: list[Check], timed: list[Timing], quick: bool) -> str:
    check_rows = [
        (check.operator, check.case, f"{check.error:.2g}", "right" if check.passed else "WRONG") for check in checked
    ]
    parts = [table(("operator", "inputs", "error / tolerance", ""), check_rows)]
    if quick:
        parts.append("quick: the logic only, on a CPU at toy sizes; its times mean nothing and no GPU was measured")
    else:
        timing_rows = [
            (
                timing.operator,
                timing.what,
                f"{timing.median_ms:.3f} ({timing.p10_ms:.3f}–{timing.p90_ms:.3f})",
                "" if timing.of_limit is None else f"{timing.of_limit:.0%}",
                ", ".join(f"{name} {rival / timing.median_ms:.2f} ×" for name, rival in timing.rivals.items()),
            )
            for timing in timed
        ]
        header = ("operator", "work", "median ms (10–90 %)", "of limit", "rival's time / ours")
        parts.append(table(header, timing_rows))
    return "\n\n".join(parts)


def write_whole(path: Path, text: str) -> None:
    """Whole or absent: written beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run the logic on a CPU at toy sizes; no GPU figures")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the JSON file (quick writes none by default)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of the random data; a fresh one by default")
    options = parser.parse_args(arguments)
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit(
            "gpu_acceptance: no CUDA device is visible to torch, so nothing was measured. Run it on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or pass --quick to run its logic on this CPU."
        )
    device = torch.device("cpu" if options.quick else "cuda")
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    print(f"seed {seed}", file=sys.stderr)

    used = backends(device)
    if not options.quick and set(used.values()) != {"triton"}:
        raise SystemExit(
            f"gpu_acceptance: these operators would not run their GPU kernels: "
            f"{', '.join(f'{name} ({backend})' for name, backend in used.items() if backend != 'triton')}. "
            "Install triton and unset FISHERTUNE_BACKEND."
        )
    bench = Bench(device, TOY if options.quick else VIT_L, seed)
    with poisoned_memory():
        checked = []
        for check in checks(bench):
            checked.append(check)
            print(f"{check.operator} {check.case}: {'right' if check.passed else 'WRONG'}", file=sys.stderr)
    bench.measure_limits()
    timed = []
    for timing in timings(bench):
        timed.append(timing)
        print(f"timed {timing.operator} {timing.what}", file=sys.stderr)

    name = "cpu-quick" if options.quick else torch.cuda.get_device_name().replace(" ", "_")
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "device": name,
        "quick": options.quick,
        "date": now.isoformat(timespec="seconds"),
        "commit": commit(),
        "seed": seed,
        "versions": versions(),
        "backends": used,
        "copy_gb_per_s": None if options.quick else bench.bytes_per_ms / 1e6,
        "bf16_product_tflop_per_s": None if options.quick else bench.flops_per_ms / 1e9,
        "checks": [
            {
                "operator": c.operator,
                "case": c.case,
                "error": c.error if math.isfinite(c.error) else None,
                "passed": c.passed,
            }
            for c in checked
        ],
        # Times of the quick run are of toy sizes on a CPU and are left out, so that nobody quotes them.
        "timings": [{"operator": t.operator, "what": t.what} if options.quick else asdict(t) for t in timed],
    }
    folder = options.out or (None if options.quick else RESULTS)
    if folder is not None:
        path = folder / f"{name}-{now:%Y-%m-%d}-{result['commit']}.json"
        write_whole(path, json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}", file=sys.stderr)
    if not options.quick:
        print(
            f"{name}: copy {bench.bytes_per_ms / 1e6:.0f} GB/s, bf16 product {bench.flops_per_ms / 1e9:.0f} TFLOP/s\n"
        )
    print(summary(checked, timed, options.quick))
    return 0 if all(check.passed for check in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
