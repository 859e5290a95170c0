"""Sums of squared per-sample gradients: what a parameter gets from all of its uses, squared, summed over samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fishertune.fisher.rules import Affine, Slot
from fishertune_kernels import per_sample_affine_squared_grad_, per_sample_squared_grad_


class SquaredSums:
    """acc ← acc + weight·Σ_n (Σ_uses gradient_n)² for every parameter of one batch.

    A parameter used once is squared as soon as its gradient arrives. One used more often waits for the others: the
    factors of shared Linear weights are joined along the tokens, everything else is held per sample.

    Args:
        accumulators: by parameter name, changed in place.
        shadows: by parameter name, the leaves that derived slots lead back to.
        weight: factor of the squares.
        samples: N.
        uses: how many slots each parameter has in this batch.
        products: parameters that are only ever used as the weight of Linear-like calls.
    """

    def __init__(
        self,
        accumulators: Mapping[str, Tensor],
        shadows: Mapping[str, Tensor],
        weight: float,
        samples: int,
        uses: Counter[str],
        products: set[str],
    ) -> None:
        self._accumulators = accumulators
        self._shadows = shadows
        self._weight = weight
        self._samples = samples
        self._uses = uses
        self._products = products
        self._held: dict[str, Tensor] = {}
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def takes_product(self, slot: Slot) -> bool:
        """Whether the slot's gradient should come as two factors rather than as a tensor."""
        return slot.source is None and slot.names[0] in self._products

    def add_product(self, weight: Slot, bias: Slot | None, x_NTI: Tensor, dy_NTO: Tensor) -> None:
        """The gradient dYₙᵀXₙ of a weight, and Σ_t dYₙ of its bias."""
        name = weight.names[0]
        fused = bias is not None and bias.source is None and self._uses[bias.names[0]] == self._uses[name] == 1
        if bias is not None and not fused:
            self.add(bias, 0, dy_NTO.sum(dim=1, dtype=torch.promote_types(dy_NTO.dtype, torch.float32)))
        if self._uses[name] > 1:
            waiting = self._factors.setdefault(name, [])
            waiting.append((x_NTI, dy_NTO))
            if len(waiting) == self._uses[name]:
                self._square_product(name)
            return
        self._square(name, x_NTI, dy_NTO, self._accumulators[bias.names[0]] if bias is not None and fused else None)

    def takes_affine(self, slots: Sequence[Slot]) -> bool:
        """Whether the gradients of these slots may be squared as they come: each is all there is of its parameter."""
        return (
            all(slot.source is None and self._uses[slot.names[0]] == 1 for slot in slots)
            and len({self._accumulators[slot.names[0]].dtype for slot in slots}) == 1
        )

    def add_affine(self, affine: Affine) -> None:
        """The gradients of a weight and a bias along the last dimension."""
        weight, bias = (
            None if slot is None else self._accumulators[slot.names[0]].view(-1)
            for slot in (affine.weight, affine.bias)
        )
        scale = self._weight * affine.factor**2
        per_sample_affine_squared_grad_(
            weight, bias, affine.x_NTC, affine.dy_NTC, scale, affine.mean_NT, affine.rstd_NT
        )

    def add(self, slot: Slot, start: int, grads: Tensor) -> None:
        """Gradients (k, *slot shape) of samples start … start + k − 1."""
        if slot.source is None:
            self._add(slot.names[0], start, grads)
            return
        leaves = [self._shadows[name] for name in slot.names]
        for i, grad in enumerate(grads):
            pulled = torch.autograd.grad(
                slot.source, leaves, grad.to(slot.source.dtype), retain_graph=True, allow_unused=True
            )
            for name, part in zip(slot.names, pulled, strict=True):
                if part is not None:
                    self._add(name, start + i, part[None])

    def add_direct(self, name: str, sample: int, grad: Tensor) -> None:
        """The gradient of one sample, as autograd computed it for the whole model."""
        self._add(name, sample, grad[None])

    def finish(self) -> None:
        """Squares what is still held."""
        for name in list(self._factors):
            self._square_product(name)
        for name, grads in self._held.items():
            self._accumulators[name].add_(grads.square_().sum(dim=0), alpha=self._weight)
        self._held.clear()

    def _add(self, name: str, start: int, grads: Tensor) -> None:
        accumulator = self._accumulators[name]
        grads = grads.to(accumulator.dtype)
        if self._uses[name] > 1:
            if name not in self._held:
                self._held[name] = accumulator.new_zeros(self._samples, *accumulator.shape)
            self._held[name][start : start + len(grads)] += grads
        elif len(grads) == 1:
            accumulator.addcmul_(grads[0], grads[0], value=self._weight)
        else:
            accumulator.add_(grads.square().sum(dim=0), alpha=self._weight)

    def _square_product(self, name: str) -> None:
        factors = self._factors.pop(name)
        self._square(name, torch.cat([x for x, _ in factors], dim=1), torch.cat([dy for _, dy in factors], dim=1), None)

    def _square(self, name: str, x_NTI: Tensor, dy_NTO: Tensor, bias_accumulator: Tensor | None) -> None:
        accumulator = self._accumulators[name]
        per_sample_squared_grad_(
            accumulator.view(accumulator.shape[0], -1), x_NTI, dy_NTO, self._weight, bias_accumulator
        )
