"""Poles and what they carry: street lamps, traffic signs, traffic lights."""

from __future__ import annotations

from .canvas import Lamp
from .sketch import COOL, LIGHT, POLE, SIGN, WARM, Sketch


def draw_post(sketch: Sketch, x: float, z: float, height: float, radius: float, label: int = POLE) -> int:
    canvas = sketch.canvas
    surface = canvas.surface(
        label,
        sketch.pick(((0.45, 0.46, 0.47), (0.28, 0.30, 0.30), (0.56, 0.55, 0.53), (0.34, 0.28, 0.22))),
        at=z,
        snow=0.1,
    )
    bottom, top = canvas.camera.project(x, 0, z), canvas.camera.project(x, height, z)
    canvas.line([bottom, top], 2 * radius * canvas.camera.focal / z + 1.0, surface)
    canvas.shadow(
        min(x, x + sketch.lean * height), max(x, x + sketch.lean * height), z - radius, z + radius * 2, 0.0, 170
    )
    return surface


def draw_street_lamp(sketch: Sketch, x: float, z: float, sign: int) -> None:
    canvas, camera = sketch.canvas, sketch.canvas.camera
    height, arm = sketch.between(5.5, 8.0), sketch.between(0.8, 2.2)
    surface = draw_post(sketch, x, z, height, 0.08)
    end = x - sign * arm
    canvas.line(
        [camera.project(x, height, z), camera.project(end, height + 0.3, z)], 0.08 * camera.focal / z + 1.0, surface
    )
    colour = WARM if sketch.chance(0.7) else COOL
    head = canvas.surface(POLE, (0.8, 0.8, 0.78), at=z, snow=0.5, glow=4.0)
    canvas.upright(end - 0.35, end + 0.35, height + 0.15, height + 0.4, z, head)
    canvas.lamps.append(Lamp(end, height, z, colour, 7.0))


def draw_traffic_sign(sketch: Sketch, x: float, z: float) -> None:
    canvas, camera = sketch.canvas, sketch.canvas.camera
    height = sketch.between(2.1, 2.8)
    draw_post(sketch, x, z, height, 0.04)
    scale, size = camera.focal / z, sketch.between(0.32, 0.48)
    middle = camera.project(x, height, z)
    red, white, blue, yellow = (
        canvas.surface(SIGN, colour, at=z, roughness=0.05, glow=0.03)
        for colour in ((0.75, 0.10, 0.10), (0.90, 0.90, 0.88), (0.12, 0.28, 0.65), (0.90, 0.72, 0.10))
    )
    kind = int(sketch.random.integers(5))
    if kind == 0:  # prohibition
        canvas.ellipse(middle, size * scale, size * scale, red)
        canvas.ellipse(middle, 0.68 * size * scale, 0.68 * size * scale, white)
    elif kind == 1:  # order
        canvas.ellipse(middle, size * scale, size * scale, blue)
        canvas.line(
            [(middle[0], middle[1] + 0.5 * size * scale), (middle[0], middle[1] - 0.5 * size * scale)],
            0.2 * size * scale,
            white,
        )
    elif kind == 2:  # warning
        for factor, surface in ((1.15, red), (0.7, white)):
            r = factor * size * scale
            canvas.polygon(
                [
                    (middle[0], middle[1] - r),
                    (middle[0] + 0.9 * r, middle[1] + 0.6 * r),
                    (middle[0] - 0.9 * r, middle[1] + 0.6 * r),
                ],
                surface,
            )
    elif kind == 3:  # right of way
        for factor, surface in ((1.1, white), (0.75, yellow)):
            r = factor * size * scale
            canvas.polygon(
                [
                    (middle[0], middle[1] - r),
                    (middle[0] + r, middle[1]),
                    (middle[0], middle[1] + r),
                    (middle[0] - r, middle[1]),
                ],
                surface,
            )
    else:  # directions
        canvas.upright(
            x - 1.6 * size,
            x + 1.6 * size,
            height - 0.6 * size,
            height + 0.6 * size,
            z,
            blue if sketch.chance(0.6) else yellow,
        )
        canvas.upright(x - 1.2 * size, x + 0.9 * size, height - 0.15 * size, height + 0.15 * size, z, white)


def draw_traffic_light(sketch: Sketch, x: float, z: float, sign: int) -> None:
    canvas, camera = sketch.canvas, sketch.canvas.camera
    height = sketch.between(2.7, 3.4)
    surface = draw_post(sketch, x, z, height, 0.06)
    spots = [(x, height)]
    if sketch.chance(0.4):
        end, top = x - sign * sketch.between(2.0, 4.0), 5.6
        canvas.line(
            [camera.project(x, 0, z), camera.project(x, top, z), camera.project(end, top, z)],
            0.1 * camera.focal / z + 1.0,
            surface,
        )
        spots.append((end, top - 0.5))
    lit = int(sketch.random.integers(3))
    case = canvas.surface(LIGHT, (0.10, 0.11, 0.11), at=z, roughness=0.05, snow=0.2)
    colours = ((0.95, 0.15, 0.10), (0.95, 0.70, 0.15), (0.15, 0.90, 0.45))
    off = canvas.surface(LIGHT, (0.2, 0.18, 0.17), at=z)
    on = canvas.surface(LIGHT, colours[lit], at=z, roughness=0.0, glow=2.5)
    for px, py in spots:
        canvas.upright(px - 0.24, px + 0.24, py - 0.62, py + 0.62, z, case)
        for i in range(3):
            radius = 0.16 * camera.focal / z
            canvas.ellipse(camera.project(px, py + 0.4 - 0.4 * i, z), radius, radius, on if i == lit else off)
    canvas.lamps.append(Lamp(x, height, z, colours[lit], 1.5))
