"""What a segmentation data set is: anything with a length, classes and items of this one type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Sample:
    """One labelled image.

    Attributes:
        image: (3, H, W) uint8, RGB.
        label: (H, W) uint8 class indices (trainIds), 255 (``classes.IGNORE_INDEX``) where a pixel does not count.
        name: unique within its data set; used in messages, reports and picture file names.
    """

    image: torch.Tensor
    label: torch.Tensor
    name: str


@runtime_checkable
class SegmentationDataset(Protocol):
    """Any map-style data set of labelled images. Reading an item twice gives the same bits."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the position is the class index found in labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...
