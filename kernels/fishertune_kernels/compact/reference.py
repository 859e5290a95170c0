"""The flat indices of everything above the threshold and of the first ties, in rising order."""

from __future__ import annotations

import torch

from ..select_threshold.search import Threshold


def compact(scores: list[torch.Tensor], threshold: Threshold) -> list[torch.Tensor]:
    indices = []
    for tensor, ties_kept in zip(scores, threshold.ties_kept_per_tensor, strict=True):
        wide = tensor.reshape(-1).double()  # every supported dtype and the threshold are exact in float64
        tie = wide == threshold.value
        kept = (wide > threshold.value) | (tie & (tie.cumsum(0) <= ties_kept))
        dtype = torch.int32 if tensor.numel() <= 2**31 else torch.int64
        indices.append(kept.nonzero().squeeze(1).to(dtype))
    return indices
