"""AdamW on selected elements on GPUs: state is streamed, parameters and gradients are touched where selected only."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..triton_common import (
    TL_DTYPES,
    by_dtype,
    chunk_offsets,
    launch,
    list_table,
    locate,
    pointer,
    rounded,
    rounding_bits,
    stochastically_rounded,
    words,
)

CONFIG = {"BLOCK": 1024, "num_warps": 4}


# A scale may be any element of a larger tensor; its address must not decide which kernel is compiled.
@triton.jit(do_not_specialize=["n_tensors", "grad_scale_address", "seed_low", "seed_high", "step_low", "step_high"])
def sparse_adamw_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    step_size,
    keep,
    mean_gain,
    square_keep,
    square_gain,
    correction2_sqrt,
    eps,
    grad_scale,
    grad_scale_address,
    active_threshold,
    seed_low,
    seed_high,
    step_low,
    step_high,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    INDEX: tl.constexpr,
    COMPACT: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """COMPACT: gradients hold one value per index. SCALED: the number at ``grad_scale_address`` multiplies them, not
    ``grad_scale``. GATED: scores in row 4 decide who moves. MASTER: row 5 holds the parameters in float32. STOCHASTIC:
    bfloat16 parameters are rounded by random bits of seed, step and global index."""
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    param = pointer(pointers, n_tensors, owner, 0, PARAM, False)
    grad = pointer(pointers, n_tensors, owner, 1, GRAD, False)
    exp_avg = pointer(pointers, n_tensors, owner, 2, tl.float32, ALIGNED)
    exp_avg_sq = pointer(pointers, n_tensors, owner, 3, tl.float32, ALIGNED)
    scores = pointer(pointers, n_tensors, owner, 4, tl.float32, ALIGNED)
    master = pointer(pointers, n_tensors, owner, 5, tl.float32, ALIGNED)
    indices = pointer(pointers, n_tensors, owner, 6, INDEX, ALIGNED)
    offset = chunk  # unused unless STOCHASTIC
    if STOCHASTIC:
        offset = tl.load(layout + 2 * tl.cast(n_tensors, tl.int64) + owner)
    gain = tl.cast(grad_scale, tl.float32)
    if SCALED:
        gain = tl.load(grad_scale_address)
    start = chunk * BLOCK
    if start + BLOCK <= size:
        _step(
            param, grad, exp_avg, exp_avg_sq, indices, scores, master, start, size, offset, step_size, keep, mean_gain,
            square_keep, square_gain, correction2_sqrt, eps, gain, active_threshold, seed_low, seed_high, step_low,
            step_high, PARAM, COMPACT, GATED, MASTER, STOCHASTIC, False, BLOCK,
        )  # fmt: skip
    else:
        _step(
            param, grad, exp_avg, exp_avg_sq, indices, scores, master, start, size, offset, step_size, keep, mean_gain,
            square_keep, square_gain, correction2_sqrt, eps, gain, active_threshold, seed_low, seed_high, step_low,
            step_high, PARAM, COMPACT, GATED, MASTER, STOCHASTIC, True, BLOCK,
        )  # fmt: skip


@triton.jit
def _step(
    param, grad, exp_avg, exp_avg_sq, indices, scores, master, start, size, offset, step_size, keep, mean_gain,
    square_keep, square_gain, correction2_sqrt, eps, gain, active_threshold, seed_low, seed_high, step_low, step_high,
    PARAM: tl.constexpr, COMPACT: tl.constexpr, GATED: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = chunk_offsets(start, BLOCK)
    mask = offsets < size if MASKED else None
    index = tl.load(indices + offsets, mask=mask, other=0 if MASKED else None).to(tl.int64)
    where = offsets if COMPACT else index
    g = tl.load(grad + where, mask=mask).to(tl.float32) * gain
    mean = tl.load(exp_avg + offsets, mask=mask)
    square = tl.load(exp_avg_sq + offsets, mask=mask)
    mean += tl.cast(mean_gain, tl.float32) * (g - mean)
    square = tl.cast(square_keep, tl.float32) * square + tl.cast(square_gain, tl.float32) * (g * g)
    tl.store(exp_avg + offsets, mean, mask=mask)
    tl.store(exp_avg_sq + offsets, square, mask=mask)

    moves = mask
    if GATED:
        moves = tl.load(scores + offsets, mask=mask) >= tl.cast(active_threshold, tl.float32)
        if MASKED:
            moves = moves & mask
    if MASTER:  # noqa: SIM108
        theta = tl.load(master + offsets, mask=moves)
    else:
        theta = tl.load(param + index, mask=moves).to(tl.float32)
    denominator = tl.div_rn(tl.sqrt_rn(square), tl.cast(correction2_sqrt, tl.float32)) + tl.cast(eps, tl.float32)
    theta = tl.cast(keep, tl.float32) * theta - tl.cast(step_size, tl.float32) * tl.div_rn(mean, denominator)
    if MASTER:
        tl.store(master + offsets, theta, mask=moves)
    if STOCHASTIC:
        random = rounding_bits(offset + index, seed_low, seed_high, step_low, step_high)
        tl.store(param + index, stochastically_rounded(theta, random), mask=moves)
    else:
        tl.store(param + index, rounded(theta, PARAM), mask=moves)


def sparse_adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    indices: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    scores: list[torch.Tensor] | None = None,
    active_threshold: float | None = None,
    grad_scale: float | torch.Tensor = 1.0,
    master: list[torch.Tensor] | None = None,
    compact_grads: bool = False,
    seed: int | None = None,
    offsets: list[int] | None = None,
) -> None:
    beta1, beta2 = betas
    gated = scores is not None and active_threshold is not None
    scaled = isinstance(grad_scale, torch.Tensor)
    # Rows that a launch does not read hold the moments, which are float32 of the same length.
    rows = (params, grads, exp_avg, exp_avg_sq, scores if gated else exp_avg, master or exp_avg, indices)
    for *group, offsets_ in by_dtype(*rows, offsets or [0] * len(params)):
        params_, grads_, mean_, *_, indices_ = group
        table = list_table(CONFIG["BLOCK"], *group, offsets=None if seed is None else offsets_, scattered=2)
        launch(
            sparse_adamw_kernel,
            table.n_chunks,
            params_[0].device,
            *table.arguments,
            lr / (1 - beta1**step),
            1.0 - lr * weight_decay,
            # 1 − β is taken in double: in float32, 1 − 0.999 is off by 5e-5 of itself.
            1.0 - beta1,
            float(beta2),
            1.0 - beta2,
            math.sqrt(1 - beta2**step),
            float(eps),
            1.0 if scaled else float(grad_scale),
            grad_scale if scaled else mean_[0],
            float(active_threshold) if gated else 0.0,
            *words(seed or 0),
            *words(step),
            PARAM=TL_DTYPES[params_[0].dtype],
            GRAD=TL_DTYPES[grads_[0].dtype],
            INDEX=TL_DTYPES[indices_[0].dtype],
            COMPACT=compact_grads,
            SCALED=scaled,
            GATED=gated,
            MASTER=master is not None,
            STOCHASTIC=seed is not None,
            ALIGNED=table.aligned,
            **CONFIG,
        )
