"""Sliding windows and evaluation, against plain prediction and numpy's counting."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fishertune.segmentation.datasets import Sample
from fishertune.segmentation.inference import check_windows, evaluate, predict
from fishertune.segmentation.transforms import IMAGENET_MEAN, IMAGENET_STD


class Pointwise(nn.Module):
    """Scores each pixel by itself, so that windows must not change anything."""

    def __init__(self, classes=4):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 3, 1, 1, generator=draw))
        self.calls = []

    def forward(self, images):
        self.calls.append((tuple(images.shape), self.training))
        return F.conv2d(images, self.weight)


class Position(nn.Module):
    """One logit: the pixel's row and column inside its window, to see which windows covered it."""

    def forward(self, images):
        height, width = images.shape[-2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return (rows * 100.0 + columns).expand(images.shape[0], 1, height, width)


class Images:
    classes = ("a", "b", "c", "d")

    def __init__(self, sizes, *, label=None):
        draw = torch.Generator().manual_seed(1)
        self.samples = []
        for place, size in enumerate(sizes):
            labels = torch.randint(0, 3, size, generator=draw).to(torch.uint8)
            labels[0] = 255
            if label is not None:
                labels[:] = label
            image = torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8)
            self.samples.append(Sample(image, labels, f"image{place}"))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_covering_window_is_the_plain_prediction():
    images, model = torch.randn(2, 3, 10, 14), Pointwise()
    expected = model(images)
    assert torch.equal(predict(model, images), expected)
    for window in ((10, 14), (64, 64), (10, 100)):
        assert torch.equal(predict(model, images, window, window), expected)


@pytest.mark.parametrize(("window", "stride"), [((4, 5), (4, 5)), ((4, 5), (3, 2)), ((7, 50), None), ((1, 1), None)])
def test_windows_of_a_pointwise_model_change_nothing(window, stride):
    images, model = torch.randn(2, 3, 10, 14), Pointwise()
    # the mean of k equal fp32 numbers is off by at most k roundings; k ≤ 6 windows cover a pixel
    torch.testing.assert_close(predict(model, images, window, stride), model(images), atol=2e-6, rtol=2e-6)


def test_overlaps_are_averaged_and_the_last_window_ends_at_the_border():
    images = torch.zeros(1, 3, 7, 9)
    window, stride = (4, 4), (2, 3)
    total, count = np.zeros((7, 9)), np.zeros((7, 9))
    for top in (0, 2, 3):  # 4 would end past row 7
        for left in (0, 3, 5):
            rows, columns = np.mgrid[:4, :4]
            total[top : top + 4, left : left + 4] += rows * 100.0 + columns
            count[top : top + 4, left : left + 4] += 1
    assert count.min() == 1
    result = predict(Position(), images, window, stride)
    np.testing.assert_allclose(result[0, 0].numpy(), total / count, rtol=1e-6)


def confusion_by_numpy(model, dataset):
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    confusion = np.zeros((4, 4), dtype=np.int64)
    weight = model.weight.detach().double().numpy()[:, :, 0, 0]
    for sample in dataset.samples:
        scores = np.einsum("kc,chw->khw", weight, (sample.image.numpy() / 255.0 - mean) / std)
        prediction, truth = scores.argmax(0), sample.label.numpy()
        valid = truth != 255
        np.add.at(confusion, (truth[valid], prediction[valid]), 1)
    return confusion


@pytest.mark.parametrize("windows", [{}, {"window": (6, 6), "stride": (4, 4)}])
def test_evaluate_counts_like_numpy(windows):
    model, dataset = Pointwise().train(), Images([(8, 9)] * 3 + [(12, 6)] * 2 + [(8, 9)])
    steps = []
    metrics = evaluate(model, dataset, batch_size=2, progress=lambda *step: steps.append(step), **windows)
    np.testing.assert_array_equal(metrics.confusion.numpy(), confusion_by_numpy(model, dataset))
    assert metrics.images == 6 and list(metrics.iou) == ["a", "b", "c", "d"]
    assert steps == [(2, 6), (3, 6), (5, 6), (6, 6)]  # equal sizes share a batch
    assert model.training and not any(training for _, training in model.calls)


def test_mode_of_every_module_comes_back_also_after_an_error():
    model = nn.Sequential(Pointwise(), nn.Dropout())
    model[0].eval()
    with pytest.raises(ValueError, match="has label 9"):
        evaluate(model, Images([(8, 8)], label=9))
    assert model.training and not model[0].training and model[1].training


def test_own_normalisation_of_the_model_is_used():
    model, dataset = Pointwise(), Images([(8, 9)] * 2)
    by_argument = evaluate(model, dataset, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    model.mean, model.std = (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)
    assert torch.equal(evaluate(model, dataset).confusion, by_argument.confusion)
    del model.mean, model.std
    assert not torch.equal(evaluate(model, dataset).confusion, by_argument.confusion)


def test_bf16_runs_the_model_in_bf16():
    dtypes = []

    class Probe(Pointwise):
        def forward(self, images):
            result = super().forward(images)
            dtypes.append(result.dtype)
            return result

    evaluate(Probe(), Images([(8, 8)]), precision="bf16")
    evaluate(Probe(), Images([(8, 8)]))
    assert dtypes == [torch.bfloat16, torch.float32]


def test_evaluation_is_the_same_for_every_batch_size():
    model, dataset = Pointwise(), Images([(8, 9)] * 5)
    assert torch.equal(evaluate(model, dataset, batch_size=1).confusion, evaluate(model, dataset).confusion)


def test_bad_input_is_named():
    model = Pointwise()
    with pytest.raises(ValueError, match="The data set to evaluate is empty"):
        evaluate(model, Images([]))
    with pytest.raises(ValueError, match="scores 3 classes but the data set has 4"):
        evaluate(Pointwise(3), Images([(8, 8)]))
    with pytest.raises(ValueError, match="None of the 1 images has a labelled pixel"):
        evaluate(model, Images([(8, 8)], label=255))
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(model, Images([(8, 8)]), batch_size=0)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="prediction for image0 is not finite"):
        evaluate(model, Images([(8, 8)]))


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (None, (4, 4), "without a window"),
        ((0, 4), None, "window="),
        ((4, 4), (5, 4), "at most the window"),
        ((4, 4), (0, 4), "stride="),
    ],
)
def test_bad_windows(window, stride, message):
    with pytest.raises(ValueError, match=message):
        check_windows(window, stride)
