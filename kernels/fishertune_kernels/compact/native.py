"""Flat indices of the selected elements in C++: one read leaves a bit per score, indices come from the bits."""

from __future__ import annotations

import torch

from ..native import DTYPES, INDEX_DTYPES, Rows, call, lib
from ..select_threshold.search import Threshold


def compact(scores: list[torch.Tensor], threshold: Threshold) -> list[torch.Tensor]:
    scores = [tensor.contiguous() for tensor in scores]
    dtypes = [torch.int32 if tensor.numel() <= 2**31 else torch.int64 for tensor in scores]
    counts = torch.empty(len(scores), dtype=torch.int64, device="cpu")

    def rows_for(addresses: list[int]) -> Rows:
        rows = Rows()
        for tensor, ties, dtype, address in zip(scores, threshold.ties_kept_per_tensor, dtypes, addresses, strict=True):
            rows.add(tensor.data_ptr(), tensor.numel(), DTYPES[tensor.dtype], ties, address, INDEX_DTYPES[dtype])
        return rows

    rows = rows_for([0] * len(scores))
    plan = torch.empty(lib().ft_compact_plan_size(*rows.arguments), dtype=torch.int64, device="cpu")
    call("ft_compact_count", rows, threshold.value, plan.data_ptr(), counts.data_ptr())
    indices = [
        torch.empty(count, dtype=dtype, device="cpu") for count, dtype in zip(counts.tolist(), dtypes, strict=True)
    ]
    call("ft_compact_write", rows_for([index.data_ptr() for index in indices]), threshold.value, plan.data_ptr())
    return indices
