"""Counts, samples and brackets of order-preserving keys on GPUs: one read of the scores.

A histogram's fixed number of programs walk over the chunks and keep their counts in registers; integer atomics add
them up, which is exact in any order. A bracket's counts are stored chunk by chunk and summed per tensor; one integer
atomic a chunk reserves room for its candidates, whose order has no meaning.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..triton_common import (
    INTERPRETED,
    TL_DTYPES,
    ListTable,
    by_dtype,
    chunk_offsets,
    launch,
    list_table,
    locate,
    ordered_key,
    pointer,
    signed_word,
)
from . import reference

CONFIG = {"BLOCK": 2048, "num_warps": 8}
COLLECT_CONFIG = {"BLOCK": 2048, "num_warps": 8}  # with eight scores a lane an AMD kernel spills
SAMPLE_CONFIG = {"BLOCK": 256, "num_warps": 2}
GOLDEN_RATIO = tl.constexpr(reference.GOLDEN_RATIO)
PROGRAMS_PER_MULTIPROCESSOR = 4
MAX_BINS_IN_REGISTERS = 256  # the compiler's histogram of 2048 bins takes 196 registers a thread


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "shift", "prefix_mask", "prefix"])
def key_histogram_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    n_chunks,
    counts,
    shift,
    prefix_mask,
    prefix,
    SCORE: tl.constexpr,
    BINS: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    bins = tl.arange(0, BINS).to(tl.int64)
    found = tl.zeros((BINS,), tl.int64)
    nans = tl.zeros((BLOCK,), tl.int32)
    n_chunks = tl.cast(n_chunks, tl.int64)
    current = tl.program_id(0).to(tl.int64)
    while current < n_chunks:
        owner, size, chunk = locate(layout, owners, n_tensors, current)
        scores = pointer(pointers, n_tensors, owner, 0, SCORE, ALIGNED)
        offsets = chunk_offsets(chunk * BLOCK, BLOCK)
        inside = offsets < size
        if chunk * BLOCK + BLOCK <= size:
            score = tl.load(scores + offsets).to(tl.float32)
        else:
            score = tl.load(scores + offsets, mask=inside, other=0.0).to(tl.float32)
        nan = score != score
        key = ordered_key(score)
        member = inside & ~nan & ((key & tl.cast(prefix_mask, tl.uint32)) == tl.cast(prefix, tl.uint32))
        digit = ((key >> tl.cast(shift, tl.uint32)) & (BINS - 1)).to(tl.int32)
        if IN_REGISTERS:
            found += tl.histogram(digit, BINS, mask=member).to(tl.int64)
        else:
            tl.atomic_add(counts + digit.to(tl.int64), tl.full((BLOCK,), 1, tl.int64), mask=member, sem="relaxed")
        nans += nan.to(tl.int32)
        current += tl.num_programs(0)
    if IN_REGISTERS:
        tl.atomic_add(counts + bins, found, mask=found > 0, sem="relaxed")
    n_nan = tl.sum(nans.to(tl.int64), axis=0)
    tl.atomic_add(counts + tl.full((), BINS, tl.int64), n_nan, mask=n_nan > 0, sem="relaxed")


def key_histogram(scores: list[torch.Tensor], shift: int, bits: int, prefix_mask: int, prefix: int) -> torch.Tensor:
    device = scores[0].device
    counts = torch.zeros(2**bits + 1, dtype=torch.int64, device=device)
    # Three in the interpreter, so that a program has more than one chunk there too.
    programs = 3 if INTERPRETED else PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(device)
    for (scores_,) in by_dtype(scores):
        table = list_table(CONFIG["BLOCK"], scores_)
        launch(
            key_histogram_kernel,
            min(programs, table.n_chunks),
            device,
            *table.arguments,
            table.n_chunks,
            counts,
            shift,
            signed_word(prefix_mask),
            signed_word(prefix),
            SCORE=TL_DTYPES[scores_[0].dtype],
            BINS=2**bits,
            IN_REGISTERS=2**bits <= MAX_BINS_IN_REGISTERS,
            ALIGNED=table.aligned,
            **CONFIG,
        )
    return counts


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "stride"])
def sample_scores_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    n_chunks,
    runs,
    sample,
    stride,
    SCORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sample[runs[i]] = one score of the i-th run of ``stride`` elements; a chunk of the table is a run."""
    run = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = run < tl.cast(n_chunks, tl.int64)
    owner = tl.load(owners + run, mask=inside, other=0).to(tl.int64)
    size = tl.load(layout + owner)
    within = run - tl.load(layout + tl.cast(n_tensors, tl.int64) + owner)
    number = tl.load(runs + owner) + within
    stride = tl.cast(stride, tl.int64)
    turn = (number * GOLDEN_RATIO) & 0xFFFFFFFF
    place = within * stride + ((turn * stride) >> 32)
    scores = tl.load(pointers + owner).to(tl.pointer_type(SCORE))
    score = tl.load(scores + place, mask=inside & (place < size), other=float("nan")).to(tl.float32)
    tl.store(sample + number, score, mask=inside)


