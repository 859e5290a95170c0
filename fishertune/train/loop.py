"""The training loop that warm-up and tuning share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fishertune.segmentation.loss import SegmentationLoss
from fishertune.segmentation.model import SegmentationModel
from fishertune.segmentation.transforms import normalise
from fishertune.train.checkpoint import trained_parameters
from fishertune.train.data import BatchStream
from fishertune.train.progress import Bar


@dataclass(frozen=True)
class LoopSettings:
    """How a training stage steps.

    Attributes:
        stage: names the stage in messages.
        steps: optimizer steps in all.
        accumulate: batches whose gradients add up to one step.
        clip: largest gradient norm over everything that trains; None leaves gradients alone.
        poly_power: the learning rate falls as (1 - step / steps) to this power.
        precision: ``bf16`` runs forward passes under autocast.
    """

    stage: str
    steps: int
    accumulate: int = 1
    clip: float | None = None
    poly_power: float = 0.9
    precision: str = "fp32"


@dataclass
class Curve:
    """Loss and learning rate of every step so far."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)

    def to_plain(self) -> dict[str, list[float]]:
        return {"loss": self.loss, "lr": self.lr}


class NonFiniteLossError(RuntimeError):
    """Training met a NaN or infinite loss; the last checkpoint is intact."""


def train(
    model: SegmentationModel,
    optimizer: torch.optim.Optimizer,
    stream: BatchStream,
    settings: LoopSettings,
    *,
    curve: Curve,
    bar: Bar,
    checkpoint: Callable[[int], None],
    checkpoint_every: int,
) -> None:
    """Steps ``optimizer`` from ``len(curve.loss)`` to ``settings.steps``; only what it holds gets gradients.

    Raises:
        NonFiniteLossError: if the loss is not finite; the step is not taken.
    """
    trained = trained_parameters(model, optimizer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    parameters = list(trained.values())
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    device = parameters[0].device
    loss_fn = SegmentationLoss()
    model.train()
    done = len(curve.loss)
    total = 0.0
    for position, (images, labels), names in stream.iterate(
        done * settings.accumulate, settings.steps * settings.accumulate
    ):
        step, part = divmod(position, settings.accumulate)
        if part == 0:
            factor = (1.0 - step / settings.steps) ** settings.poly_power
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            total = 0.0
        batch = (normalise(images.to(device), model.mean, model.std), labels.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = loss_fn(model, batch).mean() / settings.accumulate
        total += _finite(loss, settings, step, names, optimizer)
        loss.backward()
        if part + 1 < settings.accumulate:
            continue
        if settings.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        curve.loss.append(total)
        curve.lr.append(float(optimizer.param_groups[0]["lr"]))
        bar.advance(f"loss {total:.3f}")
        if (step + 1) % checkpoint_every == 0 or step + 1 == settings.steps:
            checkpoint(step + 1)


def _finite(loss: torch.Tensor, settings: LoopSettings, step: int, names: list[str], optimizer: Any) -> float:
    value = float(loss.detach())
    if math.isfinite(value):
        return value
    rates = ", ".join(f"{group['lr']:.2g}" for group in optimizer.param_groups)
    raise NonFiniteLossError(
        f"The loss became {value} at step {step} of {settings.stage} (learning rates {rates}; "
        f"images {', '.join(names)}). Lower the learning rate or set a clip; the last checkpoint is intact and "
        "--resume continues from it."
    )
