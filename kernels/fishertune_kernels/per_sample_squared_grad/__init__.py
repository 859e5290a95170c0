"""Exact per-sample squared gradients of a Linear layer without a per-sample gradient in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import join_windows


def per_sample_squared_grad_(
    accumulator_OI: Tensor,
    x_NTI: Tensor,
    dy_NTO: Tensor,
    weight: float = 1.0,
    bias_accumulator_O: Tensor | None = None,
    *,
    samples: int | None = None,
) -> None:
    """F[o,i] ← F[o,i] + weight·Σ_n (Σ_t dY[n,t,o]·X[n,t,i])², in place (FisherTune, Eq. 4, for y = x·Wᵀ + b).

    Weights that differ between heads or groups, F[h,o,i] ← F[h,o,i] + weight·Σ_n (Σ_t dY[n,h,t,o]·X[n,h,t,i])², go in
    one call with one dimension more: the accumulator as (H, O, I), x as (N, H, T, I), dY as (N, H, T, O), the bias's as
    (H, O). Inputs with any strides are read where they lie as long as their last dimension is dense: slices of a fused
    projection and transposed heads need no copy.

    Args:
        accumulator_OI: contiguous float32 (or float64), the shape of the layer's weight; updated.
        x_NTI: the layer's input, samples × tokens × input features; float32, bfloat16, float16 or float64.
        dy_NTO: gradient of the summed loss at the layer's output, samples × tokens × output features.
        weight: factor of every square, for example 1/N for a mean.
        bias_accumulator_O: if given, gains weight·Σ_n (Σ_t dY[n,t,o])², the bias's squared gradients.
        samples: the number of samples, where the leading dimension counts windows (all windows of the first sample,
            then those of the second, …), as in windowed attention: a sample's windows are then summed before they are
            squared. Without a copy for dense inputs. Not with heads.

    Raises:
        TypeError, ValueError: for types, shapes, devices or layouts that do not fit, naming the tensor and the remedy.
    """
    if samples is not None:
        x_NTI, dy_NTO = join_windows("x_NTI", x_NTI, samples), join_windows("dy_NTO", dy_NTO, samples)
    with torch.no_grad():
        torch.ops.fishertune.per_sample_squared_grad_(accumulator_OI, x_NTI, dy_NTO, weight, bias_accumulator_O)
