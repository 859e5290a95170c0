"""Joint L2 norm of selected gradients: ‖g‖ = s·√Σ(g/s)² with s = max|g|, so that no square leaves float32's range."""

from __future__ import annotations

import torch


def selected_grad_norm(grads: list[torch.Tensor], indices: list[torch.Tensor] | None) -> torch.Tensor:
    """``indices`` None stands for every element."""
    flat = [grad.reshape(-1) for grad in grads]
    if indices is not None:
        flat = [grad[index.long()] for grad, index in zip(flat, indices, strict=True)]
    wide = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    values = torch.cat([grad.to(wide) for grad in flat])
    largest = values.abs().amax() if values.numel() else values.new_zeros(())
    scale = torch.where(largest.isfinite() & (largest > 0), largest, torch.ones_like(largest))
    return (values / scale).square().sum().sqrt() * scale
