"""Flat indices of the selected elements in CUDA C++: one read leaves a bit per score, indices come from the bits."""

from __future__ import annotations

import torch

from ..cuda_common import launch, score_table
from ..native import lib
from ..select_threshold.search import Threshold


def compact(scores: list[torch.Tensor], threshold: Threshold) -> list[torch.Tensor]:
    device = scores[0].device
    table = score_table(scores)
    quotas_L = torch.tensor(threshold.ties_kept_per_tensor, dtype=torch.int64).to(device)
    workspace = torch.empty(lib().ft_cuda_compact_workspace(table.n_tiles), dtype=torch.uint8, device=device)
    counts_L = torch.empty(len(scores), dtype=torch.int64, device=device)
    value, plan = threshold.value, workspace.data_ptr()
    launch("ft_cuda_compact_count", table, value, quotas_L.data_ptr(), plan, counts_L.data_ptr())
    indices = [
        torch.empty(count, dtype=torch.int32 if tensor.numel() <= 2**31 else torch.int64, device=device)
        for tensor, count in zip(scores, counts_L.tolist(), strict=True)
    ]
    addresses_L = torch.tensor([index.data_ptr() for index in indices], dtype=torch.int64).to(device)
    launch("ft_cuda_compact_write", table, value, plan, addresses_L.data_ptr())
    return indices
