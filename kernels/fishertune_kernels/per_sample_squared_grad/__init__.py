"""Exact per-sample squared gradients of a Linear layer without a per-sample gradient in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample_squared_grad_(
    accumulator_OI: Tensor,
    x_NTI: Tensor,
    dy_NTO: Tensor,
    weight: float = 1.0,
    bias_accumulator_O: Tensor | None = None,
) -> None:
    """F[o,i] ← F[o,i] + weight·Σ_n (Σ_t dY[n,t,o]·X[n,t,i])², in place (FisherTune, Eq. 4, for y = x·Wᵀ + b).

    Args:
        accumulator_OI: contiguous float32 (or float64), the shape of the layer's weight; updated.
        x_NTI: the layer's input, samples × tokens × input features; float32, bfloat16, float16 or float64.
        dy_NTO: gradient of the summed loss at the layer's output, samples × tokens × output features.
        weight: factor of every square, for example 1/N for a mean.
        bias_accumulator_O: if given, gains weight·Σ_n (Σ_t dY[n,t,o])², the bias's squared gradients.

    Raises:
        TypeError, ValueError: for types, shapes, devices or layouts that do not fit, naming the tensor and the remedy.
    """
    with torch.no_grad():
        torch.ops.fishertune.per_sample_squared_grad_(accumulator_OI, x_NTI, dy_NTO, weight, bias_accumulator_O)
