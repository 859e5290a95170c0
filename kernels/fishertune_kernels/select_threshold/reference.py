"""Counts of order-preserving keys, the building block of an exact k-th largest over many tensors and ranks.

A float's bits, read as an unsigned integer, order like the float once negative numbers are complemented and positive
ones get the top bit (Herf, "Radix tricks", 2001). Half types widen to float32 exactly; −0 counts as +0.
"""

from __future__ import annotations

import torch

_SIGN_64 = -(1 << 63)


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
