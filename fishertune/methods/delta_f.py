"""Domain sensitivity alone: relative change of the Fisher information under a simulated shift (Eq. 5)."""

from fishertune.methods.base import ScoredMethod


class DeltaF(ScoredMethod):
    """Tunes the candidates that rank highest by this score."""

    name = "delta_f"
    summary = "Domain sensitivity alone: relative change of the Fisher information under a simulated shift (Eq. 5)."
    score_kind = "delta_f"
