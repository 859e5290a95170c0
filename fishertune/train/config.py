"""Run configuration: a YAML file, checked key by key before any work starts.

Every section is a frozen dataclass; its fields, types and defaults are the documentation of the format. A key that does
not exist is refused with the nearest one that does, a value of the wrong type with what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from fishertune.files import atomic_write
from fishertune.segmentation.transforms import AugmentConfig


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, the value and what was expected."""


@dataclass(frozen=True)
class BackboneConfig:
    """A ViT of timm, or ``tiny``: the small one that ships with the project."""

    name: str = "tiny"
    weights: str | None = None  # local safetensors file; None starts from random weights (``tiny`` has its own)
    image_size: tuple[int, int] | None = None  # (height, width) the position table is resampled to
    patch_size: int | None = None  # resamples the patch embedding; None keeps the model's own
    blocks: tuple[int, ...] = (2, 5)  # features of these blocks go to the head; later blocks are not run


@dataclass(frozen=True)
class HeadConfig:
    """The per-pixel decoder."""

    kind: str = "linear"


@dataclass(frozen=True)
class CorruptionConfig:
    """An image corruption laid over a data set; needs the extra ``fishertune[corruptions]``."""

    name: str
    severity: int = 3


@dataclass(frozen=True)
class FolderConfig:
    """Images and labels in two folders."""

    images: str
    labels: str
    kind: Literal["folder"] = "folder"
    ignore_ids: tuple[int, ...] = ()  # further file ids that do not count
    label_map: str | dict[int, int] | None = None  # preset name, or file id -> class index; None: ids are class indices
    manifest: str | None = None
    sequences: tuple[str, ...] | None = None
    image_suffix: str = ".jpg"
    label_suffix: str = ".png"
    size: tuple[int, int] | None = None  # (height, width) everything is resized to
    every: int = 1  # keep each n-th frame of a sequence; neighbouring video frames nearly repeat each other
    limit: int | None = None  # at most this many, evenly spread
    part: Literal["train", "val"] | None = None  # of an unseen domain made of source frames: only the held-out ones
    on_size_mismatch: Literal["error", "skip"] = "error"
    corruption: CorruptionConfig | None = None


@dataclass(frozen=True)
class ScenesConfig:
    """The project's own procedural street scenes."""

    kind: Literal["scenes"] = "scenes"
    domain: str = "clear"
    count: int = 200
    size: tuple[int, int] = (96, 160)
    seed: int = 0
    corruption: CorruptionConfig | None = None


DomainConfig = FolderConfig | ScenesConfig


@dataclass(frozen=True)
class DataConfig:
    """One labelled source domain; any number of unseen ones that are only ever evaluated."""

    source: DomainConfig
    unseen: dict[str, DomainConfig]
    classes: str | tuple[str, ...] = "cityscapes"  # preset name or the class names in index order
    root: str | None = None  # folder that relative paths of the domains start from
    holdout: float = 0.15  # share of the source kept back; hyper-parameters may look at it, unseen domains never


@dataclass(frozen=True)
class WarmupConfig:
    """T1: the decoder alone, backbone frozen."""

    steps: int = 250
    lr: float = 1e-3
    batch_size: int = 4


@dataclass(frozen=True)
class EstimateConfig:
    """T2: Fisher information on the source and on its simulated shift (Eq. 6-15)."""

    steps: int = 25
    batch_size: int = 8
    estimator: Literal["closed_form", "natural", "sgvb", "local"] = "closed_form"
    options: dict[str, float] = field(default_factory=dict)  # of the estimator, e.g. {beta: 0.1}
    labels: Literal["empirical", "sampled"] = "empirical"
    gamma: float = 1e-3
    tau: float = 1.0
    eps: float = 1e-8
    c: Literal["signed", "abs"] | float = "signed"
    draw: Literal["channel", "scalar"] = "channel"
    where: str = "patch_embed"


@dataclass(frozen=True)
class SelectConfig:
    """What share of the backbone is tuned, and where it may lie (Eq. 3)."""

    fraction: float = 0.05
    base: Literal["backbone", "candidates"] = "backbone"
    kinds: tuple[str, ...] = ("Q", "K", "V", "FFN")


