"""Domain-related Fisher information without a prior (Eq. 7)."""

from fishertune.methods.base import ScoredMethod


class DRFIM(ScoredMethod):
    """Tunes the candidates that rank highest by this score."""

    name = "dr_fim"
    summary = "Domain-related Fisher information without a prior (Eq. 7)."
    score_kind = "dr_fim"
