"""Σ_n of squared per-sample gradients of y = x̂·w + b on a CPU: x and dY are read once, x̂ is never written."""

from __future__ import annotations

import torch

from ..native import DTYPES, Rows, call


def per_sample_affine_squared_grad_(
    weight_accumulator_C: torch.Tensor | None,
    bias_accumulator_C: torch.Tensor | None,
    x_NTC: torch.Tensor | None,
    dy_NTC: torch.Tensor,
    weight: float = 1.0,
    mean_NT: torch.Tensor | None = None,
    rstd_NT: torch.Tensor | None = None,
) -> None:
    rows = Rows()
    rows.add(
        rows.write(weight_accumulator_C) if weight_accumulator_C is not None else 0,
        rows.write(bias_accumulator_C) if bias_accumulator_C is not None else 0,
        rows.read(x_NTC) if x_NTC is not None else 0,
        rows.read(dy_NTC),
        rows.read_float(mean_NT) if mean_NT is not None else 0,
        rows.read_float(rstd_NT) if rstd_NT is not None else 0,
        *dy_NTC.shape,
        DTYPES[x_NTC.dtype if x_NTC is not None else dy_NTC.dtype],
        DTYPES[dy_NTC.dtype],
    )
    call("ft_per_sample_affine", rows, weight)
