"""Flat indices of the selected elements in C++: one read of the scores, straight into outputs of known size."""

from __future__ import annotations

import torch

from ..native import DTYPES, INDEX_DTYPES, Rows, call
from ..select_threshold.search import Threshold


def compact(scores: list[torch.Tensor], threshold: Threshold) -> list[torch.Tensor]:
    selected = torch.empty(len(scores), dtype=torch.int64, device="cpu")
    indices = []
    rows = Rows()
    for tensor, greater, ties in zip(scores, threshold.greater_per_tensor, threshold.ties_kept_per_tensor, strict=True):
        dtype = torch.int32 if tensor.numel() <= 2**31 else torch.int64
        index = torch.empty(greater + ties, dtype=dtype, device="cpu")
        indices.append(index)
        rows.add(
            rows.read(tensor), tensor.numel(), DTYPES[tensor.dtype], ties,
            rows.write(index, dtype=dtype), INDEX_DTYPES[dtype], index.numel(),
        )  # fmt: skip
    call("ft_compact", rows, threshold.value, selected.data_ptr())
    threshold.require(selected.tolist())
    return indices
