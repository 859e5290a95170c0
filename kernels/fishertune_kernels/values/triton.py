"""Reading and writing selected elements on GPUs. Bits are moved, not numbers: NaN payloads survive."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..triton_common import TL_DTYPES, by_dtype, chunk_offsets, launch, list_table, locate, pointer

CONFIG = {"BLOCK": 1024, "num_warps": 4}
BITS = {2: tl.int16, 4: tl.int32}


@triton.jit(do_not_specialize=["n_tensors"])
def move_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    VALUE: tl.constexpr,
    INDEX: tl.constexpr,
    SCATTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """values ← tensor[index], or with SCATTER tensor[index] ← values."""
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    tensor = pointer(pointers, n_tensors, owner, 0, VALUE, False)
    values = pointer(pointers, n_tensors, owner, 1, VALUE, ALIGNED)
    indices = pointer(pointers, n_tensors, owner, 2, INDEX, ALIGNED)
    start = chunk * BLOCK
    if start + BLOCK <= size:
        _move(tensor, values, indices, start, size, SCATTER, False, BLOCK)
    else:
        _move(tensor, values, indices, start, size, SCATTER, True, BLOCK)


@triton.jit
def _move(tensor, values, indices, start, size, SCATTER: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = chunk_offsets(start, BLOCK)
    mask = offsets < size if MASKED else None
    index = tl.load(indices + offsets, mask=mask, other=0 if MASKED else None).to(tl.int64)
    if SCATTER:
        tl.store(tensor + index, tl.load(values + offsets, mask=mask), mask=mask)
    else:
        tl.store(values + offsets, tl.load(tensor + index, mask=mask), mask=mask)


def gather_values(tensors: list[torch.Tensor], indices: list[torch.Tensor]) -> list[torch.Tensor]:
    values = [
        torch.empty(index.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, index in zip(tensors, indices, strict=True)
    ]
    _launch(tensors, values, indices, scatter=False)
    return values


def gather_values_into_(out: torch.Tensor, tensors: list[torch.Tensor], indices: list[torch.Tensor]) -> None:
    _launch(tensors, out.split([index.numel() for index in indices]), indices, scatter=False)


def scatter_values_(tensors: list[torch.Tensor], indices: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    _launch(tensors, values, indices, scatter=True)


def _launch(
    tensors: list[torch.Tensor], values: Sequence[torch.Tensor], indices: list[torch.Tensor], *, scatter: bool
) -> None:
    for group in by_dtype(tensors, values, indices):
        tensors_, _, indices_ = group
        table = list_table(CONFIG["BLOCK"], *group, scattered=1)
        launch(
            move_kernel,
            table.n_chunks,
            tensors_[0].device,
            *table.arguments,
            VALUE=BITS[tensors_[0].element_size()],
            INDEX=TL_DTYPES[indices_[0].dtype],
            SCATTER=scatter,
            ALIGNED=table.aligned,
            **CONFIG,
        )
