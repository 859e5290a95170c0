"""Data sets: folders of labelled images, procedural street scenes, corrupted copies of either."""

from fishertune.segmentation.datasets.base import Sample, SegmentationDataset
from fishertune.segmentation.datasets.corruptions import CORRUPTIONS, corrupt
from fishertune.segmentation.datasets.folder import FolderDataset, class_presence
from fishertune.segmentation.datasets.scenes import SceneDataset

__all__ = [
    "CORRUPTIONS",
    "FolderDataset",
    "Sample",
    "SceneDataset",
    "SegmentationDataset",
    "class_presence",
    "corrupt",
]
