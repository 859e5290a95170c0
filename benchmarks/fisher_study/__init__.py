"""The parts of ``benchmarks/estimation_cost.py``: what is estimated, how estimates are compared, cost and picture."""
