"""The interface every method of tuning implements, and the two kinds there are so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fishertune.optim import SparseAdamW
from fishertune.partition import Partition
from fishertune.selection import Schedule, Selection


@dataclass(frozen=True)
class TuneSettings:
    """What an optimizer of the tuning stage needs to know.

    Attributes:
        lr: rate of the backbone.
        head_lr: rate of the decoder, which always trains densely.
        betas: moment decay of AdamW.
        weight_decay: decoupled decay of everything that trains.
        growth: schedule of the active share of a selection (Eq. 16); None keeps all of it active.
    """

    lr: float
    head_lr: float
    betas: tuple[float, float]
    weight_decay: float
    growth: Schedule | None = None


class Method(ABC):
    """One way of tuning a backbone.

    A new method is a new file with a subclass: say what must be estimated (``score_kind``), how candidates are ranked
    (``scores``; None for methods that select nothing) and what trains (``optimizer``).
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    trains_backbone: ClassVar[bool] = True
    score_kind: ClassVar[str | None] = None  # a kind of fishertune.fisher.score; None skips the estimation stage

    def scores(
        self, partition: Partition, backbone: nn.Module, estimated: Mapping[str, torch.Tensor] | None, seed: int
    ) -> dict[str, torch.Tensor] | None:
        """Scores that rank the candidates, -inf elsewhere; None if the method does not select.

        Args:
            partition: the candidates (Eq. 3).
            backbone: the pretrained model; not changed.
            estimated: what the estimation stage measured, by parameter name; None if ``score_kind`` is None.
            seed: for methods that draw.
        """
        return None

    @abstractmethod
    def optimizer(
        self, backbone: nn.Module, head: nn.Module, selection: Selection | None, settings: TuneSettings
    ) -> torch.optim.Optimizer:
        """The optimizer of the tuning stage; what it does not hold stays frozen."""


class ScoredMethod(Method):
    """Tunes the elements with the largest scores and the decoder."""

    def scores(
        self, partition: Partition, backbone: nn.Module, estimated: Mapping[str, torch.Tensor] | None, seed: int
    ) -> dict[str, torch.Tensor] | None:
        if estimated is None:
            raise ValueError(f"{self.name} ranks by an estimate and was given none.")
        return partition.mask_scores(dict(estimated))

    def optimizer(
        self, backbone: nn.Module, head: nn.Module, selection: Selection | None, settings: TuneSettings
    ) -> torch.optim.Optimizer:
        if selection is None:
            raise ValueError(f"{self.name} tunes a selection and was given none.")
        optimizer = SparseAdamW(
            backbone.named_parameters(),
            selection,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            growth=settings.growth,
        )
        optimizer.add_param_group({"params": list(head.parameters()), "lr": settings.head_lr})
        return optimizer
