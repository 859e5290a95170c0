"""Images in one folder, label maps in another: Cityscapes, GTAV, ACDC, BDD100K, CamVid and others laid out alike."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from fishertune.files import load_json
from fishertune.segmentation.classes import CLASS_SETS, IGNORE_INDEX, LABEL_MAPS
from fishertune.segmentation.datasets.base import Sample, SegmentationDataset

_INDEX_MODES = (
    "L",
    "P",
    "1",
    "I",
    "I;16",
    "I;16B",
    "I;16L",
)  # one integer for each pixel; "P" keeps the palette's index
_UNKNOWN = -1

T = TypeVar("T")


class _Pair(NamedTuple):
    name: str
    image: Path
    label: Path


class FolderDataset:
    """Pairs of image and label files.

    The label of ``images/a/b<image_suffix>`` is ``labels/a/b<label_suffix>``; ``a/b`` is the sample's name. A sequence
    is a folder below ``images`` (Cityscapes' cities), or an entry of ``manifest``.

    Args:
        images: folder of the images, searched at any depth.
        labels: folder of the label files: one integer id for each pixel. Palette files give their index, never colours.
        classes: class names in index order, or the name of a known list (``"cityscapes"``, ``"camvid"``).
        label_map: id in the file to class index, or 255 to ignore: a dict or the name of a preset
            (:data:`fishertune.segmentation.classes.LABEL_MAPS`). None: the ids are the class indices already.
        ignore_ids: further ids that do not count. 255 never counts unless ``label_map`` says otherwise.
        manifest: JSON file ``{"sequences": {sequence: [name, …]}}`` that says which names there are and in which order;
            paths of images and labels then follow from the names.
        sequences: keep these sequences only, in this order. None keeps all.
        image_suffix: how image files end, e.g. ``"_leftImg8bit.png"``.
        label_suffix: how label files end, e.g. ``"_gtFine_labelIds.png"``.
        size: (height, width) everything is resized to: images bilinear with antialiasing, labels nearest. None keeps
            the size of the files.
        holdout: share of every sequence, taken from its end in one piece, that forms part ``"val"``. Neighbouring video
            frames nearly repeat each other, so that a random hold-out would measure memory.
        part: ``"train"`` is what ``holdout`` leaves, ``"val"`` what it takes, ``"all"`` both.
        every: keep each ``every``-th frame of a sequence's part.
        limit: keep at most this many samples, evenly spread over the whole list.
        on_size_mismatch: what to do if an image and its label differ in size: ``"error"``, or ``"skip"`` the pair with
            one warning that gives the count (GTAV has some).

    Raises:
        FileNotFoundError: folder or manifest does not exist, no image was found, or a label is missing.
        ValueError: an argument, a header that cannot be read, or sizes that differ; all found at construction. Reading
            an item raises it for a truncated file and for a label id outside the map, naming file and id.
    """

    def __init__(
        self,
        images: str | Path,
        labels: str | Path,
        *,
        classes: str | Sequence[str],
        label_map: str | Mapping[int, int] | None = None,
        ignore_ids: Iterable[int] = (),
        manifest: str | Path | None = None,
        sequences: Sequence[str] | None = None,
        image_suffix: str = ".png",
        label_suffix: str = ".png",
        size: tuple[int, int] | None = None,
        holdout: float = 0.0,
        part: Literal["all", "train", "val"] = "all",
        every: int = 1,
        limit: int | None = None,
        on_size_mismatch: Literal["error", "skip"] = "error",
    ) -> None:
        _check_arguments(size, holdout, part, every, limit, on_size_mismatch)
        self._classes = _resolve_classes(classes)
        self._lookup = _lookup_table(label_map, ignore_ids, self._classes)
        self._size = size
        images, labels = _existing_folder(images, "image"), _existing_folder(labels, "label")
        if manifest is None:
            by_sequence = _scan(images, labels, image_suffix, label_suffix)
        else:
            by_sequence = _read_manifest(Path(manifest), images, labels, image_suffix, label_suffix)
        chosen = _choose_sequences(by_sequence, sequences, images)
        pairs = [pair for frames in chosen for pair in _part_of(frames, holdout, part)[::every]]
        if not pairs:
            raise ValueError(
                f'Part "{part}" of {images} is empty: a holdout of {holdout} leaves no frame there. Use more frames or '
                "another holdout."
            )
        if limit is not None:
            pairs = evenly_spread(pairs, limit)
        _check_presence(pairs)
        self._pairs = _check_sizes(pairs, on_size_mismatch)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @property
    def names(self) -> tuple[str, ...]:
        """The samples' names, in order, without reading any image."""
        return tuple(pair.name for pair in self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int, /) -> Sample:
        pair = self._pairs[index]
        image = _read(pair.image).convert("RGB")
        label = self._to_classes(_read(pair.label), pair.label)
        if self._size is not None:
            height, width = self._size
            image = image.resize((width, height), Image.Resampling.BILINEAR)
            label = _resize_nearest(label, height, width)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return Sample(pixels, torch.from_numpy(label), pair.name)

    def _to_classes(self, label: Image.Image, path: Path) -> np.ndarray:
        ids = np.array(label).astype(np.int64)
        known = (ids >= 0) & (ids < len(self._lookup))
        classes = np.where(known, self._lookup[np.where(known, ids, 0)], _UNKNOWN)
        unknown = np.unique(ids[classes == _UNKNOWN])
        if unknown.size:
            some = ", ".join(map(str, unknown[:5])) + (", …" if unknown.size > 5 else "")
            raise ValueError(
                f"{path} has label id {some}, which the label map does not know. Add it to label_map (255 ignores it) "
                "or to ignore_ids."
            )
        return classes.astype(np.uint8)


def class_presence(
    dataset: SegmentationDataset, limit: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Counts the labelled pixels of each class, to find classes a data set never shows.

    Args:
        dataset: any labelled images.
        limit: look at this many samples only, evenly spread. None looks at all.
        progress: called with (samples done, samples in all).

    Returns:
        class name → pixels, in class order; 0 where the class is absent from what was looked at.
    """
    positions = range(len(dataset)) if limit is None else evenly_spread(range(len(dataset)), limit)
    counts = torch.zeros(IGNORE_INDEX + 1, dtype=torch.int64)
    for done, position in enumerate(positions, start=1):
        counts += torch.bincount(dataset[position].label.flatten().long(), minlength=IGNORE_INDEX + 1)
        if progress is not None:
            progress(done, len(positions))
    return {name: int(counts[index]) for index, name in enumerate(dataset.classes)}


def evenly_spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` items, the first one included, at equal distances (to rounding) over the whole sequence."""
    if count >= len(items):
        return list(items)
    return [items[position * len(items) // count] for position in range(count)]


# ---------------------------------------------------------------------------------------------------------- arguments


def _check_arguments(
    size: tuple[int, int] | None, holdout: float, part: str, every: int, limit: int | None, on_size_mismatch: str
) -> None:
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size={size} must be (height, width), both positive.")
    if not 0.0 <= holdout < 1.0:
        raise ValueError(f"holdout={holdout} must lie in [0, 1): it is the share of each sequence that is kept back.")
    if part not in ("all", "train", "val"):
        raise ValueError(f'part={part!r} must be "all", "train" or "val".')
    if every < 1:
        raise ValueError(f"every={every} must be 1 (keep each frame) or more.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more, or None for all samples.")
    if on_size_mismatch not in ("error", "skip"):
        raise ValueError(f'on_size_mismatch={on_size_mismatch!r} must be "error" or "skip".')


def _resolve_classes(classes: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(classes, str):
        return _preset(CLASS_SETS, classes, "classes")
    if not 0 < len(classes) <= IGNORE_INDEX:
        raise ValueError(f"{len(classes)} classes: expected 1 to {IGNORE_INDEX} ({IGNORE_INDEX} marks ignored pixels).")
    return tuple(classes)


def _preset(known: Mapping[str, T], name: str, argument: str) -> T:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{argument}={name!r} is not a known preset.{hint} Known: {', '.join(known)}.")
    return known[name]


def _lookup_table(
    label_map: str | Mapping[int, int] | None, ignore_ids: Iterable[int], classes: tuple[str, ...]
) -> np.ndarray:
    """Class index by file id, ``_UNKNOWN`` where the map is silent."""
    if isinstance(label_map, str):
        label_map = _preset(LABEL_MAPS, label_map, "label_map")
    elif label_map is None:
        label_map = {index: index for index in range(len(classes))}
    pairs = {IGNORE_INDEX: IGNORE_INDEX, **label_map, **dict.fromkeys(ignore_ids, IGNORE_INDEX)}
    for label_id, index in pairs.items():
        if label_id < 0 or not (0 <= index < len(classes) or index == IGNORE_INDEX):
            raise ValueError(
                f"The label map sends id {label_id} to {index}; ids start at 0 and class indices go from 0 to "
                f"{len(classes) - 1} for the {len(classes)} classes given, or {IGNORE_INDEX} to ignore."
            )
    table = np.full(max(pairs) + 1, _UNKNOWN, dtype=np.int16)
    table[list(pairs)] = list(pairs.values())
    return table


# ---------------------------------------------------------------------------------------------------------- file lists


def _existing_folder(path: str | Path, what: str) -> Path:
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"The {what} folder {path} does not exist. Check the path in the data section.")
    return path


def _scan(images: Path, labels: Path, image_suffix: str, label_suffix: str) -> dict[str, list[_Pair]]:
    files = sorted(path for path in images.rglob("*") if path.is_file())
    found: dict[str, list[_Pair]] = {}
    for path in files:
        relative = path.relative_to(images)
        if relative.name.endswith(image_suffix):
            name = relative.as_posix().removesuffix(image_suffix)
            sequence = relative.parent.as_posix()
            found.setdefault(sequence, []).append(_Pair(name, path, labels / (name + label_suffix)))
    if not found:
        endings = sorted({path.suffix for path in files if path.suffix})
        there = f"it holds files ending in {', '.join(endings[:5])}" if endings else "it is empty"
        raise FileNotFoundError(
            f"No image ending in {image_suffix!r} below {images}: {there}. Set image_suffix, or check the folder."
        )
    return found


def _read_manifest(
    manifest: Path, images: Path, labels: Path, image_suffix: str, label_suffix: str
) -> dict[str, list[_Pair]]:
    if not manifest.is_file():
        raise FileNotFoundError(f"The manifest {manifest} does not exist. Check the path in the data section.")
    content: Any = load_json(manifest)
    sequences = content.get("sequences") if isinstance(content, dict) else None
    if not isinstance(sequences, dict) or not all(isinstance(names, list) for names in sequences.values()):
        raise ValueError(f'{manifest} must be JSON of the form {{"sequences": {{"name": ["frame", …]}}}}.')
    return {
        sequence: [_Pair(name, images / (name + image_suffix), labels / (name + label_suffix)) for name in names]
        for sequence, names in sequences.items()
    }


def _choose_sequences(
    by_sequence: dict[str, list[_Pair]], wanted: Sequence[str] | None, images: Path
) -> list[list[_Pair]]:
    if wanted is None:
        return list(by_sequence.values())
    for sequence in wanted:
        if sequence not in by_sequence:
            near = difflib.get_close_matches(sequence, by_sequence, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            known = ", ".join(list(by_sequence)[:20]) + (", …" if len(by_sequence) > 20 else "")
            raise ValueError(f"There is no sequence {sequence!r} in {images}.{hint} Known: {known}.")
    return [by_sequence[sequence] for sequence in wanted]


def _part_of(frames: list[_Pair], holdout: float, part: str) -> list[_Pair]:
    """The end of a sequence is held back; with two frames or more, neither side of a true hold-out is empty."""
    if part == "all":
        return frames
    held = 0
    if holdout > 0.0:
        held = min(max(round(holdout * len(frames)), 1), len(frames) - 1)
    split = len(frames) - held
    return frames[:split] if part == "train" else frames[split:]


def _check_presence(pairs: list[_Pair]) -> None:
    for what, paths in (("image", [pair.image for pair in pairs]), ("label", [pair.label for pair in pairs])):
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} {what} files are missing, the first is {missing[0]}. Check "
                f"the {what} folder and {what}_suffix."
            )


def _check_sizes(pairs: list[_Pair], on_mismatch: str) -> list[_Pair]:
    """Reads headers only, some 0.1 ms a pair: a bad pair then stops a run at its start and not hours later."""
    fitting, first_message = [], ""
    for pair in pairs:
        image_size, _ = _header(pair.image)
        label_size, label_mode = _header(pair.label)
        if label_mode not in _INDEX_MODES:
            raise ValueError(
                f"{pair.label} is a colour image (mode {label_mode}); a label file holds one id for each pixel, as a "
                "grey or palette PNG. Convert the colours to ids first."
            )
        if image_size == label_size:
            fitting.append(pair)
            continue
        first_message = first_message or (
            f"{pair.label} is {label_size[0]}×{label_size[1]} pixels but its image {pair.image} is "
            f"{image_size[0]}×{image_size[1]}"
        )
        if on_mismatch == "error":
            raise ValueError(f'{first_message}. Mend the pair, or skip such pairs with on_size_mismatch="skip".')
    skipped = len(pairs) - len(fitting)
    if not fitting:
        raise ValueError(f"All {skipped} labels differ in size from their images: {first_message}. Check the folders.")
    if skipped:
        warnings.warn(f"Skipped {skipped} of {len(pairs)} pairs of different size; {first_message}.", stacklevel=3)
    return fitting


# --------------------------------------------------------------------------------------------------------------- files


def _header(path: Path) -> tuple[tuple[int, int], str]:
    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _read(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
    return ValueError(
        f"{path} cannot be read ({reason}). It may be truncated: fetch it again, or take it out of the "
        "folder or manifest."
    )


def _resize_nearest(label: np.ndarray, height: int, width: int) -> np.ndarray:
    """The source pixel under each target pixel's centre, as in the image's own resize."""
    rows = ((np.arange(height) + 0.5) * (label.shape[0] / height)).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * (label.shape[1] / width)).astype(np.int64)
    return label[rows[:, None], columns[None, :]]
