"""per_sample_squared_grad_: F += w·Σ_n (Σ_t dY·X)². The limit is the plain weight-gradient product of that batch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fishertune_kernels as fk
from fishertune_kernels.per_sample_squared_grad import tiles

from ..compare import (
    FLOATS,
    WINDOW,
    Case,
    Outputs,
    beyond,
    error,
    of_largest,
    read_only,
    short,
    written,
)
from ..measure import Bench, Rotation
from ..operator import Operator, Timed
from ..race import Contender, Work, with_variants

NAME = "per_sample_squared_grad_"
ODD = ((3, 100, 200, 136), (2, 33, 129, 257), (1, 1, 1, 1), (4, 64, 128, 128))
"""N, T, O, I."""


# Right? ---------------------------------------------------------------------------------------------------------------


def cases(bench: Bench) -> Iterator[Case]:
    for dtype in FLOATS:
        yield _squares(bench, short(dtype), dtype, dtype, "contiguous")
    yield _squares(bench, "bf16 inputs, fp32 gradients", torch.bfloat16, torch.float32, "contiguous")
    for layout in ("strided", "unaligned"):
        yield _squares(bench, f"bf16, {layout}", torch.bfloat16, torch.bfloat16, layout)
    yield _heads_and_windows(bench)


def _heads_and_windows(bench: Bench) -> Case:
    """Weights of their own for every head, from transposed inputs; windows that belong to one sample."""
    N, H, T, O, I = 3, 2, 50, 40, 72  # noqa: E741
    x = bench.normal((N, T, H, I), torch.bfloat16).transpose(1, 2)
    dy = bench.normal((N, T, H, O), torch.bfloat16).transpose(1, 2)
    per_head = torch.einsum("nhto,nhti->nhoi", dy.double(), x.double()).square().sum(0)
    windows_x, windows_dy = bench.normal((6, 49, I), torch.bfloat16), bench.normal((6, 49, O), torch.bfloat16)
    joined = windows_x.double().view(2, 3 * 49, I), windows_dy.double().view(2, 3 * 49, O)
    per_sample = torch.einsum("nto,nti->noi", joined[1], joined[0]).square().sum(0)

    def run() -> Outputs:
        heads, windows = torch.zeros(H, O, I, device=bench.device), torch.zeros(O, I, device=bench.device)
        fk.per_sample_squared_grad_(heads, x, dy)
        fk.per_sample_squared_grad_(windows, windows_x, windows_dy, samples=2)
        return [heads, windows]

    def off(actual: Outputs) -> float:
        return error(actual, [per_head, per_sample], rtol=5e-6, atol=147 * 5e-6)

    return Case("bf16, heads and windows", run, off)


def _squares(bench: Bench, name: str, x_dtype: torch.dtype, dy_dtype: torch.dtype, layout: str) -> Case:
    inputs, expected = [], []
    for N, T, O, I in ODD:  # noqa: E741
        x, dy = bench.normal((N, T, I), x_dtype), bench.normal((N, T, O), dy_dtype)
        F, b = bench.positive((O, I)), bench.positive((O,))
        grads = torch.einsum("nto,nti->noi", dy.double(), x.double())
        inputs.append((x, dy, F, b))
        expected += [F + 0.5 * grads.square().sum(0), b + 0.5 * dy.double().sum(1).square().sum(0)]

    def run() -> Outputs:
        outputs = []
        for x, dy, F, b in inputs:
            sums = written([F, b], layout)
            x_, dy_ = read_only([x, dy], layout)
            fk.per_sample_squared_grad_(sums[0], x_, dy_, 0.5, sums[1])
            outputs += sums
        return outputs

    def off(actual: Outputs) -> float:
        # Sums of T products of order one: their rounding stays where they cancel, beside results of order T.
        tokens = [T for _, T, _, _ in ODD for _ in range(2)]
        pairs = zip(actual, expected, tokens, strict=True)
        return max(error([a], [e], rtol=5e-6, atol=T * 5e-6) for a, e, T in pairs)

    return Case(name, run, off)


def large(bench: Bench) -> Iterator[Case]:
    I = 64 if bench.quick else 1024  # noqa: E741
    T = beyond(bench) // I + 5
    x = torch.zeros(1, T, I, dtype=torch.bfloat16, device=bench.device)
    dy = torch.zeros(1, T, 64, dtype=torch.bfloat16, device=bench.device)
    tokens = WINDOW // I
    for tensor in (x, dy):
        tensor[:, -tokens:] = bench.normal((1, tokens, tensor.shape[2]))
    expected = (dy[0, -tokens:].double().T @ x[0, -tokens:].double()).square()

    def many_tokens() -> Outputs:
        F = torch.zeros(64, I, device=bench.device)
        fk.per_sample_squared_grad_(F, x, dy)
        return [F]

    yield Case("tokens × inputs", many_tokens, lambda actual: error(actual, [expected], rtol=5e-6, atol=tokens * 5e-6))

    O = beyond(bench) // 4096 + 5  # noqa: E741
    few_x, few_dy = bench.normal((1, 16, 4096), torch.bfloat16), bench.normal((1, 16, O), torch.bfloat16)
    rows = max(1, WINDOW // 4096)
    expected_rows = (few_dy[0, :, -rows:].double().T @ few_x[0].double()).square()

    def many_weights() -> Outputs:
        F = torch.zeros(O, 4096, device=bench.device)
        fk.per_sample_squared_grad_(F, few_x, few_dy)
        return [F[-rows:].clone()]

    yield Case("weights", many_weights, lambda actual: error(actual, [expected_rows], rtol=5e-6, atol=16 * 5e-6))


# Fast? ----------------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    F_OI: Tensor
    x_NTI: Tensor
    dy_NTO: Tensor


def ours(layers: Rotation[Layer]) -> Callable[[], list[Tensor]]:
    def call() -> list[Tensor]:
        layer = layers.next()
        fk.per_sample_squared_grad_(*layer)
        return [layer.F_OI]

    return call


def product_square_sum(layers: Rotation[Layer]) -> Callable[[], list[Tensor]]:
    """What plain torch can do: every sample's gradient in memory."""

    def call() -> list[Tensor]:
        layer = layers.next()
        grads_NOI = torch.bmm(layer.dy_NTO.mT, layer.x_NTI)
        layer.F_OI.add_(torch.linalg.vector_norm(grads_NOI, dim=0, dtype=torch.float32).square_())
        return [layer.F_OI]

    return call


