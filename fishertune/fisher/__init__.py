"""Fisher information of the weights: per-sample squares, posterior precision, scores."""

from fishertune.fisher.per_sample import PerSampleSquares, per_sample_fisher
from fishertune.fisher.posterior import make_estimator
from fishertune.fisher.score import ScoreAverage

__all__ = ["PerSampleSquares", "ScoreAverage", "make_estimator", "per_sample_fisher"]
