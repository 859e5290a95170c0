"""Light and weather: turns the materials of a street into the picture a camera takes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from .canvas import FloatArray
from .shading import Materials
from .sketch import BUILDING, ROAD

Random = np.random.Generator
Picture = NDArray[np.uint8]  # (H, W, 3)


def _rgb(colour: ArrayLike) -> FloatArray:
    return np.asarray(colour, dtype=np.float32)


def _lit(scene: Materials, skylight: ArrayLike, sunlight: ArrayLike) -> FloatArray:
    """Linear radiance under skylight and direct sun."""
    light = scene.occlusion_HW[..., None] * _rgb(skylight) + scene.sun_HW[..., None] * _rgb(sunlight)
    return scene.albedo_HW3 * light


def _with_sky(
    scene: Materials, radiance: FloatArray, zenith: ArrayLike, horizon: ArrayLike, cloud: ArrayLike, cover: float
) -> FloatArray:
    """Puts a sky (gradient and clouds) behind the street."""
    height = scene.sky_HW.shape[0]
    position = np.clip(np.arange(height, dtype=np.float32) / max(scene.horizon, 1.0), 0.0, 1.0)[:, None, None]
    sky = _rgb(zenith) * (1 - position) + _rgb(horizon) * position
    clouds = (cover * scene.cloud_HW)[..., None]
    sky = sky * (1 - clouds) + _rgb(cloud) * clouds
    share = scene.sky_HW[..., None]
    return radiance * (1 - share) + sky * share


def _haze(scene: Materials, radiance: FloatArray, density: float, airlight: ArrayLike) -> FloatArray:
    """Koschmieder's law: what is seen = radiance·t + airlight·(1 − t), t = exp(−density·distance)."""
    clearness = np.exp(-density * np.minimum(scene.depth_HW, 400.0))[..., None]
    return radiance * clearness + _rgb(airlight) * (1 - clearness)


def _blur(image: FloatArray, radius: float) -> FloatArray:
    """Gaussian blur of a linear image, by way of 8 bits at gamma 2."""
    picture = Image.fromarray(_to_bytes(image)).filter(ImageFilter.GaussianBlur(radius))
    back = np.asarray(picture, dtype=np.float32) * np.float32(1 / 255)
    return back * back


def _to_bytes(radiance: FloatArray) -> Picture:
    return (np.sqrt(np.clip(radiance, 0.0, 1.0)) * 255.0 + 0.5).astype(np.uint8)


