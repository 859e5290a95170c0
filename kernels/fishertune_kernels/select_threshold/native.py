"""Counts of order-preserving keys in C++: one read of the scores, no copy of them."""

from __future__ import annotations

import torch

from ..native import DTYPES, Rows, call


def key_histogram(scores: list[torch.Tensor], shift: int, bits: int, prefix_mask: int, prefix: int) -> torch.Tensor:
    counts = torch.zeros(2**bits + 1, dtype=torch.int64, device="cpu")
    rows = Rows()
    for tensor in scores:
        rows.add(rows.read(tensor), tensor.numel(), DTYPES[tensor.dtype])
    call("ft_key_histogram", rows, shift, bits, prefix_mask, prefix, counts.data_ptr())
    return counts
