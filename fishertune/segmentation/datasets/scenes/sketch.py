"""The hand that draws: a canvas, a source of randomness and the sun, shared by everything that stands in a street."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, Colour

# Cityscapes trainIds (fishertune.segmentation.classes); trains, 16, do not occur
(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS) = (
    range(16)
)
MOTORCYCLE, BICYCLE, IGNORE = 17, 18, 255

# Colours of light
WARM, COOL, RED_LAMP, HEAD_LAMP = (1.0, 0.72, 0.38), (0.85, 0.92, 1.0), (1.0, 0.08, 0.05), (1.0, 0.96, 0.85)

PAINTS = (  # of vehicles
    (0.75, 0.76, 0.78), (0.10, 0.10, 0.12), (0.88, 0.88, 0.87), (0.35, 0.36, 0.38), (0.55, 0.10, 0.10),
    (0.12, 0.20, 0.42), (0.55, 0.57, 0.58), (0.20, 0.30, 0.24), (0.62, 0.50, 0.34), (0.80, 0.66, 0.16),
)  # fmt: skip


class Sketch:
    """Draws on ``canvas``; every number comes from ``random``.

    Attributes:
        sun: where the sunlight comes from, −1 left to +1 right.
        lean: metres to the right that a shadow reaches, per metre of height.
    """

    def __init__(self, canvas: Canvas, random: np.random.Generator) -> None:
        self.canvas = canvas
        self.random = random
        self.sun = float(random.choice((-1.0, 1.0)) * random.uniform(0.3, 1.0))
        self.lean = float(-self.sun * random.uniform(0.4, 1.4))

    def between(self, low: float, high: float) -> float:
        return float(self.random.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def pick(self, colours: tuple[Colour, ...], spread: float = 0.06) -> Colour:
        """One of the colours, varied in brightness and, by ``spread``, in tint."""
        base = np.asarray(colours[int(self.random.integers(len(colours)))])
        tint = base * self.between(0.85, 1.15) + self.random.uniform(-spread, spread, 3)
        red, green, blue = np.clip(tint, 0.03, 0.97)
        return float(red), float(green), float(blue)
