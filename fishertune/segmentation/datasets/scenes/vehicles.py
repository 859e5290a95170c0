"""Cars of several shapes, trucks and buses, as blocks in perspective."""

from __future__ import annotations

import math

import numpy as np

from . import canvas as c
from .canvas import Colour, Lamp
from .sketch import BUS, CAR, HEAD_LAMP, PAINTS, RED_LAMP, TRUCK, Sketch


def draw_vehicle(sketch: Sketch, x: float, z: float, across: bool, oncoming: bool) -> None:
    draw = sketch.random.random()
    if draw < 0.84:
        _car(sketch, x, z, across, oncoming)
    else:
        _large(sketch, x, z, across, oncoming, bus=draw > 0.92)


def _frustum(
    sketch: Sketch,
    bottom: tuple[float, float, float, float, float],
    top: tuple[float, float, float, float, float],
    faces: tuple[int, int, int],
) -> tuple[list[c.Point], list[c.Point]]:
    """A block with rectangular bottom and top (x0, x1, z0, z1, y); returns its near and its flank face."""
    project = sketch.canvas.camera.project
    bx0, bx1, bz0, bz1, by = bottom
    tx0, tx1, tz0, tz1, ty = top
    near = [project(bx0, by, bz0), project(bx1, by, bz0), project(tx1, ty, tz0), project(tx0, ty, tz0)]
    left_is_seen = (bx0 + bx1) / 2 > 0  # the block stands to the right of the camera
    bx, tx = (bx0, tx0) if left_is_seen else (bx1, tx1)
    flank = [project(bx, by, bz0), project(bx, by, bz1), project(tx, ty, tz1), project(tx, ty, tz0)]
    sketch.canvas.polygon(
        [project(tx0, ty, tz0), project(tx1, ty, tz0), project(tx1, ty, tz1), project(tx0, ty, tz1)], faces[2]
    )
    sketch.canvas.polygon(flank, faces[1])
    sketch.canvas.polygon(near, faces[0])
    return near, flank


def _inset(sketch: Sketch, face: list[c.Point], u0: float, u1: float, v0: float, v1: float, surface: int) -> None:
    """A panel inside a face, in the face's own coordinates (0 to 1)."""
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = face

    def at(u: float, v: float) -> c.Point:
        x = (1 - v) * ((1 - u) * ax + u * bx) + v * ((1 - u) * dx + u * cx)
        y = (1 - v) * ((1 - u) * ay + u * by) + v * ((1 - u) * dy + u * cy)
        return x, y

    sketch.canvas.polygon([at(u0, v0), at(u1, v0), at(u1, v1), at(u0, v1)], surface)


def _faces(sketch: Sketch, label: int, paint: Colour, z: float, x: float, length: float) -> tuple[int, int, int]:
    middle = z + length / 2
    near = sketch.canvas.surface(label, paint, at=z, roughness=0.06, snow=0.12)
    flank = sketch.canvas.surface(
        label, tuple(0.9 * v for v in paint), at=middle, roughness=0.06, normal=-float(np.sign(x)), snow=0.08
    )
    top = sketch.canvas.surface(
        label, tuple(min(1.0, 1.12 * v + 0.03) for v in paint), at=middle, roughness=0.06, snow=0.95
    )
    return near, flank, top


