"""One step on E = Λ − τ⁻² on GPUs, each method in one pass; the reparameterised one draws its ε again in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import (
    TL_DTYPES,
    by_dtype,
    chunk_offsets,
    expm1,
    launch,
    list_table,
    locate,
    pointer,
    standard_normal,
    words,
)

NATURAL_CONFIG = {"BLOCK": 4096, "num_warps": 8}
SGVB_CONFIG = {"BLOCK": 1024, "num_warps": 4}


@triton.jit(do_not_specialize=["n_tensors"])
def natural_kernel(
    pointers, layout, owners, n_tensors, keep, gain, SQUARED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    excess = pointer(pointers, n_tensors, owner, 0, tl.float32, ALIGNED)
    squared = pointer(pointers, n_tensors, owner, 1, SQUARED, ALIGNED)
    start = chunk * BLOCK
    keep = tl.cast(keep, tl.float32)
    gain = tl.cast(gain, tl.float32)
    if start + BLOCK <= size:
        _natural(excess, squared, start, size, keep, gain, False, BLOCK)
    else:
        _natural(excess, squared, start, size, keep, gain, True, BLOCK)


@triton.jit
def _natural(excess, squared, start, size, keep, gain, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = chunk_offsets(start, BLOCK)
    mask = offsets < size if MASKED else None
    old = tl.load(excess + offsets, mask=mask)
    new = keep * old + gain * tl.load(squared + offsets, mask=mask).to(tl.float32)
    tl.store(excess + offsets, new, mask=mask)


def precision_update_natural_(
    excess: list[torch.Tensor], squared_grads: list[torch.Tensor], beta: float, gamma: float
) -> None:
    for excess_, squared_ in by_dtype(excess, squared_grads):
        table = list_table(NATURAL_CONFIG["BLOCK"], excess_, squared_)
        launch(
            natural_kernel,
            table.n_chunks,
            excess_[0].device,
            *table.arguments,
            1.0 - beta,
            float(beta / gamma),
            SQUARED=TL_DTYPES[squared_[0].dtype],
            ALIGNED=table.aligned,
            **NATURAL_CONFIG,
        )


@triton.jit(do_not_specialize=["n_tensors", "seed_low", "seed_high", "step_low", "step_high"])
def sgvb_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    step_size,
    mean_gain,
    square_keep,
    square_gain,
    correction2,
    eps,
    gamma,
    prior_precision,
    sign,
    seed_low,
    seed_high,
    step_low,
    step_high,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    excess = pointer(pointers, n_tensors, owner, 0, tl.float32, ALIGNED)
    grad = pointer(pointers, n_tensors, owner, 1, GRAD, ALIGNED)
    exp_avg = pointer(pointers, n_tensors, owner, 2, tl.float32, ALIGNED)
    exp_avg_sq = pointer(pointers, n_tensors, owner, 3, tl.float32, ALIGNED)
    offset = tl.load(layout + 2 * tl.cast(n_tensors, tl.int64) + owner)
    lead = offset & 3
    start = chunk * BLOCK
    epsilon = standard_normal(offset - lead + start, seed_low, seed_high, step_low, step_high, BLOCK)
    epsilon *= tl.cast(sign, tl.float32)
    if (lead == 0) & (start + BLOCK <= size):
        _sgvb(
            excess, grad, exp_avg, exp_avg_sq, start, size, epsilon, step_size, mean_gain, square_keep, square_gain,
            correction2, eps, gamma, prior_precision, False, BLOCK,
        )  # fmt: skip
    else:
        _sgvb(
            excess, grad, exp_avg, exp_avg_sq, start - lead, size, epsilon, step_size, mean_gain, square_keep,
            square_gain, correction2, eps, gamma, prior_precision, True, BLOCK,
        )  # fmt: skip


@triton.jit
def _sgvb(
    excess, grad, exp_avg, exp_avg_sq, start, size, epsilon, step_size, mean_gain, square_keep, square_gain,
    correction2, eps, gamma, prior_precision, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    step_size = tl.cast(step_size, tl.float32)
    mean_gain = tl.cast(mean_gain, tl.float32)
    square_keep = tl.cast(square_keep, tl.float32)
    square_gain = tl.cast(square_gain, tl.float32)
    correction2 = tl.cast(correction2, tl.float32)
    eps = tl.cast(eps, tl.float32)
    gamma = tl.cast(gamma, tl.float32)
    prior_precision = tl.cast(prior_precision, tl.float32)

    offsets = chunk_offsets(start, BLOCK)
    mask = (offsets >= 0) & (offsets < size) if MASKED else None
    old = tl.load(excess + offsets, mask=mask)
    g = tl.load(grad + offsets, mask=mask).to(tl.float32)
    mean = tl.load(exp_avg + offsets, mask=mask)
    square = tl.load(exp_avg_sq + offsets, mask=mask)

    precision = old + prior_precision
    # 1 − τ⁻²/Λ written as E/Λ: no cancellation where E is small beside τ⁻².
    log_grad = -0.5 * epsilon * tl.rsqrt(precision) * g + 0.5 * gamma * tl.div_rn(old, precision)
    mean += mean_gain * (log_grad - mean)
    square = square_keep * square + square_gain * (log_grad * log_grad)
    delta = -step_size * tl.div_rn(mean, tl.sqrt_rn(tl.div_rn(square, correction2)) + eps)
    new = old + precision * expm1(delta)
    # Λ·exp(δ) is positive, but E + τ⁻² can round to zero: keep E at least two roundings above −τ⁻². NaN passes.
    floor = -prior_precision * (1 - 1.0 / 8388608)
    new = tl.where(new < floor, floor, new)

    tl.store(exp_avg + offsets, mean, mask=mask)
    tl.store(exp_avg_sq + offsets, square, mask=mask)
    tl.store(excess + offsets, new, mask=mask)


def precision_update_sgvb_(
    excess: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    gamma: float,
    prior_precision: float,
    seed: int,
    noise_step: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> None:
    beta1, beta2 = betas
    for excess_, grads_, mean_, square_, offsets_ in by_dtype(excess, grads, exp_avg, exp_avg_sq, offsets):
        table = list_table(SGVB_CONFIG["BLOCK"], excess_, grads_, mean_, square_, offsets=offsets_)
        launch(
            sgvb_kernel,
            table.n_chunks,
            excess_[0].device,
            *table.arguments,
            lr / (1 - beta1**step),
            # 1 − β is taken in double: in float32, 1 − 0.999 is off by 5e-5 of itself.
            1.0 - beta1,
            float(beta2),
            1.0 - beta2,
            1.0 - beta2**step,
            float(eps),
            float(gamma),
            float(prior_precision),
            float(sign),
            *words(seed),
            *words(noise_step),
            GRAD=TL_DTYPES[grads_[0].dtype],
            ALIGNED=table.aligned,
            **SGVB_CONFIG,
        )
