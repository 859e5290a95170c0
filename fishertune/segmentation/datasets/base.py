"""What a segmentation data set is to the rest of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Sample:
    """One image with its labels.

    Attributes:
        image: uint8 (3, H, W), RGB.
        label: uint8 (H, W), index into the data set's ``classes``; 255 marks pixels that are not scored.
        name: stable within the data set, fit for a file name.
    """

    image: torch.Tensor
    label: torch.Tensor
    name: str


@runtime_checkable
class SegmentationDataset(Protocol):
    """Indexable images with labels. ``classes[i]`` names label ``i``."""

    classes: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...
