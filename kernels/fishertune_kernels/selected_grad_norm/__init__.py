"""The gradient norm of what is selected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import as_list


def selected_grad_norm(grads: Tensor | Sequence[Tensor], indices: Tensor | Sequence[Tensor] | None = None) -> Tensor:
    """√Σ g[index]² over all tensors, the joint L2 norm of the gradient that a sparse step sees.

    Repeated calls give the same bits, on a CPU also on any number of threads and with any instruction set. On a GPU the
    host does not wait: use the result as a tensor, for example ``grad_scale=(max_norm / (norm + 1e-6)).clamp(max=1)``
    of :func:`sparse_adamw_`. Squares do not overflow or vanish, whatever the gradients' size: CPUs add in float64, GPUs
    scale by powers of two. Infinity and NaN come through.

    Args:
        grads: dense gradients, float32, bfloat16, float16 or float64, on one device.
        indices: flat, rising, without repeats; int32 or int64, one tensor per gradient (of :func:`compact`). None
            counts every element, as is right for compact gradients (of :func:`gather_values`) and for dense parameters.

    Returns:
        A scalar tensor on the gradients' device, float32 (float64 if a gradient is).

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.

    Source: ``torch.nn.utils.clip_grad_norm_``, restricted to a selection.
    """
    with torch.no_grad():
        return torch.ops.fishertune.selected_grad_norm(
            as_list("grads", grads), None if indices is None else as_list("indices", indices)
        )
