"""F[h,o,i] ← F[h,o,i] + weight·Σ_n (Σ_t dY[n,h,t,o]·X[n,h,t,i])² on a CPU: torch's product, squared in cache.

Rows of the weight are taken in tiles of about a second-level cache; each tile's product is squared into the accumulator
by the C++ library before the next one overwrites it. The buffer is one tile, whatever the batch and the weight, and the
cost above the plain weight-gradient product is one pass over cached memory.
"""

from __future__ import annotations

import torch

from ..native import DTYPES, Rows, call
from ..per_sample_affine_squared_grad.native import per_sample_affine_squared_grad_

TILE_ELEMENTS = 1 << 20
"""Product elements per tile and thread: 4 MiB. Smaller tiles were measured to lose more in the matrix product and in
starting threads than they save in cache misses."""


def per_sample_squared_grad_(
    accumulator_HOI: torch.Tensor,
    x_NHTI: torch.Tensor,
    dy_NHTO: torch.Tensor,
    weight: float = 1.0,
    bias_accumulator_HO: torch.Tensor | None = None,
) -> None:
    heads, n_out, n_in = accumulator_HOI.shape
    n_samples = x_NHTI.shape[0]
    tiles = -(-n_out * n_in // (TILE_ELEMENTS * torch.get_num_threads()))
    tile = -(-n_out // max(tiles, 1))  # of equal size: a narrow last one would be slow
    product_OI = torch.empty(tile, n_in, dtype=torch.float32, device="cpu")
    wide = x_NHTI.dtype == dy_NHTO.dtype == torch.float32
    for head in range(heads):
        # Half inputs are widened one sample at a time: a wide copy of the batch would double their memory.
        for samples in [range(n_samples)] if wide else [range(n, n + 1) for n in range(n_samples)]:
            x_all = x_NHTI[samples.start : samples.stop, head].float()
            dy_all = dy_NHTO[samples.start : samples.stop, head].float()
            for first in range(0, n_out, max(tile, 1)):
                last = min(first + tile, n_out)
                grad_OI, accumulator_OI = product_OI[: last - first], accumulator_HOI[head, first:last]
                rows = Rows()
                rows.add(rows.write(accumulator_OI), rows.read(grad_OI), grad_OI.numel(), DTYPES[torch.float32])
                for x_TI, dy_TO in zip(x_all, dy_all, strict=True):
                    # In float32 under autocast, too: products with out= are exempt from it.
                    torch.mm(dy_TO[:, first:last].T, x_TI, out=grad_OI)
                    call("ft_squared_grad_accumulate", rows, weight)
    if bias_accumulator_HO is not None:
        for head, bias_accumulator_O in enumerate(bias_accumulator_HO):
            per_sample_affine_squared_grad_(None, bias_accumulator_O, None, dy_NHTO[:, head], weight)
