"""AdamW on selected elements, with state for these alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import as_flat_list, as_list, running_offsets


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
    grad_scale: float | Tensor = 1.0,
    master: Tensor | Sequence[Tensor] | None = None,
    compact_grads: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    offsets: Sequence[int] | None = None,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2019, as ``torch.optim.AdamW``) on params.flat[indices], in place.

    Nothing else of ``params`` is written: no weight decay, momentum or rounding reaches unselected elements.

    **Stochastic rounding.** bfloat16 is the upper half of float32: storing drops 16 bits. Sixteen random bits are added
    to them, and a carry rounds up in magnitude, so the probability is exactly what was dropped, in units of 2⁻¹⁶, and
    the stored value is the float32 result on average; more bits would change nothing. Updates far below half a unit in
    the last place then add up, without the master copy's 4 bytes a selected element. The bits are the upper half of
    word g & 3 of Philox4x32-10 with key ``seed`` and counter (g >> 2 with the top bit of its 64 set, ``step``), g being
    the element's global index: the same on every backend and however a parameter is sharded (Salmon et al., SC 2011).
    A finite result is stored finite (rounded down next to the largest bfloat16), infinity stays, NaN is quiet.

    Args:
        params: contiguous float32, bfloat16, float16 (or float64) tensors, updated.
        grads: dense gradients, same shapes; see ``compact_grads``.
        indices: flat, rising, without repeats; int32 or int64, one tensor per parameter (of :func:`compact`).
        exp_avg, exp_avg_sq: moments, one float32 value per index (float64 for float64 parameters), updated.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        step: number of this step, from 1.
        scores: one value per index in the moments' dtype; needed with ``active_threshold``.
        active_threshold: elements scoring below it keep their value today; their moments are updated all the same, so
            that they are right when the element joins. None moves every selected element.
        grad_scale: every gradient is multiplied by it (clipping, loss scaling). A tensor of one float32 element
            (float64 for float64 parameters) on the parameters' device is read by the kernel, so that the host need not
            wait for it; unlike a number it is not checked: NaN or infinity in it reaches moments and parameters.
        master: one value per index in the moments' dtype: the parameter at full precision. Updated; ``params`` gets
            its rounding (to nearest even).
        compact_grads: ``grads`` holds one value per index: a list of 1-D tensors, or one 1-D tensor with all of them in
            order (the buffer of :func:`gather_values`, after its all-reduce).
        rounding: "nearest" (even), or "stochastic" for bfloat16 parameters without master.
        seed: of the stochastic rounding, in [0, 2⁶³).
        offsets: global flat index of each parameter's first element, for the stochastic rounding; by default the list
            counts as one long vector.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy. Nothing is changed then.
    """
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={rounding!r} is unknown. Use 'nearest' or 'stochastic'.")
    params, indices = as_list("params", params), as_list("indices", indices)
    stochastic = rounding == "stochastic"
    if stochastic and offsets is None:
        offsets = running_offsets(params)
    scaled = isinstance(grad_scale, Tensor)
    with torch.no_grad():
        torch.ops.fishertune.sparse_adamw_(
            params,
            as_flat_list("grads", grads, indices) if compact_grads else as_list("grads", grads),
            indices,
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
            1.0 if scaled else grad_scale,
            grad_scale if scaled else None,
            compact_grads,
            stochastic,
            seed,
            list(offsets) if stochastic and offsets is not None else [],
        )
