"""From a configuration to data sets and a model, with everything checked before work starts."""

from __future__ import annotations

import torch

from fishertune.methods import get_method
from fishertune.segmentation.classes import CLASS_SETS
from fishertune.segmentation.datasets import FolderDataset, SceneDataset, SegmentationDataset, corrupt
from fishertune.segmentation.datasets.folder import class_presence
from fishertune.segmentation.heads import create_head
from fishertune.segmentation.model import SegmentationModel, create_backbone
from fishertune.segmentation.tiny import create_tiny_backbone
from fishertune.train.config import ConfigError, DataConfig, DomainConfig, RunConfig, ScenesConfig
from fishertune.train.data import InMemory, RunData
from fishertune.train.progress import Reporter
from fishertune.train.seeds import derive_seed


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
    domain: DomainConfig, classes: tuple[str, ...], *, part: str | None = None, holdout: float = 0.0
) -> SegmentationDataset:
    """One domain; ``part`` is ``train`` or ``val`` of a source with ``holdout`` kept back."""
    dataset: SegmentationDataset
    if isinstance(domain, ScenesConfig):
        dataset = SceneDataset(domain.domain, domain.count, domain.size, domain.seed)
        if part is not None:
            kept = max(1, round(domain.count * holdout))
            split = range(domain.count - kept) if part == "train" else range(domain.count - kept, domain.count)
            dataset = Part(dataset, split)
    else:
        dataset = FolderDataset(
            domain.images,
            domain.labels,
            classes=classes,
            label_map=domain.label_map,
            manifest=domain.manifest,
            sequences=domain.sequences,
            image_suffix=domain.image_suffix,
            label_suffix=domain.label_suffix,
            size=domain.size,
            limit=domain.limit,
            on_size_mismatch=domain.on_size_mismatch,
            holdout=holdout,
            part=part,
        )
    if domain.corruption is not None:
        dataset = corrupt(dataset, domain.corruption.name, severity=domain.corruption.severity, seed=0)
    return dataset


class Part:
    """Some of a data set's items."""

    def __init__(self, dataset: SegmentationDataset, indices: range) -> None:
        self._dataset, self._indices = dataset, indices

    @property
    def classes(self) -> tuple[str, ...]:
        return self._dataset.classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> object:
        return self._dataset[self._indices[index]]
