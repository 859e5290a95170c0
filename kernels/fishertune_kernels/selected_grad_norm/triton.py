"""Joint L2 norm of selected gradients on GPUs: touched sectors are read once, a second stage of one program adds up.

The squares of a chunk are taken after scaling by the power of two that brings its largest gradient near one, and the
chunk leaves its sum and that exponent: exact scaling, so bfloat16 and float32 gradients of any size neither overflow
nor vanish, in float32 arithmetic. The order of every sum is fixed by the sizes: repeated calls give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import TL_DTYPES, by_dtype, chunk_offsets, launch, list_table, locate, pointer

CONFIG = {"BLOCK": 2048, "num_warps": 4}
FINISH_CONFIG = {"BLOCK": 1024, "num_warps": 4}


@triton.jit(do_not_specialize=["n_tensors", "first", "n_partials"])
def selected_squares_kernel(
    pointers,
    layout,
    owners,
    n_tensors,
    partials,
    first,
    n_partials,
    GRAD: tl.constexpr,
    INDEX: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes scaled sum and exponent of chunk c to partials[first + c] and partials[n_partials + first + c].

    WHOLE: every element counts and row 1 is not read.
    """
    program = tl.program_id(0).to(tl.int64)
    owner, size, chunk = locate(layout, owners, n_tensors, program)
    grad = pointer(pointers, n_tensors, owner, 0, GRAD, ALIGNED and WHOLE)
    indices = pointer(pointers, n_tensors, owner, 1, INDEX, ALIGNED)
    start = chunk * BLOCK
    if start + BLOCK <= size:
        total, exponent = _squares(grad, indices, start, size, WHOLE, False, BLOCK)
    else:
        total, exponent = _squares(grad, indices, start, size, WHOLE, True, BLOCK)
    place = partials + program + tl.cast(first, tl.int64)
    tl.store(place, total)
    tl.store(place + tl.cast(n_partials, tl.int64), exponent.to(tl.float32))


@triton.jit
def _squares(grad, indices, start, size, WHOLE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = chunk_offsets(start, BLOCK)
    mask = offsets < size if MASKED else None
    if WHOLE:  # noqa: SIM108
        index = offsets
    else:
        index = tl.load(indices + offsets, mask=mask, other=0 if MASKED else None).to(tl.int64)
    g = tl.load(grad + index, mask=mask, other=0.0 if MASKED else None).to(tl.float32)
    exponent = tl.max((g.to(tl.uint32, bitcast=True) >> 23).to(tl.int32) & 255, axis=0)
    # Kept where 2^(126 − e) and its inverse are normal numbers; infinity (255) and NaN come through the product.
    exponent = tl.minimum(tl.maximum(exponent, 1), 252)
    scaled = g * ((253 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.sum(scaled * scaled, axis=0), exponent


@triton.jit(do_not_specialize=["n_partials"])
def finish_kernel(partials, n_partials, norm, BLOCK: tl.constexpr):
    """norm ← √Σ sums·4^(e − 126), relative to the largest exponent."""
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    n_partials = tl.cast(n_partials, tl.int64)
    largest = tl.full((BLOCK,), 1.0, tl.float32)
    for start in range(0, n_partials, BLOCK):
        at = start + lanes
        largest = tl.maximum(largest, tl.load(partials + n_partials + at, mask=at < n_partials, other=1.0))
    top = tl.max(largest, axis=0).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_partials, BLOCK):
        at = start + lanes
        mask = at < n_partials
        below = tl.load(partials + n_partials + at, mask=mask, other=1.0).to(tl.int32) - top
        # Beyond 2^−126 of the largest nothing reaches the sum.
        factor = (tl.maximum(127 + 2 * below, 0) << 23).to(tl.float32, bitcast=True)
        total += tl.load(partials + at, mask=mask, other=0.0) * factor
    tl.store(norm, tl.sqrt_rn(tl.sum(total, axis=0)) * ((top + 1) << 23).to(tl.float32, bitcast=True))


def selected_grad_norm(grads: list[torch.Tensor], indices: list[torch.Tensor] | None) -> torch.Tensor:
    whole = indices is None
    groups = [
        (group, list_table(CONFIG["BLOCK"], *group, scattered=0 if whole else 1))
        for group in by_dtype(grads, grads if indices is None else indices)
    ]
    n_partials = sum(table.n_chunks for _, table in groups)
    device = grads[0].device
    partials = torch.empty(2 * n_partials, dtype=torch.float32, device=device)
    norm = torch.empty((), dtype=torch.float32, device=device)
    first = 0
    for (grads_, sized), table in groups:
        launch(
            selected_squares_kernel,
            table.n_chunks,
            device,
            *table.arguments,
            partials,
            first,
            n_partials,
            GRAD=TL_DTYPES[grads_[0].dtype],
            INDEX=tl.int32 if whole else TL_DTYPES[sized[0].dtype],
            WHOLE=whole,
            ALIGNED=table.aligned,
            **CONFIG,
        )
        first += table.n_chunks
    launch(finish_kernel, 1, device, partials, n_partials, norm, **FINISH_CONFIG)
    return norm
