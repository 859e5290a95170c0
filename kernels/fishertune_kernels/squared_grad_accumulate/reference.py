"""acc ← acc + weight·g². Summed over batches of one sample this is N times the Fisher diagonal of Eq. 4."""

from __future__ import annotations

import torch


def squared_grad_accumulate_(accumulators: list[torch.Tensor], grads: list[torch.Tensor], weight: float = 1.0) -> None:
    for accumulator, grad in zip(accumulators, grads, strict=True):
        wide = grad.to(accumulator.dtype)
        accumulator.addcmul_(wide, wide, value=weight)
