"""Counts of order-preserving keys and the keys in a bracket, in CUDA C++: one read of the scores each. A sample."""

from __future__ import annotations

import itertools

import torch

from ..cuda_common import launch, score_table


def key_histogram(scores: list[torch.Tensor], shift: int, bits: int, prefix_mask: int, prefix: int) -> torch.Tensor:
    counts = torch.zeros(2**bits + 1, dtype=torch.int64, device=scores[0].device)
    table = score_table(scores)
    launch("ft_cuda_key_histogram", table, shift, bits, prefix_mask, prefix, counts.data_ptr())
    return counts


def sample_scores(scores: list[torch.Tensor], stride: int) -> torch.Tensor:
    device = scores[0].device
    ends = list(itertools.accumulate(-(-tensor.numel() // stride) for tensor in scores))
    firsts_L = torch.tensor([0, *ends[:-1]], dtype=torch.int64).to(device)
    sample = torch.empty(ends[-1], dtype=torch.float32, device=device)
    arguments = firsts_L.data_ptr(), stride, sample.data_ptr()
    launch("ft_cuda_sample_scores", score_table(scores), *arguments, work=len(sample))
    return sample


def collect_bracket(
    scores: list[torch.Tensor], low: int, high: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One read of the scores. Returns counts_L3, int64 (len(scores), 3): keys above ``high``, keys in [low, high], NaN;
    and (tensor number << 32) | key of every score inside, in any order, or nothing if there are more than ``capacity``.
    """
    device = scores[0].device
    # The kernel adds: the last entry counts the candidates as they find their places.
    counts = torch.zeros(3 * len(scores) + 1, dtype=torch.int64, device=device)
    candidates = torch.empty(capacity, dtype=torch.int64, device=device)
    launch(
        "ft_cuda_collect_bracket",
        score_table(scores),
        low,
        high,
        counts.data_ptr(),
        candidates.data_ptr(),
        capacity,
        counts[-1:].data_ptr(),
    )
    found = int(counts[-1])
    return counts[:-1].view(-1, 3), candidates[: found if found <= capacity else 0]
