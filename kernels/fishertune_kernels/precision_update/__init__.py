"""One step on the posterior precision Λ, kept as its excess E = Λ − τ⁻² over the prior's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import as_list, check_seed, running_offsets


def precision_update_natural_(
    excess: Tensor | Sequence[Tensor], squared_grads: Tensor | Sequence[Tensor], *, beta: float, gamma: float
) -> None:
    """E ← (1−β)E + β·F̂/γ, in place: the natural-gradient step of FisherTune's Eq. 11 (VOGN, Khan et al. 2018).

    Args:
        excess: E, contiguous float32 (or float64) tensors, updated.
        squared_grads: F̂, the mean of per-sample squared gradients at the drawn θ, same shapes.
        beta: step size in [0, 1].
        gamma: weight of the KL term (Eq. 11), positive.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.
    """
    with torch.no_grad():
        torch.ops.fishertune.precision_update_natural_(
            as_list("excess", excess), as_list("squared_grads", squared_grads), beta, gamma
        )


def precision_update_sgvb_(
    excess: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    gamma: float,
    prior_precision: float,
    seed: int,
    noise_step: int,
    step: int,
    offsets: Sequence[int] | None = None,
    sign: float = 1.0,
) -> None:
    """One Adam step on log Λ through θ = θ̂ + sign·Λ^−½ε (FisherTune, Eq. 11–13), in place.

    With Λ = E + τ⁻² the gradient is −½·sign·ε·Λ^−½·g + ½γ(1 − τ⁻²/Λ); Adam turns it into a step δ of log Λ, and
    E ← E + Λ·(e^δ − 1). Λ stays positive: E is kept at or above −τ⁻²(1 − 2⁻²³).

    Args:
        excess: E, contiguous float32 (or float64), updated.
        grads: g, the gradient of the batch's mean loss at the perturbed θ, same shapes.
        exp_avg, exp_avg_sq: Adam's moments of the log-precision gradient, same shapes and dtype as ``excess``, updated.
        lr, betas, eps: Adam's; lr is in units of log Λ.
        gamma: weight of the KL term, positive.
        prior_precision: τ⁻², positive.
        seed, noise_step, offsets, sign: as given to :func:`gaussian_perturb` (whose ``step`` is ``noise_step`` here).
        step: Adam's step, from 1.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.
    """
    excess = as_list("excess", excess)
    check_seed(seed, noise_step=noise_step)
    with torch.no_grad():
        torch.ops.fishertune.precision_update_sgvb_(
            excess,
            as_list("grads", grads),
            as_list("exp_avg", exp_avg),
            as_list("exp_avg_sq", exp_avg_sq),
            lr,
            betas[0],
            betas[1],
            eps,
            gamma,
            prior_precision,
            seed,
            noise_step,
            step,
            running_offsets(excess) if offsets is None else list(offsets),
            sign,
        )


def precision_update_(
    excess: Tensor | Sequence[Tensor], grads: Tensor | Sequence[Tensor], *, method: str = "natural", **arguments: Any
) -> None:
    """One step on the posterior precision by either method, chosen by name.

    Args:
        excess: E = Λ − τ⁻², updated in place.
        grads: mean per-sample squared gradients for ``natural``, gradients for ``sgvb``.
        method: ``natural`` (:func:`precision_update_natural_`) or ``sgvb`` (:func:`precision_update_sgvb_`).
        arguments: that function's keywords; ``sgvb`` takes ``exp_avg`` and ``exp_avg_sq`` here too.

    Raises:
        ValueError: for another method; TypeError, ValueError: as the function called.
    """
    if method == "natural":
        precision_update_natural_(excess, grads, **arguments)
    elif method == "sgvb":
        precision_update_sgvb_(excess, grads, **arguments)
    else:
        raise ValueError(f"method={method!r} is not a precision update. Use 'natural' or 'sgvb'.")
