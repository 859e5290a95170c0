"""Joint L2 norm of selected gradients in C++, added up in float64: one pass over all tensors of the list."""

from __future__ import annotations

import ctypes

import torch

from ..native import DTYPES, INDEX_DTYPES, Rows, call


def selected_grad_norm(grads: list[torch.Tensor], indices: list[torch.Tensor] | None) -> torch.Tensor:
    rows = Rows()
    for i, grad in enumerate(grads):
        index = None if indices is None else indices[i]
        rows.add(
            rows.read(grad),
            0 if index is None else rows.read(index),
            grad.numel(),
            grad.numel() if index is None else index.numel(),
            DTYPES[grad.dtype],
            0 if index is None else INDEX_DTYPES[index.dtype],
        )
    norm = ctypes.c_double()
    call("ft_selected_grad_norm", rows, ctypes.addressof(norm))
    return torch.tensor(norm.value, dtype=torch.float32, device="cpu")
