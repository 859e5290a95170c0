"""Data sets: folders of labelled images, procedural street scenes, corrupted copies of either."""

from fishertune.segmentation.datasets.base import Sample, SegmentationDataset

__all__ = ["Sample", "SegmentationDataset"]
