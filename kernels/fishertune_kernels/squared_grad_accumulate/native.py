"""acc ← acc + weight·g² in C++: one pass over all tensors of the list."""

from __future__ import annotations

import torch

from ..native import DTYPES, Rows, call


def squared_grad_accumulate_(accumulators: list[torch.Tensor], grads: list[torch.Tensor], weight: float = 1.0) -> None:
    rows = Rows()
    for accumulator, grad in zip(accumulators, grads, strict=True):
        rows.add(rows.write(accumulator), rows.read(grad), grad.numel(), DTYPES[grad.dtype])
    call("ft_squared_grad_accumulate", rows, weight)
