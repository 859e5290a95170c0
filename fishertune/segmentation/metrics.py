"""Intersection over union, by class and on average, from a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class DomainMetrics:
    """How well a model segments one domain. All scores are fractions in [0, 1].

    Attributes:
        miou: mean of the classes' IoU, over the classes that have one.
        iou: class name → TP / (TP + FP + FN) over all pixels of the domain, as the Cityscapes evaluation defines it.
            None for a class that occurs neither in the ground truth nor in the predictions.
        images: number of images.
        confusion: (C, C) int64; entry [i, j] counts the pixels of class i predicted as j. Ignored pixels are not in it.
    """

    miou: float
    iou: dict[str, float | None]
    images: int
    confusion: torch.Tensor

    @classmethod
    def from_confusion(cls, confusion: torch.Tensor, classes: Sequence[str], images: int) -> DomainMetrics:
        """Scores of an int64 confusion matrix, rows ground truth, columns prediction.

        Raises:
            ValueError: if the shape does not fit the classes, or no pixel was counted.
        """
        if confusion.shape != (len(classes), len(classes)):
            raise ValueError(f"A confusion matrix {tuple(confusion.shape)} does not fit {len(classes)} classes.")
        if not confusion.any():
            raise ValueError(
                f"None of the {images} images has a labelled pixel, so there is no IoU. Check the label map: it may "
                "ignore every id."
            )
        counts = confusion.detach().cpu().to(torch.int64)
        hits = counts.diagonal().tolist()
        unions = (counts.sum(0) + counts.sum(1) - counts.diagonal()).tolist()
        iou = {name: hit / union if union else None for name, hit, union in zip(classes, hits, unions, strict=True)}
        scored = [value for value in iou.values() if value is not None]
        return cls(sum(scored) / len(scored), iou, images, counts)

    def to_dict(self) -> dict[str, Any]:
        """What metrics.json holds for a domain: everything but the confusion matrix."""
        return {"miou": self.miou, "iou": dict(self.iou), "images": self.images}
