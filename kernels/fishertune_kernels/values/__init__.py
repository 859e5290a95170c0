"""Reading and writing selected elements of many tensors at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import as_flat_list, as_list


def gather_values(
    tensors: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor], out: Tensor | None = None
) -> list[Tensor]:
    """tensor.flat[index] for every pair, as 1-D tensors of the tensors' dtype (any dtype).

    Args:
        tensors: where to read.
        indices: flat, rising, without repeats; int32 or int64, one tensor per tensor (of :func:`compact`).
        out: a contiguous 1-D tensor with one element for every index, in the dtype of all tensors; it receives the
            values one tensor after the other, and views of it are returned. One buffer is one all-reduce, and
            :func:`scatter_values_`, :func:`sparse_adamw_` and :func:`selected_grad_norm` take it as it is. Without it
            every pair gets a new tensor.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy. Nothing is changed then.
    """
    tensors, indices = as_list("tensors", tensors), as_list("indices", indices)
    with torch.no_grad():
        if out is None:
            return torch.ops.fishertune.gather_values(tensors, indices)
        torch.ops.fishertune.gather_values_into_(out, tensors, indices)
        return list(out.split([index.numel() for index in indices]))


def scatter_values_(
    tensors: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor], values: Tensor | Sequence[Tensor]
) -> None:
    """tensor.flat[index] ← value for every triple, in place; the rest of each tensor is not touched.

    Args:
        tensors: contiguous, any dtype; updated.
        indices: flat, rising, without repeats; int32 or int64, one tensor per tensor.
        values: one value per index, in the tensor's dtype: a list of 1-D tensors, or one 1-D tensor with all of them
            in order (the buffer of :func:`gather_values`).

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy. Nothing is changed then.
    """
    indices = as_list("indices", indices)
    with torch.no_grad():
        torch.ops.fishertune.scatter_values_(
            as_list("tensors", tensors), indices, as_flat_list("values", values, indices)
        )
