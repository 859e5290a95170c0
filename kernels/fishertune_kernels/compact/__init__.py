"""From a threshold to the indices of the selected elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import as_list
from ..select_threshold import Threshold


def compact(scores: Tensor | Sequence[Tensor], threshold: Threshold) -> list[Tensor]:
    """Flat indices of the elements above the threshold and of the ties it keeps, tensor by tensor.

    Args:
        scores: the tensors (or this rank's shards) that ``threshold`` was found for.
        threshold: of :func:`select_threshold`.

    Returns:
        One rising 1-D tensor per score tensor on its device, int32 (int64 for more than 2³¹ elements); together exactly
        k elements over all ranks.

    Raises:
        ValueError: if the scores are not those of the threshold.
        TypeError: for scores that are not dense floats.
    """
    with torch.no_grad():
        return torch.ops.fishertune.compact(
            as_list("scores", scores),
            threshold.value,
            list(threshold.greater_per_tensor),
            list(threshold.ties_kept_per_tensor),
        )
