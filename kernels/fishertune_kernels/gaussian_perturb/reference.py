"""θ' = θ̂ + sign·(E + τ⁻²)^−½·ε: a draw from the posterior N(θ̂, Λ⁻¹) with Λ = E + τ⁻² (Eq. 10, 11).

ε comes from (seed, step, global element index), so the update of E can draw it again instead of storing it.
"""

from __future__ import annotations

import torch

from ..philox import standard_normal


def gaussian_perturb(
    params: list[torch.Tensor],
    excess: list[torch.Tensor],
    prior_precision: float,
    seed: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> list[torch.Tensor]:
    perturbed = []
    for param, excess_i, offset in zip(params, excess, offsets, strict=True):
        dtype = torch.promote_types(param.dtype, excess_i.dtype)
        epsilon = standard_normal(
            param.numel(), seed=seed, step=step, offset=offset, device=param.device, dtype=dtype
        ).view(param.shape)
        deviation = torch.rsqrt(excess_i.to(dtype) + prior_precision)
        perturbed.append((param.to(dtype) + sign * deviation * epsilon).to(param.dtype))
    return perturbed
