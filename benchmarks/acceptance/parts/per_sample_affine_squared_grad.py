"""per_sample_affine_squared_grad_: squares of LayerNorm's, LayerScale's and every bias's gradients, in one read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fishertune_kernels as fk

from ..compare import WINDOW, Case, Outputs, beyond, dtypes_and_layouts, error, of_largest, read_only, written
from ..measure import Bench, Rotation
from ..operator import Operator, Timed
from ..race import Work

NAME = "per_sample_affine_squared_grad_"
ODD = ((3, 100, 200), (2, 33, 129), (1, 1, 1), (4, 257, 128), (8, 1, 1031))
"""N, T, C."""


def cases(bench: Bench) -> Iterator[Case]:
    for name, dtype, layout in dtypes_and_layouts():
        yield _affine(bench, name, dtype, layout)


def _affine(bench: Bench, name: str, dtype: torch.dtype, layout: str) -> Case:
    """LayerNorm with both parameters, LayerScale, and a bias alone, of every shape."""
    inputs, expected, tokens = [], [], []
    for N, T, C in ODD:
        x, dy = bench.normal((N, T, C), dtype), bench.normal((N, T, C), dtype)
        mean, rstd = bench.normal((N, T)), 1 + bench.positive((N, T))
        sums = [bench.positive((C,)) for _ in range(4)]
        inputs.append((x, dy, mean, rstd, sums))
        normalised = (x.double() - mean.double()[..., None]) * rstd.double()[..., None]
        for factor, total in zip((normalised, 1.0, x.double(), 1.0), sums, strict=True):
            expected.append(total + 0.5 * (dy.double() * factor).sum(1).square().sum(0))
            tokens.append(T)

    def run() -> Outputs:
        outputs: list[Tensor] = []
        for x, dy, mean, rstd, sums in inputs:
            x_, dy_, mean_, rstd_ = (read_only([t], layout)[0] for t in (x, dy, mean, rstd))
            W, B, scale, bias = written(sums, layout)
            fk.per_sample_affine_squared_grad_(W, B, x_, dy_, 0.5, mean_, rstd_)
            fk.per_sample_affine_squared_grad_(scale, None, x_, dy_, 0.5)
            fk.per_sample_affine_squared_grad_(None, bias, None, dy_, 0.5)
            outputs += [W, B, scale, bias]
        return outputs

    def off(actual: Outputs) -> float:
        # Sums of T products of order one to ten: their rounding stays where they cancel, beside results of order T.
        pairs = zip(actual, expected, tokens, strict=True)
        return max(error([a], [e], rtol=5e-6, atol=T * 2e-5) for a, e, T in pairs)

    return Case(name, run, off)


def large(bench: Bench) -> Iterator[Case]:
    C = 256
    T = beyond(bench) // C + 5
    dy = torch.zeros(1, T, C, dtype=torch.bfloat16, device=bench.device)
    tokens = WINDOW // C
    dy[:, -tokens:] = bench.normal((1, tokens, C))
    expected = dy[0, -tokens:].double().sum(0).square()

    def run() -> Outputs:
        bias = torch.zeros(C, device=bench.device)
        fk.per_sample_affine_squared_grad_(None, bias, None, dy)
        return [bias]

    yield Case("bf16", run, lambda actual: error(actual, [expected], rtol=5e-6, atol=tokens * 5e-6))


class Norm(NamedTuple):
    W: Tensor
    B: Tensor
    x: Tensor
    dy: Tensor
    mean: Tensor
    rstd: Tensor


def ours(norms: Rotation[Norm]) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        norm = norms.next()
        fk.per_sample_affine_squared_grad_(norm.W, norm.B, norm.x, norm.dy, 1.0, norm.mean, norm.rstd)
        return [norm.W, norm.B]

    return call


def torch_eager(norms: Rotation[Norm]) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        norm = norms.next()
        dy = norm.dy.float()
        normalised = (norm.x.float() - norm.mean[..., None]) * norm.rstd[..., None]
        norm.W.add_((dy * normalised).sum(1).square().sum(0))
        norm.B.add_(dy.sum(1).square().sum(0))
        return [norm.W, norm.B]

    return call


def works(bench: Bench) -> Iterator[Work[Rotation[Norm]]]:
    N, T, C = (2, 16, 32) if bench.quick else (8, 1025, 1024)

    def norm(N: int, T: int, C: int) -> Norm:
        x, dy = bench.normal((N, T, C), torch.bfloat16), bench.normal((N, T, C), torch.bfloat16)
        sums = torch.zeros(C, device=bench.device), torch.zeros(C, device=bench.device)
        return Norm(*sums, x, dy, bench.normal((N, T)), 1 + bench.positive((N, T)))

    n_bytes = 2 * 2 * N * T * C + 8 * N * T + 16 * C
    yield Work(
        NAME, "LayerNorm", f"LayerNorm, bf16, N={N} T={T} C={C}", lambda: Rotation([norm(*ODD[0])]),
        lambda: bench.rotation(lambda: norm(N, T, C), n_bytes), ours, of_largest(1e-5), {"torch eager": torch_eager},
        n_bytes=n_bytes, flops=5 * N * T * C,
    )  # fmt: skip


OPERATOR = Operator(NAME, (NAME,), cases, large, 5 << 31, (Timed("LayerNorm", works),))
