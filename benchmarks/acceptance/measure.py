"""The device that is measured: its random data, its memory, its clock."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Shape = tuple[int, ...]
P = TypeVar("P")


class Spread(NamedTuple):
    """Of repeated runs, in ms."""

    median: float
    p10: float
    p90: float


class Rotation(Generic[P]):
    """Sets of buffers used in turn, so that no run finds its data in the cache of the one before."""

    def __init__(self, sets: Sequence[P]):
        self._turns = itertools.cycle(sets)

    def next(self) -> P:
        return next(self._turns)


class Bench:
    """One device. ``quick`` shrinks every size to a toy and every measurement to one run."""

    def __init__(self, device: torch.device, seed: int, quick: bool = False):
        self.device, self.seed, self.quick = device, seed, quick
        self.generator = torch.Generator(device)
        self.reseed("")

    # Random data ------------------------------------------------------------------------------------------------------

    def reseed(self, what: str) -> None:
        """The draws that follow are a function of the seed and of ``what``, whatever ran before."""
        self.generator.manual_seed(self.seed ^ zlib.crc32(what.encode()))

    def normal(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def positive(self, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        """Over six decades, as Fisher values are."""
        exponent = torch.rand(shape, generator=self.generator, device=self.device)
        return exponent.mul_(6 * math.log(10)).sub_(6 * math.log(10)).exp_().to(dtype)

    def normals(self, shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [self.normal(shape, dtype) for shape in shapes]

    def positives(self, shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [self.positive(shape, dtype) for shape in shapes]

    def zeros(self, shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype, device=self.device) for shape in shapes]

    def selection(self, shapes: Sequence[Shape], fraction: float, dtype: torch.dtype = torch.int32) -> list[Tensor]:
        """Rising flat indices of a random ``fraction`` of every tensor."""
        return [
            (torch.rand(math.prod(shape), generator=self.generator, device=self.device) < fraction)
            .nonzero()
            .squeeze(1)
            .to(dtype)
            for shape in shapes
        ]

    # Sizes ------------------------------------------------------------------------------------------------------------

    def backbone(self, bytes_per_element: float) -> tuple[list[Shape], str]:
        """The weights of SAM-H's image encoder (632 M), or of as many of its blocks as the memory allows.

        Args:
            bytes_per_element: what the work and its data hold at the peak.

        Returns:
            The shapes, and why they are fewer than asked for (empty where they are not).
        """
        if self.quick:
            return vit_shapes(width=32, blocks=2), ""
        if self.device.type != "cuda":
            return vit_shapes(width=1280, blocks=2), "2 of 32 blocks, on a CPU"
        shapes = vit_shapes(width=1280, blocks=32)
        n, room = count(shapes), 0.8 * self.free_bytes() / bytes_per_element
        if n <= room:
            return shapes, ""
        blocks = max(1, int(32 * room / n) - 1)
        return vit_shapes(1280, blocks), f"{blocks} of 32 blocks, all that fits into memory"

    def free_bytes(self) -> float:
        if self.device.type != "cuda":
            return 4 * 2.0**30
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def rotation(self, make: Callable[[], P], n_bytes: float) -> Rotation[P]:
        """As many sets of ``n_bytes`` each as together exceed the second-level cache four times."""
        if self.device.type != "cuda":
            return Rotation([make(), make()])
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        return Rotation([make() for _ in range(min(64, max(2, math.ceil(4 * cache / n_bytes))))])

    # Time -------------------------------------------------------------------------------------------------------------

    def times(self, call: Callable[[], object], seconds: float = 0.7) -> Spread:
        """Median, 10th and 90th percentile of as many runs as fit into ``seconds``, of a call that ran before.

        At least 10 runs of what is fast, 3 of what is slow, 1 of what takes longer than ``seconds`` four times. On a
        GPU they are enqueued one behind the other and timed by events: the host's share shows only where the GPU has to
        wait for it.
        """
        self.synchronize()
        start = time.perf_counter()
        call()
        self.synchronize()
        once = time.perf_counter() - start
        if once > 4 * seconds:
            return _spread([1e3 * once])
        slow = once > 0.2
        for _ in range(0 if slow or self.quick else 2):
            call()
        repeats = 2 if self.quick else min(50, max(3 if slow else 10, int(seconds / once)))
        return _spread(self._timed(call, repeats))

    def _timed(self, call: Callable[[], object], repeats: int) -> list[float]:
        if self.device.type != "cuda":
            ticks = [time.perf_counter()]
            for _ in range(repeats):
                call()
                ticks.append(time.perf_counter())
            return [1e3 * (end - begin) for begin, end in itertools.pairwise(ticks)]
        begins = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
        for begin, end in zip(begins, ends, strict=True):
            begin.record()
            call()
            end.record()
        self.synchronize()
        return [begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True)]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # Memory -----------------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Gives back what nobody holds, so that the next one finds the memory whole."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def peak_gib(self, call: Callable[[], object]) -> float | None:
        """Memory that one run takes beyond what is there before it."""
        if self.device.type != "cuda":
            call()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**30


def vit_shapes(width: int, blocks: int, tokens: int = 1024) -> list[Shape]:
    """Patch and position embedding and the linear layers of a plain ViT's blocks: weights and biases."""
    w = width
    block: list[Shape] = [(3 * w, w), (3 * w,), (w, w), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return [(w, 3, 16, 16), (1, tokens, w), *block * blocks]


def count(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def elements(shapes: Sequence[Shape]) -> str:
    return f"{count(shapes) / 1e6:.4g} M"


def _spread(times: list[float]) -> Spread:
    times = sorted(times)
    last = len(times) - 1
    return Spread(statistics.median(times), times[round(0.1 * last)], times[round(0.9 * last)])


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that an output element nobody wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
