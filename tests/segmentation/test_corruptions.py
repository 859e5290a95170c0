"""Corrupted data sets: repeatable, without side effects, labels untouched, clear errors."""

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from fishertune.segmentation.datasets import CORRUPTIONS, Sample, SegmentationDataset, corrupt


class Flat:
    """Smooth pictures of any size; index decides the picture."""

    classes = ("a", "b")

    def __init__(self, height=48, width=64, count=3):
        self.size, self.count, self.reads = (height, width), count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.reads += 1
        ramp = torch.linspace(40, 200, self.size[1]).round().to(torch.uint8)
        image = ramp.expand(3, *self.size).clone()
        image[0] += range(self.count)[index]
        return Sample(image, torch.ones(self.size, dtype=torch.uint8), f"flat{index}")


def available():
    pytest.importorskip("imagecorruptions", reason="needs imagecorruptions-imaug")


# The shuffle of glass_blur is compiled at first use, which takes seconds; "slow" runs it with the others' test.
FAST = [name for name in CORRUPTIONS if name != "glass_blur"]


@pytest.mark.parametrize("name", [*FAST, pytest.param("glass_blur", marks=pytest.mark.slow)])
def test_every_corruption_repeats_and_leaves_labels_and_global_state_alone(name):
    available()
    np.random.seed(5)  # noqa: NPY002
    state = np.random.get_state()  # noqa: NPY002
    source = Flat()
    first, again = corrupt(source, name, severity=5), corrupt(source, name, severity=5)
    assert isinstance(first, SegmentationDataset) and first.classes == source.classes and len(first) == 3
    for index in (2, 0):
        sample, other = first[index], again[index]
        assert sample.image.shape == (3, 48, 64) and sample.image.dtype == torch.uint8
        assert torch.equal(sample.image, other.image)
        assert not torch.equal(sample.image, source[index].image)
        assert torch.equal(sample.label, source[index].label) and sample.name == source[index].name
    after = np.random.get_state()  # noqa: NPY002
    assert state[0] == after[0] and np.array_equal(state[1], after[1]) and state[2:] == after[2:]


def test_draws_depend_on_seed_index_and_name_only():
    available()
    source = Flat(count=4)

    def layer(name, seed, index):
        return corrupt(source, name, severity=3, seed=seed)[index].image.int() - source[index].image.int()

    assert not torch.equal(layer("snow", 0, 0), layer("snow", 1, 0))
    assert not torch.equal(layer("snow", 0, 0), layer("snow", 0, 1))
    dataset = corrupt(source, "fog")
    assert torch.equal(dataset[-1].image, dataset[3].image)
    with pytest.raises(IndexError):
        dataset[4]


def test_severity_grows():
    available()
    source = Flat()
    distance = [
        (corrupt(source, "fog", severity=s)[0].image.double() - source[0].image.double()).abs().mean() for s in (1, 5)
    ]
    assert distance[0] < distance[1]


@pytest.mark.parametrize("size", [(9, 13), (31, 70), (33, 32)])
@pytest.mark.parametrize("name", ["fog", "snow", "frost", "motion_blur", "zoom_blur"])
def test_small_and_odd_sizes(size, name, capsys):
    available()
    assert corrupt(Flat(*size), name, severity=5)[0].image.shape == (3, *size)
    assert capsys.readouterr().out == ""


def test_threads_do_not_mix_their_draws():
    available()
    dataset = corrupt(Flat(count=16), "snow")  # draws twice with slow work between, where another thread would cut in
    expected = [dataset[i].image for i in range(16)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            images = list(pool.map(lambda i: dataset[i].image, range(16)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(a, b) for a, b in zip(expected, images, strict=True))


def test_cache_reads_once():
    available()
    source = Flat()
    dataset = corrupt(source, "contrast", cache=True)
    assert dataset[1] is dataset[1] and source.reads == 1
    assert torch.equal(dataset[1].image, corrupt(source, "contrast")[1].image)


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"no corruption 'motionblur'\. Did you mean 'motion_blur'\?"):
        corrupt(Flat(), "motionblur")
    with pytest.raises(ValueError, match="no corruption 'elastic_transform'"):
        corrupt(Flat(), "elastic_transform")


@pytest.mark.parametrize("severity", [0, 6, 2.5])
def test_bad_severity(severity):
    with pytest.raises(ValueError, match=f"severity={severity}"):
        corrupt(Flat(), "fog", severity=severity)


def test_missing_package_gives_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fishertune\[corruptions\]'"):
        corrupt(Flat(), "fog")
