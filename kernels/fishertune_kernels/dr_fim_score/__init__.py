"""Domain-related Fisher scores of FisherTune, alone or as a running mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import as_list, checked_score_and_search
from ..select_threshold import Threshold


def dr_fim_score(
    fisher: Tensor | Sequence[Tensor],
    shifted: Tensor | Sequence[Tensor] | None,
    *,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> list[Tensor]:
    """The score of every element, from its Fisher F on the source and F' under simulated domain shift.

    - ``f``: F;  ``delta_f``: |F − F'| / (min(F, F') + eps);  ``dr_fim``: F + c·delta_f (FisherTune, Eq. 4, 5, 7).
    - ``dr_fim_variational`` (Eq. 15), for excesses E = Λ − τ⁻²: γ(E + c·|E − E'| / (min(E, E') + τ⁻² + eps/γ)).

    Args:
        fisher: F, or E for the variational kind; float32, bfloat16, float16 or float64.
        shifted: F' or E', same shapes; None is enough for ``f``.
        kind: one of the four above.
        c: weight of the domain term, exp(−(ε_μ + ε_σ)) in Eq. 7; at least 0.
        gamma, prior_precision: γ and τ⁻²; read by the variational kind only.
        eps: guards the division; 1e-8 as printed.

    Returns:
        float32 tensors of the same shapes (float64 for float64).

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.
    """
    fisher, shifted = _pair(fisher, shifted, kind)
    with torch.no_grad():
        return torch.ops.fishertune.dr_fim_score(fisher, shifted, kind, c, gamma, prior_precision, eps)


def dr_fim_score_(
    scores: Tensor | Sequence[Tensor],
    fisher: Tensor | Sequence[Tensor],
    shifted: Tensor | Sequence[Tensor] | None,
    *,
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
) -> None:
    """Running mean of :func:`dr_fim_score`: scores ← scores + (score − scores)/count, in place.

    Args:
        scores: contiguous float32 (or float64) tensors, updated; their content does not matter at ``count`` 1.
        count: how many scores the mean holds after this one: 1, 2, 3, …
        fisher, shifted, kind, c, gamma, prior_precision, eps: as for :func:`dr_fim_score`; c may change every time.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.
    """
    fisher, shifted = _pair(fisher, shifted, kind)
    with torch.no_grad():
        torch.ops.fishertune.dr_fim_score_(
            as_list("scores", scores), fisher, shifted, count, kind, c, gamma, prior_precision, eps
        )


def dr_fim_threshold_(
    scores: Tensor | Sequence[Tensor],
    fisher: Tensor | Sequence[Tensor],
    shifted: Tensor | Sequence[Tensor] | None,
    k: int,
    *,
    count: int,
    kind: str,
    c: float,
    gamma: float = 1.0,
    prior_precision: float = 0.0,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
) -> Threshold:
    """:func:`dr_fim_score_` and :func:`select_threshold` of the new scores, in one pass over memory.

    The pass that writes the scores also counts them: the threshold costs no read of its own, except where masses of
    scores are equal or there are few. The results are those of the two calls, exactly.

    Args:
        scores, fisher, shifted, count, kind, c, gamma, prior_precision, eps: as for :func:`dr_fim_score_`.
        k, group: as for :func:`select_threshold`.

    Returns:
        The :class:`Threshold` of the k largest of the updated ``scores``.

    Raises:
        TypeError, ValueError: as the two functions. NaN scores are refused after the scores were written.
    """
    fisher, shifted = _pair(fisher, shifted, kind)
    with torch.no_grad():
        return checked_score_and_search(
            as_list("scores", scores), fisher, shifted, k, count, kind, c, gamma, prior_precision, eps, group
        )


def _pair(
    fisher: Tensor | Sequence[Tensor], shifted: Tensor | Sequence[Tensor] | None, kind: str
) -> tuple[list[Tensor], list[Tensor]]:
    fisher = as_list("fisher", fisher)
    if shifted is None:
        if kind != "f":
            raise ValueError(f"kind={kind!r} compares two Fishers but shifted is None. Pass it, or kind='f'.")
        return fisher, fisher
    return fisher, as_list("shifted", shifted)
