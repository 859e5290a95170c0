"""Makes the small backbone that ships with the project: masked autoencoding over rendered streets of many looks.

    python benchmarks/pretrain_tiny.py [--out fishertune/assets]

Renders the images, hides three quarters of the patches of each, learns to predict their normalised pixels (He et al.,
"Masked Autoencoders Are Scalable Vision Learners", 2022), then measures what a linear probe trained on clear streets
makes of the features, against the same network with random weights. Writes ``tiny_vit.safetensors`` (fp16) and
``tiny_vit.json`` (recipe, losses, probe, versions). About 20 minutes on one core. The encoder never sees a label; only
the probe does.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fishertune import _torchvision  # noqa: F401 (must run before timm)
from fishertune.files import save_json, save_tensors
from fishertune.segmentation.classes import IGNORE_INDEX
from fishertune.segmentation.datasets.scenes import DOMAINS, LOOKS, SceneDataset
from fishertune.segmentation.heads import create_head
from fishertune.segmentation.metrics import DomainMetrics
from fishertune.segmentation.model import SegmentationModel, feature_channels
from fishertune.segmentation.tiny import ARCHITECTURE, create_tiny_backbone
from fishertune.segmentation.transforms import IMAGENET_MEAN, IMAGENET_STD, normalise
from fishertune.train.progress import Reporter

SIZE: tuple[int, int] = ARCHITECTURE["img_size"]  # type: ignore[assignment]
PATCH: int = ARCHITECTURE["patch_size"]  # type: ignore[assignment]
# Seeds of streets: none of them is a seed of a configuration's data, so no picture of a test was seen here.
STREETS, HELD_OUT, PROBE_TRAIN, PROBE_TEST = 700_000, 710_000, 720_000, 730_000


class MaskedAutoencoder(nn.Module):
    """The backbone sees the visible patches; a narrow decoder predicts the pixels of the hidden ones."""

    positions: torch.Tensor

    def __init__(self, backbone: Any, width: int = 96, depth: int = 1, heads: int = 3) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.backbone = backbone
        grid = (SIZE[0] // PATCH, SIZE[1] // PATCH)
        dim = int(backbone.embed_dim)
        with torch.no_grad():  # a good start for the learned table: positions are ordered from the first step
            backbone.pos_embed.copy_(sine_positions(grid, dim))
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sine_positions(grid, width))
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio=3.0, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.predict = nn.Linear(width, 3 * PATCH * PATCH)

    def forward(self, images_N3HW: torch.Tensor, order_NT: torch.Tensor, visible: int) -> torch.Tensor:
        """Mean squared error per hidden patch. ``order_NT`` permutes the patches; the first ``visible`` are shown."""
        shown = order_NT[:, :visible, None]
        x = self.backbone.patch_embed.proj(images_N3HW).flatten(2).transpose(1, 2) + self.backbone.pos_embed
        x = self.backbone.blocks(x.gather(1, shown.expand(-1, -1, x.shape[-1])))
        x = self.embed(self.backbone.norm(x))
        canvas = self.mask_token.expand(*order_NT.shape, -1).scatter(1, shown.expand_as(x), x)
        predicted = self.predict(self.norm(self.blocks(canvas + self.positions)))
        hidden = order_NT[:, visible:, None].expand(-1, -1, predicted.shape[-1])
        return F.mse_loss(predicted.gather(1, hidden), normalised_patches(images_N3HW).gather(1, hidden))


def sine_positions(grid: tuple[int, int], dim: int) -> torch.Tensor:
    """Sine and cosine of row and column at geometric frequencies, (1, rows·columns, dim), scaled like timm's start."""
    frequency = 1.0 / 100.0 ** (torch.arange(dim // 4) / (dim // 4))
    rows, columns = (torch.arange(n)[:, None] * frequency for n in grid)
    row_part = torch.cat([rows.sin(), rows.cos()], 1)[:, None].expand(-1, grid[1], -1)
    column_part = torch.cat([columns.sin(), columns.cos()], 1)[None].expand(grid[0], -1, -1)
    return torch.cat([row_part, column_part], -1).reshape(1, -1, dim)


def normalised_patches(images_N3HW: torch.Tensor) -> torch.Tensor:
    """Pixels of every patch with mean 0 and variance 1 inside the patch, (N, T, 3·P²)."""
    patches = F.unfold(images_N3HW, PATCH, stride=PATCH).transpose(1, 2)
    # the floor keeps the sensor noise of an even patch (sky, fog) from becoming the thing to predict
    return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 0.02).sqrt()


def render(count: int, seed: int, reporter: Reporter) -> torch.Tensor:
    """``count`` images of random looks, uint8 (count, 3, H, W)."""
    dataset = SceneDataset(LOOKS, count, SIZE, seed)
    images = torch.empty(count, 3, *SIZE, dtype=torch.uint8)
    with reporter.bar("Rendering", count) as bar:
        for index in range(count):
            images[index] = dataset[index].image
            bar.advance()
    return images


def pretrain(backbone: nn.Module, recipe: dict[str, Any], reporter: Reporter) -> dict[str, Any]:
    """Trains in place; returns the losses."""
    images = render(recipe["images"], STREETS + recipe["seed"], reporter)
    held_out = normalise(render(64, HELD_OUT + recipe["seed"], reporter), IMAGENET_MEAN, IMAGENET_STD)
    torch.manual_seed(recipe["seed"])
    generator = torch.Generator().manual_seed(recipe["seed"])
    model = MaskedAutoencoder(backbone)
    patches = (SIZE[0] // PATCH) * (SIZE[1] // PATCH)
    visible = round(patches * (1 - recipe["masked"]))
    held_out_order = torch.rand(len(held_out), patches, generator=generator).argsort(1)

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(model.eval()(held_out, held_out_order, visible))

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe["lr"], betas=(0.9, 0.95), fused=True)
    steps, warmup = recipe["steps"], max(1, recipe["steps"] // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        ),
    )
    losses: list[float] = []
    curve = {0: held_out_loss()}
    with reporter.bar("Pretraining", steps) as bar:
        queue = torch.empty(0, dtype=torch.long)
        for step in range(1, steps + 1):
            if len(queue) < recipe["batch"]:
                queue = torch.cat([queue, torch.randperm(len(images), generator=generator)])
            chosen, queue = queue[: recipe["batch"]], queue[recipe["batch"] :]
            batch = normalise(images[chosen], IMAGENET_MEAN, IMAGENET_STD)
            flip = torch.rand(len(batch), generator=generator) < 0.5
            batch[flip] = batch[flip].flip(-1)
            order = torch.rand(len(batch), patches, generator=generator).argsort(1)
            loss = model.train()(batch, order, visible)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(float(loss.detach()))
            bar.advance(f"loss {loss:.3f}")
            if step % max(1, steps // 10) == 0:
                curve[step] = held_out_loss()
                reporter.line(f"step {step}: held-out loss {curve[step]:.4f}")
    return {"train_last_50": float(np.mean(losses[-50:])), "held_out_by_step": curve}


def probe(backbone: nn.Module, reporter: Reporter, *, images: int = 200, steps: int = 300) -> dict[str, float]:
    """mIoU by domain of a linear head that was trained on the frozen features of clear streets alone."""
    blocks = (2, 5)
    head = create_head("linear", feature_channels(backbone, blocks), len(SceneDataset.classes), seed=0)
    model = SegmentationModel(backbone, head, blocks).eval()
    features, labels = _features(model, SceneDataset("clear", images, SIZE, PROBE_TRAIN))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(0)
    with reporter.bar("Linear probe", steps) as bar:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / steps)
            chosen = torch.randint(len(labels), (8,), generator=generator)
            logits = model.decode([feature[chosen] for feature in features], SIZE)
            loss = F.cross_entropy(logits, labels[chosen].long(), ignore_index=IGNORE_INDEX)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.advance()
    return {domain: _miou(model, SceneDataset(domain, 40, SIZE, PROBE_TEST)) for domain in DOMAINS}


@torch.no_grad()
def _features(model: SegmentationModel, dataset: SceneDataset) -> tuple[list[torch.Tensor], torch.Tensor]:
    samples = [dataset[index] for index in range(len(dataset))]
    images = normalise(torch.stack([sample.image for sample in samples]), IMAGENET_MEAN, IMAGENET_STD)
    parts = [model.features(batch) for batch in images.split(16)]
    maps = [torch.cat([part[i] for part in parts]) for i in range(len(parts[0]))]
    return maps, torch.stack([sample.label for sample in samples])


@torch.no_grad()
def _miou(model: SegmentationModel, dataset: SceneDataset) -> float:
    features, labels = _features(model, dataset)
    classes = len(dataset.classes)
    predicted = model.decode(features, SIZE).argmax(1)
    counted = labels != IGNORE_INDEX
    pairs = labels[counted].long() * classes + predicted[counted]
    confusion = torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return DomainMetrics.from_confusion(confusion, dataset.classes, len(dataset)).miou


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fishertune/assets"), help="folder that gets the two files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=3000, help="rendered once, then reused in random order")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    options = parser.parse_args()
    recipe = {
        "seed": options.seed,
        "images": options.images,
        "steps": options.steps,
        "batch": options.batch,
        "lr": options.lr,
        "weight_decay": 0.05,
        "masked": 0.75,
        "target": "pixels normalised per patch",
        "schedule": "5 % linear warm-up, cosine to 0",
        "augmentation": "horizontal flip",
        "data": f"scenes, domain {LOOKS}, seed {STREETS} + seed",
    }
    reporter = Reporter()
    start = time.perf_counter()
    random_probe = probe(create_tiny_backbone(pretrained=False, seed=options.seed), reporter)
    reporter.line(f"probe, random weights: {random_probe}")
    pretrain_start = time.perf_counter()
    backbone = create_tiny_backbone(pretrained=False, seed=options.seed)
    losses = pretrain(backbone, recipe, reporter)
    seconds = time.perf_counter() - pretrain_start
    stored = {name: tensor.half() for name, tensor in backbone.state_dict().items()}
    backbone.load_state_dict({name: tensor.float() for name, tensor in stored.items()})  # measure what is shipped
    pretrained_probe = probe(backbone.eval(), reporter)
    reporter.line(f"probe, pretrained: {pretrained_probe}")
    weights = options.out / "tiny_vit.safetensors"
    save_tensors(weights, stored, {"recipe": recipe})
    import timm

    save_json(
        options.out / "tiny_vit.json",
        {
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "architecture": ARCHITECTURE,
            "parameters": sum(tensor.numel() for tensor in stored.values()),
            "stored_as": "float16",
            "recipe": recipe,
            "losses": losses,
            "linear_probe_miou": {
                "what": "linear head on blocks 2 and 5, trained on 200 clear streets, tested on 40 others per domain",
                "pretrained": pretrained_probe,
                "random_weights": random_probe,
            },
            "seconds": {"pretraining": round(seconds), "all": round(time.perf_counter() - start)},
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "timm": timm.__version__,
                "numpy": np.__version__,
            },
        },
    )
    reporter.line(f"wrote {weights}")


if __name__ == "__main__":
    main()
