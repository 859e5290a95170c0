"""Per-sample gradients of the parameters one torch call uses, from that call's inputs and its output gradient.

A rule is built while the model runs forward, from one call that met parameters, and is asked for gradients once the
gradient dY of the call's output is known. Every rule is exact and local: it sees one call, never the network.

* :class:`Linear`: the gradient of sample n is dYₙᵀXₙ. The two factors go to a fused kernel that never writes it.
* :class:`Convolution`: a Linear layer over patches where patches do not overlap (patch embedding), else the framework's
  own weight gradient, sample by sample.
* :class:`LayerNorm`, :class:`BatchNorm`, :class:`Scale`, :class:`Shift`: sums of dY or dY·x. Where the parameter fills
  the last dimensions, as it nearly always does, another fused kernel takes them as they are (:class:`Affine`).
* :class:`Rerun`: any other call, run again for one sample at a time and differentiated with respect to the parameters.

A call's samples lie along one dimension of its inputs and outputs, in blocks of equal size (windowed attention puts all
windows of an image one after another): :class:`Layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the samples are: ``samples`` blocks of equal size along dimension ``dim``."""

    samples: int
    dim: int = 0

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > self.dim and shape[self.dim] % self.samples == 0

    def first(self, tensor: Tensor) -> Tensor:
        """The tensor with its samples along dimension 0."""
        return tensor.movedim(self.dim, 0) if self.dim else tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """(..., C) as (samples, rows of the sample, C)."""
        return self.first(tensor).reshape(self.samples, -1, tensor.shape[-1])

    def part(self, tensor: Tensor, sample: int) -> Tensor:
        """The block of one sample."""
        size = tensor.shape[self.dim] // self.samples
        return tensor.narrow(self.dim, sample * size, size)


@dataclass(eq=False)
class Slot:
    """A place in a call's arguments that holds a parameter, or something computed from parameters alone.

    Attributes:
        value: what the call received: detached, so that no ordinary weight gradient is computed.
        names: the parameters behind it.
        source: the same tensor with its graph back to the parameters; None if ``value`` is a parameter itself.
        expanded: the value was expanded along dimension 0, over the batch.
    """

    value: Tensor
    names: tuple[str, ...]
    source: Tensor | None = None
    expanded: bool = False


@dataclass
class Call:
    """A torch function and its arguments, with every parameter replaced by the ``value`` of its slot."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slots: list[Slot]
    data: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", str(self.function))

    @property
    def in_place(self) -> bool:
        return self.name.endswith("_") and not self.name.startswith("__")

    def slot_of(self, value: Any) -> Slot | None:
        return next((slot for slot in self.slots if slot.value is value), None)

    def bind(self, *names: str, **defaults: Any) -> dict[str, Any]:
        """The arguments by name, in the order of ``names`` followed by ``defaults``."""
        bound = dict(defaults)
        bound.update(zip((*names, *defaults), self.args))
        bound.update(self.kwargs)
        return bound


@dataclass(frozen=True)
class Affine:
    """Per-sample gradients Σ_t dY·x̂ of a weight and Σ_t dY of a bias, each over the whole last dimension C.

    x̂ = (x − mean)·rstd, or x where there are no statistics; ``factor`` multiplies both gradients.
    """

    dy_NTC: Tensor
    weight: Slot | None = None
    bias: Slot | None = None
    x_NTC: Tensor | None = None
    mean_NT: Tensor | None = None
    rstd_NT: Tensor | None = None
    factor: float = 1.0


class Rule(ABC):
    """What one call contributes to the per-sample gradients.

    Attributes:
        slots: the parameters this rule answers for.
        saved: the inputs it needs; released by the caller after use.
    """

    slots: list[Slot]
    saved: tuple[Tensor, ...] = ()

    @abstractmethod
    def gradients(self, dy: tuple[Tensor | None, ...], layout: Layout) -> Iterator[list[Tensor]]:
        """Chunks of consecutive samples: for each slot a tensor (samples in the chunk, *slot shape)."""

    def affine(self, dy: Tensor, layout: Layout) -> Affine | None:
        """What :meth:`gradients` would give, as the operands of a fused kernel; None where they have no such form."""
        return None

    def run(self, call: Call) -> Any:
        """The call itself."""
        return call.function(*call.args, **call.kwargs)

    def check(self, layout: Layout) -> bool:
        """Whether every saved input can be split into the samples of ``layout``."""
        return all(layout.fits(tensor.shape) for tensor in self.saved)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over tokens run in."""
    return torch.promote_types(dtype, torch.float32)