def weight_gradient(layers: Rotation[Layer]) -> Callable[[], list[Tensor]]:
    """cuBLAS on the same batch: as many operations, but one gradient of the whole batch."""

    def call() -> list[Tensor]:
        layer = layers.next()
        return [layer.dy_NTO.flatten(0, 1).T @ layer.x_NTI.flatten(0, 1)]

    return call


def differs(actual: Outputs, expected: Outputs) -> float:
    """torch rounds a bf16 gradient before it is squared: 2⁻⁸ of it, twice that of the square."""
    return of_largest(2.0**-6)(actual, expected)


def work(bench: Bench, name: str, N: int, T: int, O: int, I: int, dtype: torch.dtype) -> Work[Rotation[Layer]]:  # noqa: E741
    def layer(N: int, T: int, O: int, I: int) -> Layer:  # noqa: E741
        dy = bench.normal((N, T, O), dtype)
        return Layer(torch.zeros(O, I, device=bench.device), bench.normal((N, T, I), dtype), dy)

    n_bytes = dtype.itemsize * N * T * (O + I) + 8 * O * I
    under_roof = dtype == torch.bfloat16  # the card's product rate is measured in it
    return Work(
        NAME, name, f"{short(dtype)}, N={N} T={T} O={O} I={I}", lambda: Rotation([layer(*ODD[0])]),
        lambda: bench.rotation(lambda: layer(N, T, O, I), n_bytes), ours, differs,
        {"bmm, square, sum": product_square_sum}, {"weight gradient": weight_gradient},
        n_bytes=n_bytes if under_roof else None, flops=2 * N * T * O * I if under_roof else None, seconds=0.3,
    )  # fmt: skip


MODELS = {
    # Tokens of a 512 px image with patches of 16 and a class token.
    "ViT-L": {"N": 8, "T": 1025, "width": 1024},
    # Of a 1024 px image without one, in the blocks that see it whole.
    "SAM-H": {"N": 4, "T": 4096, "width": 1280},
    # In windows of 14 × 14, regrouped to samples.
    "SAM-H windows": {"N": 4, "T": 25 * 196, "width": 1280},
}
LAYERS = {"qkv": (3, 1), "proj": (1, 1), "fc1": (4, 1), "fc2": (1, 4)}


def layers_of(model: str, dtype: torch.dtype) -> Callable[[Bench], Iterator[Work[Rotation[Layer]]]]:
    def works(bench: Bench) -> Iterator[Work[Rotation[Layer]]]:
        N, T, w = (MODELS[model][key] for key in ("N", "T", "width"))
        if bench.quick:
            N, T, w = 2, 16, 32
        for layer, (out, in_) in LAYERS.items():
            yield work(bench, f"{model} {layer} {short(dtype)}", N, T, out * w, in_ * w, dtype)

    return works


def with_config(config: Any = None, splits: int | None = None) -> Contender[Rotation[Layer]]:
    """The Triton kernel with another tile or loop than its table says, or with its samples split."""

    def contender(layers: Rotation[Layer]) -> Callable[[], list[Tensor]]:
        triton = importlib.import_module("fishertune_kernels.per_sample_squared_grad.triton")

        def call() -> list[Tensor]:
            layer = layers.next()
            heads = layer.F_OI[None], layer.x_NTI[:, None], layer.dy_NTO[:, None]
            triton.per_sample_squared_grad_(*heads, config=config, splits=splits)
            return [layer.F_OI]

        return call

    return contender


def variants(bench: Bench) -> Iterator[Work[Rotation[Layer]]]:
    """Other ways to do the same product: add a row to this dictionary, or a tile to VARIANTS of ``tiles.py``."""
    half = (
        "sm_90" if bench.device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0) else "sm_80",
        "half",
    )
    rows = {name: with_config(config) for name, config in tiles.VARIANTS[half].items()}
    rows |= {f"tile {i}": with_config(config) for i, config in enumerate(tiles.TABLE[half])}
    rows |= {f"{splits} splits": with_config(splits=splits) for splits in (1, 2, 4)}
    for work_ in layers_of("ViT-L", torch.bfloat16)(bench):
        yield with_variants(work_, rows)


OPERATOR = Operator(
    NAME, (NAME,), cases, large, 10 << 31,
    (
        Timed("ViT-L bf16", layers_of("ViT-L", torch.bfloat16), seconds=10, goal=True),
        Timed("SAM-H bf16", layers_of("SAM-H", torch.bfloat16), seconds=10, goal=True),
        Timed("SAM-H windows bf16", layers_of("SAM-H windows", torch.bfloat16), seconds=10),
        Timed("ViT-L fp32", layers_of("ViT-L", torch.float32), seconds=10),
    ),
    variants, check_seconds=30,
)  # fmt: skip
