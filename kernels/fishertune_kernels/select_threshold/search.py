"""Exact k-th largest in about one read of the scores.

1. A sample of n^⅔ scores brackets the threshold: Floyd and Rivest's idea (CACM 18(3), 1975).
2. One pass counts what lies above the bracket and copies the few candidates inside it.
3. A radix search among the candidates gives the exact answer.

Where the bracket missed, or holds too much to copy (masses of equal scores), a radix search over all scores finds the
threshold's key and the same pass counts its ties; so nothing rests on luck but time. Between ranks only counts travel,
every rank takes the same decisions from the same sums, and nothing is sorted.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dispatch

_SIGN_32 = -(2**31)
_BELOW_SIGN_32 = 2**31 - 1
LAST_KEY = 2**32 - 1  # of a NaN: no score that can be ranked has it
SMALL = 1 << 18  # below, three passes of counting cost less than the calls that a sample takes
DEVIATIONS = 4  # a bracket this wide misses once in 16,000 times (two tails of a normal distribution)
LARGEST_SHARE = 1 / 10  # of the scores as candidates; more would cost as much as the passes they are to save


class Threshold(NamedTuple):
    """The boundary of a top-k set. Kept: every element above ``value`` and, in each tensor, the first ties.

    Attributes:
        value: the k-th largest score; +inf for k = 0.
        greater_per_tensor: elements above it (of this rank), in list order.
        ties_kept_per_tensor: elements equal to it that belong to the set (of this rank), in list order.
    """

    value: float
    greater_per_tensor: tuple[int, ...]
    ties_kept_per_tensor: tuple[int, ...]

    @property
    def n_greater(self) -> int:
        """Elements above the value (of this rank)."""
        return sum(self.greater_per_tensor)

    @property
    def n_ties_kept(self) -> int:
        """Elements equal to the value that belong to the set (of this rank)."""
        return sum(self.ties_kept_per_tensor)

    def require(self, found: Sequence[int]) -> None:
        """That tensors hold as many selected elements as the threshold stands for.

        Raises:
            ValueError: if they do not.
        """
        expected = [sum(pair) for pair in zip(self.greater_per_tensor, self.ties_kept_per_tensor, strict=True)]
        if list(found) != expected:
            i = next(i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
            raise ValueError(
                f"The threshold stands for {sum(expected)} elements but the scores hold {sum(found)} "
                f"(scores[{i}]: {expected[i]} and {found[i]}). Call select_threshold again after the scores changed."
            )


class Bracket(NamedTuple):
    """Keys from ``low`` to ``high``, both inside, and how many scores may lie there before it is of no use."""

    low: int
    high: int
    capacity: int


class Ranked(NamedTuple):
    """The key of a rank, how many keys are larger and how many equal; key 0 if there are fewer keys than that."""

    key: int
    above: int
    equal: int


def search(scores: list[Tensor], k: int, group: dist.ProcessGroup | None = None) -> Threshold:
    """Arguments of :func:`fishertune_kernels.select_threshold`, already checked."""
    n = agreed_size(scores, k, group)
    if not scores:
        return Threshold(math.inf, (), ())
    if any(tensor.dtype == torch.float64 for tensor in scores):
        return _search_float64([tensor.double() for tensor in scores], k, n, group)
    for bracket in _brackets(scores, k, n, group):
        counts_L3, candidates = torch.ops.fishertune.collect_bracket.default(scores, *bracket)
        threshold = settled(bracket, counts_L3, candidates, k, n, group)
        if threshold is not None:
            return threshold
    raise AssertionError("the last bracket is exact")


def agreed_size(scores: list[Tensor], k: int, group: dist.ProcessGroup | None) -> int:
    """How many scores there are on all ranks.

    Raises:
        ValueError: if that is less than k, or ranks ask for different selections.
    """
    n = sum(tensor.numel() for tensor in scores)
    if group is not None:
        _check_agreement(scores, k, group)
        if scores:
            n = int(_summed(torch.tensor(n), group, scores[0].device))
    if not scores and k:
        raise ValueError(f"k={k}, but there are no scores to select from.")
    if k > n:
        raise ValueError(f"k={k}, but there are only {n} scores. Choose k between 0 and {n}.")
    return n


def _brackets(scores: list[Tensor], k: int, n: int, group: dist.ProcessGroup | None) -> Iterator[Bracket]:
    """Where to look for the threshold: first by a sample, then, surely, at its very key."""
    if k == 0:
        yield Bracket(LAST_KEY, LAST_KEY, 0)  # looks for NaN only
        return
    if n >= SMALL:
        bracket = sampled_bracket(sample(scores, sampling_stride(n)), k, n, group)
        if bracket is not None:
            yield bracket
    [ranked] = _ranked_keys(scores, [k], 32, group)
    yield Bracket(ranked.key, ranked.key, 0)


def sampling_stride(n: int) -> int:
    """Elements per sampled one: n^⅓, at which the sample and the candidates, n/√(n^⅔), are about equally many."""
    return max(1, round(n ** (1 / 3)))


def sample(scores: list[Tensor], stride: int) -> Tensor:
    """One score from each run of ``stride`` elements of each tensor, in float32; NaN where a last run has none."""
    module = dispatch.implementation("select_threshold", scores[0].device, {tensor.dtype for tensor in scores})
    drawn: Tensor = module.sample_scores(scores, stride)
    return drawn


def sampled_bracket(drawn: Tensor, k: int, n: int, group: dist.ProcessGroup | None) -> Bracket | None:
    """A bracket that very likely holds the k-th largest and not many scores more; None if it would hold too many.

    One score was drawn from each of m = n/stride runs. Let X be how many of these are among the k largest: as if drawn
    independently, its mean is k/stride and its variance at most that of the binomial distribution, m·p(1 − p) with
    p = k/n (smaller where runs differ, p ↦ p(1 − p) being concave). The k-th largest is inside unless X leaves the
    sample's ranks k/stride ± DEVIATIONS·(σ + 1); the one covers the skewed tail where σ is small.
    """
    stride = sampling_stride(n)
    rank = k / stride
    margin = DEVIATIONS * (math.sqrt(rank * (1 - k / n)) + 1)
    ranks = [max(1, math.floor(rank - margin)), math.ceil(rank + margin)]
    high, low = _ranked_keys([drawn], ranks, 32, group)
    if rank - margin < 1:
        high = Ranked(LAST_KEY, 0, 0)
    if low.key == high.key:
        return Bracket(low.key, high.key, 0)  # a mass of equal scores: its ties need only be counted
    inside = low.above + low.equal - high.above
    capacity = stride * math.ceil(inside + DEVIATIONS * (math.sqrt(inside) + 1))
    return Bracket(low.key, high.key, capacity) if capacity <= LARGEST_SHARE * n else None


def settled(
    bracket: Bracket, counts_L3: Tensor, candidates: Tensor, k: int, n: int, group: dist.ProcessGroup | None
) -> Threshold | None:
    """The threshold, from what :func:`collect_bracket` found; None if it is not inside or candidates are missing.

    Raises:
        ValueError: if NaN were counted.
    """
    single = bracket.low == bracket.high
    missing = torch.zeros_like(counts_L3[0, 1]) if single else counts_L3[:, 1].sum() - candidates.numel()
    sums = torch.cat((counts_L3.sum(dim=0), missing.reshape(1)))
    above, inside, n_nan, n_missing = _summed(sums, group, counts_L3.device).tolist()
    _refuse_nan(n_nan, n)
    if k == 0:
        return Threshold(math.inf, (0,) * len(counts_L3), (0,) * len(counts_L3))
    if n_missing or not above < k <= above + inside:
        return None

    key, greater_L, ties_L = bracket.low, counts_L3[:, 0], counts_L3[:, 1]
    if not single:
        ordered = candidates.to(torch.int32).bitwise_xor_(_SIGN_32)  # the keys, as signed integers of the same order
        scores = (ordered >> 31).bitwise_and_(_BELOW_SIGN_32).bitwise_xor_(ordered).view(torch.float32)
        [ranked] = _ranked_keys([scores], [k - above], 32, group)
        key, above = ranked.key, above + ranked.above
        del scores  # here memory is at its peak
        place = (candidates >> 32).mul_(3)  # 3 tensor + 0, 1, 2 for below, equal, above
        place += ordered >= key - 2**31
        place += ordered > key - 2**31
        places_L3 = torch.bincount(place, minlength=3 * len(counts_L3)).view(-1, 3)
        greater_L, ties_L = greater_L + places_L3[:, 2], places_L3[:, 1]
    return _threshold(_value_of(key, 32), greater_L, ties_L, k - above, group)


def _search_float64(scores: list[Tensor], k: int, n: int, group: dist.ProcessGroup | None) -> Threshold:
    device = scores[0].device
    n_nan = torch.stack([tensor.isnan().sum() for tensor in scores]).sum()
    _refuse_nan(int(_summed(n_nan, group, device)), n)
    if k == 0:
        return Threshold(math.inf, (0,) * len(scores), (0,) * len(scores))
    [ranked] = _ranked_keys(scores, [k], 64, group)
    value = _value_of(ranked.key, 64)
    greater_L = torch.stack([(tensor > value).sum() for tensor in scores])
    ties_L = torch.stack([(tensor == value).sum() for tensor in scores])
    return _threshold(value, greater_L, ties_L, k - ranked.above, group)


def _ranked_keys(
    scores: list[Tensor], ranks: Sequence[int], width: int, group: dist.ProcessGroup | None
) -> list[Ranked]:
    """Radix search: each pass counts one digit of the keys, top first, under the digits found so far. Skips NaN."""
    device = scores[0].device
    histogram = torch.ops.fishertune.key_histogram.default
    found = [Ranked(0, 0, 0)] * len(ranks)
    mask, shift, n_keys = 0, width, 0
    for bits in _digits(width, device.type):
        shift -= bits
        prefixes = sorted({ranked.key for ranked in found})
        counts = [histogram(scores, shift, bits, _int64(mask), _int64(prefix)) for prefix in prefixes]
        # From the largest digit down; a rank has the first digit at which the counts reach it.
        totals = _summed(torch.stack(counts), group, device)[:, :-1].flip(1)
        running = totals.cumsum(1)
        if mask == 0:
            n_keys = int(running[0, -1])
        for i, rank in enumerate(ranks):
            if rank > n_keys:
                found[i] = Ranked(0, n_keys, 0)
                continue
            key, above, equal = found[i]
            row = prefixes.index(key)
            position = int(torch.searchsorted(running[row], rank - above))
            equal = int(totals[row, position])
            above += int(running[row, position]) - equal
            found[i] = Ranked(key | (2**bits - 1 - position) << shift, above, equal)
        mask |= (2**bits - 1) << shift
    return found


def _digits(width: int, device: str) -> tuple[int, ...]:
    """Bits of each pass. A GPU block counts 256 bins in shared memory; on a CPU 2048 fit the first-level cache."""
    if device == "cpu":
        return (11, 11, 10) if width == 32 else (11, 11, 11, 11, 11, 9)
    return (8,) * (width // 8)


def _refuse_nan(n_nan: int, n: int) -> None:
    if n_nan:
        raise ValueError(
            f"{n_nan} of {n} scores are NaN and cannot be ranked. Find what produced them (a NaN loss, an overflow in "
            "half precision), or set them to -inf to leave them out."
        )


def _threshold(
    value: float, greater_L: Tensor, ties_L: Tensor, quota: int, group: dist.ProcessGroup | None
) -> Threshold:
    device = ties_L.device
    greater_L, ties_L = torch.stack((greater_L, ties_L)).cpu()
    return Threshold(value, tuple(greater_L.tolist()), tuple(_tie_quota(ties_L, quota, group, device)))


def _tie_quota(ties: Tensor, quota: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
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


def _summed(local: Tensor, group: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    if group is None:
        return local.cpu()
    total = local.to(device, copy=True)
    dist.all_reduce(total, group=group)
    return total.cpu()


def _check_agreement(scores: list[Tensor], k: int, group: dist.ProcessGroup) -> None:
    """Ranks that differ in what they ask would wait for one another for ever, or agree on a wrong answer."""
    device = scores[0].device if scores else torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    width = 64 if any(tensor.dtype == torch.float64 for tensor in scores) else 32
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
