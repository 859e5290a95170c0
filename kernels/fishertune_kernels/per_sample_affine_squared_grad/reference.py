"""Σ_n of squared per-sample gradients of what multiplies or shifts channels, y = x̂·w + b.

W[c] ← W[c] + weight·Σ_n (Σ_t dY[n,t,c]·x̂[n,t,c])² and B[c] ← B[c] + weight·Σ_n (Σ_t dY[n,t,c])², the squares of every
sample's own gradient (Eq. 4 of the FisherTune paper), with x̂ = (x − mean)·rstd, or x̂ = x without statistics.
"""

from __future__ import annotations

import torch


def per_sample_affine_squared_grad_(
    weight_accumulator_C: torch.Tensor | None,
    bias_accumulator_C: torch.Tensor | None,
    x_NTC: torch.Tensor | None,
    dy_NTC: torch.Tensor,
    weight: float = 1.0,
    mean_NT: torch.Tensor | None = None,
    rstd_NT: torch.Tensor | None = None,
) -> None:
    for n, dy_TC in enumerate(dy_NTC):
        if weight_accumulator_C is not None and x_NTC is not None:
            dtype = weight_accumulator_C.dtype
            x_TC = x_NTC[n].to(dtype)
            if mean_NT is not None and rstd_NT is not None:
                x_TC = (x_TC - mean_NT[n, :, None].to(dtype)) * rstd_NT[n, :, None].to(dtype)
            grad_C = (dy_TC.to(dtype) * x_TC).sum(dim=0)
            weight_accumulator_C.addcmul_(grad_C, grad_C, value=weight)
        if bias_accumulator_C is not None:
            grad_C = dy_TC.sum(dim=0, dtype=bias_accumulator_C.dtype)
            bias_accumulator_C.addcmul_(grad_C, grad_C, value=weight)
