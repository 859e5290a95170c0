"""AdamW on selected elements in C++: gathers, steps and scatters in cache-sized blocks, all tensors in one call."""

from __future__ import annotations

import ctypes
import math

import torch

from ..native import DTYPES, INDEX_DTYPES, Rows, call


class _AdamW(ctypes.Structure):
    """``ft_adamw`` of the header."""

    _fields_ = (
        *(
            (name, ctypes.c_double)
            for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_scale", "active_threshold")
        ),
        *((name, ctypes.c_int64) for name in ("step", "compact_grads", "stochastic")),
        ("seed", ctypes.c_uint64),
    )


def sparse_adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    indices: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    scores: list[torch.Tensor] | None = None,
    active_threshold: float | None = None,
    grad_scale: float | torch.Tensor = 1.0,
    master: list[torch.Tensor] | None = None,
    compact_grads: bool = False,
    seed: int | None = None,
    offsets: list[int] | None = None,
) -> None:
    gated = scores is not None and active_threshold is not None
    rows = Rows()
    for i, (param, grad, index, mean, square) in enumerate(
        zip(params, grads, indices, exp_avg, exp_avg_sq, strict=True)
    ):
        rows.add(
            rows.write(param, dtype=None),
            rows.read(grad),
            rows.read(index),
            rows.write(mean),
            rows.write(square),
            rows.read_float(scores[i]) if gated and scores is not None else 0,
            rows.write(master[i]) if master is not None else 0,
            param.numel(),
            index.numel(),
            DTYPES[param.dtype],
            DTYPES[grad.dtype],
            INDEX_DTYPES[index.dtype],
            offsets[i] if offsets else 0,
        )
    threshold = active_threshold if gated and active_threshold is not None else -math.inf
    options = _AdamW(
        lr, *betas, eps, weight_decay, float(grad_scale), threshold, step, compact_grads, seed is not None, seed or 0
    )
    call("ft_sparse_adamw", rows, ctypes.addressof(options))
