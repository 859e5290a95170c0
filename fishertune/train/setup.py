"""From a configuration to data sets and a model, with everything checked before work starts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from fishertune.methods import get_method
from fishertune.segmentation.classes import CLASS_SETS
from fishertune.segmentation.datasets import FolderDataset, SceneDataset, SegmentationDataset, corrupt
from fishertune.segmentation.datasets.base import Sample
from fishertune.segmentation.datasets.folder import class_presence
from fishertune.segmentation.heads import create_head
from fishertune.segmentation.inference import check_windows
from fishertune.segmentation.model import SegmentationModel, create_backbone, feature_channels, resolve_blocks
from fishertune.segmentation.tiny import create_tiny_backbone
from fishertune.train.config import ConfigError, DataConfig, DomainConfig, RunConfig, ScenesConfig
from fishertune.train.data import InMemory, RunData
from fishertune.train.progress import Reporter
from fishertune.train.seeds import derive_seed
from fishertune.train.stages import Context

Part = Literal["train", "val"]
_PRESENCE_SAMPLES = 200


def resolve_device(name: str) -> torch.device:
    """``auto`` takes the GPU where there is one.

    Raises:
        ConfigError: if the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is no device of torch; use auto, cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: torch sees no GPU here. Use device=cpu or device=auto.")
    return device


def class_names(data: DataConfig) -> tuple[str, ...]:
    """The class names a data section speaks of.

    Raises:
        ConfigError: for an unknown preset.
    """
    if isinstance(data.classes, tuple):
        return data.classes
    if data.classes not in CLASS_SETS:
        raise ConfigError(f"data.classes={data.classes!r} is not one of {', '.join(CLASS_SETS)}, nor a list of names.")
    return CLASS_SETS[data.classes]


def build_domain(
    domain: DomainConfig, classes: tuple[str, ...], *, part: Part | None = None, holdout: float = 0.0
) -> SegmentationDataset:
    """The data set a section describes; ``part`` of a source with ``holdout`` kept back."""
    dataset: SegmentationDataset
    if isinstance(domain, ScenesConfig):
        dataset = _scenes(domain, part, holdout)
    else:
        dataset = FolderDataset(
            domain.images,
            domain.labels,
            classes=classes,
            label_map=domain.label_map,
            ignore_ids=domain.ignore_ids,
            manifest=domain.manifest,
            sequences=domain.sequences,
            image_suffix=domain.image_suffix,
            label_suffix=domain.label_suffix,
            size=domain.size,
            holdout=holdout,
            part=part or domain.part or "all",
            every=domain.every,
            limit=domain.limit,
            on_size_mismatch=domain.on_size_mismatch,
        )
    if domain.corruption is not None:
        dataset = corrupt(dataset, domain.corruption.name, severity=domain.corruption.severity)
    return dataset


def _scenes(domain: ScenesConfig, part: Part | None, holdout: float) -> SegmentationDataset:
    dataset = SceneDataset(domain.domain, domain.count, domain.size, domain.seed)
    if part is None:
        return dataset
    kept = max(1, round(domain.count * holdout))
    return Excerpt(dataset, range(domain.count - kept) if part == "train" else range(domain.count - kept, domain.count))


def build_data(config: DataConfig, reporter: Reporter) -> RunData:
    """Every data set of a run, opened and checked.

    Raises:
        ConfigError, ValueError, FileNotFoundError: naming the domain and what is wrong with it.
    """
    classes = class_names(config)
    data = RunData(
        train=InMemory(build_domain(config.source, classes, part="train", holdout=config.holdout)),
        validation=InMemory(build_domain(config.source, classes, part="val", holdout=config.holdout)),
        unseen={
            name: InMemory(build_domain(domain, classes, holdout=config.holdout))
            for name, domain in config.unseen.items()
        },
        classes=classes,
    )
    absent = [name for name, pixels in class_presence(data.train, limit=_PRESENCE_SAMPLES).items() if pixels == 0]
    if len(absent) == len(classes):
        raise ConfigError("The source domain shows none of the classes: check data.source.label_map and data.classes.")
    if absent:
        looked_at = min(_PRESENCE_SAMPLES, len(data.train))
        reporter.warn(
            f"the source domain never shows {', '.join(absent)} ({looked_at} images looked at); "
            "no method can learn them, and they count as missed where an unseen domain has them."
        )
    return data


def build_context(config: RunConfig, reporter: Reporter, data: RunData | None = None) -> Context:
    """Data sets and pretrained model of a run; nothing is written.

    Args:
        config: the resolved configuration.
        reporter: where progress and warnings go.
        data: the data sets of ``config.data``, where several runs share them.

    Raises:
        ConfigError, ValueError, FileNotFoundError: for anything that would stop the run later.
    """
    device = resolve_device(config.device)
    get_method(config.method)  # an unknown name should not wait for the data
    check_windows(config.evaluate.window, config.evaluate.stride)
    data = data or build_data(config.data, reporter)
    backbone = build_backbone(config)
    channels = feature_channels(backbone, resolve_blocks(backbone, config.backbone.blocks))
    head = create_head(config.head.kind, channels, len(data.classes), seed=derive_seed(config.seed, "head"))
    model = SegmentationModel(backbone, head, config.backbone.blocks)
    return Context(config, model.to(device), data, device, reporter)


def build_backbone(config: RunConfig) -> nn.Module:
    """The pretrained backbone a configuration names."""
    settings = config.backbone
    if settings.name == "tiny":
        return create_tiny_backbone()
    return create_backbone(
        settings.name,
        weights=settings.weights,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        seed=derive_seed(config.seed, "backbone"),
    )


class Excerpt:
    """Some of a data set's items, in order."""

    def __init__(self, dataset: SegmentationDataset, indices: range) -> None:
        self._dataset, self._indices = dataset, indices

    @property
    def classes(self) -> tuple[str, ...]:
        return self._dataset.classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> Sample:
        return self._dataset[self._indices[index]]