def _camera(radiance: FloatArray, random: Random, noise: float, softness: float = 0.0) -> Picture:
    """Exposure spread, white balance, shot noise, 8 bits."""
    gain = random.uniform(0.9, 1.1) * random.uniform(0.96, 1.04, 3)
    radiance = radiance * gain.astype(np.float32)
    if softness:
        radiance = _blur(radiance, softness)
    signal = np.sqrt(np.clip(radiance, 0.0, 1.0))
    # at gamma 2 the square root turns shot noise into noise of one strength everywhere
    grain = random.standard_normal(signal.shape, dtype=np.float32)
    return (np.clip(signal + noise * grain, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def clear(scene: Materials, random: Random) -> Picture:
    """Daylight, mostly sunny."""
    if random.random() < 0.75:
        strength, warmth = random.uniform(0.7, 1.0), random.uniform(0.85, 1.0)
        radiance = _lit(
            scene, (0.40, 0.44, 0.52), (1.05 * strength, 1.0 * strength * warmth**0.5, 0.92 * strength * warmth)
        )
        blue = random.uniform(0.8, 1.1)
        radiance = _with_sky(
            scene, radiance, (0.16 * blue, 0.32 * blue, 0.66), (0.58, 0.70, 0.84), (0.92, 0.92, 0.93), 0.8
        )
    else:
        radiance = _lit(scene, (0.92, 0.93, 0.96), (0.12, 0.12, 0.11))
        radiance = _with_sky(scene, radiance, (0.55, 0.60, 0.68), (0.78, 0.80, 0.83), (0.88, 0.88, 0.89), 0.9)
    radiance = _haze(scene, radiance, 0.0012, (0.62, 0.70, 0.80))
    return _camera(radiance, random, 0.010)


def fog(scene: Materials, random: Random) -> Picture:
    """Depth-dependent haze: sight of 30 to 120 m, flat light, pale colours."""
    sight = random.uniform(30.0, 120.0)
    tone = random.uniform(0.50, 0.75)
    airlight = (tone, tone * random.uniform(0.98, 1.03), tone * random.uniform(0.99, 1.08))
    radiance = _lit(scene, (0.72, 0.74, 0.77), (0.05, 0.05, 0.05))
    radiance = _with_sky(scene, radiance, airlight, airlight, airlight, 0.0)
    radiance = _haze(scene, radiance, 3.0 / sight, airlight)  # 5 % contrast left at the end of sight
    return _camera(_blur(radiance, 0.5), random, 0.012)


def _lamp_light(scene: Materials, brightness: float) -> FloatArray:
    """Light that the lamps of the street and the car's own headlights throw, (H, W, 3)."""
    depth, x = scene.depth_HW, scene.x_HW
    light = np.zeros((*depth.shape, 3), dtype=np.float32)
    for lamp in scene.street.canvas.lamps:
        if lamp.z < 90.0:
            reach = np.float32(1.0 / lamp.reach**2)
            fall = np.exp(-((x - np.float32(lamp.x)) ** 2 + (depth - np.float32(lamp.z)) ** 2) * reach)
            light += fall[..., None] * (brightness * _rgb(lamp.colour))
    beam = np.exp(-depth * np.float32(1 / 14.0) - (x / (1.6 + 0.16 * depth)) ** 2)
    light += beam[..., None] * _rgb((0.42, 0.40, 0.35))
    return light


def _bloom(scene: Materials, strength: float) -> FloatArray:
    """Light sources and the glow around them, (H, W, 3): blurred at a quarter of the size, where it is cheap."""
    height, width = scene.glow_HW.shape
    tint = np.where((scene.label_HW == BUILDING)[..., None], _rgb((1.0, 0.78, 0.45)), _rgb((1.0, 1.0, 1.0)))
    source = scene.glow_HW[..., None] * tint * (0.15 + np.sqrt(scene.albedo_HW3))
    halo = np.minimum(source, 3.0) * np.float32(1 / 3)
    small = (max(1, width // 4), max(1, height // 4))
    picture = Image.fromarray((halo * 255).astype(np.uint8)).resize(small, Image.Resampling.BOX)
    near = np.asarray(
        picture.filter(ImageFilter.GaussianBlur(0.8)).resize((width, height), Image.Resampling.BILINEAR),
        dtype=np.float32,
    )
    far = np.asarray(
        picture.filter(ImageFilter.GaussianBlur(3.0)).resize((width, height), Image.Resampling.BILINEAR),
        dtype=np.float32,
    )
    return (source + strength * (near * np.float32(2.5 / 255) + far * np.float32(5.0 / 255))).astype(np.float32)


def night(scene: Materials, random: Random) -> Picture:
    """Dark: lamps, headlights and lit windows are the light, with a colour cast, glow and a noisy sensor."""
    ambient = random.uniform(0.012, 0.045)
    cast = _rgb(((1.0, 0.82, 0.62), (0.75, 0.85, 1.15), (1.0, 0.92, 0.85))[int(random.integers(3))])
    light = _lamp_light(scene, random.uniform(0.25, 0.6)) + ambient * cast * scene.occlusion_HW[..., None]
    radiance = scene.albedo_HW3 * light
    dark = ambient * random.uniform(0.15, 0.6)
    top, low = dark * 0.5 * cast, dark * 1.6 * cast
    radiance = _with_sky(scene, radiance, top, low, low, 0.3)
    radiance += _bloom(scene, random.uniform(0.5, 1.2))
    return _camera(radiance, random, random.uniform(0.022, 0.045), softness=0.5)


def _streaks(shape: tuple[int, int], random: Random, count: int, length: float) -> FloatArray:
    height, width = shape
    image = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(image)
    slant = random.uniform(-0.35, 0.35)
    for x, y, size, bright in zip(
        random.uniform(-5, width + 5, count), random.uniform(-5, height, count),
        random.uniform(0.4, 1.0, count) * length, random.uniform(40, 130, count), strict=True,
    ):  # fmt: skip
        draw.line((x, y, x + slant * size, y + size), fill=int(bright))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(0.4)), dtype=np.float32) * np.float32(1 / 255)


def _mirror(scene: Materials, radiance: FloatArray) -> FloatArray:
    """What a wet ground shows: the picture above the horizon, upside down and smeared."""
    rows = np.clip(np.round(2 * scene.horizon - np.arange(radiance.shape[0])), 0, radiance.shape[0] - 1).astype(
        np.int64
    )
    mirrored = _blur(radiance[rows], 1.5)
    share = scene.ground_HW * np.where(scene.label_HW == ROAD, 1.0, 0.55)
    fresnel = 0.22 + 0.5 * np.exp(-18.0 / scene.depth_HW)  # flat angles reflect more
    weight = (share * fresnel)[..., None].astype(np.float32)
    return radiance * (1 - weight) + mirrored * weight


def rain(scene: Materials, random: Random) -> Picture:
    """Dull light, wet ground with reflections, streaks, drops on the lens."""
    height, width = scene.depth_HW.shape
    level = random.uniform(0.26, 0.45)
    wet = np.where(scene.ground_HW > 0.5, 0.45, 0.78)[..., None].astype(np.float32)
    radiance = _lit(
        replace(scene, albedo_HW3=scene.albedo_HW3 * wet), (level, 1.02 * level, 1.08 * level), (0.0, 0.0, 0.0)
    )
    radiance = _with_sky(scene, radiance, (0.9 * level, 0.95 * level, level), (1.1 * level, 1.12 * level, 1.15 * level),
                         (0.75 * level, 0.78 * level, 0.8 * level), 0.9)  # fmt: skip
    radiance += 0.35 * _bloom(scene, 0.6)
    radiance = _mirror(scene, radiance)
    grey = 1.0 * level
    radiance = _haze(scene, radiance, random.uniform(0.008, 0.022), (grey, 1.02 * grey, 1.05 * grey))
    streaks = _streaks((height, width), random, int(width * random.uniform(0.6, 1.6)), height * 0.12)[..., None]
    radiance = radiance * (1 - 0.6 * streaks) + 0.6 * streaks * (0.5 + 0.4 * level)
    mask = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(mask)
    for _ in range(int(random.integers(4, 16))):
        x, y, size = random.uniform(0, width), random.uniform(0, height), random.uniform(0.012, 0.045) * width
        draw.ellipse((x - size, y - size * 1.2, x + size, y + size * 1.2), fill=230)
    drops = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.8)), dtype=np.float32)[..., None] * np.float32(1 / 255)
    blurred = _blur(radiance, 0.016 * width)
    radiance = radiance * (1 - drops) + (1.15 * blurred + 0.01) * drops
    return _camera(radiance, random, 0.016)


