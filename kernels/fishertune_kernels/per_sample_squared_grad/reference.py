"""F[h,o,i] ← F[h,o,i] + weight·Σ_n (Σ_t dY[n,h,t,o]·X[n,h,t,i])²: the square of every sample's own weight gradient.

Eq. 4 of the FisherTune paper for y = x·Wᵀ + b: sample n's weight gradient is dYₙᵀ·Xₙ and its bias gradient Σ_t dYₙ. An
ordinary Linear layer has one head; block-diagonal weights have one for each block.
"""

from __future__ import annotations

import torch


def per_sample_squared_grad_(
    accumulator_HOI: torch.Tensor,
    x_NHTI: torch.Tensor,
    dy_NHTO: torch.Tensor,
    weight: float = 1.0,
    bias_accumulator_HO: torch.Tensor | None = None,
) -> None:
    dtype = accumulator_HOI.dtype
    # A surrounding autocast region would run the product in half precision.
    with torch.autocast(accumulator_HOI.device.type, enabled=False):
        # One sample at a time: a batch of gradients would need N times the weight's memory.
        for x_HTI, dy_HTO in zip(x_NHTI, dy_NHTO, strict=True):
            dy_HTO = dy_HTO.to(dtype)
            grad_HOI = dy_HTO.mT @ x_HTI.to(dtype)
            accumulator_HOI.addcmul_(grad_HOI, grad_HOI, value=weight)
            if bias_accumulator_HO is not None:
                grad_HO = dy_HTO.sum(dim=1)
                bias_accumulator_HO.addcmul_(grad_HO, grad_HO, value=weight)
