"""Procedural streets: same bits per seed, exact labels shared by all domains, and weather that does what it says."""

import numpy as np
import pytest
import torch

from fishertune.segmentation.classes import CITYSCAPES_CLASSES, IGNORE_INDEX
from fishertune.segmentation.datasets import SceneDataset, SegmentationDataset
from fishertune.segmentation.datasets.scenes import DOMAINS, LOOKS
from fishertune.segmentation.datasets.scenes import street as street_module
from fishertune.segmentation.datasets.scenes.canvas import FAR, FRONT, GROUND, SIDE, Camera, Canvas
from fishertune.segmentation.datasets.scenes.shading import SUPERSAMPLING, shade
from fishertune.segmentation.datasets.scenes.street import Street, draw_street
from fishertune.segmentation.datasets.scenes.weather import WEATHER, _haze

SIZE = (64, 96)
SKY, ROAD, BUILDING = (CITYSCAPES_CLASSES.index(name) for name in ("sky", "road", "building"))


def samples(domain: str, count: int = 8, seed: int = 11, size: tuple[int, int] = SIZE):
    dataset = SceneDataset(domain, count, size, seed)
    return [dataset[index] for index in range(count)]


def brightness(sample) -> float:
    return float(sample.image.float().mean() / 255)


def test_protocol_shapes_and_names():
    dataset = SceneDataset("clear", 3, (70, 101), seed=4)
    assert isinstance(dataset, SegmentationDataset)
    assert len(dataset) == 3
    assert dataset.classes == CITYSCAPES_CLASSES
    for sample in (dataset[index] for index in range(3)):
        assert sample.image.shape == (3, 70, 101)
        assert sample.image.dtype == torch.uint8
        assert sample.label.shape == (70, 101)
        assert sample.label.dtype == torch.uint8
        assert sample.image.is_contiguous()
        assert sample.label.is_contiguous()
    assert len({dataset[index].name for index in range(3)}) == 3
    assert torch.equal(dataset[-1].image, dataset[2].image)
    with pytest.raises(IndexError, match="3 images"):
        dataset[3]


@pytest.mark.parametrize("domain", [*DOMAINS, LOOKS])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(domain):
    first, again = (SceneDataset(domain, 4, SIZE, seed=5)[2] for _ in range(2))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.label, again.label)
    other_index = SceneDataset(domain, 4, SIZE, seed=5)[1]
    other_seed = SceneDataset(domain, 4, SIZE, seed=6)[2]
    for other in (other_index, other_seed):
        assert not torch.equal(first.image, other.image)
        assert not torch.equal(first.label, other.label)


def test_an_image_does_not_depend_on_the_others_or_on_global_random_state():
    np.random.seed(0)  # noqa: NPY002 (the point is that nobody uses it)
    torch.manual_seed(0)
    alone = SceneDataset("rain", 9, SIZE, seed=1)[7]
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    after_others = samples("rain", 9, seed=1)[7]
    assert torch.equal(alone.image, after_others.image)


def test_all_domains_show_the_same_streets():
    rows = [samples(domain, 4) for domain in (*DOMAINS, LOOKS)]
    for same_street in zip(*rows, strict=True):
        for other in same_street[1:]:
            assert torch.equal(same_street[0].label, other.label)
            assert not torch.equal(same_street[0].image, other.image)


def test_every_class_but_train_occurs_and_nothing_else():
    seen = torch.zeros(256, dtype=torch.long)
    for sample in samples("clear", 60):
        seen += torch.bincount(sample.label.flatten().long(), minlength=256)
    present = {name for index, name in enumerate(CITYSCAPES_CLASSES) if seen[index]}
    assert present == set(CITYSCAPES_CLASSES) - {"train"}
    assert seen[IGNORE_INDEX] > 0
    assert int(seen.sum()) == int(seen[: len(CITYSCAPES_CLASSES)].sum() + seen[IGNORE_INDEX])
    assert seen[IGNORE_INDEX] < 0.01 * seen.sum()
    for name in ("road", "building", "sky"):  # the large ones dominate, as in any street
        assert seen[CITYSCAPES_CLASSES.index(name)] > 0.05 * seen.sum()


def test_labels_fit_the_picture():
    """Road is nearest to the camera, sky is above the horizon and bluer or brighter than the road."""
    for sample in samples("clear", 12):
        label, image = sample.label, sample.image.float()
        rows = torch.arange(SIZE[0])[:, None].expand(SIZE)
        assert (rows[label == ROAD] >= 0.38 * SIZE[0]).all()  # the horizon lies between 0.40 and 0.52 of the height
        assert (rows[label == SKY] <= 0.54 * SIZE[0]).all()
        if (label == SKY).sum() > 50:
            assert image[2][label == SKY].mean() > image[2][label == ROAD].mean()


