"""F[o,i] ← F[o,i] + weight·Σ_n (Σ_t dY[n,t,o]·X[n,t,i])² on a CPU: torch's matrix product, squared in cache.

Rows of the weight are taken in tiles of about a second-level cache; each tile's product is squared into the accumulator
by the C++ library before the next one overwrites it. The buffer is one tile, whatever the batch and the weight, and the
cost above the plain weight-gradient product is one pass over cached memory.
"""

from __future__ import annotations

import torch

from ..native import DTYPES, Rows, call

TILE_ELEMENTS = 1 << 19
"""Product elements per tile and thread: 2 MiB, a second-level cache. Smaller tiles were measured to lose more in the
matrix product and in starting threads than they save in cache misses."""


def per_sample_squared_grad_(
    accumulator_OI: torch.Tensor,
    x_NTI: torch.Tensor,
    dy_NTO: torch.Tensor,
    weight: float = 1.0,
    bias_accumulator_O: torch.Tensor | None = None,
) -> None:
    n_samples, _, n_in = x_NTI.shape
    n_out = dy_NTO.shape[2]
    tile = max(1, min(n_out, TILE_ELEMENTS * torch.get_num_threads() // max(n_in, 1)))
    product_OI = torch.empty(tile, n_in, dtype=torch.float32, device="cpu")
    # A surrounding autocast region would run the product in half precision.
    with torch.autocast("cpu", enabled=False):
        wide = x_NTI.dtype == dy_NTO.dtype == torch.float32
        # Half inputs are widened one sample at a time: a wide copy of the batch would double the activations' memory.
        for samples in [range(n_samples)] if wide else [range(n, n + 1) for n in range(n_samples)]:
            x_all = x_NTI[samples.start : samples.stop].float()
            dy_all = dy_NTO[samples.start : samples.stop].float()
            for first in range(0, n_out, tile):
                last = min(first + tile, n_out)
                grad_OI, accumulator = product_OI[: last - first], accumulator_OI[first:last]
                rows = Rows()
                rows.add(rows.write(accumulator), rows.read(grad_OI), grad_OI.numel(), DTYPES[torch.float32])
                for x_TI, dy_TO in zip(x_all, dy_all, strict=True):
                    torch.mm(dy_TO[:, first:last].T, x_TI, out=grad_OI)
                    call("ft_squared_grad_accumulate", rows, weight)
        if bias_accumulator_O is not None:
            grads_NO = dy_NTO.sum(dim=1, dtype=torch.float32)
            bias_accumulator_O.add_(grads_NO.square_().sum(dim=0), alpha=weight)
