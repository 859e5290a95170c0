"""Segmentation: data sets, model, loss, inference and metrics."""
