"""The exact k-th largest score over many tensors and ranks, without sorting or copying them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops import as_list, checked_search
from .search import Threshold

__all__ = ["Threshold", "collect_bracket", "key_histogram", "select_threshold"]


def select_threshold(scores: Tensor | Sequence[Tensor], k: int, *, group: dist.ProcessGroup | None = None) -> Threshold:
    """The boundary of the k largest scores: exact, the same on every device and at every world size.

    Ties with the k-th largest belong to the set in order of their global flat index: tensor after tensor and, inside a
    tensor, rank after rank (shards of its first dimension) and element after element. −0 ties with +0. −inf is an
    ordinary lowest score. Waits for the device.

    Args:
        scores: float32, bfloat16, float16 or float64 tensors on one device; empty ones are fine. Under a group, this
            rank's shards, the same list on every rank, empty where it holds none.
        k: how many elements to keep, over all tensors and ranks; 0 ≤ k ≤ their number.
        group: ranks that hold the other shards; only counts travel. Every rank of it must call.

    Returns:
        :class:`Threshold`; under a group its counts are this rank's.

    Raises:
        ValueError: NaN among the scores (with their count), k out of range, ranks that disagree on k or the list.
        TypeError: for scores that are not dense floats.
    """
    with torch.no_grad():
        return checked_search(as_list("scores", scores), k, group)


def key_histogram(
    scores: Tensor | Sequence[Tensor], *, shift: int, bits: int, prefix_mask: int = 0, prefix: int = 0
) -> Tensor:
    """Counts of one digit of the order-preserving keys of all scores: one pass of a radix search.

    A score's key is its float32 bit pattern, mapped so that keys order as scores do: x ≥ 0 gets the top bit, x < 0 is
    complemented, −0 counts as +0. Narrower types are widened exactly; float64 has 64-bit keys.

    Args:
        scores: as for :func:`select_threshold`, at least one tensor; not mixed with float64.
        shift, bits: the digit is (key >> shift) mod 2^bits; 1 to 16 bits.
        prefix_mask, prefix: only keys with key & prefix_mask == prefix count.

    Returns:
        int64 tensor of 2^bits + 1 counts on the scores' device; the last entry counts NaN, which no other entry does.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.
    """
    with torch.no_grad():
        return torch.ops.fishertune.key_histogram(as_list("scores", scores), shift, bits, prefix_mask, prefix)


def collect_bracket(scores: Tensor | Sequence[Tensor], *, low: int, high: int, capacity: int) -> tuple[Tensor, Tensor]:
    """What lies above and inside a bracket of keys (see :func:`key_histogram`): one read of the scores.

    Args:
        scores: as for :func:`select_threshold`, at least one tensor, none of float64.
        low, high: keys, 0 ≤ low ≤ high < 2³²; both belong to the bracket.
        capacity: how many candidates to return at most.

    Returns:
        int64 tensors on the scores' device: ``counts_L3``, for each tensor the number of keys above the bracket, of
        keys inside and of NaN, which are neither; and the candidates, (tensor number << 32) | key of every score
        inside, in any order, or none where more than ``capacity`` lie inside.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the value and the remedy.
    """
    with torch.no_grad():
        return torch.ops.fishertune.collect_bracket(as_list("scores", scores), low, high, capacity)
