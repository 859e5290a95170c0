"""Reading and writing selected elements of many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import as_list


def gather_values(tensors: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """tensor.flat[index] for every pair, as new 1-D tensors of the tensors' dtype (any dtype).

    Args:
        tensors: where to read.
        indices: flat, rising, without repeats; int32 or int64, one tensor per tensor (of :func:`compact`).

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.
    """
    with torch.no_grad():
        return torch.ops.fishertune.gather_values(as_list("tensors", tensors), as_list("indices", indices))


def scatter_values_(
    tensors: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor], values: Tensor | Sequence[Tensor]
) -> None:
    """tensor.flat[index] ← value for every triple, in place; the rest of each tensor is not touched.

    Args:
        tensors: contiguous, any dtype; updated.
        indices: flat, rising, without repeats; int32 or int64, one tensor per tensor.
        values: one value per index, in the tensor's dtype.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy. Nothing is changed then.
    """
    with torch.no_grad():
        torch.ops.fishertune.scatter_values_(
            as_list("tensors", tensors), as_list("indices", indices), as_list("values", values)
        )
