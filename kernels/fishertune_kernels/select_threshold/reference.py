"""Order-preserving keys, the building block of an exact k-th largest over many tensors and ranks.

A float's bits, read as an unsigned integer, order like the float once negative numbers are complemented and positive
ones get the top bit (Herf, "Radix tricks", 2001). Half types widen to float32 exactly; −0 counts as +0.
"""

from __future__ import annotations

import math

import torch

_SIGN_64 = -(1 << 63)
GOLDEN_RATIO = 2654435769  # 2³²/φ, odd


def ordered_keys(scores: torch.Tensor) -> torch.Tensor:
    """Order-preserving keys as int64: values in [0, 2³²) for float32 and narrower, for float64 the bits of a uint64."""
    if scores.dtype == torch.float64:
        bits = (scores + 0.0).view(torch.int64)  # −0 + 0 = +0
        return torch.where(bits < 0, ~bits, bits ^ _SIGN_64)
    bits = (scores.float() + 0.0).view(torch.int32).to(torch.int64)
    return torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits | 0x80000000)


def key_histogram(scores: list[torch.Tensor], shift: int, bits: int, prefix_mask: int, prefix: int) -> torch.Tensor:
    """Entry d: how many keys with key & prefix_mask == prefix have (key >> shift) mod 2^bits = d; last entry: NaN."""
    counts = torch.zeros(2**bits + 1, dtype=torch.int64, device=scores[0].device)
    for tensor in scores:
        nan = tensor.isnan()
        keys = ordered_keys(tensor)
        member = ~nan & ((keys & prefix_mask) == prefix)
        digits = (keys[member] >> shift) & (2**bits - 1)
        counts[:-1] += torch.bincount(digits, minlength=2**bits)
        counts[-1] += nan.sum()
    return counts


def sample_scores(scores: list[torch.Tensor], stride: int) -> torch.Tensor:
    """One score, in float32, from each run of ``stride`` elements of each tensor; NaN where a last run has none there.

    Multiples of the golden ratio choose the place within the runs: spread evenly, in step with no period.
    """
    sample, first = [], 0
    for tensor in scores:
        runs = torch.arange(math.ceil(tensor.numel() / stride), device=tensor.device)
        turn = (runs + first) * GOLDEN_RATIO & 0xFFFFFFFF
        place = runs * stride + (turn * stride >> 32)
        inside = place < tensor.numel()
        values = tensor.reshape(-1)[torch.where(inside, place, 0)].float()
        sample.append(torch.where(inside, values, math.nan))
        first += len(runs)
    return torch.cat(sample)


def collect_bracket(
    scores: list[torch.Tensor], low: int, high: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per tensor the number of keys above ``high``, in [low, high], and of NaN; and (tensor number << 32) | key of all
    inside, in any order, or none of them if they are more than ``capacity``."""
    counts, candidates = [], []
    for i, tensor in enumerate(scores):
        nan = tensor.isnan()
        keys = ordered_keys(tensor)[~nan]
        inside = keys[(keys >= low) & (keys <= high)]
        counts.append(torch.stack(((keys > high).sum(), torch.tensor(len(inside), device=keys.device), nan.sum())))
        candidates.append(i << 32 | inside)
    found = torch.cat(candidates)
    return torch.stack(counts), found if len(found) <= capacity else found[:0]
