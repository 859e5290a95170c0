"""Fisher information of the weights: per-sample squares, posterior precision, scores."""
