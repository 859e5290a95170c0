"""F[h,o,i] += weight·Σ_n (Σ_t dY[n,h,t,o]·X[n,h,t,i])² on GPUs: the plain weight-gradient product, squared in place.

One program owns one tile of F and goes through the samples, so that a sample's gradient lives in registers only, no two
programs write the same element, and the sum has one order. Where the tiles are too few for the card, groups of samples
get programs of their own, whose sums a second kernel adds in one order (``tiles.py`` has the rules and the tile sizes).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..per_sample_affine_squared_grad.triton import per_sample_affine_squared_grad_
from ..triton_common import INTERPRETED, launch
from .tiles import Config, choose_config, choose_splits

GROUP = 8  # tile rows that go together through the columns, for hits in the second-level cache
SUM_CONFIG = {"BLOCK": 2048, "num_warps": 4}


@triton.jit
def per_sample_squared_grad_kernel(
    result,
    x,
    dy,
    N,
    T,
    O,  # noqa: E741
    I,  # noqa: E741
    heads,
    x_sample,
    x_head,
    x_token,
    dy_sample,
    dy_head,
    dy_token,
    split_samples,
    weight,
    PARTIAL: tl.constexpr,
    FLAT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Adds to ``result`` (heads, O, I), or with PARTIAL stores one such for each group of ``split_samples`` samples."""
    tiles_o = tl.cdiv(O, BLOCK_O)
    tiles_i = tl.cdiv(I, BLOCK_I)
    program = tl.program_id(0)
    head = program // (tiles_o * tiles_i) % heads
    split = program // (tiles_o * tiles_i) // heads
    program = program % (tiles_o * tiles_i)
    group_size = GROUP * tiles_i
    first_o = program // group_size * GROUP
    rows = tl.minimum(tiles_o - first_o, GROUP)
    tile_o = first_o + program % group_size % rows
    tile_i = program % group_size // rows

    o = tl.cast(tile_o, tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    i = tl.cast(tile_i, tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    first = split * split_samples
    last = tl.minimum(first + split_samples, N)
    x_at, dy_at = x, dy
    if not TMA:
        x_at += tl.cast(head, tl.int64) * x_head + t[:, None] * x_token + i[None, :]
        dy_at += tl.cast(head, tl.int64) * dy_head + t[:, None] * dy_token + o[None, :]

    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if FLAT:
        steps = tl.cdiv(T, BLOCK_T)
        grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for step in range(first * steps, last * steps):
            n = step // steps
            start = step % steps * BLOCK_T
            dy_TO = _operand(dy_at, n, head, start, tile_o, T, O, dy_sample, dy_token, TMA, BLOCK_T, BLOCK_O, WIDEN)
            x_TI = _operand(x_at, n, head, start, tile_i, T, I, x_sample, x_token, TMA, BLOCK_T, BLOCK_I, WIDEN)
            grad = tl.dot(tl.trans(dy_TO), x_TI, grad, input_precision=PRECISION)
            if start + BLOCK_T >= T:  # the sample's last block
                squares += grad * grad
                grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    else:
        for n in range(first, last):
            grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
            for start in range(0, T, BLOCK_T):
                dy_TO = _operand(dy_at, n, head, start, tile_o, T, O, dy_sample, dy_token, TMA, BLOCK_T, BLOCK_O, WIDEN)
                x_TI = _operand(x_at, n, head, start, tile_i, T, I, x_sample, x_token, TMA, BLOCK_T, BLOCK_I, WIDEN)
                grad = tl.dot(tl.trans(dy_TO), x_TI, grad, input_precision=PRECISION)
            squares += grad * grad
    # From here on, so that no register holds them through the loop.
    slab = (tl.cast(split, tl.int64) * heads + head) * O * I
    tile = result + slab + o[:, None] * I + i[None, :]
    inside = (o < O)[:, None] & (i < I)[None, :]
    if PARTIAL:
        tl.store(tile, squares, mask=inside)
    else:
        tl.store(tile, tl.load(tile, mask=inside) + tl.cast(weight, tl.float32) * squares, mask=inside)


@triton.jit
def _operand(
    at,
    n,
    head,
    start,
    tile,
    T,
    size,
    sample_stride,
    token_stride,
    TMA: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """(BLOCK_T, BLOCK) of sample n from token ``start`` on, zero outside; ``at`` points to the first sample's first."""
    if TMA:
        block = tl.reshape(at.load([n, head, start, tile * BLOCK]), (BLOCK_T, BLOCK))
    else:
        inside_t = start + tl.arange(0, BLOCK_T) < T
        inside = tile * BLOCK + tl.arange(0, BLOCK) < size
        offset = tl.cast(n, tl.int64) * sample_stride + tl.cast(start, tl.int64) * token_stride
        block = tl.load(at + offset, mask=inside_t[:, None] & inside[None, :], other=0.0)
    if WIDEN:
        block = block.to(tl.float32)
    return block


@triton.jit
def partial_sum_kernel(accumulator, partials, size, splits, weight, BLOCK: tl.constexpr):
    """accumulator[j] += weight·Σ_s partials[s, j], in the order of s."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    if start + BLOCK <= size:
        _add_partials(accumulator, partials, start, size, splits, weight, False, BLOCK)
    else:
        _add_partials(accumulator, partials, start, size, splits, weight, True, BLOCK)


@triton.jit
def _add_partials(accumulator, partials, start, size, splits, weight, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = start + tl.arange(0, BLOCK).to(tl.int64)
    mask = at < size if MASKED else None
    total = tl.load(partials + at, mask=mask)
    for split in range(1, splits):
        total += tl.load(partials + tl.cast(split, tl.int64) * size + at, mask=mask)
    tl.store(accumulator + at, tl.load(accumulator + at, mask=mask) + tl.cast(weight, tl.float32) * total, mask=mask)


def per_sample_squared_grad_(
    accumulator_HOI: torch.Tensor,
    x_NHTI: torch.Tensor,
    dy_NHTO: torch.Tensor,
    weight: float = 1.0,
    bias_accumulator_HO: torch.Tensor | None = None,
    *,
    config: Config | None = None,
    splits: int | None = None,
) -> None:
    """``config`` and ``splits`` replace the choices of ``tiles.py``, for tests and timings."""
    N, H, T, O = dy_NHTO.shape  # noqa: E741
    I = x_NHTI.shape[3]  # noqa: E741
    device = accumulator_HOI.device
    # One dtype for both operands of the product; mixed ones meet in float32.
    half = x_NHTI.dtype == dy_NHTO.dtype != torch.float32
    if not half:
        x_NHTI, dy_NHTO = x_NHTI.float(), dy_NHTO.float()
    if N and T and accumulator_HOI.numel():
        architecture, processors = _card(device)
        config = config or choose_config(architecture, "half" if half else "float", T, O, I)
        splits = min(splits or choose_splits(config, processors, H, N, T, O, I), N)
        _square_products(accumulator_HOI, x_NHTI, dy_NHTO, float(weight), config, splits)
    if bias_accumulator_HO is not None:
        # dY is read once more, a small part of the product's traffic: the product's programs would have to take it
        # through registers for a sum.
        dy_NTC = dy_NHTO.transpose(1, 2).reshape(N, T, H * O).contiguous()
        per_sample_affine_squared_grad_(None, bias_accumulator_HO.view(-1), None, dy_NTC, weight)


def _square_products(
    accumulator_HOI: torch.Tensor,
    x_NHTI: torch.Tensor,
    dy_NHTO: torch.Tensor,
    weight: float,
    config: Config,
    splits: int,
) -> None:
    N, H, T, I = x_NHTI.shape  # noqa: E741
    O = dy_NHTO.shape[3]  # noqa: E741
    device = accumulator_HOI.device
    split_samples = triton.cdiv(N, splits)
    splits = triton.cdiv(N, split_samples)
    result = accumulator_HOI
    if splits > 1:
        result = torch.empty(splits, H, O, I, dtype=torch.float32, device=device)
    tma = config.tma and x_NHTI.dtype != torch.float32 and _describable(x_NHTI) and _describable(dy_NHTO)
    launch(
        per_sample_squared_grad_kernel,
        splits * H * triton.cdiv(O, config.BLOCK_O) * triton.cdiv(I, config.BLOCK_I),
        device,
        result,
        _descriptor(x_NHTI, config.BLOCK_T, config.BLOCK_I) if tma else x_NHTI,
        _descriptor(dy_NHTO, config.BLOCK_T, config.BLOCK_O) if tma else dy_NHTO,
        N,
        T,
        O,
        I,
        H,
        *x_NHTI.stride()[:3],
        *dy_NHTO.stride()[:3],
        split_samples,
        weight,
        PARTIAL=splits > 1,
        FLAT=config.flat,
        TMA=tma,
        PRECISION=_precision(),
        WIDEN=INTERPRETED,
        BLOCK_O=config.BLOCK_O,
        BLOCK_I=config.BLOCK_I,
        BLOCK_T=config.BLOCK_T,
        GROUP=GROUP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        size = accumulator_HOI.numel()
        programs = triton.cdiv(size, SUM_CONFIG["BLOCK"])
        launch(partial_sum_kernel, programs, device, accumulator_HOI, result, size, splits, weight, **SUM_CONFIG)


def _describable(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor can stand for it: 16-byte steps between rows, heads and samples."""
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    return tensor.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in strides
    )


def _descriptor(tensor: torch.Tensor, block_t: int, block: int) -> TensorDescriptor:
    """Made on the host: descriptors made by the kernel would need a global allocator (``triton.set_allocator``)."""
    strides = [stride if size > 1 else 16 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, block_t, block])


@functools.cache
def _card(device: torch.device) -> tuple[str, int]:
    """The architecture whose tiles it takes, and its number of multiprocessors."""
    if INTERPRETED:
        return "interpreter", 8
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "gfx942", properties.multi_processor_count
    return "sm_90" if properties.major in (9, 10) else "sm_80", properties.multi_processor_count


def _precision() -> str:
    """Of float32 operands: on NVIDIA tensor cores three TF32 products keep its accuracy; elsewhere float32 itself."""
    return "ieee" if INTERPRETED or torch.version.hip else "tf32x3"
