"""One tile of smooth noise, made once per process and looked up by world position."""

from __future__ import annotations

from functools import cache

import numpy as np

from .canvas import FloatArray

TILE = 256  # samples; the tile repeats without a seam


@cache
def noise_tile(cell: int) -> FloatArray:
    """Value noise in [−1, 1] whose features are about ``cell`` samples wide; (TILE, TILE)."""
    random = np.random.default_rng((20260, cell))
    coarse = random.uniform(-1, 1, (TILE // cell, TILE // cell))
    position = np.arange(TILE) / cell
    index = position.astype(np.int64)
    weight = position - index
    weight = weight * weight * (3 - 2 * weight)
    following = (index + 1) % coarse.shape[0]
    rows = coarse[index] * (1 - weight)[:, None] + coarse[following] * weight[:, None]
    tile = rows[:, index] * (1 - weight) + rows[:, following] * weight
    return tile.astype(np.float32)


def lookup(u: FloatArray, v: FloatArray, samples_per_metre: float, cell: int) -> FloatArray:
    """Noise at world coordinates (u, v)."""
    row = (v * samples_per_metre).astype(np.int32) & (TILE - 1)
    column = (u * samples_per_metre).astype(np.int32) & (TILE - 1)
    return noise_tile(cell).reshape(-1)[(row << 8) | column]
