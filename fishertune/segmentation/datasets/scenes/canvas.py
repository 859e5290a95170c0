"""A camera over a street and one integer image: every pixel holds the number of the surface it shows.

Shapes are drawn far to near, so depth order needs no buffer. Colour, class, texture and light of a surface sit in
tables indexed by that number; labels are therefore exact and shading is a handful of array operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

FloatArray = NDArray[np.float32]
Point = tuple[float, float]
Colour = tuple[float, float, float]

# Planes, which decide how a pixel's depth follows from its position
GROUND, SIDE, FRONT, SKY = range(4)
# Textures
PLAIN, FACADE, FOLIAGE, ASPHALT, TILES, GRASS, RAILS, BRICKS, CLOUDS = range(9)

NEAR = 0.6  # metres; nothing is drawn closer than this to the camera
FAR = 400.0


@dataclass(frozen=True)
class Camera:
    """Pinhole at (0, height, 0) looking along +z; x to the right, metres. Pixels of the (supersampled) image."""

    height: float
    focal: float
    centre_x: float
    horizon: float
    image_height: int
    image_width: int

    def project(self, x: float, y: float, z: float) -> Point:
        scale = self.focal / z
        return self.centre_x + x * scale, self.horizon + (self.height - y) * scale


@dataclass
class Lamp:
    """A light of the scene, used at night: position in metres, colour, and how far it shines (metres)."""

    x: float
    y: float
    z: float
    colour: Colour
    reach: float


@dataclass
class Canvas:
    """Draws surfaces and remembers what they are."""

    camera: Camera
    surfaces: list[tuple[float, ...]] = field(default_factory=list)
    lamps: list[Lamp] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = (self.camera.image_width, self.camera.image_height)
        self.image = Image.new("I", size, 0)
        self._draw = ImageDraw.Draw(self.image)
        self.shadow_image = Image.new("L", size, 0)
        self._shadow_draw = ImageDraw.Draw(self.shadow_image)

    def surface(
        self,
        label: int,
        colour: Sequence[float],
        *,
        plane: int = FRONT,
        at: float = FAR,
        texture: int = PLAIN,
        roughness: float = 0.12,
        snow: float = 0.0,
        glow: float = 0.0,
        normal: float = 0.0,
        pattern: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    ) -> int:
        """Registers a surface and returns its number.

        Args:
            label: trainId, or 255.
            colour: sRGB in [0, 1].
            at: depth of a FRONT surface, distance from the camera's plane x = 0 of a SIDE surface (metres).
            roughness: amplitude of the noise in its colour.
            snow: how much of it snow covers, in [0, 1].
            glow: light it sends out at night, relative to white paper in daylight.
            normal: −1 faces left, +1 faces right, 0 faces the camera; used by sunlight.
            pattern: (period along, period up, filled share, phase) of its texture, metres.
        """
        self.surfaces.append((label, *colour, plane, at, texture, roughness, snow, glow, normal, *pattern))
        return len(self.surfaces) - 1

    def polygon(self, points: Sequence[Point], surface: int) -> None:
        self._draw.polygon(points, fill=surface)

    def ellipse(self, centre: Point, radius_x: float, radius_y: float, surface: int, ring: int = 0) -> None:
        box = (centre[0] - radius_x, centre[1] - radius_y, centre[0] + radius_x, centre[1] + radius_y)
        if ring:
            self._draw.ellipse(box, outline=surface, width=ring)
        else:
            self._draw.ellipse(box, fill=surface)

    def line(self, points: Sequence[Point], width: float, surface: int) -> None:
        self._draw.line(points, fill=surface, width=max(1, round(width)))

    def ground(self, x0: float, x1: float, z0: float, z1: float, surface: int) -> None:
        """A rectangle on the ground."""
        self.polygon(self._ground_points(x0, x1, z0, z1), surface)

    def upright(self, x0: float, x1: float, y0: float, y1: float, z: float, surface: int) -> None:
        """A rectangle that faces the camera."""
        left, top = self.camera.project(x0, y1, z)
        right, bottom = self.camera.project(x1, y0, z)
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], surface)

    def along(self, x: float, y0: float, y1: float, z0: float, z1: float, surface: int) -> None:
        """A rectangle parallel to the street."""
        z0 = max(z0, NEAR)
        if z1 > z0:
            corners = ((y0, z0), (y1, z0), (y1, z1), (y0, z1))
            self.polygon([self.camera.project(x, y, z) for y, z in corners], surface)

    def shadow(self, x0: float, x1: float, z0: float, z1: float, lean: float, darkness: int = 255) -> None:
        """A parallelogram of shade on the ground, its far side shifted by ``lean`` metres."""
        points = self._ground_points(x0, x1, z0, z1)
        far_shift = lean * self.camera.focal / max(z1, NEAR)
        shifted = [
            points[0],
            points[1],
            (points[2][0] + far_shift, points[2][1]),
            (points[3][0] + far_shift, points[3][1]),
        ]
        self._shadow_draw.polygon(shifted, fill=darkness)

    def _ground_points(self, x0: float, x1: float, z0: float, z1: float) -> list[Point]:
        z0, z1 = max(z0, NEAR), max(z1, NEAR)
        return [self.camera.project(x, 0.0, z) for x, z in ((x0, z0), (x1, z0), (x1, z1), (x0, z1))]
