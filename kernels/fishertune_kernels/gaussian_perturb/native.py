"""θ' = θ̂ + sign·(E + τ⁻²)^−½·ε in C++: one read, one write, ε drawn on the way."""

from __future__ import annotations

import torch

from ..native import DTYPES, Rows, call

_MASK_64 = (1 << 64) - 1


def gaussian_perturb(
    params: list[torch.Tensor],
    excess: list[torch.Tensor],
    prior_precision: float,
    seed: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> list[torch.Tensor]:
    perturbed = [torch.empty_like(param, memory_format=torch.contiguous_format) for param in params]
    rows = Rows()
    for param, excess_i, out, offset in zip(params, excess, perturbed, offsets, strict=True):
        rows.add(
            rows.read(param),
            rows.read_float(excess_i),
            rows.write(out, dtype=None),
            param.numel(),
            DTYPES[param.dtype],
            offset,
        )
    call("ft_gaussian_perturb", rows, prior_precision, seed & _MASK_64, step & _MASK_64, sign)
    return perturbed
