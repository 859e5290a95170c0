"""θ' = θ̂ + sign·(E + τ⁻²)^−½·ε on GPUs: one read of θ̂ and E, one write; ε is drawn in registers."""

from __future__ import annotations

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
    standard_normal,
    words,
)

CONFIG = {"BLOCK": 1024, "num_warps": 4}


@triton.jit(do_not_specialize=["n_tensors", "seed_low", "seed_high", "step_low", "step_high"])
def gaussian_perturb_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    prior_precision,
    sign,
    seed_low,
    seed_high,
    step_low,
    step_high,
    PARAM: tl.constexpr,
    EXCESS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    param = pointer(pointers, n_tensors, owner, 0, PARAM, ALIGNED)
    excess = pointer(pointers, n_tensors, owner, 1, EXCESS, ALIGNED)
    perturbed = pointer(pointers, n_tensors, owner, 2, PARAM, ALIGNED)
    offset = tl.load(layout + 2 * tl.cast(n_tensors, tl.int64) + owner)
    prior_precision = tl.cast(prior_precision, tl.float32)
    sign = tl.cast(sign, tl.float32)
    # Chunks begin at multiples of four global elements; a tensor that does not loses the vector loads of its chunks.
    lead = offset & 3
    start = chunk * BLOCK
    epsilon = standard_normal(offset - lead + start, seed_low, seed_high, step_low, step_high, BLOCK)
    if (lead == 0) & (start + BLOCK <= size):
        _perturb(param, excess, perturbed, start, size, epsilon, prior_precision, sign, PARAM, False, BLOCK)
    else:
        _perturb(param, excess, perturbed, start - lead, size, epsilon, prior_precision, sign, PARAM, True, BLOCK)


@triton.jit
def _perturb(
    param,
    excess,
    perturbed,
    start,
    size,
    epsilon,
    prior_precision,
    sign,
    PARAM: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = chunk_offsets(start, BLOCK)
    mask = (offsets >= 0) & (offsets < size) if MASKED else None
    theta = tl.load(param + offsets, mask=mask).to(tl.float32)
    precision = tl.load(excess + offsets, mask=mask).to(tl.float32) + prior_precision
    tl.store(perturbed + offsets, rounded(theta + sign * tl.rsqrt(precision) * epsilon, PARAM), mask=mask)


def gaussian_perturb(
    params: list[torch.Tensor],
    excess: list[torch.Tensor],
    prior_precision: float,
    seed: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> list[torch.Tensor]:
    perturbed = [torch.empty_like(param, memory_format=torch.contiguous_format) for param in params]
    for params_, excess_, perturbed_, offsets_ in by_dtype(params, excess, perturbed, offsets):
        table = list_table(CONFIG["BLOCK"], params_, excess_, perturbed_, offsets=offsets_)
        launch(
            gaussian_perturb_kernel,
            table.n_chunks,
            params_[0].device,
            *table.arguments,
            float(prior_precision),
            float(sign),
            *words(seed),
            *words(step),
            PARAM=TL_DTYPES[params_[0].dtype],
            EXCESS=TL_DTYPES[excess_[0].dtype],
            ALIGNED=table.aligned,
            **CONFIG,
        )
    return perturbed
