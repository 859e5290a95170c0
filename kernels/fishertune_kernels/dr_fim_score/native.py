"""Scores of Eq. 4, 5, 7 and 15 in C++: one pass, the running mean and the counting for a threshold included."""

from __future__ import annotations

import ctypes

import torch

from ..native import DTYPES, Rows, call
from ..select_threshold.native import Bracket

_KINDS = {"f": 0, "delta_f": 1, "dr_fim": 2, "dr_fim_variational": 3}


def dr_fim_score(
    fisher: list[torch.Tensor],
    shifted: list[torch.Tensor],
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> list[torch.Tensor]:
    scores = [torch.empty(tensor.shape, dtype=torch.float32, device="cpu") for tensor in fisher]
    dr_fim_score_(scores, fisher, shifted, 1, kind, c, gamma, prior_precision, eps)
    return scores


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
    rows = _rows(scores, fisher, shifted)
    call("ft_dr_fim_score", rows, _KINDS[kind], c, gamma, prior_precision, eps, count, None)


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
    bracket = Bracket(len(scores), low, high, capacity)
    rows, address = _rows(scores, fisher, shifted), ctypes.addressof(bracket)
    call("ft_dr_fim_score", rows, _KINDS[kind], c, gamma, prior_precision, eps, count, address)
    return bracket.result()


def _rows(scores: list[torch.Tensor], fisher: list[torch.Tensor], shifted: list[torch.Tensor]) -> Rows:
    rows = Rows()
    for score, fisher_i, shifted_i in zip(scores, fisher, shifted, strict=True):
        if fisher_i.dtype != shifted_i.dtype:
            fisher_i, shifted_i = fisher_i.float(), shifted_i.float()
        rows.add(rows.write(score), rows.read(fisher_i), rows.read(shifted_i), fisher_i.numel(), DTYPES[fisher_i.dtype])
    return rows
