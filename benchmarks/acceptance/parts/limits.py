"""What this card can do at most, measured: bytes copied and bf16 operations multiplied in a second."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ..measure import Bench
from ..operator import Part
from ..records import Limit, Record

COPY, PRODUCT = "copy", "bf16 product"
COPY_MIB = (256, 512, 1024, 2048, 4096)
VIT_L = ((3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096))


def limits(bench: Bench) -> Iterator[Record]:
    """The best of several sizes counts: the limit is the card's, not that of one size."""
    rates: dict[str, float] = {}
    for mib in (1, 2) if bench.quick else COPY_MIB:
        if 2.2 * (mib << 20) > bench.free_bytes():
            continue
        source = torch.ones(mib << 20, dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        target.copy_(source)
        ms = bench.times(partial(target.copy_, source), 0.3).median
        rates[f"{mib} MiB"] = 2 * source.numel() / ms * 1e3
    size = max(rates, key=lambda name: rates[name])
    yield Limit(COPY, f"best of {', '.join(rates)}: {size}", rates[size])

    cuda = bench.device.type == "cuda"
    m = 8192 if cuda else 128 if bench.quick else 1024
    square, tokens = f"{m}³", 8 * 1025
    products = {square: (m, m, m)}
    if cuda:
        products |= {f"ViT-L, {tokens} tokens, {out}×{in_}": (out, tokens, in_) for out, in_ in VIT_L}
    rates = {}
    for name, (rows, inner, columns) in products.items():
        a, b = bench.normal((inner, rows), torch.bfloat16), bench.normal((inner, columns), torch.bfloat16)
        torch.mm(a.T, b)
        ms = bench.times(partial(torch.mm, a.T, b), 0.3).median
        rates[name] = 2 * rows * inner * columns / ms * 1e3
        if name != square:
            yield Limit(f"{PRODUCT}, {name}", "weight gradient by cuBLAS", rates[name])
    size = max(rates, key=lambda name: rates[name])
    yield Limit(PRODUCT, f"best of {square} and ViT-L's weight gradients: {size}", rates[size])


PART = Part("limits", 8, limits)
