"""Exact per-sample squared gradients of what multiplies or shifts channels: LayerNorm, LayerScale, embeddings."""

from __future__ import annotations

import torch
from torch import Tensor


def per_sample_affine_squared_grad_(
    weight_accumulator_C: Tensor | None,
    bias_accumulator_C: Tensor | None,
    x_NTC: Tensor | None,
    dy_NTC: Tensor,
    weight: float = 1.0,
    mean_NT: Tensor | None = None,
    rstd_NT: Tensor | None = None,
) -> None:
    """Squares of every sample's gradient for y = x̂·w + b, in place and in one pass over x and dY (FisherTune, Eq. 4).

    W[c] ← W[c] + weight·Σ_n (Σ_t dY[n,t,c]·x̂[n,t,c])² and B[c] ← B[c] + weight·Σ_n (Σ_t dY[n,t,c])².

    * LayerNorm: x its input, ``mean_NT`` and ``rstd_NT`` its statistics: x̂ = (x − mean)·rstd. Pass x̂ itself as x,
      without statistics, where that is what is at hand.
    * LayerScale, y = x·w: x without statistics, ``bias_accumulator_C`` None.
    * A bias of any layer: ``weight_accumulator_C`` and x None.
    * A position embedding, whose gradient of one sample is dY itself: as a bias with one token,
      ``dy.reshape(N, 1, -1)``.

    Args:
        weight_accumulator_C, bias_accumulator_C: contiguous float32 (or float64), one value a channel; updated. At
            least one; either may be None.
        x_NTC: samples × tokens × channels, float32, bfloat16, float16 or float64; needed with ``weight_accumulator_C``.
        dy_NTC: gradient of the summed loss at y, same shape, any of these types.
        weight: factor of every square, for example 1/N for a mean.
        mean_NT, rstd_NT: mean and 1/√(variance + eps) of every token, both or none.

    Raises:
        TypeError, ValueError: for types, shapes, devices or layouts that do not fit, naming the tensor and the remedy.
    """
    with torch.no_grad():
        torch.ops.fishertune.per_sample_affine_squared_grad_(
            weight_accumulator_C, bias_accumulator_C, x_NTC, dy_NTC, weight, mean_NT, rstd_NT
        )
