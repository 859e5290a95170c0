"""Trees, conifers and bushes."""

from __future__ import annotations

import math

import numpy as np

from . import canvas as c
from .sketch import VEGETATION, Sketch


def _leaves(sketch: Sketch, z: float) -> tuple[int, int, int]:
    base = np.asarray(
        sketch.pick(
            ((0.25, 0.36, 0.15), (0.32, 0.40, 0.18), (0.20, 0.32, 0.18), (0.42, 0.38, 0.16), (0.44, 0.28, 0.12)),
            0.04,
        )
    )
    dark, middle, light = (
        sketch.canvas.surface(
            VEGETATION, tuple(base * factor), at=z, texture=c.FOLIAGE, roughness=0.5, snow=snow, normal=normal
        )
        for factor, snow, normal in (
            (0.62, 0.1, -0.4 * sketch.sun),
            (1.0, 0.45, 0.2 * sketch.sun),
            (1.28, 0.9, 0.6 * sketch.sun),
        )
    )
    return dark, middle, light


def draw_tree(sketch: Sketch, x: float, z: float) -> None:
    canvas, camera = sketch.canvas, sketch.canvas.camera
    height = sketch.between(4.5, 10.0)
    scale = camera.focal / z
    trunk = canvas.surface(
        VEGETATION, sketch.pick(((0.28, 0.21, 0.15), (0.36, 0.32, 0.27))), at=z, roughness=0.3, snow=0.1
    )
    width = sketch.between(0.12, 0.26)
    leaves = _leaves(sketch, z)
    canvas.shadow(x - 1.2, x + 1.2, z - 0.8, z + 0.8, 0.0, 170)
    canvas.shadow(
        min(x, x + sketch.lean * height) - 0.5, max(x, x + sketch.lean * height) + 0.5, z - 0.9, z + 0.9, 0.0, 200
    )
    if sketch.chance(0.2):  # a conifer: stacked skirts
        canvas.upright(x - width, x + width, 0, 1.5, z, trunk)
        levels = 5
        for level in range(levels):
            y = 1.0 + (height - 1.0) * level / levels
            spread = (height * 0.26) * (1 - level / (levels + 0.5))
            tip = y + (height - 1.0) / levels * 1.7
            middle = x + sketch.between(-0.1, 0.1)
            canvas.polygon(
                [camera.project(px, py, z) for px, py in ((x - spread, y), (x + spread, y), (middle, tip))],
                leaves[min(level % 3, 1)],
            )
            canvas.polygon([camera.project(px, py, z) for px, py in (
                (x + spread * np.sign(sketch.sun), y), (x + 0.2 * spread, y), (middle, tip))], leaves[2])  # fmt: skip
        return
    crown = sketch.between(0.24, 0.36) * height
    base = height - 1.7 * crown
    canvas.polygon(
        [
            camera.project(px, py, z)
            for px, py in (
                (x - width, 0),
                (x - width * 0.6, base + crown * 0.6),
                (x + width * 0.6, base + crown * 0.6),
                (x + width, 0),
            )
        ],
        trunk,
    )
    _blobs(sketch, x, base + crown, z, crown, crown * sketch.between(0.8, 1.05), leaves, 12 if scale < 12 else 26)


def draw_bush(sketch: Sketch, x: float, z: float) -> None:
    size = sketch.between(0.5, 1.2)
    _blobs(sketch, x, size * 0.7, z, size * 1.3, size * 0.7, _leaves(sketch, z), 10)


def _blobs(
    sketch: Sketch, x: float, y: float, z: float, wide: float, tall: float, leaves: tuple[int, int, int], count: int
) -> None:
    """A crown: dark blobs behind, light ones on the sunny upper side."""
    camera = sketch.canvas.camera
    scale = camera.focal / z
    angle = sketch.random.uniform(0, 2 * math.pi, count)
    radius = np.sqrt(sketch.random.random(count)) * 0.75
    size = sketch.random.uniform(0.25, 0.45, count) * min(wide, tall) * scale
    dx, dy = radius * np.cos(angle) * wide, radius * np.sin(angle) * tall
    brightness = dy / tall + 0.5 * sketch.sun * dx / wide + sketch.random.uniform(-0.35, 0.35, count)
    sketch.canvas.ellipse(camera.project(x, y, z), wide * 0.75 * scale, tall * 0.75 * scale, leaves[0])
    for i in np.argsort(brightness):
        tone = leaves[0 if brightness[i] < -0.3 else 1 if brightness[i] < 0.3 else 2]
        sketch.canvas.ellipse(camera.project(x + dx[i], y + dy[i], z), size[i], size[i] * 0.85, tone)
