"""The backbone stays as it was pretrained; only the decoder trains."""

from __future__ import annotations

import torch
from torch import nn

from fishertune.methods.base import Method, TuneSettings
from fishertune.selection import Selection


class Freeze(Method):
    """Dense AdamW on the decoder alone; the warm-up stage trains with it too."""

    name = "freeze"
    summary = "The decoder alone."
    trains_backbone = False

    def optimizer(
        self, backbone: nn.Module, head: nn.Module, selection: Selection | None, settings: TuneSettings
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            head.parameters(), lr=settings.head_lr, betas=settings.betas, weight_decay=settings.weight_decay
        )