def _car(sketch: Sketch, x: float, z: float, across: bool, oncoming: bool) -> None:
    canvas = sketch.canvas
    paint = sketch.pick(PAINTS)
    length, width, height = sketch.between(3.6, 4.9), sketch.between(1.65, 1.9), sketch.between(1.4, 1.75)
    long, wide = (width, length) if across else (length, width)
    x0, x1 = x - wide / 2, x + wide / 2
    belt = height * sketch.between(0.55, 0.62)
    body = _faces(sketch, CAR, paint, z, x, long)
    glass_tint = sketch.between(0.10, 0.22)
    glass = canvas.surface(CAR, (glass_tint, glass_tint * 1.1, glass_tint * 1.25), at=z, roughness=0.25, snow=0.05)
    dark = canvas.surface(CAR, (0.06, 0.06, 0.065), at=z, roughness=0.1)
    canvas.shadow(x0 - 0.15, x1 + 0.15, z - 0.15, z + long + 0.1, 0.0, 235)
    canvas.shadow(min(x0, x + sketch.lean * height), max(x1, x + sketch.lean * height), z, z + long, 0.0, 215)
    _wheels_under(sketch, x0, x1, z, long, dark)
    near, flank = _frustum(
        sketch, (x0, x1, z, z + long, 0.28), (x0 + 0.04, x1 - 0.04, z + 0.05, z + long - 0.05, belt), body
    )
    shape = int(sketch.random.integers(4))  # saloon, hatchback, estate, van
    front, rear = ((1.3, 0.7), (1.1, 0.15), (1.2, 0.1), (0.7, 0.05))[shape]
    if across:
        ends = (x0 + (front if sketch.chance(0.5) else rear), x1 - rear)
        cabin_bottom = (ends[0], ends[1], z + 0.08, z + long - 0.08, belt)
        cabin_top = (ends[0] + 0.4, ends[1] - 0.3, z + 0.25, z + long - 0.25, height)
    else:
        near_gap, far_gap = (front, rear) if oncoming else (rear, front)
        near_slope, far_slope = (0.6, 0.3) if oncoming else (0.35, 0.6)
        cabin_bottom = (x0 + 0.08, x1 - 0.08, z + near_gap, z + long - far_gap, belt)
        cabin_top = (x0 + 0.26, x1 - 0.26, z + near_gap + near_slope, z + long - far_gap - far_slope, height)
    cabin_near, cabin_flank = _frustum(sketch, cabin_bottom, cabin_top, body)
    if across:
        for u0, u1 in ((0.06, 0.48), (0.53, 0.94)):
            _inset(sketch, cabin_near, u0, u1, 0.06, 0.86, glass)
        _round_wheels(sketch, x0, x1, z, dark)
        return
    _inset(sketch, cabin_near, 0.05, 0.95, 0.08, 0.88, glass)
    for u0, u1 in ((0.08, 0.5), (0.55, 0.94)):
        _inset(sketch, cabin_flank, u0, u1, 0.06, 0.86, glass)
    _flank_wheels(sketch, flank, long, dark)
    _front_or_rear(sketch, near, x, z, oncoming, belt, dark)


def _wheels_under(sketch: Sketch, x0: float, x1: float, z: float, long: float, dark: int) -> None:
    sketch.canvas.upright(x0 + 0.05, x0 + 0.3, 0, 0.35, z + 0.1, dark)
    sketch.canvas.upright(x1 - 0.3, x1 - 0.05, 0, 0.35, z + 0.1, dark)
    inner = x0 if (x0 + x1) > 0 else x1
    sketch.canvas.along(inner, 0.12, 0.3, z + 0.1, z + long - 0.1, dark)


def _round_wheels(sketch: Sketch, x0: float, x1: float, z: float, dark: int) -> None:
    scale = sketch.canvas.camera.focal / z
    rim = sketch.canvas.surface(_label_of(sketch, dark), (0.5, 0.5, 0.52), at=z)
    for x in (x0 + 0.75, x1 - 0.75):
        centre = sketch.canvas.camera.project(x, 0.33, z)
        sketch.canvas.ellipse(centre, 0.33 * scale, 0.33 * scale, dark)
        sketch.canvas.ellipse(centre, 0.17 * scale, 0.17 * scale, rim)


def _flank_wheels(sketch: Sketch, flank: list[c.Point], long: float, dark: int) -> None:
    """Wheels on a face seen at an angle: circles drawn in the face's own coordinates."""
    corners = np.asarray(flank)
    angles = np.linspace(0, 2 * math.pi, 9)[:-1]
    for middle in (0.85 / long, 1 - 0.85 / long):
        u, v = middle + 0.34 / long * np.cos(angles), -0.02 + 0.6 * np.sin(angles)
        u, v = u[:, None], v[:, None]
        points = (1 - v) * ((1 - u) * corners[0] + u * corners[1]) + v * ((1 - u) * corners[3] + u * corners[2])
        sketch.canvas.polygon([(float(px), float(py)) for px, py in points], dark)


