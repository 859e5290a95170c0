"""How alike two rankings are."""

from __future__ import annotations

import torch
from torch import Tensor

from fishertune_kernels import select_threshold


def selection_chances(values: Tensor, k: int) -> Tensor:
    """The probability of each element to be among the k largest when ties are broken at random.

    An estimator with one value a row has nothing but ties; breaking them by position would be luck, good or bad.

    Args:
        values: (n,), ranked from the largest.
        k: 1 … n.

    Raises:
        ValueError: for NaN among the values or k out of range.
    """
    threshold = select_threshold(values, k).value
    above, tied = values > threshold, values == threshold
    chances = above.float()
    chances[tied] = float((k - above.sum()) / tied.sum())
    return chances


def expected_overlap(mine: Tensor, theirs: Tensor) -> float:
    """Share of one selection's elements that the other has too, on average over both ways to break ties.

    Args:
        mine, theirs: chances of :func:`selection_chances` for the same k.
    """
    return float((mine * theirs).sum(dtype=torch.float64) / theirs.sum(dtype=torch.float64))


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's ρ; ties share their mean rank. Ranks of values and of their logarithms are the same."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1].nan_to_num())


def _ranks(values: Tensor) -> Tensor:
    _, group, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]


class Reference:
    """One Fisher estimate that others are held against.

    Args:
        fisher: (n,), of every parameter of the backbone.
        candidates: (n,) bool: what the method ranks.
        k: how many elements are selected.
    """

    SAMPLE = 200_000  # elements of the rank correlation; its standard error is then about 0.002

    def __init__(self, fisher: Tensor, candidates: Tensor, k: int) -> None:
        self._candidates, self._k = candidates, k
        self._chances = selection_chances(self._masked(fisher), k)
        self._all_chances = selection_chances(fisher, k)
        # elements that no gradient reaches (blocks after the last used one) would all tie
        ranked = (candidates & (fisher > 0)).nonzero().squeeze(1)
        draw = torch.randint(len(ranked), (min(self.SAMPLE, len(ranked)),), generator=torch.Generator().manual_seed(0))
        self._sample = ranked[draw]
        self._sampled = fisher[self._sample]

    def _masked(self, values: Tensor) -> Tensor:
        return values.masked_fill(~self._candidates, -torch.inf)

    def overlap(self, values: Tensor) -> float:
        """Over the candidates."""
        return expected_overlap(selection_chances(self._masked(values), self._k), self._chances)

    def compare(self, values: Tensor, everything: bool = True) -> dict[str, float]:
        """Overlap over the candidates and (if ``values`` has ``everything``) over all parameters; Spearman's ρ."""
        result = {"overlap": self.overlap(values)}
        if everything:
            result["overlap_all"] = expected_overlap(selection_chances(values, self._k), self._all_chances)
        result["spearman"] = rank_correlation(values[self._sample], self._sampled)
        return {key: round(value, 5) for key, value in result.items()}


def effective_sample_size(weights: Tensor) -> float:
    """(Σw)² / Σw²: how many equally heavy images would average as well as these."""
    return float(weights.sum(dtype=torch.float64) ** 2 / weights.double().square().sum())
