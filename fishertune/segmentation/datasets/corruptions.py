"""Image corruptions (fog, snow, frost, motion blur, …) laid over any data set; labels stay as they are.

The pictures are those of ImageNet-C (Hendrycks and Dietterich, 2019) as packaged in ``imagecorruptions-imaug``, an
optional dependency.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import threading
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fishertune.segmentation.datasets.base import Sample, SegmentationDataset

CORRUPTIONS: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "gaussian_blur",
    "snow",
    "frost",
    "fog",
    "spatter",
    "brightness",
    "contrast",
    "saturate",
    "pixelate",
    "jpeg_compression",
)
"""What :func:`corrupt` accepts. ``elastic_transform`` is left out: it moves pixels away from their labels."""

_OWN_SEED = ("glass_blur", "impulse_noise")  # these do not draw from numpy's global generator, they take a seed
_SMALLEST = 32  # sides below this are refused by the corruption functions

_global_numpy_state = threading.Lock()


def corrupt(
    dataset: SegmentationDataset, name: str, *, severity: int = 3, seed: int = 0, cache: bool = False
) -> SegmentationDataset:
    """The same data set with every image corrupted.

    Item ``index`` is a pure function of (its image, name, severity, seed, index): the corruption functions draw from
    numpy's global generator, which is seeded for the call and put back afterwards, under a lock. Code in another thread
    that draws from that global generator at the same moment would be disturbed; nothing in this project does.

    Args:
        dataset: labelled images.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 (light) to 5.
        seed: another seed gives another fog bank.
        cache: keep corrupted samples in memory once they were made.

    Raises:
        ValueError: for an unknown name (suggesting the nearest) or severity.
        RuntimeError: if ``imagecorruptions-imaug`` is not installed or does not import, with the command that mends it.
    """
    if name not in CORRUPTIONS:
        near = difflib.get_close_matches(name, CORRUPTIONS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no corruption {name!r}.{hint} Known: {', '.join(CORRUPTIONS)}.")
    if severity not in range(1, 6):
        raise ValueError(f"severity={severity} must be a whole number from 1 (light) to 5.")
    return _Corrupted(dataset, name, severity, seed, cache)


class _Corrupted:
    def __init__(self, dataset: SegmentationDataset, name: str, severity: int, seed: int, cache: bool) -> None:
        self._function = _corruption_function()
        self._dataset, self._name, self._severity, self._seed = dataset, name, severity, seed
        self._cache: dict[int, Sample] | None = {} if cache else None

    @property
    def classes(self) -> tuple[str, ...]:
        return self._dataset.classes

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int, /) -> Sample:
        index = range(len(self))[index]  # -1 and the last index are one sample and get one seed
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        sample = self._dataset[index]
        image = torch.from_numpy(self._corrupt(sample.image.permute(1, 2, 0).numpy(), index)).permute(2, 0, 1)
        corrupted = Sample(image.contiguous(), sample.label, sample.name)
        if self._cache is not None:
            self._cache[index] = corrupted
        return corrupted

    def _corrupt(self, image: np.ndarray, index: int) -> np.ndarray:
        height, width = image.shape[:2]
        below, right = max(_SMALLEST - height, 0), max(_SMALLEST - width, 0)
        padded = np.pad(image, ((0, below), (0, right), (0, 0)), mode="symmetric")
        stream = np.random.SeedSequence([self._seed, index, zlib.crc32(self._name.encode())])
        seed = int(stream.generate_state(1)[0])
        own_seed = {"seed": seed} if self._name in _OWN_SEED else {}
        with _seeded(seed), contextlib.redirect_stdout(io.StringIO()):  # some functions print when sizes are odd
            corrupted = self._function(
                np.ascontiguousarray(padded), severity=self._severity, corruption_name=self._name, **own_seed
            )
        return corrupted[:height, :width].copy()  # some functions hand out a read-only view of a picture


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """numpy's global generator starts at ``seed`` inside, and is as before outside."""
    with _global_numpy_state:
        state = np.random.get_state()  # noqa: NPY002 (the corruption functions draw from the global generator)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def _corruption_function() -> Callable[..., np.ndarray]:
    try:
        from imagecorruptions import corrupt as function
    except ImportError as error:
        raise RuntimeError(
            f"Image corruptions need the package imagecorruptions-imaug ({error}). Install it with "
            "`pip install 'fishertune[corruptions]'` or `pip install imagecorruptions-imaug`; the plain "
            "`imagecorruptions` does not work with numpy 2."
        ) from error
    return function
