"""Prediction in sliding windows, and evaluation of a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn

from fishertune import _torchvision  # noqa: F401 (must run before torchmetrics, which imports torchvision)
from fishertune.segmentation.classes import IGNORE_INDEX
from fishertune.segmentation.datasets.base import Sample, SegmentationDataset
from fishertune.segmentation.metrics import DomainMetrics
from fishertune.segmentation.transforms import IMAGENET_MEAN, IMAGENET_STD, normalise

Size = tuple[int, int]


@torch.no_grad()
def predict(
    model: nn.Module, images_N3HW: torch.Tensor, window: Size | None = None, stride: Size | None = None
) -> torch.Tensor:
    """Logits (N, C, H, W) of normalised images, averaged where windows overlap.

    Windows lie on a regular grid; the last one in each direction ends at the image's border. A window larger than the
    image is cut to it, so that one covering window gives exactly ``model(images)``. The model's mode is not changed.

    Args:
        model: maps float images (N, 3, h, w) to logits (N, C, h, w).
        images_N3HW: normalised float images.
        window: (height, width) of a window; None passes whole images.
        stride: (down, right) distance of windows, at most ``window``; None means two thirds of the window.

    Raises:
        ValueError: for a stride without a window, or one that leaves gaps.
    """
    check_windows(window, stride)
    if window is None:
        return model(images_N3HW)
    height, width = images_N3HW.shape[-2:]
    stride = stride or (max(window[0] * 2 // 3, 1), max(window[1] * 2 // 3, 1))
    tops = _starts(height, window[0], stride[0])
    lefts = _starts(width, window[1], stride[1])
    if len(tops) == len(lefts) == 1:
        return model(images_N3HW)
    total: torch.Tensor | None = None
    count_HW = images_N3HW.new_zeros((height, width), dtype=torch.float32)
    for top in tops:
        for left in lefts:
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(images_N3HW[place]).float()
            if total is None:
                total = logits.new_zeros((*logits.shape[:2], height, width))
            total[place] += logits
            count_HW[place] += 1
    assert total is not None
    return total / count_HW


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    *,
    window: Size | None = None,
    stride: Size | None = None,
    batch_size: int = 8,
    precision: Literal["fp32", "bf16"] = "fp32",
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DomainMetrics:
    """Scores a model on every image of a data set, at the size in which the data set gives them.

    The model is put into eval mode and afterwards back into the mode it was in.

    Args:
        model: maps normalised float images (N, 3, H, W) to logits (N, C, H, W); evaluated on its parameters' device.
        dataset: labelled images; successive ones of equal size share a batch.
        window, stride: see :func:`predict`.
        batch_size: images a batch.
        precision: ``"bf16"`` runs the model under bfloat16 autocast.
        mean, std: normalisation of the images; None takes the model's own ``mean`` and ``std``, or ImageNet's if it has
            none.
        progress: called with (images done, images in all) after every batch.

    Raises:
        ValueError: an empty data set, labels or predictions that are not its classes, logits that are not finite, or
            no labelled pixel at all.
    """
    from torchmetrics.classification import MulticlassConfusionMatrix  # a slow import that only evaluation needs

    check_windows(window, stride)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    if len(dataset) == 0:
        raise ValueError("The data set to evaluate is empty. Check its folder and sequence filter.")
    if mean is None:
        mean = tuple(getattr(model, "mean", IMAGENET_MEAN))
    if std is None:
        std = tuple(getattr(model, "std", IMAGENET_STD))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    # validation would sort every batch's pixels to look for bad values; _check_values below needs one comparison
    matrix = MulticlassConfusionMatrix(len(dataset.classes), ignore_index=IGNORE_INDEX, validate_args=False).to(device)
    done = 0
    with _eval_mode(model), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for samples in _batches(dataset, batch_size):
            images = normalise(torch.stack([sample.image for sample in samples]).to(device), mean, std)
            labels = torch.stack([sample.label for sample in samples]).to(device).long()
            logits = predict(model, images, window, stride)
            _check_values(logits, labels, samples, len(dataset.classes))
            matrix.update(logits.argmax(1), labels)
            done += len(samples)
            if progress is not None:
                progress(done, len(dataset))
    return DomainMetrics.from_confusion(matrix.compute(), dataset.classes, done)


def check_windows(window: Size | None, stride: Size | None) -> None:
    """Refuses window settings that :func:`predict` cannot run, before any work starts."""
    if window is None:
        if stride is not None:
            raise ValueError(f"stride={stride} has no meaning without a window. Set window as well.")
        return
    if min(window) < 1:
        raise ValueError(f"window={window} must be (height, width), both positive.")
    if stride is not None and not all(0 < step <= side for step, side in zip(stride, window, strict=True)):
        raise ValueError(f"stride={stride} must be positive and at most the window {window}, or pixels are left out.")


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def _batches(dataset: SegmentationDataset, batch_size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        if batch and (len(batch) == batch_size or batch[0].image.shape != sample.image.shape):
            yield batch
            batch = []
        batch.append(sample)
    yield batch


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_values(logits: torch.Tensor, labels: torch.Tensor, samples: list[Sample], classes: int) -> None:
    if logits.shape[1] != classes:
        raise ValueError(f"The model scores {logits.shape[1]} classes but the data set has {classes}.")
    bad_label = (labels >= classes) & (labels != IGNORE_INDEX)
    if bad_label.any():
        place = int(bad_label.flatten(1).any(1).nonzero()[0])
        raise ValueError(
            f"{samples[place].name} has label {int(labels[bad_label][0])}, but there are {classes} classes (0 to "
            f"{classes - 1}; {IGNORE_INDEX} is ignored)."
        )
    finite = logits.isfinite().flatten(1).all(1)
    if not finite.all():
        name = samples[int((~finite).nonzero()[0])].name
        raise ValueError(f"The prediction for {name} is not finite: training diverged. Lower the learning rate.")
