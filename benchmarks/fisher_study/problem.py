"""What is estimated: a dense model with a warmed-up head, and two samples of images that share no frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fishertune.partition import Partition, partition
from fishertune.segmentation.datasets import SegmentationDataset
from fishertune.segmentation.heads import create_head
from fishertune.segmentation.loss import SegmentationLoss
from fishertune.segmentation.model import SegmentationModel, feature_channels
from fishertune.segmentation.transforms import AugmentConfig
from fishertune.selection import budget
from fishertune.train.config import RunConfig
from fishertune.train.data import Batch, BatchStream, InMemory, RunData
from fishertune.train.progress import Reporter
from fishertune.train.seeds import derive_seed
from fishertune.train.setup import Excerpt, build_backbone, build_domain, class_names, resolve_device
from fishertune.train.stages import Context, warm_up

_BACKBONE = "backbone."


@dataclass
class Problem:
    """One model and its data.

    Attributes:
        context: model, data and configuration, as in a training run.
        names: every parameter of the backbone, as the whole model names it, in its order. Vectors of Fisher values are
            these parameters one after another.
        candidates: bool, one per element of such a vector: Q, K, V or FFN.
        k: how many elements are selected.
        loss: one loss per image.
        samples: ``reference`` and ``estimate``, endless streams of augmented crops; the same with ``whole`` behind the
            name without augmentation, which end with the frames.
    """

    context: Context
    names: tuple[str, ...]
    parts: Partition
    candidates: Tensor
    k: int
    loss: SegmentationLoss
    samples: dict[str, BatchStream]

    @property
    def model(self) -> SegmentationModel:
        return self.context.model

    @property
    def candidate_names(self) -> tuple[str, ...]:
        return tuple(_BACKBONE + name for name in self.parts.names)

    def images(self, sample: str, start: int, stop: int) -> Batch:
        """Images ``start`` to ``stop`` − 1 of one of the ``samples``, as the model takes them."""
        drawn = [self.samples[sample].batch(position)[0] for position in range(start, stop)]
        images, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        return self.context.normalised(images), labels.to(self.context.device)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector by name of the backbone's parameters."""
        parameters = dict(self.model.named_parameters())
        shapes = [parameters[name].shape for name in self.names]
        parts = vector.split([shape.numel() for shape in shapes])
        return {
            name.removeprefix(_BACKBONE): part.view(shape)
            for name, part, shape in zip(self.names, parts, shapes, strict=True)
        }

    def flat(self, values: dict[str, Tensor]) -> Tensor:
        """Values by parameter name as one vector on the CPU; −inf where a parameter has none."""
        parameters = dict(self.model.named_parameters())
        missing = -torch.inf
        return torch.cat(
            [
                values[name].detach().flatten().float().cpu()
                if name in values
                else torch.full((parameters[name].numel(),), missing)
                for name in self.names
            ]
        )


def build(config: RunConfig, reporter: Reporter, work: Path) -> Problem:
    """Opens the data, builds the model and warms its head up (or reads the warmed-up head from ``work``).

    Frames with an even number make the reference sample and those with an odd number the other one, so that no frame
    is in both. Images are augmented crops, as in the estimation stage of a run.
    """
    classes = class_names(config.data)
    frames = InMemory(build_domain(config.data.source, classes))
    backbone = build_backbone(config)
    blocks = config.backbone.blocks
    head = create_head(
        config.head.kind, feature_channels(backbone, blocks), len(classes), seed=derive_seed(config.seed, "head")
    )
    model = SegmentationModel(backbone, head, blocks)
    device = resolve_device(config.device)
    context = Context(config, model.to(device), RunData(frames, frames, {}, classes), device, reporter)
    warm_up(context, work / "warm-up.safetensors")
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_()

    names = tuple(name for name, _ in model.named_parameters() if name.startswith(_BACKBONE))
    parts = partition(backbone, kinds=config.select.kinds)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in backbone.named_parameters()}
    masked = parts.mask_scores(zeros)
    candidates = torch.cat([masked[name.removeprefix(_BACKBONE)].flatten().cpu() for name in names]) == 0
    base = candidates.numel() if config.select.base == "backbone" else parts.n_candidates
    return Problem(
        context,
        names,
        parts,
        candidates,
        budget(config.select.fraction, base),
        SegmentationLoss(),
        {
            f"{name}{kind}": _stream(Excerpt(frames, range(first, len(frames), 2)), config.seed, name, augment)
            for first, name in enumerate(("reference", "estimate"))
            for kind, augment in (("", config.augment), ("-whole", AugmentConfig.none()))
        },
    )


def _stream(half: SegmentationDataset, seed: int, name: str, augment: AugmentConfig) -> BatchStream:
    return BatchStream(half, 1, seed=seed, stage=name, config=augment)


def middle_blocks(depth: int) -> tuple[int, int]:
    """Two thirds and five sixths of the way up: where features of self-supervised ViTs are best for dense tasks."""
    return round(depth * 2 / 3) - 1, round(depth * 5 / 6) - 1


def with_model(config: RunConfig, name: str, weights: str | None) -> RunConfig:
    """The configuration with another timm backbone under the head."""
    import timm

    from fishertune import _torchvision  # noqa: F401 (before timm)

    with torch.device("meta"):
        depth = len(timm.create_model(name.partition(".")[0], num_classes=0).blocks)
    return replace(config, backbone=replace(config.backbone, name=name, weights=weights, blocks=middle_blocks(depth)))
