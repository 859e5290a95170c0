"""Counts of order-preserving keys on GPUs: one read of the scores.

A fixed number of programs walk over the chunks and keep their counts in registers; integer atomics add them up, which
is exact in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import (
    INTERPRETED,
    TL_DTYPES,
    by_dtype,
    chunk_offsets,
    launch,
    list_table,
    locate,
    ordered_key,
    pointer,
    signed_word,
)

CONFIG = {"BLOCK": 2048, "num_warps": 8}
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


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
