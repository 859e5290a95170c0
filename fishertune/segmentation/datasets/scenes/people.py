"""Pedestrians, riders, bicycles and motorcycles."""

from __future__ import annotations

import numpy as np

from . import canvas as c
from .sketch import BICYCLE, MOTORCYCLE, PAINTS, PERSON, RIDER, Sketch

_CLOTHES = (
    (0.15, 0.16, 0.22), (0.55, 0.14, 0.14), (0.20, 0.28, 0.45), (0.75, 0.73, 0.70), (0.30, 0.32, 0.28),
    (0.70, 0.55, 0.25), (0.40, 0.22, 0.38), (0.10, 0.10, 0.10), (0.25, 0.45, 0.40),
)  # fmt: skip


def draw_person(sketch: Sketch, x: float, z: float) -> None:
    canvas = sketch.canvas
    height = sketch.between(1.5, 1.9)
    stride = sketch.between(0.05, 0.32)
    skin, top, legs, hair = _outfit(sketch, PERSON, z)
    canvas.shadow(min(x, x + sketch.lean * height), max(x, x + sketch.lean * height), z - 0.15, z + 0.2, 0.0, 190)
    canvas.shadow(x - 0.35, x + 0.35, z - 0.2, z + 0.25, 0.0, 170)
    hip, neck = 0.48 * height, 0.84 * height
    width = sketch.between(0.17, 0.24)
    for foot in (-stride, stride):
        _limb(sketch, (x + 0.5 * np.sign(foot) * width * 0.6, hip), (x + foot, 0.0), 0.15, z, legs)
    coat = sketch.between(0.0, 0.2) * height
    points = ((x - width, neck), (x + width, neck), (x + width * 0.85, hip - coat), (x - width * 0.85, hip - coat))
    canvas.polygon([canvas.camera.project(px, py, z) for px, py in points], top)
    for arm in (-1, 1):
        _limb(
            sketch,
            (x + arm * width, neck - 0.05),
            (x + arm * (width + 0.06) + sketch.between(-0.1, 0.1), hip),
            0.1,
            z,
            top,
        )
    _head(sketch, x, height, z, skin, hair)


def _outfit(sketch: Sketch, label: int, z: float) -> tuple[int, int, int, int]:
    colours = (
        sketch.pick(((0.80, 0.62, 0.50), (0.50, 0.35, 0.26), (0.65, 0.48, 0.36))),
        sketch.pick(_CLOTHES), sketch.pick(_CLOTHES),
        sketch.pick(((0.10, 0.08, 0.07), (0.35, 0.24, 0.14), (0.60, 0.50, 0.32))),
    )  # fmt: skip
    skin, top, legs, hair = (
        sketch.canvas.surface(label, colour, at=z, roughness=0.15, snow=0.08) for colour in colours
    )
    return skin, top, legs, hair


def _limb(sketch: Sketch, start: c.Point, end: c.Point, width: float, z: float, surface: int) -> None:
    camera = sketch.canvas.camera
    sketch.canvas.line([camera.project(*start, z), camera.project(*end, z)], width * camera.focal / z, surface)


def _head(sketch: Sketch, x: float, top: float, z: float, skin: int, hair: int) -> None:
    scale = sketch.canvas.camera.focal / z
    centre = sketch.canvas.camera.project(x, top - 0.13, z)
    sketch.canvas.ellipse(centre, 0.11 * scale, 0.14 * scale, skin)
    sketch.canvas.ellipse((centre[0], centre[1] - 0.06 * scale), 0.11 * scale, 0.08 * scale, hair)


def draw_cycle(sketch: Sketch, x: float, z: float, motor: bool, seen_from_side: bool) -> None:
    canvas, camera = sketch.canvas, sketch.canvas.camera
    label = MOTORCYCLE if motor else BICYCLE
    scale = camera.focal / z
    tyre = canvas.surface(label, (0.09, 0.09, 0.09), at=z)
    frame = canvas.surface(label, sketch.pick(PAINTS), at=z, snow=0.15)
    canvas.shadow(x - 0.7, x + 0.7, z - 0.15, z + 0.2, 0.0, 180)
    radius = 0.33
    thick = max(1, round((0.12 if motor else 0.05) * scale))
    if not seen_from_side:
        canvas.upright(x - 0.06 - 0.06 * motor, x + 0.06 + 0.06 * motor, 0, 0.7, z, tyre)
        canvas.upright(x - 0.12 - 0.15 * motor, x + 0.12 + 0.15 * motor, 0.55, 1.0, z, frame)
        _limb(sketch, (x - 0.3, 1.05), (x + 0.3, 1.05), 0.06, z, tyre)
        return
    for wheel in (-0.52, 0.52):
        canvas.ellipse(camera.project(x + wheel, radius, z), radius * scale, radius * scale, tyre, ring=thick)
    if motor:
        points = ((-0.55, 0.8), (0.1, 0.85), (0.5, 1.05), (0.45, 0.5), (-0.3, 0.35))
        canvas.polygon([camera.project(x + px, py, z) for px, py in points], frame)
        return
    for start, end in (
        ((-0.52, radius), (-0.1, 0.3)),
        ((-0.1, 0.3), (0.38, 0.8)),
        ((-0.2, 0.85), (0.38, 0.8)),
        ((-0.2, 0.9), (-0.1, 0.3)),
        ((0.52, radius), (0.36, 1.0)),
    ):
        _limb(sketch, (x + start[0], start[1]), (x + end[0], end[1]), 0.06, z, frame)


def draw_rider(sketch: Sketch, x: float, z: float) -> None:
    side_view, motor = sketch.chance(0.4), sketch.chance(0.3)
    draw_cycle(sketch, x, z, motor, side_view)
    skin, top, legs, hair = _outfit(sketch, RIDER, z)
    if side_view:
        _limb(sketch, (x - 0.2, 0.95), (x + 0.05, 0.35), 0.16, z, legs)
        _limb(sketch, (x - 0.2, 0.95), (x + 0.15, 1.45), 0.30, z, top)
        _limb(sketch, (x + 0.15, 1.4), (x + 0.38, 1.02), 0.10, z, top)
        _head(sketch, x + 0.22, 1.78, z, skin, hair)
        return
    for foot in (-0.14, 0.14):
        _limb(sketch, (x + foot, 0.95), (x + foot * 1.2, 0.35), 0.15, z, legs)
    points = ((x - 0.24, 1.45), (x + 0.24, 1.45), (x + 0.17, 0.85), (x - 0.17, 0.85))
    sketch.canvas.polygon([sketch.canvas.camera.project(px, py, z) for px, py in points], top)
    _head(sketch, x, 1.75, z, skin, hair)