def test_depth_order_near_hides_far():
    camera = Camera(height=1.5, focal=100.0, centre_x=50.0, horizon=30.0, image_height=80, image_width=100)
    canvas = Canvas(camera)
    far = canvas.surface(BUILDING, (0.5, 0.5, 0.5), plane=FRONT, at=40.0)
    near = canvas.surface(ROAD, (0.2, 0.2, 0.2), plane=FRONT, at=10.0)
    canvas.upright(-8, 8, 0, 8, 40.0, far)
    canvas.upright(-1, 1, 0, 2, 10.0, near)
    ids = np.asarray(canvas.image)
    assert ids[28, 50] == near
    assert ids[28, 35] == far
    # 2 m wide at 10 m, focal length 100 pixels: 20 pixels, and PIL draws both edges of a polygon
    assert abs(int((ids[28] == near).sum()) - 20) <= 1


def test_things_in_the_street_are_drawn_far_to_near(monkeypatch):
    depths = []
    place = street_module._StreetSketch._place
    monkeypatch.setattr(
        street_module._StreetSketch,
        "_place",
        lambda self, what, x, z, sign: (depths.append(z), place(self, what, x, z, sign)),
    )
    draw_street(128, 192, np.random.default_rng(3))
    assert len(depths) > 10
    assert depths == sorted(depths, reverse=True)


def test_the_camera_sees_a_point_where_similar_triangles_put_it():
    camera = Camera(height=2.0, focal=100.0, centre_x=50.0, horizon=30.0, image_height=80, image_width=100)
    assert camera.project(1.0, 0.0, 10.0) == pytest.approx((60.0, 50.0))
    assert camera.project(-3.0, 2.0, FAR) == pytest.approx((50.0 - 300.0 / FAR, 30.0))


def test_a_street_has_ground_sides_and_fronts():
    street = draw_street(128, 192, np.random.default_rng(3))
    assert isinstance(street, Street)
    planes = {int(surface[4]) for surface in street.canvas.surfaces}
    assert {GROUND, SIDE, FRONT} <= planes
    assert np.asarray(street.canvas.image).max() < len(street.canvas.surfaces)


def test_night_is_much_darker_than_day():
    day, dark = (np.mean([brightness(s) for s in samples(domain, 10)]) for domain in ("clear", "night"))
    assert dark < 0.55 * day
    for light, black in zip(samples("clear", 10), samples("night", 10), strict=True):
        assert brightness(black) < brightness(light) - 0.1  # every single street, by a tenth of full scale


def test_fog_swallows_what_is_far_and_not_what_is_near():
    """Surfaces far away take the colour of the sky, whatever they are made of; near ones do not."""
    near, far = [], []
    for seed in range(10):
        layout = np.random.default_rng(seed)
        scene = shade(draw_street(SIZE[0] * SUPERSAMPLING, SIZE[1] * SUPERSAMPLING, layout), layout)
        image = WEATHER["fog"](scene, np.random.default_rng(seed)).astype(float)
        ground_and_things = scene.sky_HW == 0
        difference = np.abs(image - np.median(image[scene.sky_HW == 1], axis=0)).mean(-1)
        near.append(difference[ground_and_things & (scene.depth_HW < 8)].mean())
        far.append(difference[ground_and_things & (scene.depth_HW > 120)].mean())
    # sight ends at 30 to 120 m, where 5 % of the contrast (at most 13 of 255) is left; the sensor adds a little noise
    assert max(far) < 13
    assert min(near) > 2 * max(far)


def test_haze_is_koschmieders_law():
    layout = np.random.default_rng(1)
    scene = shade(draw_street(SIZE[0] * SUPERSAMPLING, SIZE[1] * SUPERSAMPLING, layout), layout)
    radiance = layout.random((*SIZE, 3)).astype(np.float32)
    clearness = np.exp(-0.03 * np.minimum(scene.depth_HW.astype(float), 400.0))[..., None]
    expected = radiance * clearness + np.array([0.5, 0.6, 0.7]) * (1 - clearness)
    np.testing.assert_allclose(_haze(scene, radiance, 0.03, (0.5, 0.6, 0.7)), expected, atol=1e-6)  # float32


def test_snow_whitens_the_ground_and_rain_darkens_it():
    ground = {}
    for domain in ("clear", "snow", "rain"):
        values = [s.image.float().mean(0)[s.label == CITYSCAPES_CLASSES.index("sidewalk")] for s in samples(domain, 10)]
        ground[domain] = float(torch.cat(values).mean())
    assert ground["snow"] > ground["rain"] + 40
    assert ground["rain"] < ground["clear"] - 20


def test_looks_vary_more_in_palette_than_any_domain():
    def spread(domain: str) -> float:
        """Standard deviation, over streets, of the share of each colour channel in the road's light."""
        shares = []
        for sample in samples(domain, 10):
            road = sample.image.float()[:, sample.label == ROAD].mean(1)
            shares.append((road / road.sum()).numpy())
        return float(np.std(shares, axis=0).mean())

    assert spread(LOOKS) > 1.5 * max(spread(domain) for domain in DOMAINS)


def test_an_unknown_domain_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'dusk'.*clear, fog, night, rain, snow"):
        SceneDataset("dusk", 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"count": 1, "size": (16, 96)}, "at least 32"),
        ({"count": 1, "seed": -1}, "seed is -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SceneDataset("clear", **arguments)
