"""Right or wrong: every operator against float64, run twice for the same bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .measure import Bench, Shape, poisoned_memory
from .records import Check, finite

Outputs = Sequence[Tensor]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ODD_SHAPES: list[Shape] = [(0,), (1,), (3, 5), (2, 3, 5, 7), (4096,), (129, 333), (100_003,)]
LAYOUTS = ("contiguous", "strided", "unaligned")
# One float32 rounding is 6e-8; the elementwise formulas chain about eight. Half outputs may fall to the neighbour.
RTOL = {torch.float32: 5e-7, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Case:
    """One call on one set of inputs."""

    name: str
    run: Callable[[], Outputs]
    """Runs the operator on fresh copies of the same inputs and returns whatever it wrote."""
    error: Callable[[Outputs], float]
    """Largest error of such outputs as a share of the tolerance."""


def check(operator: str, case: Case) -> Check:
    with poisoned_memory(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own operators that are not deterministic
        first = case.run()
        worst = case.error(first)
        repeatable = same_bits(first, case.run())
    return Check(operator, case.name, finite(worst), repeatable)


def dtypes_and_layouts() -> Iterator[tuple[str, torch.dtype, str]]:
    """Every dtype as it comes; the other layouts in one dtype, since every layout is a kernel more to compile."""
    for dtype in FLOATS:
        yield short(dtype), dtype, "contiguous"
    for layout in LAYOUTS[1:]:
        yield f"bf16, {layout}", torch.bfloat16, layout


def short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def read_only(tensors: Sequence[Tensor], layout: str) -> list[Tensor]:
    """The same values in another layout, beside NaN that must not be read."""
    if layout == "contiguous":
        return list(tensors)
    if layout == "strided":
        return [torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0] for t in tensors]
    return written(tensors, layout)


def written(tensors: Sequence[Tensor], layout: str) -> list[Tensor]:
    """Copies for an operator to write to; such tensors have to be contiguous, but may begin at any element."""
    if layout != "unaligned":
        return [t.clone() for t in tensors]
    shifted = [torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:] for t in tensors]
    return [s.view(t.shape) for s, t in zip(shifted, tensors, strict=True)]


# Errors as shares of a tolerance --------------------------------------------------------------------------------------


def doubles(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def ratios(actual: Tensor, expected: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> Tensor:
    """|actual − expected| over its tolerance atol + (rtol + that of actual's dtype)·|expected|; NaN is infinite."""
    allowed = atol + (rtol + RTOL[actual.dtype]) * expected.double().abs()
    ratio = (actual.double() - expected.double()).abs() / allowed
    return torch.where(actual == expected, 0.0, ratio.nan_to_num(nan=math.inf, posinf=math.inf))


def error(actual: Outputs, expected: Outputs, *, rtol: float = 0.0, atol: float = 0.0) -> float:
    """The largest of the :func:`ratios`."""
    pairs = zip(actual, expected, strict=True)
    return max((float(ratios(a, e, rtol=rtol, atol=atol).max()) for a, e in pairs if a.numel()), default=0.0)


def close(expected: Outputs, *, rtol: float = 0.0, atol: float = 0.0) -> Callable[[Outputs], float]:
    return lambda actual: error(actual, expected, rtol=rtol, atol=atol)


def wrong(actual: Outputs, expected: Outputs) -> float:
    """For answers that are right or wrong: 0 or infinity. Integers of any width compare by value."""
    pairs = list(zip(actual, expected, strict=True))
    return 0.0 if all(a.shape == e.shape and bool((a == e).all()) for a, e in pairs) else math.inf


def same_bits(first: Outputs, second: Outputs) -> bool:
    return all(
        a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(first, second, strict=True)
        if a.numel() or b.numel()
    )


def of_largest(tolerance: float) -> Callable[[Outputs, Outputs], float]:
    """For :attr:`Work.differs`: the error beside the largest element of each tensor, as a share of ``tolerance``."""

    def differs(actual: Outputs, expected: Outputs) -> float:
        shares = [
            float((a.double() - e.double()).abs().max()) / max(float(e.double().abs().max()), 1e-300)
            for a, e in zip(actual, expected, strict=True)
            if e.numel()
        ]
        return math.inf if any(map(math.isnan, shares)) else max(shares, default=0.0) / tolerance

    return differs


# More than 2³¹ elements -----------------------------------------------------------------------------------------------

WINDOW = 8192


def beyond(bench: Bench) -> int:
    """A number of elements that needs 64-bit offsets (a toy in a quick run)."""
    return 100_003 if bench.quick else 2**31 + 4099


def window(tensor: Tensor) -> Tensor:
    """The last elements of a flat tensor; of one with :func:`beyond` elements they lie on both sides of 2³¹."""
    return tensor[-WINDOW:]
