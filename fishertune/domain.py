"""Simulated unseen domain: features whose mean and spread are redrawn (paper Eq. 6, after DSU, arXiv:2202.03958).

Per sample and channel, with μ and σ the mean and standard deviation over the tokens::

    x' = (σ + ε_σ Σ_σ) · (x − μ)/σ + (μ + ε_μ Σ_μ)

Σ_μ and Σ_σ, the standard deviations of μ and σ over the batch, say how far domains may plausibly lie apart. They are
constants: no gradient flows through them, so every sample's loss depends on that sample alone.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fishertune.partition import find_blocks

_EPS = 1e-6  # added to the variance, as in DSU: a constant channel has σ > 0
_LEAST_SPREAD = 0.01  # the new σ is at least this part of the old: a strong negative draw must not turn x inside out
_MODES = ("signed", "abs")
_DRAWS = ("channel", "scalar")


class DomainStatistics:
    """Running Σ_μ and Σ_σ: the spread of μ and σ over all samples seen so far, at each place of a model.

    A batch of one has no spread of its own and takes this one. Share one object between calls of
    :func:`simulate_domain` to keep it over the steps of a run.
    """

    def __init__(self) -> None:
        self._moments: dict[str, Tensor] = {}  # per place (4, C) float64: mean and M2 of μ, mean and M2 of σ
        self._counts: dict[str, int] = {}
        self._warned = False

    def update(self, place: str, count: int, means: Tensor, squares: Tensor) -> None:
        """Takes in a batch: (2, C) means of μ and σ over its ``count`` samples, and their summed squared deviations."""
        batch = torch.stack([means, squares], dim=1).reshape(4, -1).double()
        seen = self._counts.get(place, 0)
        if seen == 0:
            self._moments[place] = batch
        else:
            total, old = seen + count, self._moments[place].to(batch.device)
            delta = batch[::2] - old[::2]
            merged = torch.empty_like(old)
            merged[::2] = old[::2] + delta * (count / total)
            merged[1::2] = old[1::2] + batch[1::2] + delta.square() * (seen * count / total)
            self._moments[place] = merged
        self._counts[place] = seen + count

    def spread(self, place: str) -> Tensor:
        """(2, C) float64: Σ_μ and Σ_σ.

        Raises:
            RuntimeError: if fewer than two samples were seen.
        """
        count = self._counts.get(place, 0)
        if count < 2:
            raise RuntimeError(
                f"The simulated domain at {place!r} was given a batch of one and has seen {count} samples in all: "
                "there is no spread over samples to draw from. Use batches of two or more, or pass statistics= a "
                "DomainStatistics that earlier batches have filled."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The simulated domain was given a batch of one; it uses the spread over all {count} samples so far.",
                stacklevel=2,
            )
        return (self._moments[place][1::2] / (count - 1)).sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact resume needs: ``tensors`` by place and JSON-able ``counts``."""
        return {"tensors": dict(self._moments), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state of :meth:`state_dict`; tensors are copied."""
        self._moments = {place: moments.clone() for place, moments in state["tensors"].items()}
        self._counts = {place: int(count) for place, count in state["counts"].items()}


class SimulatedDomain:
    """What :func:`simulate_domain` returns: active inside ``with``, and still readable after it.

    Attributes:
        eps_mu, eps_sigma: the draws of the last forward pass: (N, C) with ``draw="channel"`` (places joined along C),
            () with ``draw="scalar"``. Before the first pass they are empty.
    """

    def __init__(
        self,
        model: nn.Module,
        where: str | int | Iterable[str | int],
        draw: str,
        generator: torch.Generator | None,
        statistics: DomainStatistics | None,
        group: dist.ProcessGroup | None,
        channel_dim: int | None,
    ) -> None:
        if draw not in _DRAWS:
            raise ValueError(f"draw={draw!r} is not a way to draw; choose one of {', '.join(_DRAWS)}.")
        self._model, self._draw, self._group, self._channel_dim = model, draw, group, channel_dim
        self._generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self._statistics = statistics if statistics is not None else DomainStatistics()
        self._places = _find_places(model, where)
        self._draws: dict[str, tuple[Tensor, Tensor]] = {}  # by place, of the last forward pass
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        if self._handles:
            raise RuntimeError("This simulated domain is already active. Leave it before entering it again.")
        for place, module in self._places.items():

            def hook(module: nn.Module, inputs: Any, output: Any, place: str = place) -> Tensor:
                return self._apply(place, module, output)

            self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def eps_mu(self) -> Tensor:
        return self._last(0)

    @property
    def eps_sigma(self) -> Tensor:
        return self._last(1)

    def c(self, mode: Literal["signed", "abs"] | float = "signed") -> float:
        """The weight of the domain-sensitive term (Eq. 7) for the last forward pass.

        Args:
            mode: ``"signed"``: exp(−(ε̄_μ + ε̄_σ)), as printed; ``"abs"``: the same of |ε|; a number: that number. ε̄ is
                the mean over all draws of the batch, over all ranks of ``group``, which must then all call this.

        Raises:
            ValueError: if ``mode`` is neither.
            RuntimeError: if no forward pass has been made.
        """
        if isinstance(mode, (int, float)) and not isinstance(mode, bool):
            return float(mode)
        if mode not in _MODES:
            raise ValueError(f"c mode {mode!r} is unknown; choose one of {', '.join(_MODES)} or give a number.")
        if not self._draws:
            raise RuntimeError("c is known after a forward pass through the simulated domain; there was none yet.")
        draws = torch.stack([self.eps_mu, self.eps_sigma]).double()
        values = draws.abs() if mode == "abs" else draws
        total = torch.stack([values.sum(), values.new_tensor(values[0].numel())])
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return math.exp(-(total[0] / total[1]).item())

    # ------------------------------------------------------------------------------------------------------------------

    def _last(self, which: int) -> Tensor:
        values = [draws[which] for draws in self._draws.values()]
        if not values:
            return torch.empty(0)
        return values[0] if self._draw == "scalar" else torch.cat(values, dim=1)

    def _apply(self, place: str, module: nn.Module, x: Any) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() < 3:
            raise ValueError(
                f"The output of {place!r} is {_describe(x)}; expected one tensor of tokens (N, T, C) or a map with "
                "four dimensions. Choose another module with where=."
            )
        channel = self._channel_axis(place, module, x)
        prefix = self._prefix_tokens(place, x)
        tokens = x[:, prefix:] if prefix else x
        shifted = self._shift(place, tokens, channel)
        return torch.cat([x[:, :prefix], shifted], dim=1) if prefix else shifted

    def _shift(self, place: str, x: Tensor, channel: int) -> Tensor:
        """Eq. 6 on tokens or a map with channels along ``channel``."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        token_dims = [dim for dim in range(1, x.dim()) if dim != channel]
        variance, mu = torch.var_mean(wide, dim=token_dims, correction=0, keepdim=True)
        sigma = (variance + _EPS).sqrt()
        with torch.no_grad():
            spread_mu, spread_sigma = self._spread(place, torch.stack([mu.flatten(1), sigma.flatten(1)]))
            eps_mu, eps_sigma = self._eps(place, mu.flatten(1))
            shape = mu.shape
            step_mu = (eps_mu * spread_mu).expand(mu.flatten(1).shape).reshape(shape)
            step_sigma = (eps_sigma * spread_sigma).expand(mu.flatten(1).shape).reshape(shape)
        new_sigma = torch.maximum(sigma + step_sigma, _LEAST_SPREAD * sigma)
        return (new_sigma * ((wide - mu) / sigma) + (mu + step_mu)).to(x.dtype)

    def _spread(self, place: str, values_2NC: Tensor) -> Tensor:
        """(2, C): the standard deviations of μ and σ over the batch of all ranks; of the running statistics for one."""
        values = values_2NC.double()
        count, total = values.shape[1], values.sum(dim=1)
        if self._group is not None:
            packed = torch.cat([total.flatten(), total.new_tensor([count])])
            dist.all_reduce(packed, group=self._group)
            count, total = int(packed[-1]), packed[:-1].view_as(total)
        means = total / count
        squares = (values - means[:, None]).square().sum(dim=1)
        if self._group is not None:
            dist.all_reduce(squares, group=self._group)
        self._statistics.update(place, count, means, squares)
        spread = (squares / (count - 1)).sqrt() if count > 1 else self._statistics.spread(place)
        return spread.to(values_2NC.dtype)

    def _eps(self, place: str, like_NC: Tensor) -> tuple[Tensor, Tensor]:
        if place in self._draws:  # a place that comes up again: a new forward pass
            self._draws = {}
        if self._draw == "scalar" and self._draws:
            drawn = next(iter(self._draws.values()))
        else:
            shape = tuple(like_NC.shape) if self._draw == "channel" else ()
            device = self._generator.device
            eps_mu = torch.randn(shape, generator=self._generator, device=device)
            eps_sigma = torch.randn(shape, generator=self._generator, device=device)
            drawn = (eps_mu.to(like_NC), eps_sigma.to(like_NC))
        self._draws[place] = drawn
        return drawn

    def _channel_axis(self, place: str, module: nn.Module, x: Tensor) -> int:
        if self._channel_dim is not None:
            return self._channel_dim % x.dim()
        if x.dim() == 3:
            return 2
        stated = getattr(module, "output_fmt", None)  # timm's patch embeddings
        if stated is not None and str(getattr(stated, "value", stated)).upper() in ("NCHW", "NHWC"):
            return 1 if str(getattr(stated, "value", stated)).upper() == "NCHW" else x.dim() - 1
        channels = _inherited(self._model, place, "embed_dim")
        axes = [axis for axis in (1, x.dim() - 1) if x.shape[axis] == channels]
        if len(axes) != 1:
            raise ValueError(
                f"The output of {place!r} has shape {tuple(x.shape)}, which does not say where its channels are"
                f" (the model's embed_dim is {channels}). Pass channel_dim=1 for NCHW or channel_dim=-1 for NHWC."
            )
        return axes[0]

    def _prefix_tokens(self, place: str, x: Tensor) -> int:
        """Class and register tokens, which a patch embedding's output does not have yet."""
        if x.dim() != 3 or place.rpartition(".")[2] == "patch_embed":
            return 0
        return int(_inherited(self._model, place, "num_prefix_tokens") or 0)


def simulate_domain(
    model: nn.Module,
    *,
    where: str | int | Iterable[str | int] = "patch_embed",
    draw: Literal["channel", "scalar"] = "channel",
    generator: torch.Generator | None = None,
    statistics: DomainStatistics | None = None,
    group: dist.ProcessGroup | None = None,
    channel_dim: int | None = None,
) -> SimulatedDomain:
    """Inside ``with simulate_domain(model) as shift:`` the model sees the unseen domain x' of Eq. 6.

    Class and register tokens stay as they are. The object returned can be entered again; draws then go on.

    Args:
        model: a timm backbone, or any module whose ``where`` outputs tokens (N, T, C) or maps (N, C, H, W) or
            (N, H, W, C).
        where: a module name, or the number of a transformer block, or several of them; its output is shifted.
        draw: ``"channel"``: ε per sample and channel, as in DSU; ``"scalar"``: one ε_μ and one ε_σ a forward pass, as
            Eq. 7 writes.
        generator: source of the draws; a new one with seed 0 if None. The global generators are never used. With
            ``group``, seed it differently per rank for ``"channel"`` and alike for ``"scalar"``.
        statistics: running spreads for batches of one; new ones if None.
        group: data-parallel ranks whose samples form one batch.
        channel_dim: dimension of the channels, where the shape does not tell.

    Raises:
        ValueError: if ``where`` names no module or ``draw`` is unknown; in the forward pass, if an output is not tokens
            or a map.
        RuntimeError: in the forward pass, for a batch of one while ``statistics`` has seen fewer than two samples.
    """
    return SimulatedDomain(model, where, draw, generator, statistics, group, channel_dim)


def _find_places(model: nn.Module, where: str | int | Iterable[str | int]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    places = {}
    for item in [where] if isinstance(where, (str, int)) else list(where):
        name = item
        if isinstance(item, int):
            blocks = find_blocks(model)
            if not 0 <= item < len(blocks):
                raise ValueError(f"where={item} but {type(model).__name__} has blocks 0 to {len(blocks) - 1}.")
            name = blocks[item][0]
        if not name or name not in modules:
            near = difflib.get_close_matches(str(name), modules, n=3)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"where={item!r} is not a module of this {type(model).__name__}.{hint}")
        places[str(name)] = modules[str(name)]
    if not places:
        raise ValueError("where= names no module. Give at least one, such as 'patch_embed'.")
    return places


def _inherited(model: nn.Module, place: str, attribute: str) -> Any:
    """The attribute of the nearest module around ``place`` that has it."""
    path = place.split(".")
    for length in range(len(path) - 1, -1, -1):
        owner = model.get_submodule(".".join(path[:length]))
        if hasattr(owner, attribute):
            return getattr(owner, attribute)
    return None


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