@dataclass(frozen=True)
class GrowthConfig:
    """Growth of the tuned set over the tuning steps (Eq. 16), from ``start`` to ``select.fraction``.

    ``paper`` applies the formula as printed, to scores normalised to their quantile among the candidates: choose the
    two deltas so that no more pass at the end than ``select.fraction`` holds.
    """

    shape: Literal["exponential", "linear", "constant", "paper"] = "exponential"
    start: float = 0.01  # fraction of select.base that takes part at step 0
    delta_min: float = 0.94
    delta_max: float = 0.99


@dataclass(frozen=True)
class TuneConfig:
    """T3: the selected weights and the decoder."""

    steps: int = 200
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 1e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    poly_power: float = 0.9
    precision: Literal["fp32", "bf16"] = "fp32"
    growth: GrowthConfig | None = None


@dataclass(frozen=True)
class EvaluateConfig:
    """Sliding windows; None evaluates whole images."""

    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    batch_size: int = 8


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on."""

    data: DataConfig
    method: str = "fishertune"
    seed: int = 0
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    estimate: EstimateConfig = field(default_factory=EstimateConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint_every: int = 100
    device: str = "auto"

    def fingerprint(self, *fields: str) -> str:
        """A short hash of the named fields (``section`` or ``section.setting``).

        Two runs with the same one may share the result of a stage that depends on nothing else.
        """
        plain = to_plain(self)
        chosen = {}
        for name in fields:
            section, _, setting = name.partition(".")
            chosen[name] = plain[section][setting] if setting else plain[section]
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------------------


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies ``key.sub=value`` overrides (values are YAML too) and checks the result.

    Paths inside the file may be relative to the file's folder or to the working directory.

    Raises:
        ConfigError: naming the first thing that is wrong and how to mend it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"Configuration file {path} does not exist.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    for override in overrides:
        _apply_override(raw, override)
    config = from_plain(RunConfig, raw, "")
    _check_ranges(config)
    return _anchor_paths(config, path.parent)


def load_domains(path: str | Path) -> dict[str, DomainConfig]:
    """Reads a YAML file of domains by name, each written like one under ``data.unseen``.

    Raises:
        ConfigError: naming what is wrong.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Domain file {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    domains: dict[str, DomainConfig] = from_plain(dict[str, DomainConfig], raw, "")
    return {name: _anchor_domain(domain, Path(path).parent) for name, domain in domains.items()}


def save_config(path: str | Path, config: RunConfig) -> None:
    """Writes the resolved configuration as YAML; :func:`load_config` reads it back to an equal object."""
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(to_plain(config), sort_keys=False), encoding="utf-8")


