"""IoU from a confusion matrix, against the Cityscapes script's formula."""

import json

import numpy as np
import pytest
import torch

from fishertune.segmentation.metrics import DomainMetrics


def cityscapes_iou(confusion, label):
    """getIouScoreForLabel of cityscapesscripts, with its names."""
    tp = np.longlong(confusion[label, label])
    fn = np.longlong(confusion[label, :].sum()) - tp
    not_ignored = [other for other in range(len(confusion)) if other != label]
    fp = np.longlong(confusion[not_ignored, label].sum())
    denominator = tp + fp + fn
    return float("nan") if denominator == 0 else float(tp) / denominator


def test_iou_is_that_of_the_cityscapes_script():
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 10**9, (6, 6))
    confusion[2], confusion[:, 2] = 0, 0  # a class that occurs nowhere
    confusion[4] = 0  # predicted, but not in the ground truth
    metrics = DomainMetrics.from_confusion(torch.from_numpy(confusion), list("abcdef"), 7)
    expected = [cityscapes_iou(confusion, label) for label in range(6)]
    assert metrics.iou["c"] is None and metrics.iou["e"] == 0.0
    np.testing.assert_allclose([np.nan if v is None else v for v in metrics.iou.values()], expected, rtol=1e-15)
    assert metrics.miou == pytest.approx(np.nanmean(expected), rel=1e-14)
    assert metrics.images == 7 and metrics.confusion.dtype == torch.int64


def test_counts_beyond_32_bits_are_exact():
    confusion = torch.tensor([[2**53, 1], [0, 1]])
    assert DomainMetrics.from_confusion(confusion, "ab", 1).iou["b"] == 0.5


def test_json_form():
    metrics = DomainMetrics.from_confusion(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), ["road", "sky", "car"], 2)
    assert json.loads(json.dumps(metrics.to_dict())) == {
        "miou": (0.75 + 0.8) / 2, "iou": {"road": 0.75, "sky": 0.8, "car": None}, "images": 2,
    }  # fmt: skip


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="None of the 3 images has a labelled pixel"):
        DomainMetrics.from_confusion(torch.zeros(2, 2, dtype=torch.int64), "ab", 3)
    with pytest.raises(ValueError, match=r"\(2, 2\) does not fit 3 classes"):
        DomainMetrics.from_confusion(torch.ones(2, 2, dtype=torch.int64), "abc", 3)
