"""Running sum of squared gradients over a list of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import as_list


def squared_grad_accumulate_(
    accumulators: Tensor | Sequence[Tensor], grads: Tensor | Sequence[Tensor], weight: float = 1.0
) -> None:
    """acc ← acc + weight·g², in place. With one sample a batch this sums the Fisher diagonal (FisherTune, Eq. 4).

    Args:
        accumulators: contiguous float32 (or float64) tensors, updated.
        grads: float32, bfloat16, float16 or float64 tensors of the same shapes; squared in the accumulator's precision.
        weight: factor of every square, for example 1/N for a mean.

    Raises:
        TypeError, ValueError: for types, shapes, devices or layouts that do not fit, naming the tensor and the remedy.
    """
    with torch.no_grad():
        torch.ops.fishertune.squared_grad_accumulate_(
            as_list("accumulators", accumulators), as_list("grads", grads), weight
        )
