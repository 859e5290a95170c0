"""Training augmentation and input normalisation: pure functions of their arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fishertune.segmentation.classes import IGNORE_INDEX

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_PAD_COLOUR = (124, 116, 104)  # the ImageNet mean: close to zero after normalisation, so that padding is no edge
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class AugmentConfig:
    """What :func:`augment` does. ``AugmentConfig.none()`` leaves everything as it is.

    Attributes:
        crop: (height, width) of what comes out; None keeps the size that comes in.
        scale: range of the magnification, drawn uniformly; below 1 the rest of the crop is padding (ignored pixels).
        flip: probability of a left-right flip.
        photometric: probability of each of the four colour changes below, decided one by one.
        brightness: largest shift, as a share of the full range.
        contrast: contrast factor in [1 − contrast, 1 + contrast], around the image's mean grey.
        saturation: saturation factor in [1 − saturation, 1 + saturation].
        hue: largest turn of the colour circle, as a share of it.
    """

    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: float = 0.5
    brightness: float = 0.125
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.05

    def __post_init__(self) -> None:
        if self.crop is not None and min(self.crop) < 1:
            raise ValueError(f"augment.crop={self.crop} must be (height, width), both positive, or null.")
        if not 0.0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"augment.scale={self.scale} must be (smallest, largest), both positive.")
        for name in ("flip", "photometric", "brightness", "contrast", "saturation"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"augment.{name}={getattr(self, name)} must lie in [0, 1].")
        if not 0.0 <= self.hue <= 0.5:
            raise ValueError(f"augment.hue={self.hue} must lie in [0, 0.5], half a turn of the colour circle.")

    @staticmethod
    def none() -> AugmentConfig:
        """No change at all."""
        return AugmentConfig(scale=(1.0, 1.0), flip=0.0, photometric=0.0)


def augment(
    image: torch.Tensor, label: torch.Tensor, config: AugmentConfig, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random scale, crop, flip and colour, as in the usual driving-scene recipe (scale 0.5–2, flip, photometric).

    Scaling and cropping are one step: only the part of the image that ends up in the crop is resized.

    Args:
        image: (3, H, W) uint8.
        label: (H, W) uint8 or int64.
        config: the ranges.
        generator: the only source of chance, on the CPU; it advances. Equal generators give equal results, and the
            number of values drawn does not depend on the image.

    Returns:
        Image (3, crop) uint8 and label (crop) in the label's dtype; padding is a neutral colour with label 255.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[1:] != label.shape:
        raise ValueError(
            f"augment needs a uint8 image (3, H, W) and a label (H, W) of the same size, got {image.dtype} "
            f"{tuple(image.shape)} and {tuple(label.shape)}."
        )
    draws = torch.rand(14, generator=generator, dtype=torch.float64).tolist()
    image, label = _scale_and_crop(image, label, config, draws[:5])
    if draws[5] < config.flip:
        image, label = image.flip(-1), label.flip(-1)
    return _change_colours(image, config, coins=draws[6:10], draws=draws[10:]), label


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(…, 3, H, W) uint8 to float32 with (x/255 − mean)/std per channel; mean and std in units of the full range."""
    if images.dtype != torch.uint8:
        raise TypeError(f"normalise needs uint8 images (0–255), got {images.dtype}. Were they normalised already?")
    scale = torch.tensor([1.0 / (255.0 * value) for value in std], device=images.device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device).view(3, 1, 1)
    return torch.addcmul(shift, images, scale)


def _scale_and_crop(
    image: torch.Tensor, label: torch.Tensor, config: AugmentConfig, draws: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    height, width = label.shape
    crop_h, crop_w = config.crop or (height, width)
    low, high = config.scale
    scale = low + (high - low) * draws[0]
    source_h, source_w = min(height, max(round(crop_h / scale), 1)), min(width, max(round(crop_w / scale), 1))
    patch_h, patch_w = min(crop_h, max(round(source_h * scale), 1)), min(crop_w, max(round(source_w * scale), 1))
    top, left = _position(height - source_h, draws[1]), _position(width - source_w, draws[2])
    image = image[:, top : top + source_h, left : left + source_w]
    label = label[top : top + source_h, left : left + source_w]
    if (patch_h, patch_w) != (source_h, source_w):
        image = F.interpolate(image[None], (patch_h, patch_w), mode="bilinear", antialias=True)[0]
        rows = ((torch.arange(patch_h) + 0.5) * (source_h / patch_h)).long()  # the pixel under each target's centre
        columns = ((torch.arange(patch_w) + 0.5) * (source_w / patch_w)).long()
        label = label[rows[:, None], columns]
    if (patch_h, patch_w) == (crop_h, crop_w):
        return image, label
    below, right = _position(crop_h - patch_h, draws[3]), _position(crop_w - patch_w, draws[4])
    padded = image.new_tensor(_PAD_COLOUR).view(3, 1, 1).repeat(1, crop_h, crop_w)
    padded[:, below : below + patch_h, right : right + patch_w] = image
    padded_label = label.new_full((crop_h, crop_w), IGNORE_INDEX)
    padded_label[below : below + patch_h, right : right + patch_w] = label
    return padded, padded_label


def _position(room: int, draw: float) -> int:
    """One of the ``room`` + 1 offsets."""
    return min(int(draw * (room + 1)), room)


def _change_colours(image: torch.Tensor, config: AugmentConfig, coins: list[float], draws: list[float]) -> torch.Tensor:
    """Brightness, contrast, saturation and hue as one affine map of the colour vector, clipped once at the end.

    Saturation and hue act in YIQ, where they are a scaling and a rotation of the two colour axes; HSV would need a
    dozen passes over the image for the same purpose.
    """
    amounts = [2.0 * draw - 1.0 for draw in draws]
    use = [coin < config.photometric for coin in coins]
    shift = 255.0 * config.brightness * amounts[0] if use[0] else 0.0
    contrast = 1.0 + config.contrast * amounts[1] if use[1] else 1.0
    saturation = 1.0 + config.saturation * amounts[2] if use[2] else 1.0
    angle = 2.0 * math.pi * config.hue * amounts[3] if use[3] else 0.0
    if not any(use):
        return image
    pixels = image.reshape(3, -1).float()
    luma = torch.tensor(_LUMA)
    grey = float((luma @ pixels).mean()) + shift
    matrix = _colour_turn(saturation, angle) * contrast
    # x → contrast·(x + shift − grey) + grey, then the colour turn, which leaves greys where they are
    offset = contrast * (shift - grey) + grey
    changed = torch.addmm(torch.full((3, 1), offset), matrix, pixels)
    return changed.round_().clamp_(0, 255).to(torch.uint8).view_as(image)


def _colour_turn(saturation: float, angle: float) -> torch.Tensor:
    """RGB matrix that scales chroma and turns hue; its rows sum to one and luma is kept."""
    to_yiq = torch.tensor(
        [_LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)], dtype=torch.float64
    )
    cos, sin = saturation * math.cos(angle), saturation * math.sin(angle)
    turn = torch.tensor([(1.0, 0.0, 0.0), (0.0, cos, -sin), (0.0, sin, cos)], dtype=torch.float64)
    return (torch.linalg.inv(to_yiq) @ turn @ to_yiq).float()
