"""Augmentation: labels stay on their pixels, chance comes from the generator only, colours follow their definition."""

import colorsys

import numpy as np
import pytest
import torch

from fishertune.segmentation.transforms import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, augment, normalise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(height=48, width=64):
    """Blocks of 8×8 pixels whose colour tells their label: image = 10 · label in every channel."""
    label = torch.from_numpy(np.random.default_rng(0).integers(0, 19, (height // 8, width // 8), dtype=np.uint8))
    label = label.repeat_interleave(8, 0).repeat_interleave(8, 1)
    return (label * 10)[None].repeat(3, 1, 1), label


def colours_only(**changes):
    return AugmentConfig(
        **(
            {"scale": (1.0, 1.0), "flip": 0.0, "photometric": 1.0}
            | dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
            | changes
        )
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("crop", [None, (32, 40), (64, 96)])
def test_image_and_label_move_together(seed, crop):
    image, label = scene()
    config = AugmentConfig(crop=crop, photometric=0.0)
    out, out_label = augment(image, label, config, generator(seed))
    assert out.shape == (3, *(crop or (48, 64))) and out_label.shape == out.shape[1:]
    assert out.dtype == torch.uint8 and out_label.dtype == torch.uint8
    padding = out_label == 255
    assert torch.equal(
        out[:, padding], torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None].expand(3, int(padding.sum()))
    )
    # away from the blocks' edges, where the resized image mixes colours, each pixel still shows its label's colour
    same = (torch.nn.functional.unfold(out_label[None, None].float(), 5, padding=2)[0] == out_label.flatten()).all(0)
    inner = same.view(out_label.shape) & ~padding
    assert inner.sum() > 10
    assert torch.equal(out[0][inner], (out_label * 10)[inner])


def test_scale_covers_its_range_and_shows_padding_only_when_shrunk():
    image, label = scene()
    shares = []
    for seed in range(60):
        _, out = augment(image, label, AugmentConfig(flip=0.0, photometric=0.0), generator(seed))
        shares.append(float((out == 255).double().mean()))
    # scale s is uniform on [0.5, 2]; the padded share is 1 − s² below 1: a third of the draws, up to 3/4
    assert 0.15 < np.mean(np.array(shares) > 0) < 0.55
    assert 0.5 < max(shares) <= 0.75
    _, out = augment(image, label, AugmentConfig(scale=(2.0, 2.0), flip=0.0, photometric=0.0), generator())
    assert (out != 255).all()


def test_flip_is_exact_and_has_its_probability():
    image, label = scene()
    flips = 0
    for seed in range(200):
        out, out_label = augment(image, label, AugmentConfig(scale=(1, 1), photometric=0.0, flip=0.25), generator(seed))
        if not torch.equal(out, image):
            flips += 1
            assert torch.equal(out, image.flip(-1)) and torch.equal(out_label, label.flip(-1))
    assert 30 <= flips <= 70  # binomial(200, 1/4): 50 ± 3.3 standard deviations of 6.1


def test_pure_function_of_the_generator():
    image, label = scene()
    config = AugmentConfig(crop=(32, 32))
    before, copies = torch.get_rng_state(), (image.clone(), label.clone())
    first = augment(image, label, config, generator(3))
    torch.manual_seed(99)
    second = augment(image, label, config, generator(3))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    torch.set_rng_state(before)
    augment(image, label, config, generator(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(image, copies[0]) and torch.equal(label, copies[1])
    other = augment(image, label, config, generator(4))
    assert not torch.equal(first[0], other[0])


def test_generator_advances_by_the_same_amount_whatever_the_image():
    states = []
    for size, config in (((48, 64), AugmentConfig()), ((80, 16), AugmentConfig.none())):
        draw = generator(1)
        augment(*scene(*size), config, draw)
        states.append(draw.get_state())
    assert torch.equal(*states)


def test_none_changes_nothing():
    image, label = torch.randint(0, 256, (3, 30, 40), dtype=torch.uint8, generator=generator()), scene(32, 40)[1][:30]
    out, out_label = augment(image, label, AugmentConfig.none(), generator())
    assert torch.equal(out, image) and torch.equal(out_label, label)


def test_label_dtype_is_kept():
    image, label = scene()
    assert augment(image, label.long(), AugmentConfig(scale=(0.5, 0.6)), generator())[1].dtype == torch.int64


def random_image():
    return torch.randint(60, 190, (3, 20, 30), dtype=torch.uint8, generator=generator(5)), torch.zeros(20, 30)


def test_brightness_shifts_all_values_alike():
    image, label = random_image()
    shifts = set()
    for seed in range(30):
        out, _ = augment(image, label, colours_only(brightness=0.2), generator(seed))
        difference = out.double() - image.double()
        assert difference.max() - difference.min() <= 1  # rounding
        shifts.add(float(difference.mean()))
    assert max(map(abs, shifts)) <= 0.2 * 255 + 1 and max(shifts) > 30 and min(shifts) < -30


def test_contrast_spreads_around_the_mean_grey():
    image, label = random_image()
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = float((luma @ image.double().view(3, -1)).mean())
    factors = []
    for seed in range(20):
        out, _ = augment(image, label, colours_only(contrast=0.4), generator(seed))
        offset = image.double() - grey
        factor = float((offset * (out.double() - grey)).sum() / offset.square().sum())
        assert ((out.double() - grey) - factor * offset).abs().max() < 1.0  # rounding, and 0.01 from the fit
        factors.append(factor)
    assert min(factors) >= 0.595 and max(factors) <= 1.405 and min(factors) < 0.8 and max(factors) > 1.2


def test_saturation_keeps_luma_and_grey():
    image, label = random_image()
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    grey = image[:1].repeat(3, 1, 1)
    for seed in range(10):
        out, _ = augment(image, label, colours_only(saturation=0.5), generator(seed))
        difference = torch.einsum("c,chw->hw", luma, out.double() - image.double())
        assert difference.abs().max() <= 0.5 + 1e-3  # each channel is rounded by at most 0.5
        assert torch.equal(augment(grey, label, colours_only(saturation=0.5, hue=0.5), generator(seed))[0], grey)


def test_hue_turns_the_colour_circle_and_stays_in_range():
    image = torch.tensor([150, 100, 100], dtype=torch.uint8)[:, None, None].repeat(1, 4, 4)
    label = torch.zeros(4, 4)
    hues = []
    for seed in range(40):
        out, _ = augment(image, label, colours_only(hue=0.1), generator(seed))
        hue = colorsys.rgb_to_hsv(*(out[:, 0, 0].double() / 255).tolist())[0]
        hues.append((hue + 0.5) % 1.0 - 0.5)
    # a turn in YIQ is not the same angle in HSV, whose circle is a hexagon: red's sixth is up to 1.4 × as wide
    assert max(map(abs, hues)) < 0.15 and max(hues) > 0.04 and min(hues) < -0.04


def test_photometric_probability_zero_and_one():
    image, label = random_image()
    assert torch.equal(augment(image, label, AugmentConfig(scale=(1, 1), flip=0, photometric=0), generator())[0], image)
    changed = [
        not torch.equal(
            augment(image, label, AugmentConfig(scale=(1, 1), flip=0, photometric=1), generator(s))[0], image
        )
        for s in range(20)
    ]
    assert all(changed)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_normalise_follows_its_formula(lead):
    images = torch.randint(0, 256, (*lead, 3, 5, 6), dtype=torch.uint8, generator=generator())
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    out = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
    assert out.dtype == torch.float32
    # values up to 2.7; three fp32 roundings of 6e-8 each, relative to terms of that size
    np.testing.assert_allclose(out.numpy(), (images.numpy() / 255.0 - mean) / std, atol=1e-6)
    with pytest.raises(TypeError, match="normalised already"):
        normalise(out, IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"crop": (0, 3)}, "crop"), ({"scale": (2.0, 1.0)}, "scale"), ({"flip": 1.5}, "flip"), ({"hue": 0.6}, "hue")],
)
def test_bad_settings_are_named(options, name):
    with pytest.raises(ValueError, match=rf"augment\.{name}="):
        AugmentConfig(**options)


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) and \(8, 9\)"):
        augment(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(8, 9), AugmentConfig(), generator())
