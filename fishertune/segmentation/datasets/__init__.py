"""Data sets: folders of labelled images, procedural street scenes, corrupted copies of either."""

from fishertune.segmentation.datasets.base import IGNORE_INDEX, Sample, SegmentationDataset

__all__ = ["IGNORE_INDEX", "Sample", "SegmentationDataset"]
