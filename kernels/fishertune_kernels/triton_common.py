# mypy: ignore-errors
# The bodies of @triton.jit functions are another language.
"""What the Triton kernels share: lists of tensors in one launch, random numbers, roundings.

A list operator cuts every tensor into chunks of BLOCK elements and starts one program per chunk. A program finds its
tensor through two small tables on the device, cached, because building them costs more than most launches:

- the layout (:func:`list_table`, ``layout`` and ``owners``): sizes and the chunk's owner; depends on the sizes only;
- the pointer table (``pointers``): row r holds the addresses of the operator's r-th list.

All offsets are int64: a tensor may have more than 2³¹ elements.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 before triton is imported)."""

TL_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


# Host -----------------------------------------------------------------------------------------------------------------


class ListTable(NamedTuple):
    """One launch over lists of tensors, as the kernels' first four arguments and their grid see it."""

    pointers: torch.Tensor
    """int64 (number of lists × number of tensors): addresses, list-major."""
    layout: torch.Tensor
    """int64 (2 or 3 × number of tensors): elements, first chunk, and the global index of the first element if given."""
    owners: torch.Tensor
    """int32 (number of chunks): which tensor a chunk belongs to."""
    n_tensors: int
    n_chunks: int
    aligned: bool
    """Whether every address is a multiple of 16 bytes, so that loads can be vectors."""

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        return self.pointers, self.layout, self.owners, self.n_tensors


def list_table(
    block: int,
    *lists: Sequence[torch.Tensor],
    offsets: Sequence[int] | None = None,
    scattered: int = 0,
) -> ListTable:
    """Tables of one launch with chunks of ``block`` elements; the last list's tensors give the sizes.

    With ``offsets`` (global index of each tensor's first element) chunks begin at multiples of four global elements,
    the size of a random-number block: a tensor's first chunk is then up to three elements short. A kernel that
    draws element by element may ignore that and leave a last chunk empty. The first ``scattered`` lists are read
    element by element, so their alignment says nothing.

    A call finds its tables by the tensors' addresses. Parameters and optimizer state stay where they are. Gradients
    that are freed every step (``zero_grad(set_to_none=True)``) come from torch's caching allocator, as a rule at the
    same addresses again, which is a look-up; where they moved, a new pointer table is written to pinned memory and
    copied on the current stream, and the host does not wait for the device.
    """
    sized = lists[-1]
    device = sized[0].device
    # A table is built on the current stream; another stream builds its own instead of waiting for this one's copy.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = tuple(tensor.data_ptr() for tensors in lists for tensor in tensors)
    sizes = tuple(tensor.numel() for tensor in sized)
    layout, owners, n_chunks = _layout(device, stream, block, sizes, None if offsets is None else tuple(offsets))
    pointers, aligned = _pointers(device, stream, addresses, sum(map(len, lists[:scattered])))
    return ListTable(pointers, layout, owners, len(sized), n_chunks, aligned)


@functools.lru_cache(maxsize=64)
def _layout(
    device: torch.device,
    stream: int,
    block: int,
    sizes: tuple[int, ...],
    offsets: tuple[int, ...] | None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    sizes_T = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    lead_T = torch.zeros_like(sizes_T) if offsets is None else torch.tensor(offsets, device="cpu") & 3
    chunks_T = torch.where(sizes_T > 0, (sizes_T + lead_T + block - 1) // block, 0)
    first_T = chunks_T.cumsum(0) - chunks_T
    rows = [sizes_T, first_T] if offsets is None else [sizes_T, first_T, torch.tensor(offsets, device="cpu")]
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32, device="cpu"), chunks_T)
    return _on_device(torch.stack(rows), device), _on_device(owners, device), owners.numel()


@functools.lru_cache(maxsize=256)
def _pointers(
    device: torch.device, stream: int, addresses: tuple[int, ...], n_scattered: int
) -> tuple[torch.Tensor, bool]:
    table = torch.frombuffer(array("q", addresses), dtype=torch.int64)  # several times faster than torch.tensor
    return _on_device(table, device), not bool((table[n_scattered:] & 15).any())


