"""Lays out a random street and draws it: what stands where, in metres, independent of light and weather."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import canvas as c
from .canvas import Camera, Canvas, Colour
from .fixtures import draw_post, draw_street_lamp, draw_traffic_light, draw_traffic_sign
from .people import draw_cycle, draw_person, draw_rider
from .plants import draw_bush, draw_tree
from .sketch import BUILDING, FENCE, IGNORE, ROAD, SIDEWALK, SKY, TERRAIN, VEGETATION, WALL, Sketch
from .vehicles import draw_vehicle

LEFT, RIGHT = -1, 1
HORIZON_DEPTH = 140.0  # metres; where rows of buildings end

_FACADES = (
    (0.62, 0.55, 0.46), (0.55, 0.32, 0.26), (0.70, 0.66, 0.60), (0.50, 0.50, 0.52), (0.72, 0.60, 0.42),
    (0.42, 0.36, 0.33), (0.78, 0.76, 0.72), (0.60, 0.44, 0.36), (0.45, 0.50, 0.55), (0.66, 0.50, 0.48),
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


class _StreetSketch(Sketch):
    """Draws one street, far to near."""

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
        left = lane * self.lanes_left + parking_left - self.middle
        return left, self.middle + lane * self.lanes_right + parking_right

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
                canvas.polygon(
                    [(x, horizon - rise), (x + step, horizon - rise), (x + step, horizon + 1), (x, horizon + 1)],
                    surface,
                )
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
            texture=c.TILES, roughness=0.12, snow=0.9,
            pattern=(self.between(0.4, 1.0), self.between(0.4, 1.0), 0.0, 0.0),
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
            near = max(block.start, c.NEAR)
            front_texture = texture if self.chance(0.5) else c.BRICKS
            front = canvas.surface(BUILDING, colour, at=near, texture=front_texture, pattern=pattern, snow=0.08)
            flank = canvas.surface(
                BUILDING, colour, plane=c.SIDE, at=side.front, texture=texture, pattern=pattern, normal=-sign, snow=0.08
            )
            roof_colour = self.pick(((0.42, 0.24, 0.20), (0.30, 0.29, 0.30), (0.38, 0.34, 0.30)))
            roof = canvas.surface(
                BUILDING, roof_colour, plane=c.SIDE, at=side.front, roughness=0.2, snow=1.0, normal=-sign
            )
            pitched = block.height < 11 and self.chance(0.75)
            depth, eaves, ridge = 10.0, block.height, block.height + 3.5
            middle = x + sign * depth / 2
            if block.start > c.NEAR:
                canvas.upright(min(x, x + sign * depth), max(x, x + sign * depth), 0, block.height, block.start, front)
                if pitched:
                    gable = ((x, eaves), (middle, ridge), (x + sign * depth, eaves))
                    canvas.polygon([canvas.camera.project(px, py, block.start) for px, py in gable], front)
            canvas.along(x, 0, block.height, near, block.end, flank)
            if pitched:
                slope = ((x, eaves, near), (x, eaves, block.end), (middle, ridge, block.end), (middle, ridge, near))
                canvas.polygon([canvas.camera.project(*corner) for corner in slope], roof)
            else:
                cornice = canvas.surface(
                    BUILDING, tuple(0.75 * v for v in colour), plane=c.SIDE, at=side.front, normal=-sign, snow=0.9
                )
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
                draw_bush(self, x, float(z))
            else:
                draw_tree(self, x, float(z))
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
                plane=c.SIDE, at=x, texture=c.RAILS, normal=-sign, snow=0.15,
                pattern=(self.between(0.18, 0.5), 0.6, 0.55, 0.0),
            )  # fmt: skip
        else:  # a hedge
            green = self.pick(((0.20, 0.30, 0.14),))
            surface = canvas.surface(
                VEGETATION, green, plane=c.SIDE, at=x, texture=c.FOLIAGE, roughness=0.5, normal=-sign, snow=0.5
            )
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
            tasks += [
                (self.between(5, 60), "sign" if self.chance(0.6) else "pole", edge, side.sign)
                for _ in range(int(self.random.integers(1, 5)))
            ]
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
                tasks += [(self.crossing - 0.8, "traffic light", s.sign * (s.kerb + 0.4), s.sign) for s in sides]
            if self.chance(0.4):
                tasks.append(
                    (self.crossing - self.between(1.5, 3.5), "person", self.between(-left.kerb, right.kerb), 1)
                )
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
            draw_tree(self, x, z)
        elif what == "lamp":
            draw_street_lamp(self, x, z, sign)
        elif what == "sign":
            draw_traffic_sign(self, x, z)
        elif what == "pole":
            draw_post(self, x, z, self.between(2.5, 7.0), 0.06)
        elif what == "traffic light":
            draw_traffic_light(self, x, z, sign)
        elif what == "person":
            draw_person(self, x, z)
        elif what == "bin":
            bin_surface = self.canvas.surface(IGNORE, self.pick(((0.2, 0.3, 0.22), (0.3, 0.3, 0.32))), at=z, snow=0.3)
            self.canvas.upright(x - 0.35, x + 0.35, 0, 1.1, z, bin_surface)
        elif what == "bicycle":
            draw_cycle(self, x, z, motor=self.chance(0.3), seen_from_side=self.chance(0.7))
        elif what == "rider":
            draw_rider(self, x, z)
        elif what == "cross car":
            draw_vehicle(self, x, z, across=True, oncoming=False)
        else:
            draw_vehicle(self, x, z, across=False, oncoming=what == "oncoming")

    def _parked(self, side: Side) -> list[tuple[float, str, float, int]]:
        has_parking = (
            side.kerb
            - abs(self.middle + side.sign * self.lane * (self.lanes_left if side.sign < 0 else self.lanes_right))
        ) > 1.5
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
    return _StreetSketch(Canvas(camera), random).draw()
