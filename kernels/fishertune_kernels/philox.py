"""Counter-based random numbers: the same draw for the same global element index, whatever the sharding or device.

Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) written in int64
torch arithmetic, and Box–Muller on top. The C++ and Triton kernels produce the same integers; their floats agree to a
few units in the last place (their logarithm and cosine differ).
"""

from __future__ import annotations

import math

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio and √3 − 1, added to the key every round
_LOW = 0xFFFFFFFF


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four 32-bit random words per counter. Words are int64 tensors with values in [0, 2³²); so are the results."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The product of two 32-bit words wraps around in int64, but its 64 bits are right; ``& _LOW`` after the
        # arithmetic shift drops the sign bits it drags in.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def standard_normal(
    count: int,
    *,
    seed: int,
    step: int,
    offset: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """ε for the global element indices ``offset … offset + count − 1``, a 1-D tensor of N(0, 1) draws.

    Key (seed low, seed high); counter (g>>2 low, g>>34, step low, step high) for global index g; one counter serves
    four neighbouring elements, element g takes lane g & 3. With u = (r>>8 + ½)·2⁻²⁴: lanes 0, 1 are
    √(−2 ln u₀)·{cos, sin}(2πu₁), lanes 2, 3 the same from u₂, u₃. 24 bits at every precision, so that float64 is the
    exact value of what float32 approximates. |ε| ≤ √(−2 ln 2⁻²⁵) = 5.89.
    """
    first = offset >> 2
    blocks = torch.arange(first, ((offset + count + 3) >> 2), device=device, dtype=torch.int64)
    step_low, step_high = torch.full_like(blocks, step & _LOW), torch.full_like(blocks, (step >> 32) & _LOW)
    words = philox4x32((blocks & _LOW, blocks >> 32, step_low, step_high), (seed & _LOW, (seed >> 32) & _LOW))
    u0, u1, u2, u3 = (((word >> 8).to(dtype) + 0.5) * 2.0**-24 for word in words)
    radius01, radius23 = torch.sqrt(-2 * torch.log(u0)), torch.sqrt(-2 * torch.log(u2))
    angle01, angle23 = 2 * math.pi * u1, 2 * math.pi * u3
    lanes = torch.stack(
        (
            radius01 * torch.cos(angle01),
            radius01 * torch.sin(angle01),
            radius23 * torch.cos(angle23),
            radius23 * torch.sin(angle23),
        ),
        dim=1,
    )
    start = offset - 4 * first
    return lanes.reshape(-1)[start : start + count]


def rounding_bits(elements: torch.Tensor, *, seed: int, step: int) -> torch.Tensor:
    """Sixteen random bits for each global element index of ``elements`` (int64), as int64 in [0, 2¹⁶).

    Key (seed low, seed high); counter (g>>2 low, g>>34 with its top bit set, step low, step high); the upper half of
    word g & 3. No index reaches that top bit, so these words are none of those :func:`standard_normal` uses.
    """
    blocks = elements >> 2
    step_low, step_high = torch.full_like(blocks, step & _LOW), torch.full_like(blocks, (step >> 32) & _LOW)
    counter = (blocks & _LOW, (blocks >> 32) | 0x80000000, step_low, step_high)
    words = torch.stack(philox4x32(counter, (seed & _LOW, (seed >> 32) & _LOW)))
    return words.gather(0, (elements & 3).unsqueeze(0)).squeeze(0) >> 16
