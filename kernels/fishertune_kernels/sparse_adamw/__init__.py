"""AdamW on selected elements, with state for these alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import as_list


def sparse_adamw_(
    params: Tensor | Sequence[Tensor],
    grads: Tensor | Sequence[Tensor],
    indices: Tensor | Sequence[Tensor],
    exp_avg: Tensor | Sequence[Tensor],
    exp_avg_sq: Tensor | Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    scores: Tensor | Sequence[Tensor] | None = None,
    active_threshold: float | None = None,
    grad_scale: float = 1.0,
    master: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019, as ``torch.optim.AdamW``) on params.flat[indices], in place.

    Nothing else of ``params`` is written: no weight decay, momentum or rounding reaches unselected elements.

    Args:
        params: contiguous float32, bfloat16, float16 (or float64) tensors, updated.
        grads: dense gradients, same shapes.
        indices: flat, rising, without repeats; int32 or int64, one tensor per parameter (of :func:`compact`).
        exp_avg, exp_avg_sq: moments, one float32 value per index (float64 for float64 parameters), updated.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        step: number of this step, from 1.
        scores: one value per index in the moments' dtype; needed with ``active_threshold``.
        active_threshold: elements scoring below it keep their value today; their moments are updated all the same, so
            that they are right when the element joins. None moves every selected element.
        grad_scale: every gradient is multiplied by it (clipping, loss scaling).
        master: one value per index in the moments' dtype: the parameter at full precision. Updated; ``params`` gets
            its rounding (to nearest even).

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy. Nothing is changed then.
    """
    with torch.no_grad():
        torch.ops.fishertune.sparse_adamw_(
            as_list("params", params),
            as_list("grads", grads),
            as_list("indices", indices),
            as_list("exp_avg", exp_avg),
            as_list("exp_avg_sq", exp_avg_sq),
            [] if scores is None else as_list("scores", scores),
            [] if master is None else as_list("master", master),
            lr,
            betas[0],
            betas[1],
            eps,
            weight_decay,
            step,
            active_threshold,
            grad_scale,
        )
