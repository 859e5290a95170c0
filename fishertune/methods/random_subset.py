"""A uniformly random subset of the candidates: what any selection has to beat at the same budget."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fishertune.methods.base import ScoredMethod
from fishertune.partition import Partition


class RandomSubset(ScoredMethod):
    """Tunes as many candidates as the scored methods do, drawn without looking at data."""

    name = "random"
    summary = "A random subset of the candidates, the same budget."

    def scores(
        self, partition: Partition, backbone: nn.Module, estimated: Mapping[str, torch.Tensor] | None, seed: int
    ) -> dict[str, torch.Tensor] | None:
        generator = torch.Generator().manual_seed(seed)
        names = dict.fromkeys(item.name for item in partition)
        parameters = dict(backbone.named_parameters())
        return partition.mask_scores({name: torch.rand(parameters[name].shape, generator=generator) for name in names})