def sample_scores(scores: list[torch.Tensor], stride: int) -> torch.Tensor:
    device = scores[0].device
    lengths = [-(-tensor.numel() // stride) for tensor in scores]
    firsts = [sum(lengths[:i]) for i in range(len(scores))]
    sample = torch.empty(sum(lengths), dtype=torch.float32, device=device)
    for scores_, firsts_ in by_dtype(scores, firsts):
        table = list_table(stride, scores_)
        launch(
            sample_scores_kernel,
            triton.cdiv(table.n_chunks, SAMPLE_CONFIG["BLOCK"]),
            device,
            *table.arguments,
            table.n_chunks,
            torch.tensor(firsts_, dtype=torch.int64).to(device),
            sample,
            stride,
            SCORE=TL_DTYPES[scores_[0].dtype],
            **SAMPLE_CONFIG,
        )
    return sample


@triton.jit
def collect(
    score, inside, n_chunks, counts, cursor, candidates, number, low, high, capacity,
    KEEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts a chunk's scores into counts[0..2, chunk]; with KEEP writes those in the bracket to ``candidates``."""
    program = tl.program_id(0).to(tl.int64)
    n_chunks = tl.cast(n_chunks, tl.int64)
    nan = score != score
    key = ordered_key(score)
    ranked = inside & ~nan
    above = ranked & (key > tl.cast(high, tl.uint32))
    between = ranked & (key >= tl.cast(low, tl.uint32)) & ~above
    found = tl.sum(between.to(tl.int32), axis=0)
    tl.store(counts + program, tl.sum(above.to(tl.int32), axis=0))
    tl.store(counts + n_chunks + program, found)
    tl.store(counts + 2 * n_chunks + program, tl.sum((inside & nan).to(tl.int32), axis=0))
    if KEEP:  # noqa: SIM102 - known to the compiler, unlike `found`
        if found > 0:
            first = tl.atomic_add(cursor, found.to(tl.int64), sem="relaxed")
            position = first + tl.cumsum(between.to(tl.int32), axis=0).to(tl.int64) - 1
            fits = between & (position < tl.cast(capacity, tl.int64))
            tl.store(candidates + position, (number << 32) | key.to(tl.int64), mask=fits)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "low", "high", "capacity"])
def collect_bracket_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    n_chunks,
    numbers,
    counts,
    cursor,
    candidates,
    low,
    high,
    capacity,
    SCORE: tl.constexpr,
    KEEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    scores = pointer(pointers, n_tensors, owner, 0, SCORE, ALIGNED)
    offsets = chunk_offsets(chunk * BLOCK, BLOCK)
    inside = offsets < size
    if chunk * BLOCK + BLOCK <= size:
        score = tl.load(scores + offsets).to(tl.float32)
    else:
        score = tl.load(scores + offsets, mask=inside, other=0.0).to(tl.float32)
    number = tl.load(numbers + owner)
    collect(score, inside, n_chunks, counts, cursor, candidates, number, low, high, capacity, KEEP, BLOCK)


class Collection:
    """The memory of one ``collect_bracket``: the arguments of its launches and what they found."""

    def __init__(self, n_tensors: int, low: int, high: int, capacity: int, device: torch.device):
        self._counts_L3 = torch.zeros(n_tensors, 3, dtype=torch.int64, device=device)
        self._cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self._candidates = torch.empty(capacity, dtype=torch.int64, device=device)
        self._bracket = signed_word(low), signed_word(high), capacity
        self.options = {"KEEP": capacity > 0}

    def arguments(self, table: ListTable, places: Sequence[int]) -> tuple[object, ...]:
        """For a launch over the table, whose tensors are those with the numbers ``places`` in the whole list."""
        device = self._cursor.device
        self._places = torch.tensor(places, dtype=torch.int64).to(device)
        self._counts = torch.empty(3, table.n_chunks, dtype=torch.int32, device=device)
        return table.n_chunks, self._places, self._counts, self._cursor, self._candidates, *self._bracket

    def add_counts(self, table: ListTable) -> None:
        """Sums the launch's counts per tensor: differences of running totals, exact and without atomics."""
        totals = torch.zeros(3, table.n_chunks + 1, dtype=torch.int64, device=self._cursor.device)
        totals[:, 1:] = self._counts.cumsum(dim=1)
        first_T = table.layout[1]
        end_T = torch.cat((first_T[1:], first_T.new_tensor([table.n_chunks])))
        self._counts_L3[self._places] = (totals[:, end_T] - totals[:, first_T]).T

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        capacity = self._bracket[2]
        found = int(self._cursor) if capacity else 0
        return self._counts_L3, self._candidates[: found if found <= capacity else 0]


def collect_bracket(
    scores: list[torch.Tensor], low: int, high: int, capacity: int
) -> tuple[torch.Tensor, torch.Tensor]:
    collection = Collection(len(scores), low, high, capacity, scores[0].device)
    for scores_, places_ in by_dtype(scores, range(len(scores))):
        table = list_table(COLLECT_CONFIG["BLOCK"], scores_)
        launch(
            collect_bracket_kernel,
            table.n_chunks,
            scores_[0].device,
            *table.arguments,
            *collection.arguments(table, places_),
            SCORE=TL_DTYPES[scores_[0].dtype],
            ALIGNED=table.aligned,
            **collection.options,
            **COLLECT_CONFIG,
        )
        collection.add_counts(table)
    return collection.result()


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
