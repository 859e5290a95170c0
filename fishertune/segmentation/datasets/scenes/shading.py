"""From surface numbers to what a camera needs to know of every pixel: colour, depth, sunlight, snow, own light."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import canvas as c
from .canvas import FloatArray
from .noise import TILE, lookup
from .sketch import IGNORE
from .street import Street

SUPERSAMPLING = 2  # drawn at twice the size, then averaged: smooth edges for thin poles
_SKY_DEPTH = 1000.0


@dataclass(frozen=True)
class Materials:
    """A scene without light or weather, at the size of the final image.

    Attributes:
        albedo_HW3: linear reflectance in [0, 1].
        sun_HW: share of direct sunlight that arrives, in [0, 1].
        occlusion_HW: share of skylight that arrives, in [0, 1].
        glow_HW: own light at night, relative to white paper in daylight.
        snow_HW: share of the surface that snow can cover, in [0, 1].
        sky_HW: 1 where the sky is seen.
        depth_HW: metres along the optical axis. x_HW: metres to the right. ground_HW: 1 on the ground plane.
        label_HW: uint8 trainIds, 255 = not scored.
        horizon: row of the horizon in pixels.
    """

    albedo_HW3: FloatArray
    sun_HW: FloatArray
    occlusion_HW: FloatArray
    glow_HW: FloatArray
    snow_HW: FloatArray
    sky_HW: FloatArray
    cloud_HW: FloatArray
    depth_HW: FloatArray
    x_HW: FloatArray
    ground_HW: FloatArray
    label_HW: NDArray[np.uint8]
    horizon: float
    street: Street


def _average(image: FloatArray) -> FloatArray:
    s = SUPERSAMPLING
    total = image[0::s, 0::s].copy()
    for row in range(s):
        for column in range(s):
            if row or column:
                total += image[row::s, column::s]
    total *= 1.0 / (s * s)
    return total


def shade(street: Street, random: np.random.Generator) -> Materials:
    """Textures and measures a drawn street."""
    camera = street.canvas.camera
    ids = np.asarray(street.canvas.image, dtype=np.int32)
    table = np.asarray(street.canvas.surfaces, dtype=np.float32)
    label, plane, at, texture = table[:, 0], table[:, 4].astype(np.uint8), table[:, 5], table[:, 6].astype(np.uint8)

    column = (np.arange(camera.image_width, dtype=np.float32) + 0.5 - camera.centre_x) / camera.focal
    row = (np.arange(camera.image_height, dtype=np.float32) + 0.5 - camera.horizon) / camera.focal
    plane_HW, texture_HW = plane[ids], texture[ids]
    ground, side, sky = plane_HW == c.GROUND, plane_HW == c.SIDE, plane_HW == c.SKY
    depth = at[ids]
    with np.errstate(divide="ignore"):
        depth_ground = camera.height / np.maximum(row, 1e-4)
        depth_side_factor = 1.0 / np.maximum(np.abs(column), 1e-4)
    depth = np.where(side, depth * depth_side_factor, depth)
    depth = np.where(ground, depth_ground[:, None], depth)
    np.clip(depth, 0.3, c.FAR, out=depth)
    x = depth * column
    y = camera.height - depth * row[:, None]
    u, v = np.where(side, depth, x), np.where(ground, depth, y)

    # Noise in the colour: fine grain fades where it would be smaller than a pixel
    shift_u, shift_v = (np.float32(value) for value in random.uniform(0, 60, 2))
    fine = lookup(u + shift_u, v + shift_v, 14.0, 4)
    coarse = lookup(u + shift_v, v + shift_u, 4.0, 8)
    roughness = table[ids, 7]
    grain = coarse * 0.6 + fine * np.minimum(1.0, 14.0 / depth)
    value = 1.0 + roughness * grain

    facade_light = np.zeros_like(depth)
    _facades(table, ids, texture_HW, u, v, depth, camera.focal, value, facade_light)
    _bricks(texture_HW, u, v, depth, value)
    _rails(table, ids, texture_HW, u, v, depth, camera.focal, value)
    _tiles(table, ids, texture_HW, u, v, depth, value)
    _asphalt(table, ids, texture_HW, u, value)
    np.clip(value, 0.08, 1.7, out=value)

    colour = table[:, 1:4]
    albedo = (colour * colour)[ids] * (value * value)[..., None]  # gamma 2: near sRGB and cheap
    np.clip(albedo, 0.0, 1.0, out=albedo)

    normal = table[ids, 10]
    sun = np.where(ground, 0.85, np.clip(0.5 + 0.5 * normal * street.sun, 0.05, 1.0)).astype(np.float32)
    shadow = np.asarray(street.canvas.shadow_image, dtype=np.float32) * np.float32(1 / 255)
    sun = np.where(ground, sun * (1.0 - 0.92 * shadow), sun)
    # skylight is weaker near the ground of upright things and under cars
    occlusion = np.where(ground, 1.0 - 0.35 * (shadow > 0.88), 0.72 + 0.28 * np.clip(y / 3.0, 0.0, 1.0)).astype(
        np.float32
    )

    snow = table[ids, 8] * np.clip(0.75 + 0.9 * coarse, 0.0, 1.3)
    clouds = np.zeros_like(depth)
    _clouds(sky, row, column, random, clouds)
    centre = SUPERSAMPLING // 2
    every = (slice(centre, None, SUPERSAMPLING), slice(centre, None, SUPERSAMPLING))
    return Materials(
        albedo_HW3=_average(albedo),
        sun_HW=_average(sun),
        occlusion_HW=_average(occlusion),
        glow_HW=_average(table[ids, 9] + facade_light),
        snow_HW=np.clip(_average(snow), 0.0, 1.0),
        sky_HW=_average(sky.astype(np.float32)),
        cloud_HW=_average(clouds),
        depth_HW=np.where(sky, np.float32(_SKY_DEPTH), depth)[every],
        x_HW=x[every],
        ground_HW=ground[every].astype(np.float32),
        label_HW=np.where(label == IGNORE, 255, label).astype(np.uint8)[ids[every]],
        horizon=camera.horizon / SUPERSAMPLING,
        street=street,
    )


def _cells(position: FloatArray, period: FloatArray | np.float32) -> tuple[FloatArray, FloatArray]:
    """Splits a position into the number of its cell and the place inside, in [0, 1)."""
    scaled = position / period
    cell = np.floor(scaled)
    return cell, scaled - cell


def _hash(a: FloatArray, b: FloatArray, salt: FloatArray) -> FloatArray:
    """A number in [0, 1) for every pair of cells."""
    mixed = np.sin(a * 12.9898 + b * 78.233 + salt * 3.17) * 4375.85
    return mixed - np.floor(mixed)


def _facades(table: FloatArray, ids: NDArray[np.int32], texture: NDArray[np.uint8], u: FloatArray, v: FloatArray,
             depth: FloatArray, focal: float, value: FloatArray, light: FloatArray) -> None:  # fmt: skip
    """Rows of windows, a base of shop windows, and some windows lit at night."""
    where = np.nonzero(texture == c.FACADE)
    if not where[0].size:
        return
    number = ids[where]
    period, storey, share, phase = (table[number, 11 + i] for i in range(4))
    uu, vv, zz = u[where], v[where], depth[where]
    cell_u, in_u = _cells(uu + phase, period)
    cell_v, in_v = _cells(vv, storey)
    shop = (cell_v < 0.5) & (phase % 2.0 < 0.8)
    half_width = np.where(shop, 0.43, 0.5 * share)
    window = (np.abs(in_u - 0.5) < half_width) & (in_v > np.where(shop, 0.12, 0.26)) & (in_v < 0.82) & (vv > 0.3)
    frame = (np.abs(in_u - 0.5) < half_width + 0.06) & (in_v > 0.2) & (in_v < 0.88) & ~window
    luck = _hash(cell_u, cell_v, phase)
    # windows narrower than about two pixels blur into their mean
    contrast = np.clip(focal * period / (zz * 4.0) - 0.6, 0.0, 1.0)
    factor = np.where(window, 0.38 + 0.5 * luck, np.where(frame, 1.12, 1.0))
    factor = np.where(in_v > 0.95, 0.82, factor)
    mean = 1.0 - 0.25 * share
    value[where] *= contrast * factor + (1.0 - contrast) * mean
    lit = window & (luck > np.where(shop, 0.45, 0.72))
    light[where] = np.where(lit, 0.22 * (0.4 + luck), 0.0) * np.maximum(contrast, 0.3)


def _bricks(texture: NDArray[np.uint8], u: FloatArray, v: FloatArray, depth: FloatArray, value: FloatArray) -> None:
    where = np.nonzero(texture == c.BRICKS)
    if where[0].size:
        row, in_v = _cells(v[where], np.float32(0.35))
        _, in_u = _cells(u[where] + 0.35 * (row % 2), np.float32(0.7))
        joint = (in_v < 0.16) | (in_u < 0.08)
        value[where] *= 1.0 - 0.3 * joint * np.clip(12.0 / depth[where], 0.0, 1.0)


def _rails(table: FloatArray, ids: NDArray[np.int32], texture: NDArray[np.uint8], u: FloatArray, v: FloatArray,
           depth: FloatArray, focal: float, value: FloatArray) -> None:  # fmt: skip
    where = np.nonzero(texture == c.RAILS)
    if where[0].size:
        number = ids[where]
        _, in_u = _cells(u[where], table[number, 11])
        _, in_v = _cells(v[where], table[number, 12])
        rail = (in_u < table[number, 13]) | (in_v < 0.14)
        contrast = np.clip(focal * table[number, 11] / (depth[where] * 2.0) - 0.4, 0.0, 1.0)
        value[where] *= np.where(rail, 1.0, 1.0 - 0.62 * contrast) * (0.75 + 0.25 * contrast)


def _tiles(table: FloatArray, ids: NDArray[np.int32], texture: NDArray[np.uint8], u: FloatArray, v: FloatArray,
           depth: FloatArray, value: FloatArray) -> None:  # fmt: skip
    where = np.nonzero(texture == c.TILES)
    if where[0].size:
        number = ids[where]
        _, in_u = _cells(u[where], table[number, 11])
        _, in_v = _cells(v[where], table[number, 12])
        joint = (in_u < 0.07) | (in_v < 0.07)
        value[where] *= 1.0 - 0.28 * joint * np.clip(9.0 / depth[where], 0.0, 1.0)


def _asphalt(
    table: FloatArray, ids: NDArray[np.int32], texture: NDArray[np.uint8], u: FloatArray, value: FloatArray
) -> None:
    """Two tracks in every lane, worn darker by tyres."""
    where = np.nonzero(texture == c.ASPHALT)
    if where[0].size:
        number = ids[where]
        _, in_lane = _cells(u[where] - table[number, 14], table[number, 11])
        track = np.maximum(0.0, 1.0 - np.abs(np.abs(in_lane - 0.5) - 0.24) * 9.0)
        value[where] *= 1.0 - 0.12 * track


def _clouds(
    sky: NDArray[np.bool_], row: FloatArray, column: FloatArray, random: np.random.Generator, clouds: FloatArray
) -> None:
    """Cloud cover in [0, 1], on a flat layer seen in perspective."""
    drift_u, drift_v = random.uniform(0, TILE, 2)
    cover = random.uniform(-0.5, 0.35)
    last = int(np.nonzero(sky.any(axis=1))[0][-1]) + 1 if sky.any() else 0
    if not last:
        return
    far = (1.0 / (np.maximum(-row[:last], 0.0) + 0.09)).astype(np.float32)[:, None]
    u, v = column * far, np.broadcast_to(far, (last, column.size))
    layer = lookup(u + np.float32(drift_u), v + np.float32(drift_v), 5.0, 16)
    layer = layer + 0.5 * lookup(u + np.float32(drift_v), v + np.float32(drift_u), 14.0, 8)
    clouds[:last] = np.clip(1.6 * (layer + np.float32(cover)) + 0.3, 0.0, 1.0)