def _sum_to(product: Tensor, shape: Sequence[int], ndim: int) -> Tensor:
    """Sums (N, rows, d1, ..., d_ndim-1) to (N, *shape): the transpose of broadcasting ``shape`` to ndim dimensions."""
    aligned = (1,) * (ndim - len(shape)) + tuple(shape)
    dims = [i + 1 for i, size in enumerate(aligned) if size == 1]
    # dims is never empty: a parameter does not reach into the leading dimension
    return product.sum(dim=dims, dtype=_wide(product.dtype)).reshape(product.shape[0], *shape)


def _broadcast_ok(slot: Slot, out_ndim: int) -> bool:
    """Whether the slot is the same for all samples: it does not reach into the leading dimension."""
    value = slot.value
    return value.dim() < out_ndim or (value.dim() == out_ndim and value.shape[0] == 1)


def _channels(slot: Slot, shape: Sequence[int]) -> int | None:
    """Size of the slot's value if it fills the last dimensions of ``shape`` (and is broadcast over the others)."""
    own = tuple(slot.value.shape)
    while own and own[0] == 1:
        own = own[1:]
    return slot.value.numel() if own and tuple(shape[len(shape) - len(own) :]) == own else None


class Linear(Rule):
    """y = x·Wᵀ + b."""

    def __init__(self, x: Tensor, weight: Slot | None, bias: Slot | None) -> None:
        self.weight, self.bias = weight, bias
        self.slots = [slot for slot in (weight, bias) if slot is not None]
        self.saved = (x,) if weight is not None else ()

    @staticmethod
    def match(call: Call) -> Linear | None:
        bound = call.bind("input", "weight", bias=None)
        weight, bias = call.slot_of(bound["weight"]), call.slot_of(bound["bias"])
        if call.slot_of(bound["input"]) or len(call.slots) != (weight is not None) + (bias is not None):
            return None
        if bound["weight"].dim() != 2:
            return None
        return Linear(bound["input"], weight, bias)

    def factors(self, dy: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """X (N, T, I) and dY (N, T, O) with Σ_t dY[n,t,o]·X[n,t,i] the gradient of sample n."""
        return layout.rows(self.saved[0]).to(dy.dtype), layout.rows(dy)

    def affine(self, dy: Tensor, layout: Layout) -> Affine | None:
        return None if self.weight is not None else Affine(layout.rows(dy), bias=self.bias)

    def gradients(self, dy: tuple[Tensor | None, ...], layout: Layout) -> Iterator[list[Tensor]]:
        assert dy[0] is not None
        dy_NTO = layout.rows(dy[0])
        x_NTI = layout.rows(self.saved[0]) if self.weight is not None else None
        wide = _wide(dy_NTO.dtype)
        for n in range(layout.samples):
            chunk = []
            if x_NTI is not None:
                chunk.append((dy_NTO[n].T.to(wide) @ x_NTI[n].to(wide))[None])
            if self.bias is not None:
                chunk.append(dy_NTO[n].sum(dim=0, keepdim=True, dtype=wide))
            yield chunk


@dataclass(frozen=True)
class _Window:
    """Geometry of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]


class Convolution(Rule):
    """y = conv(x, W) + b in one to three dimensions, plain or transposed, any stride, padding, dilation and groups."""

    def __init__(self, x: Tensor, weight: Slot | None, kernel: Tensor, bias: Slot | None, window: _Window) -> None:
        self.weight, self.bias, self._kernel, self._window = weight, bias, kernel, window
        self.slots = [slot for slot in (weight, bias) if slot is not None]
        self.saved = (x,)

    @staticmethod
    def match(call: Call) -> Convolution | None:
        transposed = "transpose" in call.name
        if transposed:
            order: dict[str, Any] = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
        else:
            order = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        bound = call.bind("input", "weight", bias=None, **order)
        weight, bias = call.slot_of(bound["weight"]), call.slot_of(bound["bias"])
        if call.slot_of(bound["input"]) or len(call.slots) != (weight is not None) + (bias is not None):
            return None
        dims = bound["weight"].dim() - 2
        if bound["input"].dim() != dims + 2 or isinstance(bound["padding"], str):
            return None

        def per_dim(value: int | Sequence[int]) -> tuple[int, ...]:
            values = (value,) if isinstance(value, int) else tuple(value)
            return values * dims if len(values) == 1 else values

        window = _Window(
            per_dim(bound["stride"]),
            per_dim(bound["padding"]),
            per_dim(bound["dilation"]),
            bound["groups"],
            transposed,
            per_dim(bound.get("output_padding", 0)),
        )
        return Convolution(bound["input"], weight, bound["weight"], bias, window)

    @property
    def tiles(self) -> bool:
        """Patches that do not overlap, larger than a pixel: the patch embedding of every ViT."""
        kernel = tuple(self._kernel.shape[2:])
        return (
            self._window == _Window(kernel, (0,) * len(kernel), (1,) * len(kernel), 1, False, (0,) * len(kernel))
            and self._kernel[0, 0].numel() > 1
        )

    def factors(self, dy: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """X (N, L, C·kh·kw) and dY (N, L, O): a Linear layer over the patches. Only where :attr:`tiles` holds."""
        x, kernel = layout.first(self.saved[0]), self._kernel.shape[2:]
        grid = layout.first(dy).shape[2:]
        for dim, (count, size) in enumerate(zip(grid, kernel)):
            x = x.narrow(2 + dim, 0, count * size)  # what does not fill a patch is not seen
        x = x.reshape(*x.shape[:2], *(n for pair in zip(grid, kernel) for n in pair))
        grid_dims, kernel_dims = range(2, x.dim(), 2), range(3, x.dim(), 2)
        x_NTI = x.permute(0, *grid_dims, 1, *kernel_dims).reshape(layout.samples, -1, self._kernel[0].numel())
        return x_NTI.to(dy.dtype), layout.rows(layout.first(dy).movedim(1, -1))

    def gradients(self, dy: tuple[Tensor | None, ...], layout: Layout) -> Iterator[list[Tensor]]:
        assert dy[0] is not None
        x, window = self.saved[0], self._window
        mask = [False, self.weight is not None, self.bias is not None]
        for n in range(layout.samples):
            dy_n = layout.first(layout.part(dy[0], n))
            _, weight, bias = torch.ops.aten.convolution_backward(
                dy_n,
                layout.first(layout.part(x, n)).to(dy_n.dtype),
                self._kernel.to(dy_n.dtype),
                [self.bias.value.numel()] if self.bias is not None else None,
                window.stride,
                window.padding,
                window.dilation,
                window.transposed,
                window.output_padding,
                window.groups,
                mask,
            )
            yield [grad[None] for grad in (weight, bias) if grad is not None]


class _Elementwise(Rule):
    """Sums of dY·(something of x) over everything the parameter was broadcast over."""

    _out_ndim: int

    def gradients(self, dy: tuple[Tensor | None, ...], layout: Layout) -> Iterator[list[Tensor]]:
        assert dy[0] is not None
        dy_NM = self._blocks(dy[0], layout)
        yield self._products(dy_NM, self._blocks(self.saved[0], layout) if self.saved else None)

    @staticmethod
    def _blocks(tensor: Tensor, layout: Layout) -> Tensor:
        """(samples, rows, ...) with the other dimensions as they are."""
        tensor = layout.first(tensor) if tensor.dim() else tensor[None]
        return tensor.reshape(layout.samples, -1, *tensor.shape[1:])

    @abstractmethod
    def _products(self, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        """Per-sample gradients for each slot; dy and x are (samples, rows, ...)."""


class LayerNorm(Rule):
    """y = x̂·w + b with x̂ normalised over the last dimensions."""

    def __init__(self, x: Tensor, shape: Sequence[int], weight: Slot | None, bias: Slot | None, eps: float) -> None:
        self.weight, self.bias, self._shape, self._eps = weight, bias, list(shape), eps
        self.slots = [slot for slot in (weight, bias) if slot is not None]
        self.saved = (x,)
        self._statistics: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def match(call: Call) -> LayerNorm | None:
        bound = call.bind("input", "normalized_shape", weight=None, bias=None, eps=1e-5)
        weight, bias = call.slot_of(bound["weight"]), call.slot_of(bound["bias"])
        if len(call.slots) != (weight is not None) + (bias is not None):
            return None
        return LayerNorm(bound["input"], bound["normalized_shape"], weight, bias, bound["eps"])

    def run(self, call: Call) -> Any:
        x = self.saved[0]
        if torch.is_autocast_enabled(x.device.type):
            return super().run(call)  # which casts
        bound = call.bind("input", "normalized_shape", weight=None, bias=None, eps=1e-5)
        # The same kernel that layer_norm ends in; it hands out the statistics which the gradient needs.
        out, *statistics = torch.native_layer_norm(x, self._shape, bound["weight"], bound["bias"], self._eps)
        self._statistics = (statistics[0].detach(), statistics[1].detach())
        return out

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal standard deviation of x."""
        if self._statistics is None:
            x = self.saved[0]
            self._statistics = torch.native_layer_norm(x.to(_wide(x.dtype)), self._shape, None, None, self._eps)[1:]
        return self._statistics

    def affine(self, dy: Tensor, layout: Layout) -> Affine | None:
        dims = len(self._shape)

        def rows(tensor: Tensor) -> Tensor:
            return layout.first(tensor).flatten(-dims).reshape(layout.samples, -1, tensor.shape[-dims:].numel())

        mean, rstd = (rows(tensor).squeeze(2) for tensor in self._moments())
        x_NTC = rows(self.saved[0]) if self.weight is not None else None
        if x_NTC is None:
            return Affine(rows(dy), bias=self.bias)
        return Affine(rows(dy), self.weight, self.bias, x_NTC, mean, rstd)

    def gradients(self, dy: tuple[Tensor | None, ...], layout: Layout) -> Iterator[list[Tensor]]:
        assert dy[0] is not None
        x = self.saved[0]
        mean, scale = self._moments()
        wide = _wide(x.dtype)
        wanted = [self.weight is not None, self.bias is not None]
        values = [slot.value.to(wide) if slot is not None else None for slot in (self.weight, self.bias)]
        for n in range(layout.samples):
            parts = [layout.first(layout.part(tensor, n)).contiguous().to(wide) for tensor in (dy[0], x, mean, scale)]
            _, *grads = torch.ops.aten.native_layer_norm_backward(
                *parts[:2], self._shape, *parts[2:], *values, [False, *wanted]
            )
            yield [grad[None] for grad, want in zip(grads, wanted, strict=True) if want]

    def check(self, layout: Layout) -> bool:
        return super().check(layout) and self.saved[0].dim() - layout.dim > len(self._shape)


class BatchNorm(_Elementwise):
    """y = x̂·w + b with x̂ normalised by the running statistics, per channel (dimension 1)."""

    def __init__(
        self, x: Tensor, mean: Tensor, variance: Tensor, weight: Slot | None, bias: Slot | None, eps: float
    ) -> None:
        self.weight, self.bias, self._mean, self._variance, self._eps = weight, bias, mean, variance, eps
        self.slots = [slot for slot in (weight, bias) if slot is not None]
        self.saved = (x,) if weight is not None else ()

    @staticmethod
    def match(call: Call) -> BatchNorm | None:
        names = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
        bound = call.bind("input", "running_mean", "running_var", **names)
        weight, bias = call.slot_of(bound["weight"]), call.slot_of(bound["bias"])
        if bound["training"] or bound["running_mean"] is None:
            raise ValueError(
                f"A batch normalisation that uses {', '.join(n for s in call.slots for n in s.names)} normalises by "
                "the statistics of its batch: its samples are not independent and have no gradients of their own. Give "
                "it running statistics (track_running_stats=True) and leave it in eval mode."
            )
        if len(call.slots) != (weight is not None) + (bias is not None):
            return None
        return BatchNorm(bound["input"], bound["running_mean"], bound["running_var"], weight, bias, bound["eps"])

    def _products(self, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        dims = [1, *range(3, dy.dim())]
        grads = []
        if x is not None:
            shape = [-1, *[1] * (dy.dim() - 3)]
            scale = torch.rsqrt(self._variance + self._eps)
            normalised = (x - self._mean.reshape(shape)) * scale.reshape(shape)
            grads.append((normalised * dy).sum(dim=dims, dtype=_wide(dy.dtype)))
        if self.bias is not None:
            grads.append(dy.sum(dim=dims, dtype=_wide(dy.dtype)))
        return grads

    def check(self, layout: Layout) -> bool:
        return super().check(layout) and layout.dim == 0


class Scale(_Elementwise):
    """y = x·p with p the same for every sample (LayerScale, gates)."""

    def __init__(self, x: Tensor, slot: Slot, out_ndim: int) -> None:
        self.slots, self.saved, self._out_ndim = [slot], (x,), out_ndim

    @staticmethod
    def match(call: Call) -> Scale | None:
        operands = call.args[:2] if len(call.args) == 2 and not call.kwargs else ()
        pair = [operand for operand in operands if isinstance(operand, Tensor)]
        if len(pair) != 2 or len(call.slots) != 1:
            return None
        slot = call.slots[0]
        x = pair[0] if pair[1] is slot.value else pair[1]
        if not _broadcast_ok(slot, x.dim()) or slot.value.dim() > x.dim():
            return None
        if torch.broadcast_shapes(x.shape, slot.value.shape) != x.shape:
            return None  # x itself is repeated: its blocks are not those of the output
        return Scale(x, slot, x.dim())

    def _products(self, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        assert x is not None
        slot = self.slots[0]
        return [_sum_to(dy * x.to(dy.dtype), slot.value.shape, self._out_ndim)]

    def affine(self, dy: Tensor, layout: Layout) -> Affine | None:
        slot, x = self.slots[0], self.saved[0]
        channels = _channels(slot, dy.shape)
        if channels is None:
            return None
        shape = layout.samples, -1, channels
        return Affine(dy.reshape(shape), weight=slot, x_NTC=x.reshape(shape))

    def check(self, layout: Layout) -> bool:
        return super().check(layout) and layout.dim == 0


class Shift(_Elementwise):
    """y = x ± α·p with p the same for every sample (position embedding, biases kept apart). Needs no input."""

    def __init__(self, slot: Slot, factor: float, out_ndim: int) -> None:
        self.slots, self._factor, self._out_ndim = [slot], factor, out_ndim

    @staticmethod
    def match(call: Call) -> Shift | None:
        if len(call.args) != 2 or set(call.kwargs) - {"alpha"} or len(call.slots) != 1:
            return None
        slot = call.slots[0]
        other = call.args[0] if call.args[1] is slot.value else call.args[1]
        if not isinstance(other, Tensor) or not _broadcast_ok(slot, other.dim()):
            return None
        factor = 1.0
        if call.args[1] is slot.value:
            factor = call.kwargs.get("alpha", 1.0) * (-1.0 if call.name.startswith("sub") else 1.0)
        return Shift(slot, factor, len(torch.broadcast_shapes(other.shape, slot.value.shape)))

    def _products(self, dy: Tensor, x: Tensor | None) -> list[Tensor]:
        summed = _sum_to(dy, self.slots[0].value.shape, self._out_ndim)
        return [summed if self._factor == 1.0 else summed * self._factor]

    def affine(self, dy: Tensor, layout: Layout) -> Affine | None:
        slot = self.slots[0]
        channels = _channels(slot, dy.shape)
        if channels is None:
            return None
        return Affine(dy.reshape(layout.samples, -1, channels), bias=slot, factor=self._factor)

    def check(self, layout: Layout) -> bool:
        return layout.dim == 0


class Rerun(Rule):
    """Any other call: run again on one sample's share of the inputs, then differentiated.

    Inputs that carry a gradient are cut into samples; inputs without one (masks, tables) only if their leading
    dimension is the outputs'.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self.slots = call.slots
        self.saved = tuple(call.data)
        self._lead: tuple[int, ...] = ()

    def expect(self, shapes: Sequence[torch.Size]) -> None:
        """Remembers the shape of the call's outputs, by which inputs without gradient are judged."""
        self._lead = tuple(shapes[0]) if shapes else ()

    def check(self, layout: Layout) -> bool:
        moving = [x for x in self.saved if x.requires_grad]
        return layout.fits(self._lead) and all(layout.fits(x.shape) for x in moving)

    def gradients(self, dy: tuple[Tensor | None, ...], layout: Layout) -> Iterator[list[Tensor]]:
        for n in range(layout.samples):
            leaves = [slot.value.detach().requires_grad_() for slot in self.slots]
            with torch.enable_grad():
                outputs = self._run(leaves, layout, n)
            pairs = [
                (out, layout.part(grad, n) if layout.samples > 1 else grad)
                for out, grad in zip(outputs, dy, strict=True)
                if grad is not None and out.requires_grad
            ]
            for out, grad in pairs:
                if out.shape != grad.shape:
                    raise RuntimeError(
                        f"{self._call.name} on one sample gave shape {tuple(out.shape)}, expected {tuple(grad.shape)}."
                    )
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if pairs:
                outs, out_grads = zip(*pairs)
                grads = torch.autograd.grad(outs, leaves, out_grads, allow_unused=True)
            yield [
                (torch.zeros_like(leaf) if grad is None else grad)[None]
                for grad, leaf in zip(grads, leaves, strict=True)
            ]

    def _run(self, leaves: list[Tensor], layout: Layout, sample: int) -> list[Tensor]:
        """The call's outputs for one sample, as functions of ``leaves``."""
        values = {id(slot.value): (slot, leaf) for slot, leaf in zip(self.slots, leaves, strict=True)}

        def share(tensor: Tensor) -> Tensor:
            whole = layout.samples == 1
            if id(tensor) in values:
                slot, leaf = values[id(tensor)]
                apart = slot.expanded and not layout.dim and leaf.shape[0] == self._lead[0]
                return layout.part(leaf, sample) if apart and not whole else leaf
            if whole:
                part = tensor
            elif tensor.requires_grad or (
                tensor.dim() > layout.dim and tensor.shape[layout.dim] == self._lead[layout.dim]
            ):
                part = layout.part(tensor, sample)
            else:
                part = tensor
            return part.detach()

        args, kwargs = map_tensors(share, (self._call.args, self._call.kwargs))
        if self._call.in_place:
            args = (args[0].clone(), *args[1:])
        return float_tensors(self._call.function(*args, **kwargs))


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """``tree`` (nested lists, tuples and dicts) with every tensor replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, item) for item in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, item) for item in tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, item) for key, item in tree.items()}
    return tree


def float_tensors(result: Any) -> list[Tensor]:
    """The floating-point tensors of a call's result, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, result)
    return [tensor for tensor in found if tensor.is_floating_point()]


_MUL = (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.mul_, torch.Tensor.multiply)
_ADD = (torch.add, torch.sub, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.sub, torch.Tensor.sub_)
_RULES: dict[Callable[..., Any], Callable[[Call], Rule | None]] = {
    F.linear: Linear.match,
    F.layer_norm: LayerNorm.match,
    torch.layer_norm: LayerNorm.match,
    F.batch_norm: BatchNorm.match,
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), Convolution.match),
    **dict.fromkeys((torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d), Convolution.match),
    **dict.fromkeys(_MUL, Scale.match),
    **dict.fromkeys(_ADD, Shift.match),
}


def rule_for(call: Call) -> Rule:
    """The cheapest exact rule for a call.

    Raises:
        ValueError: if the call mixes the samples of its batch (batch normalisation by batch statistics).
    """
    match = _RULES.get(call.function)
    return (match(call) if match is not None else None) or Rerun(call)
