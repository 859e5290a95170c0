"""AdamW (Loshchilov & Hutter, 2019) on selected elements only; state is compact, one entry per selected element.

    g = grad_scale·grad[index]
    m ← β₁m + (1−β₁)g          v ← β₂v + (1−β₂)g²
    θ ← (1 − lr·λ)θ − lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + eps)

An element whose score is below ``active_threshold`` is not part of today's set (Eq. 16): its moments are kept current,
its parameter is left alone.
"""

from __future__ import annotations

import math

import torch

from ..philox import rounding_bits


def stochastically_rounded(values: torch.Tensor, elements: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """float32 to bfloat16, up in magnitude with probability (dropped bits)/2¹⁶: bfloat16 is the upper half of float32,
    so a sum with 16 random bits that carries is exactly that event. A finite value stays finite."""
    word = values.view(torch.int32).long() & 0xFFFFFFFF
    down, moved = word >> 16, (word + rounding_bits(elements, seed=seed, step=step)) >> 16
    result = torch.where(((moved & 0x7F80) == 0x7F80) | ~values.isfinite(), down, moved)
    return torch.where(values.isnan(), 0x7FC0, result).to(torch.int16).view(torch.bfloat16)


def sparse_adamw_(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    indices: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    scores: list[torch.Tensor] | None = None,
    active_threshold: float | None = None,
    grad_scale: float | torch.Tensor = 1.0,
    master: list[torch.Tensor] | None = None,
    compact_grads: bool = False,
    seed: int | None = None,
    offsets: list[int] | None = None,
) -> None:
    """``seed`` None rounds to nearest even; else ``offsets`` are the global indices of the tensors' first elements."""
    beta1, beta2 = betas
    correction1, correction2_sqrt = 1 - beta1**step, math.sqrt(1 - beta2**step)
    for i, (param, grad, index, mean, square) in enumerate(
        zip(params, grads, indices, exp_avg, exp_avg_sq, strict=True)
    ):
        index = index.long()
        flat = param.view(-1)
        selected = grad if compact_grads else grad.reshape(-1)[index]
        scale = grad_scale.reshape(()).to(mean.dtype) if isinstance(grad_scale, torch.Tensor) else grad_scale
        g = selected.to(mean.dtype) * scale
        mean.lerp_(g, 1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)

        old = master[i] if master is not None else flat[index].to(mean.dtype)
        denominator = (square.sqrt() / correction2_sqrt).add_(eps)
        new = (old * (1 - lr * weight_decay)).addcdiv_(mean, denominator, value=-lr / correction1)
        if scores is not None and active_threshold is not None:
            active = scores[i] >= active_threshold
            index, new = index[active], new[active]
            if master is not None:
                master[i][active] = new
        elif master is not None:
            master[i].copy_(new)
        if seed is None or offsets is None:
            flat[index] = new.to(param.dtype)
        else:
            flat[index] = stochastically_rounded(new, index + offsets[i], seed, step)
