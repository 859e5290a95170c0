"""F[o,i] ← F[o,i] + weight·Σ_n (Σ_t dY[n,t,o]·X[n,t,i])²: the square of every sample's own gradient of a Linear weight.

Eq. 4 of the FisherTune paper for y = x·Wᵀ + b: sample n's weight gradient is dYₙᵀ·Xₙ and its bias gradient Σ_t dYₙ.
"""

from __future__ import annotations

import torch


def per_sample_squared_grad_(
    accumulator_OI: torch.Tensor,
    x_NTI: torch.Tensor,
    dy_NTO: torch.Tensor,
    weight: float = 1.0,
    bias_accumulator_O: torch.Tensor | None = None,
) -> None:
    dtype = accumulator_OI.dtype
    # A surrounding autocast region would run the product in half precision.
    with torch.autocast(accumulator_OI.device.type, enabled=False):
        # One sample at a time: a batch of gradients would need N times the weight's memory.
        for x_TI, dy_TO in zip(x_NTI, dy_NTO, strict=True):
            dy_TO = dy_TO.to(dtype)
            grad_OI = dy_TO.T @ x_TI.to(dtype)
            accumulator_OI.addcmul_(grad_OI, grad_OI, value=weight)
            if bias_accumulator_O is not None:
                grad_O = dy_TO.sum(dim=0)
                bias_accumulator_O.addcmul_(grad_O, grad_O, value=weight)