def snow(scene: Materials, random: Random) -> Picture:
    """White ground, roofs and branches, grey light, flakes."""
    height, width = scene.depth_HW.shape
    depth_of_snow = random.uniform(0.7, 1.25)
    cover = np.clip(depth_of_snow * scene.snow_HW, 0.0, 0.97)[..., None]
    albedo = scene.albedo_HW3 * (1 - cover) + _rgb((0.86, 0.88, 0.93)) * cover
    level = random.uniform(0.55, 0.85)
    radiance = _lit(replace(scene, albedo_HW3=albedo), (0.95 * level, 0.98 * level, 1.04 * level), (0.06, 0.06, 0.06))
    air = (0.70 * level, 0.72 * level, 0.76 * level)
    radiance = _with_sky(scene, radiance, air, (0.80 * level, 0.82 * level, 0.85 * level), air, 0.5)
    radiance = _haze(scene, radiance, random.uniform(0.008, 0.02), air)
    flakes = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(flakes)
    count = int(width * random.uniform(0.5, 1.6))
    sizes = random.uniform(0.3, 1.0, count) ** 2 * 0.011 * width
    for x, y, size in zip(random.uniform(0, width, count), random.uniform(0, height, count), sizes, strict=True):
        draw.ellipse((x - size, y - size, x + size, y + size), fill=int(150 + 60 * random.random()))
    white = np.asarray(flakes.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32)[..., None] * np.float32(1 / 255)
    radiance = radiance * (1 - white) + 0.9 * white
    return _camera(radiance, random, 0.012)


