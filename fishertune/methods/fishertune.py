"""The paper's method: domain-related Fisher information from the posterior precision (Eq. 15)."""

from fishertune.methods.base import ScoredMethod


class FisherTune(ScoredMethod):
    """Tunes the candidates that rank highest by this score."""

    name = "fishertune"
    summary = "The paper's method: domain-related Fisher information from the posterior precision (Eq. 15)."
    score_kind = "dr_fim_variational"
