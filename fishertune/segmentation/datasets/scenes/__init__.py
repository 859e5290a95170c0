"""Procedural street scenes with exact labels, in five domains that share their streets and differ in light and weather.

A street is laid out in metres (:mod:`.street`), drawn far to near into one image of surface numbers (:mod:`.canvas`),
textured and measured (:mod:`.shading`), then lit and photographed (:mod:`.weather`). Everything follows from
``(seed, index)``; the domain decides the weather alone, so the same index shows the same street in every domain.
"""

from __future__ import annotations

import numpy as np
import torch

from ...classes import CITYSCAPES_CLASSES
from ..base import Sample
from .shading import SUPERSAMPLING, shade
from .street import draw_street
from .weather import WEATHER

DOMAINS = ("clear", "fog", "night", "rain", "snow")
LOOKS = "looks"  # random styles, for pretraining
MIN_SIZE = 32


class SceneDataset:
    """Rendered street scenes with Cityscapes trainIds.

    Args:
        domain: one of ``clear``, ``fog``, ``night``, ``rain``, ``snow``, or ``looks``: a random style for every image
            (palette, light, air, camera), meant for pretraining a backbone.
        count: number of images.
        size: (height, width) in pixels.
        seed: which streets; the same seed and index give the same bits. Streets do not depend on the domain.

    Raises:
        ValueError: for an unknown domain, a count below 1, a size below 32 pixels or a negative seed.
    """

    classes: tuple[str, ...] = CITYSCAPES_CLASSES

    def __init__(self, domain: str, count: int, size: tuple[int, int] = (128, 192), seed: int = 0) -> None:
        if domain not in WEATHER:
            raise ValueError(f"Unknown scene domain {domain!r}. Choose one of {', '.join(WEATHER)}.")
        if count < 1:
            raise ValueError(f"count is {count}; a scene data set needs at least 1 image.")
        if len(size) != 2 or min(size) < MIN_SIZE:
            raise ValueError(f"size is {tuple(size)}; give (height, width) of at least {MIN_SIZE} pixels each.")
        if seed < 0:
            raise ValueError(f"seed is {seed}; give a number of 0 or more.")
        self.domain = domain
        self.count = count
        self.size = (int(size[0]), int(size[1]))
        self.seed = seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not -self.count <= index < self.count:
            raise IndexError(f"index {index} is outside the {self.count} images of this data set.")
        index %= self.count
        height, width = self.size
        layout = np.random.default_rng((self.seed, index))
        street = draw_street(height * SUPERSAMPLING, width * SUPERSAMPLING, layout)
        materials = shade(street, layout)
        conditions = np.random.default_rng((self.seed, index, 1 + list(WEATHER).index(self.domain)))
        image_HW3 = WEATHER[self.domain](materials, conditions)
        return Sample(
            image=torch.from_numpy(np.ascontiguousarray(image_HW3.transpose(2, 0, 1))),
            label=torch.from_numpy(materials.label_HW),
            name=f"{self.domain}_{self.seed}_{index:05d}",
        )
