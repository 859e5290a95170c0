"""Inputs that show mistakes: odd sizes, fences around every written tensor, values with known float64 answers."""

import torch

# Empty, one, a tail, whole chunks, one element short of whole chunks, several chunks.
SIZES = [(0,), (1,), (3, 5), (4096,), (5, 9, 91), (9001,)]
CANARY = 7.25  # exact in every float dtype
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# One float32 rounding is 2⁻²⁴ = 6e-8 of its result; the elementwise formulas chain about eight of them.
RTOL = 5e-7
# A result rounded to half precision may fall to the neighbouring number: one unit in the last place.
HALF_ULP = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


class Fenced:
    """Tensors that lie inside larger buffers; :meth:`check` finds writes outside them."""

    def __init__(self, shift: int = 0):
        self._shift = shift  # elements; breaks the 16-byte alignment
        self._buffers: list[tuple[torch.Tensor, int, int]] = []

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        before = 64 + self._shift
        buffer = torch.full((tensor.numel() + before + 64,), CANARY, dtype=tensor.dtype)
        inner = buffer[before : before + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        self._buffers.append((buffer, before, before + tensor.numel()))
        return inner

    def check(self) -> None:
        for buffer, start, end in self._buffers:
            assert (buffer[:start] == CANARY).all(), "written before the tensor"
            assert (buffer[end:] == CANARY).all(), "written behind the tensor"


def normal(sizes, dtype=torch.float32, *, seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, generator=generator) * scale).to(dtype) for size in sizes]


def positive(sizes, dtype=torch.float32, *, seed: int) -> list[torch.Tensor]:
    """Over eight decades, as Fisher values are."""
    generator = torch.Generator().manual_seed(seed)
    return [(10 ** (torch.rand(size, generator=generator) * 8 - 8)).to(dtype) for size in sizes]


def doubles(tensors) -> list[torch.Tensor]:
    return [tensor.double() for tensor in tensors]


def assert_close(actual, expected, *, rtol: float = RTOL, atol: float = 0.0) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        tolerance = rtol + HALF_ULP[a.dtype]
        torch.testing.assert_close(a.double(), e.double(), rtol=tolerance, atol=atol, msg=lambda m, i=i: f"[{i}] {m}")
