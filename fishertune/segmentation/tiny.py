"""The backbone that ships with the project: a small plain ViT, pretrained on rendered streets (no download needed).

``benchmarks/pretrain_tiny.py`` made it; ``assets/tiny_vit.json`` holds its recipe, losses and measured quality.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import nn

from fishertune import _torchvision  # noqa: F401 (must run before timm)
from fishertune.files import load_json, load_tensors

ASSETS = Path(__file__).resolve().parent.parent / "assets"
WEIGHTS = ASSETS / "tiny_vit.safetensors"
RECIPE = ASSETS / "tiny_vit.json"

ARCHITECTURE = {
    "img_size": (96, 160),
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "mlp_ratio": 3.0,
}


def create_tiny_backbone(*, pretrained: bool = True, seed: int = 0) -> nn.Module:
    """timm's VisionTransformer, 6 blocks of width 192 on patches of 8 pixels: 2.3 M parameters, float32, eval mode.

    Its position table is made for 96×160 images and is interpolated for any other size (which is padded to whole
    patches). It has neither class token nor classifier.

    Args:
        pretrained: loads the weights that ship with the project (stored as fp16, widened exactly). False starts from
            random weights.
        seed: of the random weights; the global random state stays as it is.

    Raises:
        RuntimeError: if the weights are missing or are not the ones of the recipe beside them.
    """
    from timm.models.vision_transformer import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: nn.Module = VisionTransformer(
            **ARCHITECTURE,
            num_classes=0,
            class_token=False,
            global_pool="avg",
            fc_norm=False,
            dynamic_img_size=True,
            dynamic_img_pad=True,
        )
    if pretrained:
        _check_weights()
        tensors, _ = load_tensors(WEIGHTS)
        backbone.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return backbone.eval()


def _check_weights() -> None:
    remedy = "Install the package again, or make them with `python benchmarks/pretrain_tiny.py`."
    if not WEIGHTS.is_file() or not RECIPE.is_file():
        raise RuntimeError(f"The weights of the tiny backbone are not at {WEIGHTS}. {remedy}")
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    if digest != load_json(RECIPE)["sha256"]:
        raise RuntimeError(f"{WEIGHTS} is damaged: its SHA-256 is not the one in {RECIPE.name}. {remedy}")
