"""A timm ViT with a per-pixel head."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fishertune import _torchvision  # noqa: F401 (must run before timm)
from fishertune.files import load_tensors
from fishertune.segmentation.transforms import IMAGENET_MEAN, IMAGENET_STD

# The timm modules whose models are known to fit, and whether they take images of any size.
_FAMILIES = {"vision_transformer": True, "eva": True, "vision_transformer_sam": False}


class SegmentationModel(nn.Module):
    """Features of chosen blocks of a ViT, concatenated by a head that scores every pixel.

    Only blocks up to the last chosen one are computed. Later blocks, the final norm and whatever follows it therefore
    receive no gradient and never change; they stay in ``backbone`` so that its weights remain a whole checkpoint.

    Args:
        backbone: a timm ViT (plain, DINOv2, CLIP, EVA, …), anything with ``forward_intermediates``.
        head: maps the list of feature maps, each (N, D, h, w), to logits; see :mod:`fishertune.segmentation.heads`.
        blocks: indices of the blocks whose output the head sees; negative ones count from the end.

    Attributes:
        backbone, decode_head: the two parts.
        blocks: the indices, non-negative and ascending, the order in which the head gets them.
        mean, std: the per-channel normalisation that the backbone was pretrained with, in units of the full range.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, blocks: Sequence[int]) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = head
        self.blocks = resolve_blocks(backbone, blocks)
        config = getattr(backbone, "pretrained_cfg", None) or {}
        self.mean: tuple[float, ...] = tuple(config.get("mean", IMAGENET_MEAN))
        self.std: tuple[float, ...] = tuple(config.get("std", IMAGENET_STD))

    def features(self, images_N3HW: torch.Tensor) -> list[torch.Tensor]:
        """The chosen blocks' outputs as maps (N, D, ceil(H/patch), ceil(W/patch)), in the order of ``blocks``."""
        if not images_N3HW.is_floating_point():
            raise TypeError(
                f"The model needs normalised float images, got {images_N3HW.dtype}: use transforms.normalise."
            )
        return self.backbone.forward_intermediates(  # type: ignore[operator]
            images_N3HW, indices=list(self.blocks), stop_early=True, intermediates_only=True
        )

    def decode(self, features: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Logits (N, classes, H, W) for feature maps of images of ``size`` = (H, W)."""
        logits = self.decode_head(features)
        # the grid may reach past the image, which was padded to whole patches at its bottom and right
        patch_h, patch_w = self.backbone.patch_embed.patch_size  # type: ignore[union-attr, misc]
        grid_h, grid_w = features[0].shape[-2:]
        padded = (grid_h * patch_h, grid_w * patch_w)
        return F.interpolate(logits, padded, mode="bilinear", align_corners=False)[..., : size[0], : size[1]]

    def forward(self, images_N3HW: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes, H, W) at the size of the normalised float images."""
        height, width = images_N3HW.shape[-2:]
        return self.decode(self.features(images_N3HW), (height, width))


def resolve_blocks(backbone: nn.Module, blocks: Sequence[int]) -> tuple[int, ...]:
    """Block indices as ascending non-negative numbers.

    Raises:
        ValueError: if there are none, one occurs twice or the backbone has no such block.
    """
    depth = len(backbone.blocks)  # type: ignore[arg-type]
    for block in blocks:
        if not -depth <= block < depth:
            raise ValueError(f"There is no block {block}: the backbone has {depth}, numbered 0 to {depth - 1}.")
    resolved = tuple(sorted({block % depth for block in blocks}))
    if not resolved or len(resolved) != len(blocks):
        raise ValueError(f"blocks={tuple(blocks)} must name at least one block, and each only once.")
    return resolved


def feature_channels(backbone: nn.Module, blocks: Sequence[int]) -> tuple[int, ...]:
    """Channels of the feature maps of ``blocks``: what :func:`~fishertune.segmentation.heads.create_head` needs."""
    return (int(backbone.embed_dim),) * len(blocks)  # type: ignore[arg-type]


def create_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """A timm ViT without classifier, in float32 and eval mode, that accepts images of any size.

    Args:
        name: timm's model name, e.g. ``"vit_small_patch14_dinov2.lvd142m"``.
        weights: local safetensors file in timm's names (fp16 and bf16 are widened exactly). Position table and patch
            embedding are resampled to ``image_size`` and ``patch_size``; a classifier in the file is left out. None
            starts from random weights: nothing is ever downloaded.
        image_size: (height, width) the position table is made for; other sizes interpolate it at every pass. None keeps
            the model's own. SAM models accept this size only.
        patch_size: None keeps the model's own.
        seed: of the random weights; the global random state stays as it is.

    Raises:
        ValueError: unknown name (suggesting similar ones), unreadable file, or a file of another architecture, naming
            some of the keys that do not fit.
        FileNotFoundError: no such file.
    """
    import timm

    architecture = name.partition(".")[0]  # what follows the dot names pretrained weights
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models("*vit*") + timm.list_models("eva*"), 3)
        hint = f" Similar: {', '.join(near)}." if near else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}.{hint} `timm.list_models('vit*')` lists them.")
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    if family not in _FAMILIES:
        raise ValueError(
            f"{name} (timm's {family} family) is not a plain ViT with blocks to tune. Choose a vit_* model."
        )
    options: dict[str, Any] = {"num_classes": 0, "img_size": image_size, "patch_size": patch_size}
    if _FAMILIES[family]:
        options |= {"dynamic_img_size": True, "dynamic_img_pad": True}
    if weights is not None:
        options |= {"pretrained": True, "pretrained_cfg_overlay": _overlay(name, Path(weights))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            backbone = timm.create_model(name, **options)
        except RuntimeError as error:
            if weights is None or "state_dict" not in str(error):
                raise
            raise ValueError(_misfit_message(name, Path(weights), str(error))) from error
    backbone.pretrained_cfg.pop("state_dict", None)  # timm keeps the configuration, and with it a copy of the weights
    return backbone.eval()


def _overlay(name: str, path: Path) -> dict[str, Any]:
    """Makes timm load these tensors with its own key mapping and resampling, and refuse any that are left over."""
    import timm

    classifiers = timm.get_pretrained_cfg(name).classifier or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    left_out = {f"{classifier}.{kind}" for classifier in classifiers for kind in ("weight", "bias")}
    tensors, _ = load_tensors(path)
    # widened first: timm resamples in the file's dtype, and an fp16 result would be rounded a second time
    state = {key: value.float() for key, value in tensors.items() if key not in left_out}
    # with a classifier in the configuration timm would load leniently and leave missing weights at random values
    return {"state_dict": state, "num_classes": 0, "classifier": None}


def _misfit_message(name: str, path: Path, report: str) -> str:
    found = []
    for label, pattern in (
        ("missing", r"Missing key\(s\) in state_dict: (.*)"),
        ("unexpected", r"Unexpected key\(s\) in state_dict: (.*)"),
    ):
        match = re.search(pattern, report)
        if match:
            keys = re.findall(r'"([^"]+)"', match.group(1))
            found.append(f"{len(keys)} {label}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}")
    shapes = re.findall(r"size mismatch for ([^:]+): .*?torch.Size\((\[[^\]]*\]).*?torch.Size\((\[[^\]]*\])", report)
    if shapes:
        some = ", ".join(f"{key} {have} instead of {want}" for key, have, want in shapes[:3])
        found.append(f"{len(shapes)} of another shape: {some}{', …' if len(shapes) > 3 else ''}")
    return (
        f"{path} does not hold weights of {name}. Keys that do not fit: {'; '.join(found)}. "
        "Set backbone.name to the architecture the file was saved from."
    )