def _on_device(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return table.to(device)
    # Replays of a captured graph would read the host memory of this copy long after it served another table.
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A list of tensors is new to fishertune_kernels while a CUDA graph is being captured. Run the same step on "
            "the same tensors once on this stream before the capture; zero_grad(set_to_none=False) keeps gradients in "
            "place."
        )
    # The pinned block goes back to torch's host allocator at once, which hands it out again only after the copy.
    return table.pin_memory().to(device, non_blocking=True)


def by_dtype(*columns: Sequence[object]) -> Iterator[list[list]]:
    """The columns split into groups of rows whose tensors have the same dtypes: one launch each."""
    groups: dict[tuple[torch.dtype, ...], list[tuple[object, ...]]] = {}
    for row in zip(*columns, strict=True):
        key = tuple(entry.dtype for entry in row if isinstance(entry, torch.Tensor))
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        yield [list(column) for column in zip(*rows, strict=True)]


def launch(kernel: triton.JITFunction, programs: int, device: torch.device, *arguments: object, **options: object):
    """Run the kernel on a one-dimensional grid on the tensors' device; nothing to do is no launch."""
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*arguments, **options)


def words(number: int) -> tuple[int, int]:
    """Low and high 32 bits of a 64-bit counter as signed integers: kernels get one type whatever the value."""
    return signed_word(number), signed_word(number >> 32)


def signed_word(number: int) -> int:
    """The low 32 bits as a signed integer."""
    return (number & 0xFFFFFFFF) - ((number & 0x80000000) << 1)


# Device: lists --------------------------------------------------------------------------------------------------------


@triton.jit
def locate(layout, owners, n_tensors, chunk):
    """Which tensor this chunk belongs to, that tensor's size, and the chunk's number within it; all int64."""
    owner = tl.load(owners + chunk).to(tl.int64)
    size = tl.load(layout + owner)
    return owner, size, chunk - tl.load(layout + tl.cast(n_tensors, tl.int64) + owner)


@triton.jit
def pointer(pointers, n_tensors, owner, ROW: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Address of the owner's tensor in the ROW-th list."""
    address = tl.load(pointers + tl.cast(n_tensors, tl.int64) * ROW + owner).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def chunk_offsets(start, BLOCK: tl.constexpr):
    return start + tl.arange(0, BLOCK).to(tl.int64)


# Device: numbers ------------------------------------------------------------------------------------------------------


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest even, NaN kept. Spelled out for bfloat16, which the interpreter truncates."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        word = value.to(tl.uint32, bitcast=True)
        nearest = word + 0x7FFF + ((word >> 16) & 1)
        kept = tl.where(value != value, word | 0x400000, nearest)
        result = (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = value.to(DTYPE)
    return result


@triton.jit
def rounding_bits(element, seed_low, seed_high, step_low, step_high):
    """Sixteen random bits, as uint32, for every global index of a tensor (``philox.py`` has the definition)."""
    seed = (tl.cast(seed_high, tl.int64) << 32) | (tl.cast(seed_low, tl.int64) & 0xFFFFFFFF)
    low = ((element >> 2) & 0xFFFFFFFF).to(tl.uint32)
    high = (element >> 34).to(tl.uint32) | 0x80000000
    zero = tl.zeros_like(low)
    word0, word1, word2, word3 = tl.philox(
        seed, low, high, zero + tl.cast(step_low, tl.uint32), zero + tl.cast(step_high, tl.uint32)
    )
    even = tl.where((element & 2) != 0, word2, word0)
    odd = tl.where((element & 2) != 0, word3, word1)
    return tl.where((element & 1) != 0, odd, even) >> 16


@triton.jit
def stochastically_rounded(value, random):
    """float32 to bfloat16, up in magnitude if the dropped bits and the random ones carry; finite stays finite."""
    word = value.to(tl.uint32, bitcast=True)
    down = word >> 16
    moved = (word + random) >> 16
    finite = (word & 0x7F800000) != 0x7F800000
    result = tl.where(finite & ((moved & 0x7F80) != 0x7F80), moved, down)
    result = tl.where(value != value, 0x7FC0, result)
    return result.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def expm1(x):
    """e^x − 1 without cancellation near zero; the CUDA library's is out of the interpreter's reach."""
    # Taylor to x⁸: at |x| = 1/2 the next term is 1e-8 of the result.
    series = 1.0 / 5040 + x * (1.0 / 40320)
    series = 1.0 / 120 + x * (1.0 / 720 + x * series)
    series = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * series))
    return tl.where(tl.abs(x) < 0.5, x + x * x * series, tl.exp(x) - 1)


