"""acc ← acc + weight·g² on GPUs: one read of g, one read and write of acc."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import TL_DTYPES, by_dtype, chunk_offsets, launch, list_table, locate, pointer

CONFIG = {"BLOCK": 4096, "num_warps": 8}


@triton.jit(do_not_specialize=["n_tensors"])
def squared_grad_accumulate_kernel(
    pointers, layout, owners, n_tensors, weight, GRAD: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    owner, size, chunk = locate(layout, owners, n_tensors, tl.program_id(0).to(tl.int64))
    accumulator = pointer(pointers, n_tensors, owner, 0, tl.float32, ALIGNED)
    grad = pointer(pointers, n_tensors, owner, 1, GRAD, ALIGNED)
    start = chunk * BLOCK
    weight = tl.cast(weight, tl.float32)
    if start + BLOCK <= size:
        _accumulate(accumulator, grad, start, size, weight, False, BLOCK)
    else:
        _accumulate(accumulator, grad, start, size, weight, True, BLOCK)


@triton.jit
def _accumulate(accumulator, grad, start, size, weight, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = chunk_offsets(start, BLOCK)
    mask = offsets < size if MASKED else None
    g = tl.load(grad + offsets, mask=mask).to(tl.float32)
    old = tl.load(accumulator + offsets, mask=mask)
    tl.store(accumulator + offsets, old + weight * (g * g), mask=mask)


def squared_grad_accumulate_(accumulators: list[torch.Tensor], grads: list[torch.Tensor], weight: float = 1.0) -> None:
    for accumulators_, grads_ in by_dtype(accumulators, grads):
        table = list_table(CONFIG["BLOCK"], accumulators_, grads_)
        launch(
            squared_grad_accumulate_kernel,
            table.n_chunks,
            accumulators_[0].device,
            *table.arguments,
            float(weight),
            GRAD=TL_DTYPES[grads_[0].dtype],
            ALIGNED=table.aligned,
            **CONFIG,
        )
