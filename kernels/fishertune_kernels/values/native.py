"""Reading and writing selected elements in C++, as bit patterns of any dtype up to eight bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..native import INDEX_DTYPES, Rows, call


def gather_values(tensors: list[torch.Tensor], indices: list[torch.Tensor]) -> list[torch.Tensor]:
    values = [
        torch.empty(index.numel(), dtype=tensor.dtype, device="cpu")
        for tensor, index in zip(tensors, indices, strict=True)
    ]
    _gather(tensors, indices, values)
    return values


def gather_values_into_(out: torch.Tensor, tensors: list[torch.Tensor], indices: list[torch.Tensor]) -> None:
    _gather(tensors, indices, out.split([index.numel() for index in indices]))


def _gather(tensors: list[torch.Tensor], indices: list[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    rows = Rows()
    for tensor, index, value in zip(tensors, indices, values, strict=True):
        rows.add(
            rows.read(tensor),
            rows.read(index),
            rows.write(value, dtype=None),
            tensor.numel(),
            index.numel(),
            tensor.element_size(),
            INDEX_DTYPES[index.dtype],
        )
    call("ft_gather_values", rows)


def scatter_values_(tensors: list[torch.Tensor], indices: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    rows = Rows()
    for tensor, index, value in zip(tensors, indices, values, strict=True):
        rows.add(
            rows.write(tensor, dtype=None),
            rows.read(index),
            rows.read(value.to(tensor.dtype)),
            tensor.numel(),
            index.numel(),
            tensor.element_size(),
            INDEX_DTYPES[index.dtype],
        )
    call("ft_scatter_values", rows)
