"""Task sensitivity alone: the exact diagonal Fisher information (Eq. 9)."""

from fishertune.methods.base import ScoredMethod


class Fisher(ScoredMethod):
    """Tunes the candidates that rank highest by this score."""

    name = "fisher"
    summary = "Task sensitivity alone: the exact diagonal Fisher information (Eq. 9)."
    score_kind = "f"
