"""Flat indices of the selected elements on GPUs: two reads of the scores.

The first counts every chunk's larger scores and ties; their running totals say where a chunk's indices go and how many
ties came before it; the second writes the indices there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..select_threshold.search import Threshold
from ..triton_common import TL_DTYPES, by_dtype, chunk_offsets, launch, list_table, locate, pointer

CONFIG = {"BLOCK": 2048, "num_warps": 8}


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def count_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    n_chunks,
    counts,
    value,
    SCORE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[0, chunk] = scores above the value, counts[1, chunk] = scores equal to it."""
    program = tl.program_id(0).to(tl.int64)
    owner, size, chunk = locate(layout, owners, n_tensors, program)
    scores = pointer(pointers, n_tensors, owner, 0, SCORE, ALIGNED)
    above, tie = _compared(scores, chunk * BLOCK, size, value, BLOCK)
    tl.store(counts + program, tl.sum(above.to(tl.int32), axis=0))
    tl.store(counts + tl.cast(n_chunks, tl.int64) + program, tl.sum(tie.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def write_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    n_chunks,
    before,
    quotas,
    value,
    SCORE: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """before[0, chunk], before[1, chunk] = larger scores and ties in the tensor's earlier chunks."""
    program = tl.program_id(0).to(tl.int64)
    owner, size, chunk = locate(layout, owners, n_tensors, program)
    indices = pointer(pointers, n_tensors, owner, 0, INDEX, False)
    scores = pointer(pointers, n_tensors, owner, 1, SCORE, ALIGNED)
    above_before = tl.load(before + program)
    ties_before = tl.load(before + tl.cast(n_chunks, tl.int64) + program)
    quota = tl.load(quotas + owner)

    start = chunk * BLOCK
    above, tie = _compared(scores, start, size, value, BLOCK)
    tie_number = ties_before + tl.cumsum(tie.to(tl.int32), axis=0).to(tl.int64)
    kept = above | (tie & (tie_number <= quota))
    position = tl.cumsum(kept.to(tl.int32), axis=0).to(tl.int64) - 1
    position += above_before + tl.minimum(ties_before, quota)
    tl.store(indices + position, chunk_offsets(start, BLOCK).to(INDEX), mask=kept)


@triton.jit
def _compared(scores, start, size, value, BLOCK: tl.constexpr):
    value = tl.cast(value, tl.float32)
    offsets = chunk_offsets(start, BLOCK)
    inside = offsets < size
    if start + BLOCK <= size:
        score = tl.load(scores + offsets).to(tl.float32)
    else:
        score = tl.load(scores + offsets, mask=inside, other=0.0).to(tl.float32)
    return inside & (score > value), inside & (score == value)


def compact(scores: list[torch.Tensor], threshold: Threshold) -> list[torch.Tensor]:
    indices = [tensor.new_empty(0, dtype=_index_dtype(tensor.numel())) for tensor in scores]
    places = range(len(scores))
    for scores_, empty_, quotas_, places_ in by_dtype(scores, indices, threshold.ties_kept_per_tensor, places):
        found = _compact(scores_, quotas_, threshold.value, empty_[0].dtype)
        for place, index in zip(places_, found, strict=True):
            indices[place] = index
    return indices


def _compact(
    scores: list[torch.Tensor], quotas: list[int], value: float, index_dtype: torch.dtype
) -> list[torch.Tensor]:
    """For scores of one dtype."""
    device = scores[0].device
    options = {"SCORE": TL_DTYPES[scores[0].dtype], **CONFIG}
    table = list_table(CONFIG["BLOCK"], scores)
    counts = torch.empty(2, table.n_chunks, dtype=torch.int32, device=device)
    launch(
        count_kernel,
        table.n_chunks,
        device,
        *table.arguments,
        table.n_chunks,
        counts,
        float(value),
        ALIGNED=table.aligned,
        **options,
    )

    # Running totals over the chunks of all tensors; less the total at its tensor's first chunk, a chunk's own start.
    totals = torch.zeros(2, table.n_chunks + 1, dtype=torch.int64, device=device)
    totals[:, 1:] = counts.cumsum(dim=1)
    first_T = table.layout[1]
    end_T = torch.cat((first_T[1:], first_T.new_tensor([table.n_chunks])))
    before = (totals[:, :-1] - totals[:, first_T[table.owners.long()]]).contiguous()
    quotas_T = torch.tensor(quotas, dtype=torch.int64, device=device)
    above_T, ties_T = totals[:, end_T] - totals[:, first_T]
    lengths = (above_T + torch.minimum(ties_T, quotas_T)).tolist()

    indices = [torch.empty(length, dtype=index_dtype, device=device) for length in lengths]
    table = list_table(CONFIG["BLOCK"], indices, scores)
    launch(
        write_kernel,
        table.n_chunks,
        device,
        *table.arguments,
        table.n_chunks,
        before,
        quotas_T,
        float(value),
        INDEX=TL_DTYPES[index_dtype],
        ALIGNED=table.aligned,
        **options,
    )
    return indices


def _index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel <= 2**31 else torch.int64
