"""Both updates of the posterior precision in C++: one pass, the draw ε regenerated instead of read."""

from __future__ import annotations

import ctypes

import torch

from ..native import DTYPES, Rows, call

_MASK_64 = (1 << 64) - 1


class _Sgvb(ctypes.Structure):
    """``ft_sgvb`` of the header."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "gamma", "prior_precision", "sign")),
        ("seed", ctypes.c_uint64),
        ("noise_step", ctypes.c_uint64),
        ("step", ctypes.c_int64),
    )


def precision_update_natural_(
    excess: list[torch.Tensor], squared_grads: list[torch.Tensor], beta: float, gamma: float
) -> None:
    rows = Rows()
    for excess_i, squared in zip(excess, squared_grads, strict=True):
        rows.add(rows.write(excess_i), rows.read(squared), squared.numel(), DTYPES[squared.dtype])
    call("ft_precision_update_natural", rows, beta, gamma)


def precision_update_sgvb_(
    excess: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    gamma: float,
    prior_precision: float,
    seed: int,
    noise_step: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> None:
    rows = Rows()
    for excess_i, grad, mean, square, offset in zip(excess, grads, exp_avg, exp_avg_sq, offsets, strict=True):
        rows.add(
            rows.write(excess_i),
            rows.read(grad),
            rows.write(mean),
            rows.write(square),
            grad.numel(),
            DTYPES[grad.dtype],
            offset,
        )
    options = _Sgvb(lr, *betas, eps, gamma, prior_precision, sign, seed & _MASK_64, noise_step & _MASK_64, step)
    call("ft_precision_update_sgvb", rows, ctypes.addressof(options))
