"""Draws from the Gaussian posterior over parameters, with noise that can be drawn again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import as_list, check_seed, running_offsets


def gaussian_perturb(
    params: Tensor | Sequence[Tensor],
    excess: Tensor | Sequence[Tensor],
    *,
    prior_precision: float,
    seed: int,
    step: int,
    offsets: Sequence[int] | None = None,
    sign: float = 1.0,
) -> list[Tensor]:
    """θ' = θ̂ + sign·(E + τ⁻²)^−½·ε, a draw from q(θ) = N(θ̂, Λ⁻¹) (FisherTune, Eq. 10), as new tensors.

    ε is a pure function of (seed, step, global element index): shards of a tensor, given their offsets, get the values
    the whole tensor would, and :func:`precision_update_sgvb_` draws the same ε again.

    Args:
        params: θ̂; float32, bfloat16, float16 or float64. Not changed.
        excess: E = Λ − τ⁻², float32 (or float64), same shapes; E + τ⁻² must be positive.
        prior_precision: τ⁻², positive.
        seed, step: which draw; integers in [0, 2⁶³).
        offsets: global flat index of each tensor's first element; by default the list counts as one long vector.
        sign: +1, or −1 for the antithetic partner.

    Returns:
        One tensor per parameter, of its shape and dtype; computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.
    """
    params = as_list("params", params)
    check_seed(seed, step=step)
    with torch.no_grad():
        return torch.ops.fishertune.gaussian_perturb(
            params,
            as_list("excess", excess),
            prior_precision,
            seed,
            step,
            running_offsets(params) if offsets is None else list(offsets),
            sign,
        )