def _label_of(sketch: Sketch, surface: int) -> int:
    return int(sketch.canvas.surfaces[surface][0])


def _front_or_rear(
    sketch: Sketch, near: list[c.Point], x: float, z: float, oncoming: bool, height: float, dark: int
) -> None:
    canvas, label = sketch.canvas, _label_of(sketch, dark)
    plate = canvas.surface(label, (0.85, 0.85, 0.80), at=z, roughness=0.05)
    if oncoming:
        lamp = canvas.surface(label, (0.92, 0.92, 0.88), at=z, roughness=0.0, glow=5.0)
        _inset(sketch, near, 0.25, 0.75, 0.25, 0.55, dark)
        canvas.lamps.append(Lamp(x, height * 0.7, z - 2.5, HEAD_LAMP, 3.5))
    else:
        lamp = canvas.surface(label, (0.70, 0.08, 0.07), at=z, roughness=0.0, glow=1.2)
        canvas.lamps.append(Lamp(x, height * 0.7, z - 0.8, RED_LAMP, 1.3))
    for u0, u1 in ((0.04, 0.2), (0.8, 0.96)):
        _inset(sketch, near, u0, u1, 0.58, 0.82, lamp)
    _inset(sketch, near, 0.38, 0.62, 0.2, 0.38, plate)


def _large(sketch: Sketch, x: float, z: float, across: bool, oncoming: bool, bus: bool) -> None:
    """A truck or a bus."""
    canvas = sketch.canvas
    label = BUS if bus else TRUCK
    paint = sketch.pick(
        ((0.75, 0.15, 0.12), (0.85, 0.72, 0.15), (0.2, 0.35, 0.6), (0.85, 0.85, 0.83)) if bus else PAINTS
    )
    length, width, height = (
        (sketch.between(8, 11), 2.5, 3.1) if bus else (sketch.between(5.5, 9), 2.3, sketch.between(2.7, 3.5))
    )
    long, wide = (width, length) if across else (length, width)
    x0, x1 = x - wide / 2, x + wide / 2
    faces = _faces(sketch, label, paint, z, x, long)
    glass = canvas.surface(label, (0.14, 0.16, 0.19), at=z, roughness=0.25, glow=0.25 if bus else 0.0)
    dark = canvas.surface(label, (0.06, 0.06, 0.065), at=z)
    canvas.shadow(x0 - 0.2, x1 + 0.2, z - 0.2, z + long, 0.0, 235)
    canvas.shadow(min(x0, x + sketch.lean * height), max(x1, x + sketch.lean * height), z, z + long, 0.0, 215)
    _wheels_under(sketch, x0, x1, z, long, dark)
    near, flank = _frustum(sketch, (x0, x1, z, z + long, 0.4), (x0, x1, z, z + long, height), faces)
    panes = 6
    if across:
        _round_wheels(sketch, x0, x1, z, dark)
    if bus:
        for face in (near, flank) if across else (flank,):
            for i in range(panes):
                _inset(sketch, face, (i + 0.08) / panes, (i + 0.92) / panes, 0.48, 0.84, glass)
    if not across:
        if bus or oncoming:
            _inset(sketch, near, 0.06, 0.94, 0.45, 0.88, glass)
        else:
            doors = canvas.surface(label, tuple(0.75 * v for v in paint), at=z, roughness=0.06)
            _inset(sketch, near, 0.06, 0.485, 0.1, 0.94, doors)
            _inset(sketch, near, 0.515, 0.94, 0.1, 0.94, doors)
        _flank_wheels(sketch, [flank[0], flank[1], *(_low(flank))], long, dark)
        _front_or_rear(sketch, [near[0], near[1], *_low(near)], x, z, oncoming, 1.0, dark)


def _low(face: list[c.Point]) -> list[c.Point]:
    """Upper corners of the lowest part (0.6 m) of a tall face, so that wheels and lamps stay at their height."""
    share = 0.22
    return [
        (face[1][0] + share * (face[2][0] - face[1][0]), face[1][1] + share * (face[2][1] - face[1][1])),
        (face[0][0] + share * (face[3][0] - face[0][0]), face[0][1] + share * (face[3][1] - face[0][1])),
    ]
