"""Per-image cross-entropy, against the formula written out and against the softmax it samples from."""

import pytest
import torch
from torch import nn

from fishertune.segmentation.loss import SegmentationLoss


class Table(nn.Module):
    """A model whose logits are its parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits


@pytest.fixture
def case():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 6, 7, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 5, (3, 6, 7), generator=draw)
    labels[0, :3] = 255
    labels[2] = 255
    return Table(logits), (torch.zeros(3, 3, 6, 7), labels)


def test_mean_over_each_images_valid_pixels(case):
    model, (images, labels) = case
    losses = SegmentationLoss()(model, (images, labels))
    expected = []
    for image in range(3):
        terms = [
            -model.logits[image, :, y, x].log_softmax(0)[labels[image, y, x]]
            for y in range(6)
            for x in range(7)
            if labels[image, y, x] != 255
        ]
        expected.append(sum(term.item() for term in terms) / max(len(terms), 1))
    assert losses.shape == (3,) and losses.dtype == torch.float64
    torch.testing.assert_close(losses.detach(), torch.tensor(expected, dtype=torch.float64))


def test_an_image_without_labels_is_zero_with_zero_gradient(case):
    model, batch = case
    SegmentationLoss()(model, batch)[2].backward()
    assert torch.equal(model.logits.grad, torch.zeros_like(model.logits))


@pytest.mark.parametrize("mode", ["empirical", "sampled"])
def test_images_do_not_touch_each_other(case, mode):
    model, batch = case
    SegmentationLoss()(model, batch, labels=mode)[0].backward()
    assert model.logits.grad[0].any() and not model.logits.grad[1:].any()
    assert not model.logits.grad[0, :, :3].any()  # ignored pixels


def test_low_precision_logits_give_float32_losses(case):
    model, (images, labels) = case
    losses = SegmentationLoss()(Table(model.logits.detach().bfloat16()), (images, labels.to(torch.uint8)))
    reference = SegmentationLoss()(Table(model.logits.detach().bfloat16().float()), (images, labels))
    assert losses.dtype == torch.float32 and torch.equal(losses, reference)


def test_sampled_labels_follow_the_softmax():
    probabilities = torch.tensor([0.05, 0.6, 0.0, 0.35])
    side = 200
    logits = probabilities.log().view(1, 4, 1, 1).expand(1, 4, side, side).clone()
    model = Table(logits)
    SegmentationLoss(seed=1)(model, (torch.zeros(1), torch.zeros(1, side, side)), labels="sampled").backward()
    # the gradient of the mean is (softmax − onehot)/pixels, so the drawn class is where it is negative
    counts = (model.logits.grad[0] < 0).flatten(1).sum(1).double()
    assert counts.sum() == side * side and counts[2] == 0  # every pixel has a class, never an impossible one
    # binomial: standard deviation of a share at most sqrt(0.25/40000) = 0.0025; four of them
    torch.testing.assert_close(counts / side**2, probabilities.double(), atol=0.01, rtol=0)


def test_sampled_keeps_ignored_pixels_and_repeats_with_its_generator(case):
    model, (images, labels) = case
    loss = SegmentationLoss(seed=3)
    state, before = loss.generator.get_state(), torch.get_rng_state()
    first, second = (loss(model, (images, labels), labels="sampled").detach() for _ in range(2))
    loss.generator.set_state(state)
    again = loss(model, (images, labels), labels="sampled").detach()
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(first, SegmentationLoss(seed=3)(model, (images, labels), labels="sampled").detach())
    assert torch.equal(torch.get_rng_state(), before)
    assert first[2] == 0
    # the true labels play no part in a sampled loss, only which pixels are valid
    shuffled = torch.where(labels == 255, labels, (labels + 1) % 5)
    assert torch.equal(SegmentationLoss(seed=3)(model, (images, shuffled), labels="sampled").detach(), first)


def test_bad_calls(case):
    model, (images, labels) = case
    with pytest.raises(ValueError, match="labels='true' must be"):
        SegmentationLoss()(model, (images, labels), labels="true")
    with pytest.raises(ValueError, match=r"Logits \(3, 5, 6, 7\) and labels \(3, 6, 6\)"):
        SegmentationLoss()(model, (images, labels[..., :6]))