def looks(scene: Materials, random: Random) -> Picture:
    """A random style for pretraining: any palette, light, air and camera, far wider than the five domains.

    The palette is drawn anew for every image and class, as if the town were built of other materials.
    """
    albedo = scene.albedo_HW3
    mixing = np.eye(3) + random.normal(0, random.uniform(0.05, 0.35), (3, 3))
    mixing /= np.maximum(mixing.sum(axis=1, keepdims=True), 0.4)
    tints = random.uniform(0.55, 1.5, (20, 3)) ** random.uniform(0.3, 1.2)
    tint = tints[np.minimum(scene.label_HW, 19)].astype(np.float32)
    albedo = np.clip(albedo @ mixing.T.astype(np.float32), 0.0, 1.0) * tint
    if random.random() < 0.3:
        white = _rgb(random.uniform(0.4, 0.95, 3))
        cover = np.clip(random.uniform(0.3, 1.2) * scene.snow_HW, 0, 1)[..., None]
        albedo = albedo * (1 - cover) + white * cover
    scene = replace(scene, albedo_HW3=np.clip(albedo, 0.0, 1.0))
    exposure = float(np.exp(random.uniform(np.log(0.05), np.log(1.1))))
    sky_colour, sun_colour = random.uniform(0.5, 1.1, 3), random.uniform(0.4, 1.1, 3)
    sun_share = float(random.choice((0.0, random.uniform(0.2, 1.2))))
    radiance = _lit(
        scene, tuple(exposure * sky_colour * (1 - 0.4 * sun_share)), tuple(exposure * sun_colour * sun_share)
    )
    zenith, low, cloud = (tuple(exposure * random.uniform(0.05, 1.1) * random.uniform(0.6, 1.1, 3)) for _ in range(3))
    radiance = _with_sky(scene, radiance, zenith, low, cloud, random.uniform(0, 1))
    if exposure < 0.35:
        radiance += scene.albedo_HW3 * _lamp_light(scene, random.uniform(0.0, 0.5)) + random.uniform(0, 1) * _bloom(
            scene, random.uniform(0, 1)
        )
    if random.random() < 0.3:
        radiance = _mirror(scene, radiance)
    if random.random() < 0.5:
        tone = exposure * random.uniform(0.3, 1.0)
        radiance = _haze(
            scene,
            radiance,
            float(np.exp(random.uniform(np.log(0.002), np.log(0.08)))),
            tuple(tone * random.uniform(0.75, 1.1, 3)),
        )
    if random.random() < 0.25:
        streaks = _streaks(scene.depth_HW.shape, random, int(random.integers(20, 300)), random.uniform(1.0, 25.0))[
            ..., None
        ]
        radiance = radiance * (1 - streaks) + streaks * random.uniform(0.1, 0.9)
    radiance = np.clip(radiance, 0.0, 4.0) ** np.float32(random.uniform(0.7, 1.4))
    radiance *= np.float32(min(3.0, random.uniform(0.25, 1.0) / (float(radiance.mean()) * 2.0 + 0.08)))
    saturation = random.uniform(0.0, 1.4)
    radiance = np.maximum(radiance * saturation + radiance.mean(axis=-1, keepdims=True) * (1 - saturation), 0.0)
    return _camera(
        radiance.astype(np.float32),
        random,
        random.uniform(0.0, 0.05),
        softness=float(random.choice((0.0, 0.0, 0.4, 0.8))),
    )


WEATHER: dict[str, Callable[[Materials, Random], Picture]] = {
    "clear": clear,
    "fog": fog,
    "night": night,
    "rain": rain,
    "snow": snow,
    "looks": looks,
}
