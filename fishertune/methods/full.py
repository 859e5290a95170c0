"""Every weight of the backbone trains, as in ordinary fine-tuning."""

from __future__ import annotations

import torch
from torch import nn

from fishertune.methods.base import Method, TuneSettings
from fishertune.selection import Selection


class Full(Method):
    """Dense AdamW on backbone and decoder."""

    name = "full"
    summary = "Every weight of the backbone."

    def optimizer(
        self, backbone: nn.Module, head: nn.Module, selection: Selection | None, settings: TuneSettings
    ) -> torch.optim.Optimizer:
        groups = [
            {"params": list(backbone.parameters()), "lr": settings.lr},
            {"params": list(head.parameters()), "lr": settings.head_lr},
        ]
        return torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay)
