"""Reading and writing selected elements: values = tensor.flat[index], and the reverse."""

from __future__ import annotations

import torch


def gather_values(tensors: list[torch.Tensor], indices: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.reshape(-1)[index.long()] for tensor, index in zip(tensors, indices, strict=True)]


def gather_values_into_(out: torch.Tensor, tensors: list[torch.Tensor], indices: list[torch.Tensor]) -> None:
    torch.cat(gather_values(tensors, indices), out=out)


def scatter_values_(tensors: list[torch.Tensor], indices: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for tensor, index, value in zip(tensors, indices, values, strict=True):
        tensor.view(-1)[index.long()] = value
