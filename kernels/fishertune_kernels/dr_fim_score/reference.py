"""How much a parameter matters for the task and how much that changes under domain shift.

- ``f``: F (Eq. 4)
- ``delta_f``: |F − F'| / (min(F, F') + eps) (Eq. 5)
- ``dr_fim``: F + c·delta_f (Eq. 7)
- ``dr_fim_variational``: γ(E + c·|E − E'| / (min(E, E') + τ⁻² + eps/γ)) for excesses E = Λ − τ⁻² (Eq. 15, where
  Λ − Λ' = E − E' and min(Λ, Λ') = min(E, E') + τ⁻²)
"""

from __future__ import annotations

import torch

from ..select_threshold.reference import collect_bracket


def dr_fim_score(
    fisher: list[torch.Tensor],
    shifted: list[torch.Tensor],
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> list[torch.Tensor]:
    return [
        _score(fisher_i, shifted_i, kind, c, gamma, prior_precision, eps)
        for fisher_i, shifted_i in zip(fisher, shifted, strict=True)
    ]


def dr_fim_score_(
    scores: list[torch.Tensor],
    fisher: list[torch.Tensor],
    shifted: list[torch.Tensor],
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> None:
    for mean, fisher_i, shifted_i in zip(scores, fisher, shifted, strict=True):
        score = _score(fisher_i, shifted_i, kind, c, gamma, prior_precision, eps)
        if count == 1:
            mean.copy_(score)  # whatever the buffer held, NaN included, is not part of the mean
        else:
            mean.add_((score - mean) / count)


def dr_fim_score_collect_(
    scores: list[torch.Tensor],
    fisher: list[torch.Tensor],
    shifted: list[torch.Tensor],
    count: int,
    kind: str,
    c: float,
    gamma: float,
    prior_precision: float,
    eps: float,
    low: int,
    high: int,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`dr_fim_score_`, then ``collect_bracket`` of the new scores."""
    dr_fim_score_(scores, fisher, shifted, count, kind, c, gamma, prior_precision, eps)
    return collect_bracket(scores, low, high, capacity)


def _score(
    fisher: torch.Tensor, shifted: torch.Tensor, kind: str, c: float, gamma: float, prior_precision: float, eps: float
) -> torch.Tensor:
    dtype = torch.promote_types(fisher.dtype, torch.float32)
    fisher, shifted = fisher.to(dtype), shifted.to(dtype)
    if kind == "f":
        return fisher.clone()
    change, smaller = (fisher - shifted).abs(), torch.minimum(fisher, shifted)
    if kind == "delta_f":
        return change / (smaller + eps)
    if kind == "dr_fim":
        return fisher + c * change / (smaller + eps)
    return gamma * (fisher + c * change / (smaller + (prior_precision + eps / gamma)))