@triton.jit
def standard_normal(first, seed_low, seed_high, step_low, step_high, BLOCK: tl.constexpr):
    """ε of the global elements first … first + BLOCK − 1; ``first`` is a multiple of four.

    Philox-4x32-10: one counter gives the four words of four neighbouring elements; Box–Muller turns words 0, 1 into
    elements 0, 1 and words 2, 3 into elements 2, 3 (``philox.py`` has the definition).
    """
    seed = (tl.cast(seed_high, tl.int64) << 32) | (tl.cast(seed_low, tl.int64) & 0xFFFFFFFF)
    blocks = (first >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64)
    low = (blocks & 0xFFFFFFFF).to(tl.uint32)
    high = (blocks >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    word0, word1, word2, word3 = tl.philox(
        seed, low, high, zero + tl.cast(step_low, tl.uint32), zero + tl.cast(step_high, tl.uint32)
    )
    normal0, normal1 = _box_muller(word0, word1)
    normal2, normal3 = _box_muller(word2, word3)
    # join stacks along a new last axis: [n, 2, 2] in the order 0, 1, 2, 3.
    return tl.reshape(tl.join(tl.join(normal0, normal2), tl.join(normal1, normal3)), (BLOCK,))


@triton.jit
def _box_muller(word_radius, word_angle):
    uniform = ((word_radius >> 8).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 16777216)
    radius = tl.sqrt(-2 * tl.log(uniform))
    # The angle in 2⁻²⁴ turns is reduced to its nearest quarter turn in integers, exactly: tl.cos would bring float64
    # arithmetic and local memory for a range that cannot occur.
    turn = (word_angle >> 8).to(tl.int32)
    quarter = (turn + 2097152) >> 22
    x = ((turn - (quarter << 22)).to(tl.float32) + 0.5) * (1.5707963267948966 / 4194304)
    xx = x * x
    # |x| ≤ π/4: the first terms left out are 2e-9 of the sine and 5e-10 of the cosine.
    sine = x + x * xx * (-1.0 / 6 + xx * (1.0 / 120 + xx * (-1.0 / 5040 + xx * (1.0 / 362880))))
    cosine = 1 + xx * (-0.5 + xx * (1.0 / 24 + xx * (-1.0 / 720 + xx * (1.0 / 40320 + xx * (-1.0 / 3628800)))))
    odd = (quarter & 1) != 0
    along = tl.where(odd, sine, cosine)
    across = tl.where(odd, cosine, sine)
    along = tl.where(((quarter + 1) & 2) != 0, -along, along)
    across = tl.where((quarter & 2) != 0, -across, across)
    return radius * along, radius * across


@triton.jit
def ordered_key(value):
    """uint32 that orders as the float32 does; −0 counts as +0. NaN has a key too: mask it out."""
    word = value.to(tl.uint32, bitcast=True)
    word = tl.where(word == 0x80000000, 0, word)
    return tl.where(word >= 0x80000000, word ^ 0xFFFFFFFF, word | 0x80000000)
