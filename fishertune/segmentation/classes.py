"""Class names, colours and label maps of the data sets that are read here, as plain data.

A label map goes from the id stored in a label file to a class index (trainId); ``IGNORE_INDEX`` (255) leaves the
pixel out of loss and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from colorsys import hsv_to_rgb
from types import MappingProxyType

IGNORE_INDEX = 255
"""The label value of pixels that count neither in the loss nor in the evaluation."""

CITYSCAPES_CLASSES: tuple[str, ...] = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
"""The 19 evaluated classes in trainId order."""

CITYSCAPES_PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 64, 128),
    (244, 35, 232),
    (70, 70, 70),
    (102, 102, 156),
    (190, 153, 153),
    (153, 153, 153),
    (250, 170, 30),
    (220, 220, 0),
    (107, 142, 35),
    (152, 251, 152),
    (70, 130, 180),
    (220, 20, 60),
    (255, 0, 0),
    (0, 0, 142),
    (0, 0, 70),
    (0, 60, 100),
    (0, 80, 100),
    (0, 0, 230),
    (119, 11, 32),
)
"""RGB of each trainId, the colours of the Cityscapes scripts."""

CAMVID_CLASSES: tuple[str, ...] = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "signsymbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
"""CamVid's 11 classes (SegNet's grouping) in the order of their ids; id 11 is void."""

CAMVID_PALETTE: tuple[tuple[int, int, int], ...] = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)

_CITYSCAPES_EVALUATED = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10,
    24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip

CITYSCAPES_ID_TO_TRAIN_ID: Mapping[int, int] = MappingProxyType(
    {label_id: _CITYSCAPES_EVALUATED.get(label_id, IGNORE_INDEX) for label_id in (*range(35), IGNORE_INDEX)}
)
"""labelIds of Cityscapes, GTAV and Foggy Driving (0–34) to trainIds. Id 34 occurs in GTAV; it is not evaluated.

The license plate has id −1, which the 8-bit label files store as 255.
"""

CITYSCAPES_TRAIN_IDS: Mapping[int, int] = MappingProxyType({**{i: i for i in range(19)}, IGNORE_INDEX: IGNORE_INDEX})
"""Files that already hold trainIds (BDD100K, ACDC, Dark Zurich)."""

CAMVID_IDS: Mapping[int, int] = MappingProxyType({**{i: i for i in range(11)}, 11: IGNORE_INDEX})
"""CamVid's ids to its own 11 classes."""

CAMVID_TO_CITYSCAPES: Mapping[int, int] = MappingProxyType(
    {0: 10, 1: 2, 2: 5, 3: 0, 4: 1, 5: 8, 6: 7, 7: 4, 8: 13, 9: 11, 10: 12, 11: IGNORE_INDEX}
)
"""CamVid's ids to Cityscapes trainIds. Trucks and buses are "car" in CamVid, traffic lights "traffic sign"."""

LABEL_MAPS: Mapping[str, Mapping[int, int]] = MappingProxyType(
    {
        "cityscapes": CITYSCAPES_ID_TO_TRAIN_ID,
        "cityscapes_train_ids": CITYSCAPES_TRAIN_IDS,
        "camvid": CAMVID_IDS,
        "camvid_to_cityscapes": CAMVID_TO_CITYSCAPES,
    }
)
"""Label maps that a configuration can name."""

CLASS_SETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cityscapes": CITYSCAPES_CLASSES, "camvid": CAMVID_CLASSES}
)
"""Class lists that a configuration can name."""

PALETTES: Mapping[tuple[str, ...], tuple[tuple[int, int, int], ...]] = MappingProxyType(
    {CITYSCAPES_CLASSES: CITYSCAPES_PALETTE, CAMVID_CLASSES: CAMVID_PALETTE}
)


def palette_of(classes: tuple[str, ...]) -> tuple[tuple[int, int, int], ...]:
    """One RGB colour for each class: the usual ones for a known class list, else evenly spread hues.

    Colours differ from each other for up to a few hundred classes; the same classes always get the same colours.
    """
    if classes in PALETTES:
        return PALETTES[classes]
    return tuple(_spread_colour(index) for index in range(len(classes)))


def _spread_colour(index: int) -> tuple[int, int, int]:
    # the golden angle keeps any number of successive hues apart; three brightness levels separate near hues
    red, green, blue = hsv_to_rgb(index * 0.381966 % 1.0, 0.75, (0.95, 0.7, 0.5)[index % 3])
    return round(red * 255), round(green * 255), round(blue * 255)
