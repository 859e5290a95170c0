"""Exact k-th largest by radix search: each pass counts one digit of the keys, top first, under the prefix found so far.

Only counts travel between ranks, so every world size gives the same threshold, and nothing is sorted or copied. The
last pass counts tensor by tensor: what ties with the threshold is then known per tensor without another read.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import torch.distributed as dist


class Threshold(NamedTuple):
    """The boundary of a top-k set. Kept: every element above ``value`` and, in each tensor, the first ties.

    Attributes:
        value: the k-th largest score; +inf for k = 0.
        n_greater: elements above it (of this rank).
        n_ties_kept: elements equal to it that belong to the set (of this rank).
        ties_kept_per_tensor: the same tensor by tensor, in list order.
    """

    value: float
    n_greater: int
    n_ties_kept: int
    ties_kept_per_tensor: tuple[int, ...]


def search(scores: list[torch.Tensor], k: int, group: dist.ProcessGroup | None = None) -> Threshold:
    """Arguments of :func:`fishertune_kernels.select_threshold`, already checked."""
    width = 64 if any(tensor.dtype == torch.float64 for tensor in scores) else 32
    if group is not None:
        _check_agreement(scores, k, width, group)
    if not scores:
        if k:
            raise ValueError(f"k={k}, but there are no scores to select from.")
        return Threshold(math.inf, 0, 0, ())
    if width == 64:
        scores = [tensor.double() for tensor in scores]
    histogram = torch.ops.fishertune.key_histogram.default

    prefix = prefix_mask = n_greater = 0
    remaining = k  # rank of the threshold among the keys under the prefix
    shift = width
    for bits in _digits(width, scores[0].device.type):
        shift -= bits
        digit_and_prefix = (shift, bits, _int64(prefix_mask), _int64(prefix))
        if shift:
            local = histogram(scores, *digit_and_prefix)
        else:
            counts_per_tensor = torch.stack([histogram([tensor], *digit_and_prefix) for tensor in scores])
            local = counts_per_tensor.sum(dim=0)
        total = _summed(local, group, scores[0].device)
        if shift + bits == width:
            _check_total(total, k)
            if k == 0:
                return Threshold(math.inf, 0, 0, (0,) * len(scores))
        # Counts from the largest digit down; the threshold has the first digit at which they reach its rank.
        local, total = local.cpu()[:-1].flip(0), total[:-1].flip(0)
        position = int(torch.searchsorted(total.cumsum(0), remaining))
        remaining -= int(total[:position].sum())
        n_greater += int(local[:position].sum())
        digit = 2**bits - 1 - position
        prefix |= digit << shift
        prefix_mask |= (2**bits - 1) << shift

    ties = counts_per_tensor[:, digit].cpu()
    kept = _tie_quota(ties, remaining, group, scores[0].device)
    return Threshold(_value_of(prefix, width), n_greater, sum(kept), tuple(kept))


def _digits(width: int, device: str) -> tuple[int, ...]:
    """Bits of each pass. A GPU block counts 256 bins in shared memory; on a CPU 2048 fit the first-level cache."""
    if device == "cpu":
        return (11, 11, 10) if width == 32 else (11, 11, 11, 11, 11, 9)
    return (8,) * (width // 8)


def _check_total(total: torch.Tensor, k: int) -> None:
    n_nan, n = int(total[-1]), int(total.sum())
    if n_nan:
        raise ValueError(
            f"{n_nan} of {n} scores are NaN and cannot be ranked. Find what produced them (a NaN loss, an overflow in "
            "half precision), or set them to -inf to leave them out."
        )
    if k > n:
        raise ValueError(f"k={k}, but there are only {n} scores. Choose k between 0 and {n}.")


def _tie_quota(ties: torch.Tensor, quota: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """How many of this rank's ties fit into ``quota``, tensor after tensor and, within a tensor, rank after rank."""
    if group is None:
        ties_LR, rank = ties.unsqueeze(1), 0
    else:
        gathered = [torch.empty_like(ties, device=device) for _ in range(group.size())]
        dist.all_gather(gathered, ties.to(device), group=group)
        ties_LR, rank = torch.stack(gathered, dim=1).cpu(), group.rank()
    counts = ties_LR.reshape(-1)
    before = counts.cumsum(0) - counts
    kept_LR = torch.minimum(counts, (quota - before).clamp(min=0)).view(ties_LR.shape)
    return [int(count) for count in kept_LR[:, rank]]


def _summed(local: torch.Tensor, group: dist.ProcessGroup | None, device: torch.device) -> torch.Tensor:
    if group is None:
        return local.cpu()
    total = local.to(device, copy=True)
    dist.all_reduce(total, group=group)
    return total.cpu()


def _check_agreement(scores: list[torch.Tensor], k: int, width: int, group: dist.ProcessGroup) -> None:
    """Ranks that differ in what they ask would wait for one another for ever, or agree on a wrong answer."""
    device = scores[0].device if scores else torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    ours = torch.tensor([k, len(scores), width], device=device)
    extremes = torch.cat((ours, -ours))
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = extremes.cpu()[:3].tolist(), (-extremes).cpu()[3:].tolist()
    if largest != smallest:
        what = [
            f"{name} between {low} and {high}"
            for name, low, high in zip(("k", "number of tensors", "key bits"), smallest, largest, strict=True)
            if low != high
        ]
        raise ValueError(
            f"The ranks do not ask for the same selection: {'; '.join(what)}. Pass the same k and the same list of "
            "tensors, of the same types, on every rank (with an empty tensor where a rank holds no shard)."
        )


def _int64(word: int) -> int:
    """The 64 bits of ``word`` as a signed integer, which is how torch holds them."""
    return word - (1 << 64) if word >= 1 << 63 else word


def _value_of(key: int, width: int) -> float:
    """The float whose order-preserving key this is."""
    top = 1 << (width - 1)
    bits = key ^ top if key & top else ~key & ((1 << width) - 1)
    unsigned, floating = ("<Q", "<d") if width == 64 else ("<I", "<f")
    return float(struct.unpack(floating, struct.pack(unsigned, bits))[0])
