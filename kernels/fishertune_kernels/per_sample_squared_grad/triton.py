"""F[o,i] += weight·Σ_n (Σ_t dY[n,t,o]·X[n,t,i])² on GPUs: the plain weight-gradient product, squared in place.

One program owns one tile of F and goes through all samples, so that a sample's gradient lives in registers only, no two
programs write the same element, and the sum has one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_common import INTERPRETED, launch

# Tiles that spill no register on the architectures the tests compile for. Hopper's matrix units read a deeper tile from
# shared memory; others hold operands in registers beside the two accumulators.
CONFIGS = {
    ("hopper", "half"): {"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_T": 64, "num_warps": 8, "num_stages": 3},
    ("other", "half"): {"BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_T": 32, "num_warps": 8, "num_stages": 4},
    ("hopper", "float"): {"BLOCK_O": 64, "BLOCK_I": 128, "BLOCK_T": 16, "num_warps": 8, "num_stages": 3},
    ("other", "float"): {"BLOCK_O": 64, "BLOCK_I": 128, "BLOCK_T": 16, "num_warps": 8, "num_stages": 3},
    ("interpreter", "half"): {"BLOCK_O": 32, "BLOCK_I": 32, "BLOCK_T": 16},
    ("interpreter", "float"): {"BLOCK_O": 32, "BLOCK_I": 32, "BLOCK_T": 16},
}
GROUP = 8  # tile rows that go together through the columns, for hits in the second-level cache
SUM_CONFIG = {"BLOCK_O": 128, "BLOCK_T": 32, "num_warps": 4}


@triton.jit
def per_sample_squared_grad_kernel(
    accumulator,
    x,
    dy,
    N,
    T,
    O,  # noqa: E741
    I,  # noqa: E741
    weight,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_o = tl.cdiv(O, BLOCK_O)
    group_size = GROUP * tl.cdiv(I, BLOCK_I)
    first_o = program // group_size * GROUP
    rows = tl.minimum(tiles_o - first_o, GROUP)
    tile_o = first_o + program % group_size % rows
    tile_i = program % group_size // rows

    o = tl.cast(tile_o, tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    i = tl.cast(tile_i, tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    inside_o = o < O
    inside_i = i < I
    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for n in range(N):
        first_token = tl.cast(T, tl.int64) * n
        grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start in range(0, T, BLOCK_T):
            inside_t = start + t < T
            token = first_token + start + t
            dy_TO = tl.load(dy + token[:, None] * O + o[None, :], mask=inside_t[:, None] & inside_o[None, :], other=0.0)
            x_TI = tl.load(x + token[:, None] * I + i[None, :], mask=inside_t[:, None] & inside_i[None, :], other=0.0)
            if WIDEN:
                dy_TO = dy_TO.to(tl.float32)
                x_TI = x_TI.to(tl.float32)
            grad = tl.dot(tl.trans(dy_TO), x_TI, grad, input_precision=PRECISION)
        squares += grad * grad
    tile = accumulator + o[:, None] * I + i[None, :]
    inside = inside_o[:, None] & inside_i[None, :]
    tl.store(tile, tl.load(tile, mask=inside) + tl.cast(weight, tl.float32) * squares, mask=inside)


@triton.jit
def token_sum_kernel(
    sums,
    dy,
    T,
    O,  # noqa: E741
    BLOCK_O: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """sums[n, o] = Σ_t dy[n, t, o]."""
    program = tl.program_id(0)
    tiles_o = tl.cdiv(O, BLOCK_O)
    sample = tl.cast(program // tiles_o, tl.int64)
    o = tl.cast(program % tiles_o, tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    inside_o = o < O
    total = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, T, BLOCK_T):
        token = sample * T + start + t
        inside = (start + t < T)[:, None] & inside_o[None, :]
        total += tl.load(dy + token[:, None] * O + o[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + sample * O + o, tl.sum(total, axis=0), mask=inside_o)


def per_sample_squared_grad_(
    accumulator_OI: torch.Tensor,
    x_NTI: torch.Tensor,
    dy_NTO: torch.Tensor,
    weight: float = 1.0,
    bias_accumulator_O: torch.Tensor | None = None,
) -> None:
    N, T, O = dy_NTO.shape  # noqa: E741
    I = x_NTI.shape[2]  # noqa: E741
    device = accumulator_OI.device
    # One dtype for both operands of the product; mixed ones meet in float32.
    half = x_NTI.dtype == dy_NTO.dtype != torch.float32
    if not half:
        x_NTI, dy_NTO = x_NTI.float(), dy_NTO.float()
    config = CONFIGS[_architecture(device), "half" if half else "float"]
    tiles = triton.cdiv(O, config["BLOCK_O"]) * triton.cdiv(I, config["BLOCK_I"])
    launch(
        per_sample_squared_grad_kernel,
        tiles,
        device,
        accumulator_OI,
        x_NTI,
        dy_NTO,
        N,
        T,
        O,
        I,
        float(weight),
        PRECISION=_precision(),
        WIDEN=INTERPRETED,
        GROUP=GROUP,
        **config,
    )
    if bias_accumulator_O is not None:
        sums_NO = torch.empty(N, O, dtype=torch.float32, device=device)
        launch(token_sum_kernel, N * triton.cdiv(O, SUM_CONFIG["BLOCK_O"]), device, sums_NO, dy_NTO, T, O, **SUM_CONFIG)
        bias_accumulator_O.add_(sums_NO.square_().sum(dim=0), alpha=weight)


def _architecture(device: torch.device) -> str:
    if INTERPRETED:
        return "interpreter"
    hopper = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return "hopper" if hopper else "other"


def _precision() -> str:
    """Of float32 operands: on NVIDIA tensor cores three TF32 products keep its accuracy; elsewhere float32 itself."""
    return "ieee" if INTERPRETED or torch.version.hip else "tf32x3"
