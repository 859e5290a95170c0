"""Lays out a random street and draws it on a :class:`Canvas`: what stands where, in metres, independent of the weather."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import canvas as c
from .canvas import Camera, Canvas, Colour, Lamp

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR, TRUCK, BUS) = range(16)
MOTORCYCLE, BICYCLE, IGNORE = 17, 18, 255

LEFT, RIGHT = -1, 1
HORIZON_DEPTH = 140.0  # metres; where rows of buildings end
WARM, COOL, RED_LAMP, HEAD_LAMP = (1.0, 0.72, 0.38), (0.85, 0.92, 1.0), (1.0, 0.08, 0.05), (1.0, 0.96, 0.85)

_FACADES = (
    (0.62, 0.55, 0.46), (0.55, 0.32, 0.26), (0.70, 0.66, 0.60), (0.50, 0.50, 0.52), (0.72, 0.60, 0.42),
    (0.42, 0.36, 0.33), (0.78, 0.76, 0.72), (0.60, 0.44, 0.36), (0.45, 0.50, 0.55), (0.66, 0.50, 0.48),
)  # fmt: skip
_PAINTS = (
    (0.75, 0.76, 0.78), (0.10, 0.10, 0.12), (0.88, 0.88, 0.87), (0.35, 0.36, 0.38), (0.55, 0.10, 0.10),
    (0.12, 0.20, 0.42), (0.55, 0.57, 0.58), (0.20, 0.30, 0.24), (0.62, 0.50, 0.34), (0.80, 0.66, 0.16),
)  # fmt: skip
_CLOTHES = (
    (0.15, 0.16, 0.22), (0.55, 0.14, 0.14), (0.20, 0.28, 0.45), (0.75, 0.73, 0.70), (0.30, 0.32, 0.28),
    (0.70, 0.55, 0.25), (0.40, 0.22, 0.38), (0.10, 0.10, 0.10), (0.25, 0.45, 0.40),
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """One building of a row: from depth ``start`` to ``end`` on one side."""

    start: float
    end: float
    height: float


@dataclass(frozen=True)
class Side:
    """What lies beside the road: distances of the road's edge, the sidewalk's outer edge and the fronts, in metres."""

    sign: int
    kerb: float
    walk: float
    front: float
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Street:
    """A drawn street: the canvas, its two sides, and the direction the sun comes from (−1 left … +1 right)."""

    canvas: Canvas
    sides: tuple[Side, Side]
    sun: float


class _Builder:
    """Draws one street; every number comes from ``random``."""

    def __init__(self, canvas: Canvas, random: np.random.Generator) -> None:
        self.canvas = canvas
        self.random = random
        self.sun = float(random.choice((-1.0, 1.0)) * random.uniform(0.3, 1.0))
        self.lean = -self.sun * random.uniform(0.4, 1.4)  # metres of shadow per metre of height

    # Small helpers -------------------------------------------------------------------------------------------------
    def between(self, low: float, high: float) -> float:
        return float(self.random.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def pick(self, colours: tuple[Colour, ...], spread: float = 0.06) -> Colour:
        base = np.asarray(colours[int(self.random.integers(len(colours)))])
        tint = base * self.between(0.85, 1.15) + self.random.uniform(-spread, spread, 3)
        red, green, blue = np.clip(tint, 0.03, 0.97)
        return float(red), float(green), float(blue)

    def draw(self) -> Street:
        left_kerb, right_kerb = self._road_edges()
        self._sky_and_distance()
        urban = self.random.random(2) < 0.78
        sides = (
            self._plan_side(LEFT, left_kerb, bool(urban[0])),
            self._plan_side(RIGHT, right_kerb, bool(urban[1])),
        )
        self._ground(sides)
        for side in sides:
            self._buildings(side)
        for side in sides:
            self._yard(side)
        self._street_objects(sides)
        return Street(self.canvas, sides, self.sun)

    # Ground --------------------------------------------------------------------------------------------------------
    def _road_edges(self) -> tuple[float, float]:
        """Distances of the left and right kerb from the camera, which drives in the right-hand lane."""
        lane = self.between(3.0, 3.7)
        self.lanes_left, self.lanes_right = (2 if self.chance(0.3) else 1 for _ in range(2))
        parking_left, parking_right = (2.2 if self.chance(0.5) else 0.4 for _ in range(2))
        own_lane = int(self.random.integers(self.lanes_right))
        self.middle = -lane * (own_lane + 0.5)  # x of the centre line
        self.lane = lane
        return -(self.middle - lane * self.lanes_left - parking_left), self.middle + lane * self.lanes_right + parking_right

    def _sky_and_distance(self) -> None:
        canvas, camera = self.canvas, self.canvas.camera
        sky = canvas.surface(SKY, (0.5, 0.65, 0.85), plane=c.SKY, texture=c.CLOUDS)
        width, horizon = camera.image_width, camera.horizon
        canvas.polygon([(0, 0), (width, 0), (width, horizon + 1), (0, horizon + 1)], sky)
        x = 0.0
        while x < width:  # a skyline of trees and houses far away
            step = self.between(0.04, 0.16) * width
            if self.chance(0.65):
                top = self.between(4.0, 11.0)
                surface = canvas.surface(
                    VEGETATION, self.pick(((0.24, 0.32, 0.18), (0.30, 0.36, 0.22))), at=150.0,
                    texture=c.FOLIAGE, roughness=0.35, snow=0.45,
                )  # fmt: skip
                rise = top * camera.focal / 150.0
                canvas.ellipse((x + step / 2, horizon), step * 0.75, rise, surface)
            else:
                surface = canvas.surface(
                    BUILDING, self.pick(_FACADES), at=150.0, texture=c.FACADE,
                    pattern=(3.0, 3.2, 0.5, self.between(0, 9)),
                )  # fmt: skip
                rise = self.between(6.0, 22.0) * camera.focal / 150.0
                canvas.polygon([(x, horizon - rise), (x + step, horizon - rise), (x + step, horizon + 1), (x, horizon + 1)], surface)
            x += step * 0.8

    def _ground(self, sides: tuple[Side, Side]) -> None:
        canvas = self.canvas
        left, right = sides
        grass = canvas.surface(
            TERRAIN, self.pick(((0.36, 0.42, 0.20), (0.44, 0.42, 0.26), (0.30, 0.40, 0.18))), plane=c.GROUND,
            texture=c.GRASS, roughness=0.35, snow=1.0,
        )  # fmt: skip
        paving = canvas.surface(
            SIDEWALK, self.pick(((0.58, 0.56, 0.53), (0.62, 0.55, 0.50), (0.52, 0.52, 0.53))), plane=c.GROUND,
            texture=c.TILES, roughness=0.12, snow=0.9, pattern=(self.between(0.4, 1.0), self.between(0.4, 1.0), 0.0, 0.0),
        )  # fmt: skip
        kerbstone = canvas.surface(SIDEWALK, (0.70, 0.69, 0.67), plane=c.GROUND, roughness=0.08, snow=0.7)
        shade = self.between(0.24, 0.40)
        asphalt_colour = (shade, shade * self.between(0.98, 1.02), shade * self.between(0.98, 1.06))
        asphalt = canvas.surface(ROAD, asphalt_colour, plane=c.GROUND, texture=c.ASPHALT, roughness=0.16, snow=0.45,
                                 pattern=(self.lane, 0.0, 0.0, self.middle))  # fmt: skip
        paint = canvas.surface(ROAD, (0.86, 0.86, 0.83), plane=c.GROUND, roughness=0.15, snow=0.45)
        canvas.ground(-400, 400, c.NEAR, 400, grass)
        for side in sides:
            inner, outer = side.sign * side.kerb, side.sign * side.walk
            canvas.ground(min(inner, outer), max(inner, outer), c.NEAR, 300, paving)
            kerb_outer = side.sign * (side.kerb + 0.22)
            canvas.ground(min(inner, kerb_outer), max(inner, kerb_outer), c.NEAR, 120, kerbstone)
        canvas.ground(-left.kerb, right.kerb, c.NEAR, 400, asphalt)
        self.crossing = self.between(14, 45) if self.chance(0.45) else None
        if self.crossing is not None:
            canvas.ground(-200, 200, self.crossing, self.crossing + 9, asphalt)
            if self.chance(0.8):
                x = -left.kerb + 0.5
                while x < right.kerb - 0.5:
                    canvas.ground(x, x + 0.5, self.crossing - 4.0, self.crossing - 1.2, paint)
                    x += 1.0
        self._markings(paint)
        self._patches(asphalt_colour, left.kerb, right.kerb)

    def _markings(self, paint: int) -> None:
        gap = (math.inf, -math.inf) if self.crossing is None else (self.crossing - 5.0, self.crossing + 10.0)
        dash, pause = self.between(2.0, 4.0), self.between(3.0, 6.0)
        for lane in range(-self.lanes_left, self.lanes_right + 1):
            x = self.middle + lane * self.lane
            solid = lane in (-self.lanes_left, self.lanes_right) or (lane == 0 and self.chance(0.3))
            if solid and self.chance(0.3):
                continue
            z = c.NEAR if solid else self.between(0, dash + pause)
            while z < 100:
                end = z + (12.0 if solid else dash)
                if end < gap[0] or z > gap[1]:
                    self.canvas.ground(x - 0.08, x + 0.08, z, end, paint)
                z = end if solid else end + pause

    def _patches(self, colour: Colour, left: float, right: float) -> None:
        for _ in range(int(self.random.integers(0, 4))):
            factor = self.between(0.7, 1.15)
            patch = self.canvas.surface(
                ROAD, tuple(factor * v for v in colour), plane=c.GROUND, texture=c.ASPHALT, snow=0.45,
                pattern=(self.lane, 0.0, 0.0, self.middle),
            )  # fmt: skip
            x, z = self.between(-left, right - 1.0), self.between(4, 40)
            self.canvas.ground(x, min(x + self.between(0.6, 2.5), right), z, z + self.between(1, 8), patch)

    # Buildings -----------------------------------------------------------------------------------------------------
    def _plan_side(self, sign: int, kerb: float, urban: bool) -> Side:
        walk = kerb + self.between(2.0, 4.8)
        front = walk + (0.0 if urban and self.chance(0.45) else self.between(2.0, 7.0))
        blocks = []
        z = self.between(-12.0, 2.0)
        density = 0.93 if urban else 0.35
        tall = self.between(6.0, 20.0) if urban else 7.0
        while z < HORIZON_DEPTH:
            length = self.between(8.0, 22.0)
            if self.chance(density):
                blocks.append(Block(z, z + length, max(4.0, tall * self.between(0.6, 1.35))))
            z += length + (0.0 if self.chance(0.7) else self.between(2.0, 7.0))
        return Side(sign, kerb, walk, front, tuple(blocks))

    def _buildings(self, side: Side) -> None:
        canvas, sign = self.canvas, side.sign
        for block in reversed(side.blocks):
            if self.crossing is not None and block.start < self.crossing + 11 and block.end > self.crossing - 2:
                continue
            if block.end < 3.0:
                continue
            colour = self.pick(_FACADES)
            pattern = (self.between(1.6, 3.6), self.between(2.8, 3.6), self.between(0.3, 0.65), self.between(0, 97))
            texture = c.FACADE if self.chance(0.95) else c.BRICKS
            x = sign * side.front
            front = canvas.surface(BUILDING, colour, at=max(block.start, c.NEAR), texture=texture if self.chance(0.5) else c.BRICKS,
                                   pattern=pattern, snow=0.08)  # fmt: skip
            flank = canvas.surface(BUILDING, colour, plane=c.SIDE, at=side.front, texture=texture, pattern=pattern,
                                   normal=-sign, snow=0.08)  # fmt: skip
            roof_colour = self.pick(((0.42, 0.24, 0.20), (0.30, 0.29, 0.30), (0.38, 0.34, 0.30)))
            roof = canvas.surface(BUILDING, roof_colour, plane=c.SIDE, at=side.front, roughness=0.2, snow=1.0, normal=-sign)
            pitched = block.height < 11 and self.chance(0.75)
            depth = 10.0
            near = max(block.start, c.NEAR)
            if block.start > c.NEAR:
                canvas.upright(min(x, x + sign * depth), max(x, x + sign * depth), 0, block.height, block.start, front)
                if pitched:
                    ridge = [canvas.camera.project(px, py, block.start) for px, py in (
                        (x, block.height), (x + sign * depth / 2, block.height + 3.5), (x + sign * depth, block.height))]  # fmt: skip
                    canvas.polygon(ridge, front)
            canvas.along(x, 0, block.height, near, block.end, flank)
            if pitched:
                slope = [canvas.camera.project(px, py, pz) for px, py, pz in (
                    (x, block.height, near), (x, block.height, block.end),
                    (x + sign * depth / 2, block.height + 3.5, block.end), (x + sign * depth / 2, block.height + 3.5, near))]  # fmt: skip
                canvas.polygon(slope, roof)
            else:
                cornice = canvas.surface(BUILDING, tuple(0.75 * v for v in colour), plane=c.SIDE, at=side.front, normal=-sign, snow=0.9)
                canvas.along(x, block.height - 0.5, block.height, near, block.end, cornice)
            if self.sun * sign > 0.1:  # the row stands between the sun and the street
                reach = min(abs(self.lean), 1.2) * block.height
                inner = x - sign * reach
                canvas.shadow(min(x, inner), max(x, inner), near, block.end, 0.0)

    def _yard(self, side: Side) -> None:
        """Trees, bushes, then wall or fence between the sidewalk and the buildings."""
        room = side.front - side.walk
        bare = len(side.blocks) < 5
        depths = np.sort(self.random.uniform(5, 110, int(self.random.integers(2, 6)) if room > 1.5 else 0))[::-1]
        if bare:
            depths = np.sort(np.concatenate([depths, self.random.uniform(6, 120, 9)]))[::-1]
        for z in depths:
            if self._in_crossing(float(z)):
                continue
            x = side.sign * (side.walk + (self.between(0.8, max(1.0, room)) if not bare else self.between(0.8, 14.0)))
            if self.chance(0.35):
                self._bush(x, float(z))
            else:
                self._tree(x, float(z))
        if room > 1.5 and self.chance(0.7):
            self._barrier(side)

    def _barrier(self, side: Side) -> None:
        canvas, sign = self.canvas, side.sign
        x = side.walk + 0.3
        kind = self.random.random()
        z, end = self.between(0.5, 12.0), self.between(40, 110)
        height = self.between(0.9, 2.2)
        if kind < 0.42:
            texture = c.BRICKS if self.chance(0.6) else c.PLAIN
            surface = canvas.surface(
                WALL, self.pick(((0.55, 0.50, 0.45), (0.52, 0.34, 0.28), (0.62, 0.61, 0.59))), plane=c.SIDE, at=x,
                texture=texture, roughness=0.2, normal=-sign, snow=0.12,
            )  # fmt: skip
        elif kind < 0.85:
            surface = canvas.surface(
                FENCE, self.pick(((0.34, 0.24, 0.16), (0.80, 0.80, 0.78), (0.22, 0.26, 0.24), (0.45, 0.46, 0.47))),
                plane=c.SIDE, at=x, texture=c.RAILS, normal=-sign, snow=0.15, pattern=(self.between(0.18, 0.5), 0.6, 0.55, 0.0),
            )  # fmt: skip
        else:  # a hedge
            surface = canvas.surface(VEGETATION, self.pick(((0.20, 0.30, 0.14),)), plane=c.SIDE, at=x, texture=c.FOLIAGE,
                                     roughness=0.5, normal=-sign, snow=0.5)  # fmt: skip
        while z < end:
            stop = min(z + self.between(8, 25), end)
            for start, last in self._outside_crossing(z, stop):
                canvas.along(sign * x, 0, height, start, last, surface)
            z = stop + (0.0 if self.chance(0.5) else self.between(1.5, 4.0))

    def _outside_crossing(self, start: float, end: float) -> list[tuple[float, float]]:
        if self.crossing is None:
            return [(start, end)]
        low, high = self.crossing - 1.5, self.crossing + 10.5
        return [(a, b) for a, b in ((start, min(end, low)), (max(start, high), end)) if b > a]

    def _in_crossing(self, z: float) -> bool:
        return self.crossing is not None and self.crossing - 1.5 < z < self.crossing + 10.5

    # Plants --------------------------------------------------------------------------------------------------------
    def _leaves(self, z: float) -> tuple[int, int, int]:
        base = np.asarray(self.pick(((0.25, 0.36, 0.15), (0.32, 0.40, 0.18), (0.20, 0.32, 0.18), (0.42, 0.38, 0.16), (0.44, 0.28, 0.12)), 0.04))
        dark, middle, light = (
            self.canvas.surface(VEGETATION, tuple(base * factor), at=z, texture=c.FOLIAGE, roughness=0.5, snow=snow, normal=normal)
            for factor, snow, normal in ((0.62, 0.1, -0.4 * self.sun), (1.0, 0.45, 0.2 * self.sun), (1.28, 0.9, 0.6 * self.sun))
        )
        return dark, middle, light

    def _tree(self, x: float, z: float) -> None:
        canvas, camera = self.canvas, self.canvas.camera
        height = self.between(4.5, 10.0)
        scale = camera.focal / z
        trunk = canvas.surface(VEGETATION, self.pick(((0.28, 0.21, 0.15), (0.36, 0.32, 0.27))), at=z, roughness=0.3, snow=0.1)
        width = self.between(0.12, 0.26)
        leaves = self._leaves(z)
        canvas.shadow(x - 1.2, x + 1.2, z - 0.8, z + 0.8, 0.0, 170)
        canvas.shadow(min(x, x + self.lean * height) - 0.5, max(x, x + self.lean * height) + 0.5, z - 0.9, z + 0.9, 0.0, 200)
        if self.chance(0.2):  # a conifer: stacked skirts
            canvas.upright(x - width, x + width, 0, 1.5, z, trunk)
            levels = 5
            for level in range(levels):
                y = 1.0 + (height - 1.0) * level / levels
                spread = (height * 0.26) * (1 - level / (levels + 0.5))
                tip = y + (height - 1.0) / levels * 1.7
                middle = x + self.between(-0.1, 0.1)
                canvas.polygon([camera.project(px, py, z) for px, py in ((x - spread, y), (x + spread, y), (middle, tip))], leaves[min(level % 3, 1)])
                canvas.polygon([camera.project(px, py, z) for px, py in (
                    (x + spread * np.sign(self.sun), y), (x + 0.2 * spread, y), (middle, tip))], leaves[2])  # fmt: skip
            return
        crown = self.between(0.24, 0.36) * height
        base = height - 1.7 * crown
        canvas.polygon([camera.project(px, py, z) for px, py in ((x - width, 0), (x - width * 0.6, base + crown * 0.6), (x + width * 0.6, base + crown * 0.6), (x + width, 0))], trunk)
        self._blobs(x, base + crown, z, crown, crown * self.between(0.8, 1.05), leaves, 12 if scale < 12 else 26)

    def _bush(self, x: float, z: float) -> None:
        size = self.between(0.5, 1.2)
        self._blobs(x, size * 0.7, z, size * 1.3, size * 0.7, self._leaves(z), 10)

    def _blobs(self, x: float, y: float, z: float, wide: float, tall: float, leaves: tuple[int, int, int], count: int) -> None:
        """A crown: dark blobs behind, light ones on the sunny upper side."""
        camera = self.canvas.camera
        scale = camera.focal / z
        angle = self.random.uniform(0, 2 * math.pi, count)
        radius = np.sqrt(self.random.random(count)) * 0.75
        size = self.random.uniform(0.25, 0.45, count) * min(wide, tall) * scale
        dx, dy = radius * np.cos(angle) * wide, radius * np.sin(angle) * tall
        brightness = dy / tall + 0.5 * self.sun * dx / wide + self.random.uniform(-0.35, 0.35, count)
        self.canvas.ellipse(camera.project(x, y, z), wide * 0.75 * scale, tall * 0.75 * scale, leaves[0])
        for i in np.argsort(brightness):
            tone = leaves[0 if brightness[i] < -0.3 else 1 if brightness[i] < 0.3 else 2]
            self.canvas.ellipse(camera.project(x + dx[i], y + dy[i], z), size[i], size[i] * 0.85, tone)

    # Street objects ------------------------------------------------------------------------------------------------
    def _street_objects(self, sides: tuple[Side, Side]) -> None:
        tasks: list[tuple[float, str, float, int]] = []  # depth, what, x, direction
        left, right = sides
        spacing = self.between(18, 32)
        for side in sides:
            edge = side.sign * (side.kerb + 0.45)
            has_trees, has_lamps = self.chance(0.4), self.chance(0.75)
            for z in np.arange(self.between(6, 20), 110, spacing):
                if has_lamps and not self._in_crossing(float(z)):
                    tasks.append((float(z), "lamp", edge, side.sign))
                if has_trees and not self._in_crossing(float(z) + 7):
                    tasks.append((float(z) + 7, "tree", edge + side.sign * 0.4, side.sign))
            for _ in range(int(self.random.integers(1, 5))):
                tasks.append((self.between(5, 60), "sign" if self.chance(0.6) else "pole", edge, side.sign))
            for _ in range(int(self.random.integers(1, 8))):
                x = side.sign * self.between(side.kerb + 0.6, max(side.walk - 0.2, side.kerb + 0.8))
                tasks.append((self.between(5, 45), "person", x, side.sign))
            if self.chance(0.2):
                tasks.append((self.between(6, 30), "bin", side.sign * (side.walk - 0.4), side.sign))
            if self.chance(0.25):
                tasks.append((self.between(6, 25), "bicycle", side.sign * (side.kerb + 0.9), side.sign))
            tasks += self._parked(side)
        tasks += self._traffic()
        if self.crossing is not None:
            if self.chance(0.85):
                for side in sides:
                    tasks.append((self.crossing - 0.8, "traffic light", side.sign * (side.kerb + 0.4), side.sign))
            if self.chance(0.4):
                tasks.append((self.crossing - self.between(1.5, 3.5), "person", self.between(-left.kerb, right.kerb), 1))
            if self.chance(0.5):
                tasks.append((self.crossing + self.between(2.5, 6.0), "cross car", self.between(-14, 14), 1))
        elif self.chance(0.3):
            tasks.append((self.between(12, 50), "traffic light", right.kerb + 0.4, 1))
        if self.chance(0.45):
            tasks.append((self.between(6, 28), "rider", right.kerb - 0.7 if self.chance(0.6) else -left.kerb + 0.7, 1))
        for z, what, x, sign in sorted(tasks, key=lambda task: -task[0]):
            self._place(what, x, z, sign)

    def _place(self, what: str, x: float, z: float, sign: int) -> None:
        if what == "tree":
            self._tree(x, z)
        elif what == "lamp":
            self._street_lamp(x, z, sign)
        elif what == "sign":
            self._traffic_sign(x, z)
        elif what == "pole":
            self._post(x, z, self.between(2.5, 7.0), 0.06)
        elif what == "traffic light":
            self._traffic_light(x, z, sign)
        elif what == "person":
            self._person(x, z)
        elif what == "bin":
            bin_surface = self.canvas.surface(IGNORE, self.pick(((0.2, 0.3, 0.22), (0.3, 0.3, 0.32))), at=z, snow=0.3)
            self.canvas.upright(x - 0.35, x + 0.35, 0, 1.1, z, bin_surface)
        elif what == "bicycle":
            self._cycle(x, z, motor=self.chance(0.3), seen_from_side=self.chance(0.7))
        elif what == "rider":
            self._rider(x, z)
        elif what == "cross car":
            self._vehicle(x, z, across=True, oncoming=False)
        else:
            self._vehicle(x, z, across=False, oncoming=what == "oncoming")

    def _parked(self, side: Side) -> list[tuple[float, str, float, int]]:
        has_parking = (side.kerb - abs(self.middle + side.sign * self.lane * (self.lanes_left if side.sign < 0 else self.lanes_right))) > 1.5
        if not has_parking:
            return []
        cars, z = [], self.between(2.0, 10.0)
        while z < 70:
            if self.chance(0.65) and not self._in_crossing(z) and not self._in_crossing(z + 4.5):
                cars.append((z, "oncoming" if side.sign < 0 else "car", side.sign * (side.kerb - 1.15), side.sign))
            z += self.between(5.6, 7.5)
        return cars

    def _traffic(self) -> list[tuple[float, str, float, int]]:
        cars = []
        for lane in range(-self.lanes_left, self.lanes_right):
            x = self.middle + (lane + 0.5) * self.lane
            z = self.between(9.0, 45.0) if abs(x) < 1.0 else self.between(5.0, 45.0)
            while z < 90:
                if self.chance(0.7):
                    cars.append((z, "oncoming" if lane < 0 else "car", x + self.between(-0.3, 0.3), 1))
                z += self.between(12.0, 40.0)
        return cars

    # Posts, signs, lights ------------------------------------------------------------------------------------------
    def _post(self, x: float, z: float, height: float, radius: float, label: int = POLE) -> int:
        canvas = self.canvas
        surface = canvas.surface(label, self.pick(((0.45, 0.46, 0.47), (0.28, 0.30, 0.30), (0.56, 0.55, 0.53), (0.34, 0.28, 0.22))), at=z, snow=0.1)
        bottom, top = canvas.camera.project(x, 0, z), canvas.camera.project(x, height, z)
        canvas.line([bottom, top], 2 * radius * canvas.camera.focal / z + 1.0, surface)
        canvas.shadow(min(x, x + self.lean * height), max(x, x + self.lean * height), z - radius, z + radius * 2, 0.0, 170)
        return surface

    def _street_lamp(self, x: float, z: float, sign: int) -> None:
        canvas, camera = self.canvas, self.canvas.camera
        height, arm = self.between(5.5, 8.0), self.between(0.8, 2.2)
        surface = self._post(x, z, height, 0.08)
        end = x - sign * arm
        canvas.line([camera.project(x, height, z), camera.project(end, height + 0.3, z)], 0.08 * camera.focal / z + 1.0, surface)
        colour = WARM if self.chance(0.7) else COOL
        head = canvas.surface(POLE, (0.8, 0.8, 0.78), at=z, snow=0.5, glow=4.0)
        canvas.upright(end - 0.35, end + 0.35, height + 0.15, height + 0.4, z, head)
        canvas.lamps.append(Lamp(end, height, z, colour, 7.0))

    def _traffic_sign(self, x: float, z: float) -> None:
        canvas, camera = self.canvas, self.canvas.camera
        height = self.between(2.1, 2.8)
        self._post(x, z, height, 0.04)
        scale, size = camera.focal / z, self.between(0.32, 0.48)
        middle = camera.project(x, height, z)
        red, white, blue, yellow = (
            canvas.surface(SIGN, colour, at=z, roughness=0.05, glow=0.03)
            for colour in ((0.75, 0.10, 0.10), (0.90, 0.90, 0.88), (0.12, 0.28, 0.65), (0.90, 0.72, 0.10))
        )
        kind = int(self.random.integers(5))
        if kind == 0:  # prohibition
            canvas.ellipse(middle, size * scale, size * scale, red)
            canvas.ellipse(middle, 0.68 * size * scale, 0.68 * size * scale, white)
        elif kind == 1:  # order
            canvas.ellipse(middle, size * scale, size * scale, blue)
            canvas.line([(middle[0], middle[1] + 0.5 * size * scale), (middle[0], middle[1] - 0.5 * size * scale)], 0.2 * size * scale, white)
        elif kind == 2:  # warning
            for factor, surface in ((1.15, red), (0.7, white)):
                r = factor * size * scale
                canvas.polygon([(middle[0], middle[1] - r), (middle[0] + 0.9 * r, middle[1] + 0.6 * r), (middle[0] - 0.9 * r, middle[1] + 0.6 * r)], surface)
        elif kind == 3:  # right of way
            for factor, surface in ((1.1, white), (0.75, yellow)):
                r = factor * size * scale
                canvas.polygon([(middle[0], middle[1] - r), (middle[0] + r, middle[1]), (middle[0], middle[1] + r), (middle[0] - r, middle[1])], surface)
        else:  # directions
            canvas.upright(x - 1.6 * size, x + 1.6 * size, height - 0.6 * size, height + 0.6 * size, z, blue if self.chance(0.6) else yellow)
            canvas.upright(x - 1.2 * size, x + 0.9 * size, height - 0.15 * size, height + 0.15 * size, z, white)

    def _traffic_light(self, x: float, z: float, sign: int) -> None:
        canvas, camera = self.canvas, self.canvas.camera
        height = self.between(2.7, 3.4)
        surface = self._post(x, z, height, 0.06)
        spots = [(x, height)]
        if self.chance(0.4):
            end, top = x - sign * self.between(2.0, 4.0), 5.6
            canvas.line([camera.project(x, 0, z), camera.project(x, top, z), camera.project(end, top, z)], 0.1 * camera.focal / z + 1.0, surface)
            spots.append((end, top - 0.5))
        lit = int(self.random.integers(3))
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

    # People --------------------------------------------------------------------------------------------------------
    def _person(self, x: float, z: float) -> None:
        canvas = self.canvas
        height = self.between(1.5, 1.9)
        stride = self.between(0.05, 0.32)
        skin, top, legs, hair = self._outfit(PERSON, z)
        canvas.shadow(min(x, x + self.lean * height), max(x, x + self.lean * height), z - 0.15, z + 0.2, 0.0, 190)
        canvas.shadow(x - 0.35, x + 0.35, z - 0.2, z + 0.25, 0.0, 170)
        hip, neck = 0.48 * height, 0.84 * height
        width = self.between(0.17, 0.24)
        for foot in (-stride, stride):
            self._limb((x + 0.5 * np.sign(foot) * width * 0.6, hip), (x + foot, 0.0), 0.15, z, legs)
        coat = self.between(0.0, 0.2) * height
        points = ((x - width, neck), (x + width, neck), (x + width * 0.85, hip - coat), (x - width * 0.85, hip - coat))
        canvas.polygon([canvas.camera.project(px, py, z) for px, py in points], top)
        for arm in (-1, 1):
            self._limb((x + arm * width, neck - 0.05), (x + arm * (width + 0.06) + self.between(-0.1, 0.1), hip), 0.1, z, top)
        self._head(x, height, z, skin, hair)

    def _outfit(self, label: int, z: float) -> tuple[int, int, int, int]:
        colours = (
            self.pick(((0.80, 0.62, 0.50), (0.50, 0.35, 0.26), (0.65, 0.48, 0.36))),
            self.pick(_CLOTHES), self.pick(_CLOTHES),
            self.pick(((0.10, 0.08, 0.07), (0.35, 0.24, 0.14), (0.60, 0.50, 0.32))),
        )  # fmt: skip
        skin, top, legs, hair = (self.canvas.surface(label, colour, at=z, roughness=0.15, snow=0.08) for colour in colours)
        return skin, top, legs, hair

    def _limb(self, start: c.Point, end: c.Point, width: float, z: float, surface: int) -> None:
        camera = self.canvas.camera
        self.canvas.line([camera.project(*start, z), camera.project(*end, z)], width * camera.focal / z, surface)

    def _head(self, x: float, top: float, z: float, skin: int, hair: int) -> None:
        scale = self.canvas.camera.focal / z
        centre = self.canvas.camera.project(x, top - 0.13, z)
        self.canvas.ellipse(centre, 0.11 * scale, 0.14 * scale, skin)
        self.canvas.ellipse((centre[0], centre[1] - 0.06 * scale), 0.11 * scale, 0.08 * scale, hair)

    def _cycle(self, x: float, z: float, motor: bool, seen_from_side: bool) -> None:
        canvas, camera = self.canvas, self.canvas.camera
        label = MOTORCYCLE if motor else BICYCLE
        scale = camera.focal / z
        tyre = canvas.surface(label, (0.09, 0.09, 0.09), at=z)
        frame = canvas.surface(label, self.pick(_PAINTS), at=z, snow=0.15)
        canvas.shadow(x - 0.7, x + 0.7, z - 0.15, z + 0.2, 0.0, 180)
        radius = 0.33
        thick = max(1, round((0.12 if motor else 0.05) * scale))
        if not seen_from_side:
            canvas.upright(x - 0.06 - 0.06 * motor, x + 0.06 + 0.06 * motor, 0, 0.7, z, tyre)
            canvas.upright(x - 0.12 - 0.15 * motor, x + 0.12 + 0.15 * motor, 0.55, 1.0, z, frame)
            self._limb((x - 0.3, 1.05), (x + 0.3, 1.05), 0.06, z, tyre)
            return
        for wheel in (-0.52, 0.52):
            canvas.ellipse(camera.project(x + wheel, radius, z), radius * scale, radius * scale, tyre, ring=thick)
        if motor:
            points = ((-0.55, 0.8), (0.1, 0.85), (0.5, 1.05), (0.45, 0.5), (-0.3, 0.35))
            canvas.polygon([camera.project(x + px, py, z) for px, py in points], frame)
            return
        for start, end in (((-0.52, radius), (-0.1, 0.3)), ((-0.1, 0.3), (0.38, 0.8)), ((-0.2, 0.85), (0.38, 0.8)), ((-0.2, 0.9), (-0.1, 0.3)), ((0.52, radius), (0.36, 1.0))):
            self._limb((x + start[0], start[1]), (x + end[0], end[1]), 0.06, z, frame)

    def _rider(self, x: float, z: float) -> None:
        side_view, motor = self.chance(0.4), self.chance(0.3)
        self._cycle(x, z, motor, side_view)
        skin, top, legs, hair = self._outfit(RIDER, z)
        if side_view:
            self._limb((x - 0.2, 0.95), (x + 0.05, 0.35), 0.16, z, legs)
            self._limb((x - 0.2, 0.95), (x + 0.15, 1.45), 0.30, z, top)
            self._limb((x + 0.15, 1.4), (x + 0.38, 1.02), 0.10, z, top)
            self._head(x + 0.22, 1.78, z, skin, hair)
            return
        for foot in (-0.14, 0.14):
            self._limb((x + foot, 0.95), (x + foot * 1.2, 0.35), 0.15, z, legs)
        points = ((x - 0.24, 1.45), (x + 0.24, 1.45), (x + 0.17, 0.85), (x - 0.17, 0.85))
        self.canvas.polygon([self.canvas.camera.project(px, py, z) for px, py in points], top)
        self._head(x, 1.75, z, skin, hair)

    # Vehicles ------------------------------------------------------------------------------------------------------
    def _vehicle(self, x: float, z: float, across: bool, oncoming: bool) -> None:
        draw = self.random.random()
        if draw < 0.84:
            self._car(x, z, across, oncoming)
        else:
            self._large(x, z, across, oncoming, bus=draw > 0.92)

    def _frustum(
        self, bottom: tuple[float, float, float, float, float], top: tuple[float, float, float, float, float], faces: tuple[int, int, int]
    ) -> tuple[list[c.Point], list[c.Point]]:
        """A block with rectangular bottom and top (x0, x1, z0, z1, y); returns its near and its flank face."""
        project = self.canvas.camera.project
        bx0, bx1, bz0, bz1, by = bottom
        tx0, tx1, tz0, tz1, ty = top
        near = [project(bx0, by, bz0), project(bx1, by, bz0), project(tx1, ty, tz0), project(tx0, ty, tz0)]
        left = (bx0 + bx1) / 2 > 0  # of a block on the right one sees the left flank
        bx, tx = (bx0, tx0) if left else (bx1, tx1)
        flank = [project(bx, by, bz0), project(bx, by, bz1), project(tx, ty, tz1), project(tx, ty, tz0)]
        self.canvas.polygon([project(tx0, ty, tz0), project(tx1, ty, tz0), project(tx1, ty, tz1), project(tx0, ty, tz1)], faces[2])
        self.canvas.polygon(flank, faces[1])
        self.canvas.polygon(near, faces[0])
        return near, flank

    def _inset(self, face: list[c.Point], u0: float, u1: float, v0: float, v1: float, surface: int) -> None:
        """A panel inside a face, in the face's own coordinates (0 to 1)."""
        corners = np.asarray(face)

        def at(u: float, v: float) -> c.Point:
            point = (1 - v) * ((1 - u) * corners[0] + u * corners[1]) + v * ((1 - u) * corners[3] + u * corners[2])
            return float(point[0]), float(point[1])

        self.canvas.polygon([at(u0, v0), at(u1, v0), at(u1, v1), at(u0, v1)], surface)

    def _faces(self, label: int, paint: Colour, z: float, x: float, length: float) -> tuple[int, int, int]:
        middle = z + length / 2
        near = self.canvas.surface(label, paint, at=z, roughness=0.06, snow=0.12)
        flank = self.canvas.surface(label, tuple(0.9 * v for v in paint), at=middle, roughness=0.06, normal=-float(np.sign(x)), snow=0.08)
        top = self.canvas.surface(label, tuple(min(1.0, 1.12 * v + 0.03) for v in paint), at=middle, roughness=0.06, snow=0.95)
        return near, flank, top

    def _car(self, x: float, z: float, across: bool, oncoming: bool) -> None:
        canvas = self.canvas
        paint = self.pick(_PAINTS)
        length, width, height = self.between(3.6, 4.9), self.between(1.65, 1.9), self.between(1.4, 1.75)
        long, wide = (width, length) if across else (length, width)
        x0, x1 = x - wide / 2, x + wide / 2
        belt = height * self.between(0.55, 0.62)
        body = self._faces(CAR, paint, z, x, long)
        glass_tint = self.between(0.10, 0.22)
        glass = canvas.surface(CAR, (glass_tint, glass_tint * 1.1, glass_tint * 1.25), at=z, roughness=0.25, snow=0.05)
        dark = canvas.surface(CAR, (0.06, 0.06, 0.065), at=z, roughness=0.1)
        canvas.shadow(x0 - 0.15, x1 + 0.15, z - 0.15, z + long + 0.1, 0.0, 235)
        canvas.shadow(min(x0, x + self.lean * height), max(x1, x + self.lean * height), z, z + long, 0.0, 215)
        self._wheels_under(x0, x1, z, long, dark)
        near, flank = self._frustum((x0, x1, z, z + long, 0.28), (x0 + 0.04, x1 - 0.04, z + 0.05, z + long - 0.05, belt), body)
        shape = int(self.random.integers(4))  # saloon, hatchback, estate, van
        front, rear = ((1.3, 0.7), (1.1, 0.15), (1.2, 0.1), (0.7, 0.05))[shape]
        if across:
            ends = (x0 + (front if self.chance(0.5) else rear), x1 - rear)
            cabin_bottom = (ends[0], ends[1], z + 0.08, z + long - 0.08, belt)
            cabin_top = (ends[0] + 0.4, ends[1] - 0.3, z + 0.25, z + long - 0.25, height)
        else:
            near_gap, far_gap = (front, rear) if oncoming else (rear, front)
            near_slope, far_slope = (0.6, 0.3) if oncoming else (0.35, 0.6)
            cabin_bottom = (x0 + 0.08, x1 - 0.08, z + near_gap, z + long - far_gap, belt)
            cabin_top = (x0 + 0.26, x1 - 0.26, z + near_gap + near_slope, z + long - far_gap - far_slope, height)
        cabin_near, cabin_flank = self._frustum(cabin_bottom, cabin_top, body)
        if across:
            for u0, u1 in ((0.06, 0.48), (0.53, 0.94)):
                self._inset(cabin_near, u0, u1, 0.06, 0.86, glass)
            self._round_wheels(x0, x1, z, dark)
            return
        self._inset(cabin_near, 0.05, 0.95, 0.08, 0.88, glass)
        for u0, u1 in ((0.08, 0.5), (0.55, 0.94)):
            self._inset(cabin_flank, u0, u1, 0.06, 0.86, glass)
        self._flank_wheels(flank, long, dark)
        self._front_or_rear(near, x, z, oncoming, belt, dark)

    def _wheels_under(self, x0: float, x1: float, z: float, long: float, dark: int) -> None:
        self.canvas.upright(x0 + 0.05, x0 + 0.3, 0, 0.35, z + 0.1, dark)
        self.canvas.upright(x1 - 0.3, x1 - 0.05, 0, 0.35, z + 0.1, dark)
        inner = x0 if (x0 + x1) > 0 else x1
        self.canvas.along(inner, 0.12, 0.3, z + 0.1, z + long - 0.1, dark)

    def _round_wheels(self, x0: float, x1: float, z: float, dark: int) -> None:
        scale = self.canvas.camera.focal / z
        rim = self.canvas.surface(self._label_of(dark), (0.5, 0.5, 0.52), at=z)
        for x in (x0 + 0.75, x1 - 0.75):
            centre = self.canvas.camera.project(x, 0.33, z)
            self.canvas.ellipse(centre, 0.33 * scale, 0.33 * scale, dark)
            self.canvas.ellipse(centre, 0.17 * scale, 0.17 * scale, rim)

    def _flank_wheels(self, flank: list[c.Point], long: float, dark: int) -> None:
        """Wheels on a face seen at an angle: circles drawn in the face's own coordinates."""
        corners = np.asarray(flank)
        angles = np.linspace(0, 2 * math.pi, 9)[:-1]
        for middle in (0.85 / long, 1 - 0.85 / long):
            u, v = middle + 0.34 / long * np.cos(angles), -0.02 + 0.6 * np.sin(angles)
            u, v = u[:, None], v[:, None]
            points = (1 - v) * ((1 - u) * corners[0] + u * corners[1]) + v * ((1 - u) * corners[3] + u * corners[2])
            self.canvas.polygon([(float(px), float(py)) for px, py in points], dark)

    def _label_of(self, surface: int) -> int:
        return int(self.canvas.surfaces[surface][0])

    def _front_or_rear(self, near: list[c.Point], x: float, z: float, oncoming: bool, height: float, dark: int) -> None:
        canvas, label = self.canvas, self._label_of(dark)
        plate = canvas.surface(label, (0.85, 0.85, 0.80), at=z, roughness=0.05)
        if oncoming:
            lamp = canvas.surface(label, (0.92, 0.92, 0.88), at=z, roughness=0.0, glow=5.0)
            self._inset(near, 0.25, 0.75, 0.25, 0.55, dark)
            canvas.lamps.append(Lamp(x, height * 0.7, z - 2.5, HEAD_LAMP, 3.5))
        else:
            lamp = canvas.surface(label, (0.70, 0.08, 0.07), at=z, roughness=0.0, glow=1.2)
            canvas.lamps.append(Lamp(x, height * 0.7, z - 0.8, RED_LAMP, 1.3))
        for u0, u1 in ((0.04, 0.2), (0.8, 0.96)):
            self._inset(near, u0, u1, 0.58, 0.82, lamp)
        self._inset(near, 0.38, 0.62, 0.2, 0.38, plate)

    def _large(self, x: float, z: float, across: bool, oncoming: bool, bus: bool) -> None:
        """A truck or a bus."""
        canvas = self.canvas
        label = BUS if bus else TRUCK
        paint = self.pick(((0.75, 0.15, 0.12), (0.85, 0.72, 0.15), (0.2, 0.35, 0.6), (0.85, 0.85, 0.83)) if bus else _PAINTS)
        length, width, height = (self.between(8, 11), 2.5, 3.1) if bus else (self.between(5.5, 9), 2.3, self.between(2.7, 3.5))
        long, wide = (width, length) if across else (length, width)
        x0, x1 = x - wide / 2, x + wide / 2
        faces = self._faces(label, paint, z, x, long)
        glass = canvas.surface(label, (0.14, 0.16, 0.19), at=z, roughness=0.25, glow=0.25 if bus else 0.0)
        dark = canvas.surface(label, (0.06, 0.06, 0.065), at=z)
        canvas.shadow(x0 - 0.2, x1 + 0.2, z - 0.2, z + long, 0.0, 235)
        canvas.shadow(min(x0, x + self.lean * height), max(x1, x + self.lean * height), z, z + long, 0.0, 215)
        self._wheels_under(x0, x1, z, long, dark)
        near, flank = self._frustum((x0, x1, z, z + long, 0.4), (x0, x1, z, z + long, height), faces)
        panes = 6
        if across:
            self._round_wheels(x0, x1, z, dark)
        if bus:
            for face in (near, flank) if across else (flank,):
                for i in range(panes):
                    self._inset(face, (i + 0.08) / panes, (i + 0.92) / panes, 0.48, 0.84, glass)
        if not across:
            if bus or oncoming:
                self._inset(near, 0.06, 0.94, 0.45, 0.88, glass)
            else:
                doors = canvas.surface(label, tuple(0.75 * v for v in paint), at=z, roughness=0.06)
                self._inset(near, 0.06, 0.485, 0.1, 0.94, doors)
                self._inset(near, 0.515, 0.94, 0.1, 0.94, doors)
            self._flank_wheels([flank[0], flank[1], *(self._low(flank))], long, dark)
            self._front_or_rear([near[0], near[1], *self._low(near)], x, z, oncoming, 1.0, dark)

    @staticmethod
    def _low(face: list[c.Point]) -> list[c.Point]:
        """Upper corners of the lowest 0.6 m of a tall face, so that wheels and lamps stay at their height."""
        share = 0.22
        return [
            (face[1][0] + share * (face[2][0] - face[1][0]), face[1][1] + share * (face[2][1] - face[1][1])),
            (face[0][0] + share * (face[3][0] - face[0][0]), face[0][1] + share * (face[3][1] - face[0][1])),
        ]


def draw_street(height: int, width: int, random: np.random.Generator) -> Street:
    """Draws one random street into an image of ``height`` × ``width`` pixels."""
    camera = Camera(
        height=float(random.uniform(1.3, 2.1)),
        focal=float(width * random.uniform(0.72, 1.0)),
        centre_x=float(width * random.uniform(0.38, 0.62)),
        horizon=float(height * random.uniform(0.40, 0.52)),
        image_height=height,
        image_width=width,
    )
    return _Builder(Canvas(camera), random).draw()
