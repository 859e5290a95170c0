"""Flat indices of the selected elements in CUDA C++: one read leaves a bit per score, indices come from the bits."""

from __future__ import annotations

import torch

from ..cuda_common import launch, score_table
from ..native import lib
from ..select_threshold.search import Threshold


def compact(scores: list[torch.Tensor], threshold: Threshold) -> list[torch.Tensor]:
    device = scores[0].device
    indices, outputs = [], []
    for tensor, greater, ties in zip(scores, threshold.greater_per_tensor, threshold.ties_kept_per_tensor, strict=True):
        dtype = torch.int32 if tensor.numel() <= 2**31 else torch.int64
        index = torch.empty(greater + ties, dtype=dtype, device=device)
        indices.append(index)
        outputs.append((ties, index.numel(), index.data_ptr()))
    outputs_L3 = torch.tensor(outputs, dtype=torch.int64).to(device)
    table = score_table(scores)
    workspace = torch.empty(lib().ft_cuda_compact_workspace(table.n_tiles), dtype=torch.uint8, device=device)
    selected_L = torch.empty(len(scores), dtype=torch.int64, device=device)
    arguments = outputs_L3.data_ptr(), workspace.data_ptr(), selected_L.data_ptr()
    launch("ft_cuda_compact", table, threshold.value, *arguments)
    threshold.require(selected_L.tolist())
    return indices
