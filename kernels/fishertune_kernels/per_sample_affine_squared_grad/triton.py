"""Σ_n of squared per-sample gradients of y = x̂·w + b on GPUs: one read of x and dY, then a small sum of squares.

A sample's tokens are cut into splits, so that a few samples fill the card: one program sums a split's tokens for a
block of channels into a workspace (2, splits, samples, channels), and a second kernel adds the splits of a sample,
squares, and adds the samples, each in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import launch

SUM_CONFIG = {"BLOCK_C": 128, "BLOCK_T": 32, "num_warps": 4}
SQUARE_CONFIG = {"BLOCK_C": 128, "num_warps": 4}
PROGRAMS = 1024
"""Enough programs of the first kernel for every card; fewer tokens to a split would only make the second one longer."""
SPLIT_TOKENS = 128  # a split has at least so many


@triton.jit
def affine_sum_kernel(
    sums,
    x,
    dy,
    mean,
    rstd,
    N,
    T,
    C,
    split_tokens,
    splits,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sums[0, s, n, c] = Σ dY·x̂ and sums[1, s, n, c] = Σ dY over the tokens of split s."""
    program = tl.program_id(0)
    tiles = tl.cdiv(C, BLOCK_C)
    sample = tl.cast(program // tiles // splits, tl.int64)
    split = program // tiles % splits
    c = tl.cast(program % tiles, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    inside_c = c < C
    begin = split * split_tokens
    end = tl.minimum(begin + split_tokens, T)
    products = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    totals = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(begin, end, BLOCK_T):
        inside_t = start + t < end
        token = sample * T + start + t
        at = token[:, None] * C + c[None, :]
        inside = inside_t[:, None] & inside_c[None, :]
        dy_TC = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            x_TC = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            if NORMALISED:
                mean_T = tl.load(mean + token, mask=inside_t, other=0.0)
                rstd_T = tl.load(rstd + token, mask=inside_t, other=0.0)
                x_TC = (x_TC - mean_T[:, None]) * rstd_T[:, None]
            products += dy_TC * x_TC
        if SHIFTED:
            totals += dy_TC
    row = (tl.cast(split, tl.int64) * N + sample) * C + c
    if SCALED:
        tl.store(sums + row, tl.sum(products, axis=0), mask=inside_c)
    if SHIFTED:
        tl.store(sums + tl.cast(splits, tl.int64) * N * C + row, tl.sum(totals, axis=0), mask=inside_c)


@triton.jit
def affine_square_kernel(accumulator, sums, N, C, splits, weight, BLOCK_C: tl.constexpr):
    """accumulator[c] += weight·Σ_n (Σ_s sums[s, n, c])²."""
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    inside = c < C
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for n in range(N):
        grad = tl.zeros((BLOCK_C,), tl.float32)
        for split in range(splits):
            row = (tl.cast(split, tl.int64) * N + n) * C
            grad += tl.load(sums + row + c, mask=inside, other=0.0)
        squares += grad * grad
    old = tl.load(accumulator + c, mask=inside)
    tl.store(accumulator + c, old + tl.cast(weight, tl.float32) * squares, mask=inside)


def per_sample_affine_squared_grad_(
    weight_accumulator_C: torch.Tensor | None,
    bias_accumulator_C: torch.Tensor | None,
    x_NTC: torch.Tensor | None,
    dy_NTC: torch.Tensor,
    weight: float = 1.0,
    mean_NT: torch.Tensor | None = None,
    rstd_NT: torch.Tensor | None = None,
) -> None:
    N, T, C = dy_NTC.shape
    device = dy_NTC.device
    tiles = triton.cdiv(C, SUM_CONFIG["BLOCK_C"])
    splits = max(1, min(triton.cdiv(T, SPLIT_TOKENS), PROGRAMS // max(N * tiles, 1)))
    split_tokens = triton.cdiv(triton.cdiv(T, splits), SUM_CONFIG["BLOCK_T"]) * SUM_CONFIG["BLOCK_T"]
    sums_2SNC = torch.empty(2, splits, N, C, dtype=torch.float32, device=device)
    launch(
        affine_sum_kernel,
        N * splits * tiles,
        device,
        sums_2SNC,
        dy_NTC if x_NTC is None else x_NTC,
        dy_NTC,
        sums_2SNC if mean_NT is None else mean_NT.float(),
        sums_2SNC if rstd_NT is None else rstd_NT.float(),
        N,
        T,
        C,
        split_tokens,
        splits,
        SCALED=weight_accumulator_C is not None,
        SHIFTED=bias_accumulator_C is not None,
        NORMALISED=mean_NT is not None,
        **SUM_CONFIG,
    )
    for accumulator_C, sums_SNC in zip((weight_accumulator_C, bias_accumulator_C), sums_2SNC, strict=True):
        if accumulator_C is not None:
            programs = triton.cdiv(C, SQUARE_CONFIG["BLOCK_C"])
            launch(
                affine_square_kernel, programs, device, accumulator_C, sums_SNC, N, C, splits, float(weight),
                **SQUARE_CONFIG,
            )  # fmt: skip