def to_plain(value: Any) -> Any:
    """Dataclasses and tuples to the dicts and lists YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    return value


def from_plain(expected: Any, value: Any, where: str) -> Any:
    """Builds ``expected`` (a type annotation) from plain data; ``where`` is the dotted key for messages."""
    if dataclasses.is_dataclass(expected):
        return _dataclass_from(typing.cast(type, expected), value, where)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return _union_from(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(
            f"{where}={value!r} is not one of {', '.join(map(str, arguments))}.{_nearest(value, arguments)}"
        )
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}={value!r}: expected a list.")
        if arguments[-1] is Ellipsis:
            return tuple(from_plain(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(arguments):
            raise ConfigError(f"{where}={value!r}: expected a list of {len(arguments)} values.")
        return tuple(from_plain(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(arguments, value)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: expected a mapping.")
        return {
            from_plain(arguments[0], key, f"{where} (key)"): from_plain(arguments[1], item, f"{where}.{key}")
            for key, item in value.items()
        }
    return _scalar_from(expected, value, where)


def _dataclass_from(expected: type, value: Any, where: str) -> Any:
    if isinstance(value, expected):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where or 'the configuration'}={value!r}: expected a mapping of settings.")
    hints = typing.get_type_hints(expected)
    fields = {item.name: item for item in dataclasses.fields(expected)}
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in fields:
            raise ConfigError(
                f"Unknown setting {prefix}{key}.{_nearest(key, fields)} Settings here: {', '.join(fields)}."
            )
    required = [
        name
        for name, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in value]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} is missing from the configuration.")
    return expected(**{key: from_plain(hints[key], item, prefix + key) for key, item in value.items()})


def _union_from(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    choices = [kind for kind in arguments if kind is not type(None)]
    sections = [kind for kind in choices if dataclasses.is_dataclass(kind)]
    if len(sections) > 1 and isinstance(value, Mapping):  # several sections share a key that says which one is meant
        kinds = {typing.get_args(typing.get_type_hints(kind)["kind"])[0]: kind for kind in sections}
        named = value.get("kind")
        if named not in kinds:
            raise ConfigError(f"{where}.kind={named!r} is not one of {', '.join(kinds)}.{_nearest(named, kinds)}")
        return from_plain(kinds[named], value, where)
    errors = []
    for kind in choices:
        try:
            return from_plain(kind, value, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _scalar_from(expected: Any, value: Any, where: str) -> Any:
    if expected is float and isinstance(value, str):
        try:  # YAML 1.1 reads 1e-4 as text
            return float(value)
        except ValueError:
            pass
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, expected) and not (expected is not bool and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}={value!r}: expected {expected.__name__}, got {type(value).__name__}.")


def _nearest(word: Any, choices: Any) -> str:
    close = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f" Did you mean {close[0]}?" if close else ""


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"Override {override!r} is not of the form key=value, e.g. tune.lr=1e-4.")
    node = raw
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"Override {override!r}: {parent} is a single value and has no {leaf}.")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"Override {override!r}: the value is not valid YAML ({error}).") from error


def _check_ranges(config: RunConfig) -> None:
    positive = {
        "warmup.batch_size": config.warmup.batch_size,
        "estimate.steps": config.estimate.steps,
        "estimate.batch_size": config.estimate.batch_size,
        "estimate.gamma": config.estimate.gamma,
        "estimate.tau": config.estimate.tau,
        "tune.batch_size": config.tune.batch_size,
        "tune.accumulate": config.tune.accumulate,
        "checkpoint_every": config.checkpoint_every,
        "evaluate.batch_size": config.evaluate.batch_size,
    }
    for key, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{key}={value} must be greater than 0.")
    for key, steps in {"warmup.steps": config.warmup.steps, "tune.steps": config.tune.steps}.items():
        if steps < 0:
            raise ConfigError(f"{key}={steps} must not be negative.")
    if not 0 < config.select.fraction <= 1:
        raise ConfigError(f"select.fraction={config.select.fraction} must lie in (0, 1]; 5 % is 0.05.")
    if not 0 < config.data.holdout < 1:
        raise ConfigError(f"data.holdout={config.data.holdout} must lie between 0 and 1; 0.15 keeps back 15 %.")
    if not config.backbone.blocks:
        raise ConfigError("backbone.blocks is empty: name at least one block whose features the head reads, e.g. [5].")


def _anchor_paths(config: RunConfig, folder: Path) -> RunConfig:
    """Relative paths start from ``data.root``, else from the working directory, else from the file's folder."""
    root = Path(_anchor(config.data.root, folder)) if config.data.root else None
    data = dataclasses.replace(
        config.data,
        source=_anchor_domain(config.data.source, root or folder),
        unseen={name: _anchor_domain(domain, root or folder) for name, domain in config.data.unseen.items()},
        root=None,
    )
    weights = config.backbone.weights
    backbone = dataclasses.replace(config.backbone, weights=_anchor(weights, folder) if weights else None)
    return dataclasses.replace(config, data=data, backbone=backbone)


def _anchor_domain(domain: DomainConfig, folder: Path) -> DomainConfig:
    if isinstance(domain, ScenesConfig):
        return domain
    return dataclasses.replace(
        domain,
        images=_anchor(domain.images, folder),
        labels=_anchor(domain.labels, folder),
        manifest=_anchor(domain.manifest, folder) if domain.manifest else None,
    )


def _anchor(path: str, folder: Path) -> str:
    if (folder / path).exists():
        return str((folder / path).resolve())
    return path
