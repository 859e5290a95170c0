"""Per-pixel decoders: from feature maps of the backbone to class logits.

A head is a module that maps a list of feature maps, each (N, D_i, h, w), to logits (N, classes, h', w'); the model
resizes them to the input. Samples never mix: there is no batch statistic, so that per-sample gradients exist and
evaluation does not depend on what else is in the batch. A BatchNorm, the usual choice for linear probes, was worth 0.9
mIoU points on held-out CamVid frames of the source after 250 steps (44.7 against 43.8), one seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

HeadBuilder = Callable[[Sequence[int], int], nn.Module]

_HEADS: dict[str, HeadBuilder] = {}


def register_head(kind: str) -> Callable[[HeadBuilder], HeadBuilder]:
    """Makes a head known under ``kind``. It is built as ``builder(channels_of_each_feature_map, num_classes)``."""

    def register(builder: HeadBuilder) -> HeadBuilder:
        if kind in _HEADS:
            raise ValueError(f"A head named {kind!r} exists already; choose another name.")
        _HEADS[kind] = builder
        return builder

    return register


def list_heads() -> tuple[str, ...]:
    """The names :func:`create_head` accepts."""
    return tuple(_HEADS)


def create_head(kind: str, channels: Sequence[int], num_classes: int, *, seed: int = 0) -> nn.Module:
    """Builds a head with weights drawn from ``seed``; the global random state stays as it is.

    Args:
        kind: one of :func:`list_heads`.
        channels: number of channels of each feature map.
        num_classes: number of logits.
        seed: of the initial weights.
    """
    if kind not in _HEADS:
        raise ValueError(f"There is no head {kind!r}. Known: {', '.join(_HEADS)}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _HEADS[kind](channels, num_classes)


@register_head("linear")
class LinearHead(nn.Module):
    """Normalise each feature map, concatenate, one 1×1 convolution: what the features hold, and no more.

    The normalisation is a LayerNorm over the channels of each position, without scale and shift, since the
    convolution behind it can express both.
    """

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classify = nn.Conv2d(sum(channels), num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.classify(_normalised(features))


@register_head("conv")
class ConvHead(nn.Module):
    """A light decoder: 1×1 to ``hidden`` channels, twice the resolution, one 3×3 convolution, 1×1 to the classes."""

    def __init__(self, channels: Sequence[int], num_classes: int, hidden: int = 128) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(sum(channels), hidden, 1)
        self.mix = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.norm = nn.GroupNorm(8, hidden)
        self.classify = nn.Conv2d(hidden, num_classes, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        x = F.gelu(self.reduce(_normalised(features)))
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.classify(F.gelu(self.norm(self.mix(x))))


def _normalised(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Blocks differ in scale by an order of magnitude; without this the last one drowns the others."""
    return torch.cat([_channel_norm(feature) for feature in features], dim=1)


def _channel_norm(x_NDHW: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x_NDHW.movedim(1, -1), x_NDHW.shape[1:2]).movedim(-1, 1)
