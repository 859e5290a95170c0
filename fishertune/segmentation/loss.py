"""The loss of each image, on true labels or on labels drawn from the model."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from fishertune.segmentation.classes import IGNORE_INDEX


class SegmentationLoss:
    """Mean cross-entropy over the valid pixels of each image.

    A ``loss_fn(model, batch, labels=…) -> losses (N,)`` for every function of this package that takes one. Images do
    not influence each other's loss; an image without a valid pixel has loss 0 and gradient 0.

    Args:
        ignore_index: label of pixels that do not count.
        seed: of the draws with ``labels="sampled"``.

    Attributes:
        generator: the source of the draws, on the CPU; set its state to repeat them or to resume.
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX, seed: int = 0) -> None:
        self.ignore_index = ignore_index
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        model: nn.Module,
        batch: tuple[torch.Tensor, torch.Tensor],
        labels: Literal["empirical", "sampled"] = "empirical",
    ) -> torch.Tensor:
        """Losses (N,), float32 at least.

        Args:
            model: maps images (N, 3, H, W) to logits (N, C, H, W).
            batch: images in the form the model takes, and labels (N, H, W) of any integer type.
            labels: ``"empirical"`` uses the labels (Eq. 5); ``"sampled"`` draws each valid pixel's label from the
                model's softmax (Eq. 9), by which the squared gradients estimate the true Fisher information.
        """
        if labels not in ("empirical", "sampled"):
            raise ValueError(f'labels={labels!r} must be "empirical" or "sampled".')
        images, target_NHW = batch
        logits_NCHW = model(images)
        if logits_NCHW.shape[0] != target_NHW.shape[0] or logits_NCHW.shape[2:] != target_NHW.shape[1:]:
            raise ValueError(
                f"Logits {tuple(logits_NCHW.shape)} and labels {tuple(target_NHW.shape)} differ in batch or pixel size."
            )
        if logits_NCHW.dtype in (torch.float16, torch.bfloat16):
            logits_NCHW = logits_NCHW.float()
        target_NHW = target_NHW.long()
        valid_NHW = target_NHW != self.ignore_index
        if labels == "sampled":
            target_NHW = torch.where(valid_NHW, self._draw(logits_NCHW.detach()), target_NHW)
        losses_NHW = F.cross_entropy(logits_NCHW, target_NHW, ignore_index=self.ignore_index, reduction="none")
        return losses_NHW.flatten(1).sum(1) / valid_NHW.flatten(1).sum(1).clamp(min=1)

    def _draw(self, logits_NCHW: torch.Tensor) -> torch.Tensor:
        """One class per pixel: the first whose cumulative probability exceeds a uniform number."""
        cumulative = logits_NCHW.softmax(1).cumsum(1)
        shape = (logits_NCHW.shape[0], 1, *logits_NCHW.shape[2:])
        uniform = torch.rand(shape, generator=self.generator).to(cumulative)
        # scaled by the last entry, which rounding leaves a little off one: the draw is always a class
        return (cumulative[:, :-1] <= uniform * cumulative[:, -1:]).sum(1)
