"""FolderDataset: what it reads, how it splits, and one clear error for each kind of bad input."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from fishertune.segmentation.classes import (
    CAMVID_TO_CITYSCAPES,
    CITYSCAPES_CLASSES,
    CITYSCAPES_ID_TO_TRAIN_ID,
    CITYSCAPES_PALETTE,
    palette_of,
)
from fishertune.segmentation.datasets import FolderDataset, SegmentationDataset, class_presence

CLASSES = ("road", "sky", "car")


def write_pair(root, name, image=None, label=None, *, suffix=".jpg", palette=False):
    rng = np.random.default_rng(sum(name.encode()))
    image = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8) if image is None else image
    label = rng.integers(0, 3, image.shape[:2], dtype=np.uint8) if label is None else label
    for kind, pixels, ending in (("images", image, suffix), ("labels", label, ".png")):
        path = root / kind / f"{name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(pixels)
        if kind == "labels" and palette:
            picture.putpalette([value for colour in CITYSCAPES_PALETTE for value in colour])
        picture.save(path)
    return image, label


def folder(root, **options):
    settings = {"classes": CLASSES, "image_suffix": ".png"} | options
    return FolderDataset(root / "images", root / "labels", **settings)


@pytest.fixture
def sequences(tmp_path):
    """Two sequences of 10 and 4 frames, in a manifest."""
    names = {"day": [f"day_{i:02}" for i in range(10)], "dusk": [f"dusk_{i:02}" for i in range(4)]}
    for frames in names.values():
        for name in frames:
            write_pair(tmp_path, name)
    (tmp_path / "manifest.json").write_text(json.dumps({"sequences": names}))
    return tmp_path


def test_reads_the_pixels_and_ids_of_the_files(tmp_path):
    image, label = write_pair(tmp_path, "a/b_frame", suffix=".png", palette=True)
    dataset = folder(tmp_path)
    sample = dataset[0]
    assert isinstance(dataset, SegmentationDataset)
    assert sample.name == "a/b_frame" and dataset.names == ("a/b_frame",) and dataset.classes == CLASSES
    assert sample.image.dtype == torch.uint8 and sample.label.dtype == torch.uint8
    np.testing.assert_array_equal(sample.image.numpy(), image.transpose(2, 0, 1))
    np.testing.assert_array_equal(sample.label.numpy(), label)  # the palette's index, not its colour


@pytest.mark.parametrize("mode", ["I;16", "1"])
def test_label_files_of_other_depths_are_ids_too(tmp_path, mode):
    image = np.zeros((4, 6, 3), np.uint8)
    write_pair(tmp_path, "x", image, suffix=".png")
    ids = np.array([[0, 1] * 3] * 4)
    if mode == "1":
        Image.fromarray(ids.astype(bool)).save(tmp_path / "labels/x.png")
        expected = ids
    else:
        ids[0, 0] = 4000
        Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "labels/x.png")
        expected = np.where(ids == 4000, 2, ids)
    sample = folder(tmp_path, label_map={0: 0, 1: 1, 4000: 2})[0]
    np.testing.assert_array_equal(sample.label.numpy(), expected)


def test_label_map_and_ignored_ids(tmp_path):
    write_pair(tmp_path, "x", np.zeros((1, 5, 3), np.uint8), np.array([[7, 26, 4, 255, 9]], np.uint8), suffix=".png")
    sample = folder(tmp_path, label_map={7: 0, 26: 2, 4: 255}, ignore_ids=[9])[0]
    assert sample.label.tolist() == [[0, 2, 255, 255, 255]]


def test_presets_are_the_published_tables():
    # Literal copies of the label tables of the two data sets, written independently of the module's layout.
    trained = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [i for i, t in CITYSCAPES_ID_TO_TRAIN_ID.items() if t != 255] == trained
    assert [CITYSCAPES_ID_TO_TRAIN_ID[i] for i in trained] == list(range(19))
    camvid = ["sky", "building", "pole", "road", "sidewalk", "vegetation", "traffic sign", "fence", "car", "person"]
    # CamVid's bicyclist is the rider with the bicycle; it counts as rider, index 12
    assert [CITYSCAPES_CLASSES[CAMVID_TO_CITYSCAPES[i]] for i in range(11)] == [*camvid, "rider"]
    assert CAMVID_TO_CITYSCAPES[11] == 255 and len(CITYSCAPES_PALETTE) == 19
    assert len(set(palette_of(tuple(map(str, range(60)))))) == 60


def test_resize_is_antialiased_for_images_and_nearest_for_labels(tmp_path):
    checks = np.indices((64, 96)).sum(0) % 2
    label = np.zeros((64, 96), np.uint8)
    label[:, 48:] = 2
    write_pair(tmp_path, "x", np.repeat(checks[..., None] * 255, 3, 2).astype(np.uint8), label, suffix=".png")
    sample = folder(tmp_path, size=(16, 24))[0]
    assert sample.image.shape == (3, 16, 24) and sample.label.shape == (16, 24)
    # averaging a checkerboard gives grey; without antialiasing it would stay black and white
    inner = sample.image[:, 1:-1, 1:-1]
    assert inner.min() >= 120 and inner.max() <= 135
    expected = torch.zeros(16, 24, dtype=torch.uint8)
    expected[:, 12:] = 2
    assert torch.equal(sample.label, expected)  # only ids that were there


def test_same_size_is_left_alone(tmp_path):
    image, label = write_pair(tmp_path, "x", suffix=".png")
    sample = folder(tmp_path, size=(12, 16))[0]
    np.testing.assert_array_equal(sample.image.numpy().transpose(1, 2, 0), image)
    np.testing.assert_array_equal(sample.label.numpy(), label)


def test_holdout_takes_the_tail_of_every_sequence(sequences):
    options = {"manifest": sequences / "manifest.json", "image_suffix": ".jpg", "holdout": 0.25}
    train = folder(sequences, part="train", **options).names
    val = folder(sequences, part="val", **options).names
    assert val == ("day_08", "day_09", "dusk_03")  # round(2.5) = 2 and 1
    assert train + val != () and set(train).isdisjoint(val) and len(train) + len(val) == 14
    assert folder(sequences, part="all", **options).names == tuple(sorted(train + val))


def test_a_lone_frame_stays_in_training(tmp_path):
    write_pair(tmp_path, "only", suffix=".png")
    assert len(folder(tmp_path, holdout=0.5, part="train")) == 1
    with pytest.raises(ValueError, match=r"is empty: a holdout of 0\.5"):
        folder(tmp_path, holdout=0.5, part="val")


def test_sequences_every_and_limit(sequences):
    options = {"manifest": sequences / "manifest.json", "image_suffix": ".jpg"}
    assert folder(sequences, sequences=["dusk"], **options).names == tuple(f"dusk_{i:02}" for i in range(4))
    assert folder(sequences, sequences=["dusk", "day"], every=4, **options).names == (
        "dusk_00", "day_00", "day_04", "day_08",
    )  # fmt: skip
    spread = folder(sequences, sequences=["day"], limit=4, **options).names
    assert spread == ("day_00", "day_02", "day_05", "day_07")
    assert len(folder(sequences, limit=100, **options)) == 14


def test_folders_are_sequences_without_a_manifest(tmp_path):
    for name in ("ulm/a", "ulm/b", "aachen/c"):
        write_pair(tmp_path, name, suffix=".png")
    assert folder(tmp_path, sequences=["ulm"]).names == ("ulm/a", "ulm/b")


def test_suffixes_longer_than_the_extension(tmp_path):
    write_pair(tmp_path, "city/x", suffix="_leftImg8bit.png")
    (tmp_path / "labels/city/x.png").rename(tmp_path / "labels/city/x_gtFine_labelIds.png")
    dataset = folder(tmp_path, image_suffix="_leftImg8bit.png", label_suffix="_gtFine_labelIds.png")
    assert dataset.names == ("city/x",) and dataset[0].label.shape == (12, 16)


def test_class_presence_counts_pixels(tmp_path):
    label = np.array([[0, 0, 2], [255, 2, 2]], np.uint8)
    write_pair(tmp_path, "x", np.zeros((2, 3, 3), np.uint8), label, suffix=".png")
    seen = []
    counts = class_presence(folder(tmp_path), limit=5, progress=lambda done, total: seen.append((done, total)))
    assert counts == {"road": 2, "sky": 0, "car": 3} and seen == [(1, 1)]


# ------------------------------------------------------------------------------------------------------------ bad input


def test_label_id_outside_the_map_names_id_and_file(tmp_path):
    write_pair(tmp_path, "x", np.zeros((1, 3, 3), np.uint8), np.array([[0, 42, 1]], np.uint8), suffix=".png")
    with pytest.raises(ValueError, match=r"labels/x\.png has label id 42, which the label map does not know"):
        folder(tmp_path)[0]


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_truncated_image_names_the_file(tmp_path, ending):
    write_pair(tmp_path, "x", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), suffix=ending)
    path = tmp_path / f"images/x{ending}"
    path.write_bytes(path.read_bytes()[:2000])
    dataset = folder(tmp_path, image_suffix=ending)
    with pytest.raises(ValueError, match=r"images/x\.\w+ cannot be read \(.*fetch it again"):
        dataset[0]


@pytest.mark.parametrize(("kind", "content"), [("images", b""), ("images", b"no picture"), ("labels", b"no picture")])
def test_unreadable_file_stops_at_construction(tmp_path, kind, content):
    write_pair(tmp_path, "x", suffix=".png")
    (tmp_path / kind / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{kind}/x\.png cannot be read \(not an image\)"):
        folder(tmp_path)


def test_label_of_another_size(tmp_path):
    for name in ("a", "b", "c"):
        write_pair(tmp_path, name, suffix=".png")
    Image.fromarray(np.zeros((12, 15), np.uint8)).save(tmp_path / "labels/b.png")
    with pytest.raises(ValueError, match=r'labels/b\.png is 15×12 pixels .* 16×12\. .*on_size_mismatch="skip"'):
        folder(tmp_path)
    with pytest.warns(UserWarning, match=r"Skipped 1 of 3 pairs .*labels/b\.png"):
        dataset = folder(tmp_path, on_size_mismatch="skip")
    assert dataset.names == ("a", "c")
    (tmp_path / "images/a.png").unlink()
    (tmp_path / "images/c.png").unlink()
    with pytest.raises(ValueError, match="All 1 labels differ"):
        folder(tmp_path, on_size_mismatch="skip")


def test_fitting_pairs_give_no_warning(tmp_path):
    write_pair(tmp_path, "x", suffix=".png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder(tmp_path, on_size_mismatch="skip")


def test_colour_label_is_refused(tmp_path):
    write_pair(tmp_path, "x", suffix=".png")
    Image.fromarray(np.zeros((12, 16, 3), np.uint8)).save(tmp_path / "labels/x.png")
    with pytest.raises(ValueError, match=r"labels/x\.png is a colour image \(mode RGB\)"):
        folder(tmp_path)


def test_missing_files_and_folders(tmp_path, sequences):
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere does not exist"):
        FolderDataset(tmp_path / "nowhere", tmp_path, classes=CLASSES)
    with pytest.raises(FileNotFoundError, match=r"manifest .*nothing\.json does not exist"):
        folder(sequences, manifest=tmp_path / "nothing.json")
    (sequences / "labels/day_03.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 14 label files are missing, the first is .*day_03\.png"):
        folder(sequences, image_suffix=".jpg")
    with pytest.raises(FileNotFoundError, match=r"14 of 14 image files are missing.*image_suffix"):
        folder(sequences, manifest=sequences / "manifest.json", image_suffix=".webp")


def test_empty_folder_and_wrong_suffix(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No image ending in '\.png' below .*: it is empty"):
        folder(tmp_path)
    write_pair(tmp_path, "x", suffix=".jpg")
    with pytest.raises(FileNotFoundError, match=r"it holds files ending in \.jpg\. Set image_suffix"):
        folder(tmp_path)


def test_unknown_sequence_lists_the_known(sequences):
    with pytest.raises(ValueError, match=r"no sequence 'dask'.* Did you mean 'dusk'\? Known: day, dusk\."):
        folder(sequences, manifest=sequences / "manifest.json", image_suffix=".jpg", sequences=["dask"])


@pytest.mark.parametrize("content", ["[]", '{"sequences": ["a"]}', "{}", '{"sequences": {"a": "b"}}'])
def test_malformed_manifest(sequences, content):
    (sequences / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json must be JSON of the form"):
        folder(sequences, manifest=sequences / "manifest.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": "cityscape"}, "Did you mean 'cityscapes'"),
        ({"label_map": "camvit"}, "Did you mean 'camvid'"),
        ({"label_map": {0: 3}}, "sends id 0 to 3"),
        ({"label_map": {-1: 0}}, "sends id -1 to 0"),
        ({"holdout": 1.0}, "holdout=1.0"),
        ({"part": "test"}, "part='test'"),
        ({"size": (0, 4)}, r"size=\(0, 4\)"),
        ({"every": 0}, "every=0"),
        ({"limit": 0}, "limit=0"),
        ({"on_size_mismatch": "ignore"}, "on_size_mismatch='ignore'"),
        ({"classes": ()}, "0 classes"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    write_pair(tmp_path, "x", suffix=".png")
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options)
