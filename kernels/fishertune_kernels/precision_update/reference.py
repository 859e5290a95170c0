"""One step on the posterior precision, kept as the excess E = Λ − τ⁻² so that small Fisher values survive rounding.

Natural gradient of Eq. 11 (as VOGN): Λ ← (1−β)Λ + β(F̂/γ + τ⁻²), that is E ← (1−β)E + β·F̂/γ.

Reparameterised (SGVB, the paper's wording): θ = θ̂ + sign·Λ^−½ε and Adam on log Λ. With g the gradient at θ,
∂/∂logΛ = −½·sign·ε·Λ^−½·g + ½γ(1 − τ⁻²/Λ), the second term from γ·KL (Eq. 12).
"""

from __future__ import annotations

import torch

from ..philox import standard_normal


def precision_update_natural_(
    excess: list[torch.Tensor], squared_grads: list[torch.Tensor], beta: float, gamma: float
) -> None:
    for excess_i, squared in zip(excess, squared_grads, strict=True):
        excess_i.mul_(1 - beta).add_(squared.to(excess_i.dtype), alpha=beta / gamma)


def precision_update_sgvb_(
    excess: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    gamma: float,
    prior_precision: float,
    seed: int,
    noise_step: int,
    step: int,
    offsets: list[int],
    sign: float = 1.0,
) -> None:
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    for excess_i, grad, mean, square, offset in zip(excess, grads, exp_avg, exp_avg_sq, offsets, strict=True):
        dtype = excess_i.dtype
        epsilon = standard_normal(
            grad.numel(), seed=seed, step=noise_step, offset=offset, device=grad.device, dtype=dtype
        ).view(grad.shape)
        precision = excess_i + prior_precision
        # 1 − τ⁻²/Λ written as E/Λ: no cancellation where E is small beside τ⁻².
        log_grad = -0.5 * sign * epsilon * torch.rsqrt(precision) * grad.to(dtype) + 0.5 * gamma * excess_i / precision
        mean.lerp_(log_grad, 1 - beta1)
        square.mul_(beta2).addcmul_(log_grad, log_grad, value=1 - beta2)
        delta = -(lr / correction1) * mean / ((square / correction2).sqrt() + eps)
        # Λ·exp(δ) is positive, but E + τ⁻² can round to zero: keep E at least two roundings above −τ⁻².
        floor = -prior_precision * (1 - 2.0**-23)
        excess_i.add_(precision * torch.expm1(delta)).clamp_(min=floor)
