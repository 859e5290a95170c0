"""Fast or slow: one piece of work, ours and its rivals, each held to the same answer before it is timed."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, Generic, TypeVar

import torch

from .compare import Outputs
from .measure import Bench
from .records import Timing

P = TypeVar("P")
Contender = Callable[[P], Callable[[], Any]]
"""Prepares what it needs for a problem and returns the call that is timed; that call returns what it computed."""


@dataclass(frozen=True)
class Work(Generic[P]):
    """``small`` and ``large`` make the problem that answers are compared on and the one that is timed."""

    operator: str
    name: str
    what: str
    small: Callable[[], P]
    large: Callable[[], P]
    ours: Contender[P]
    differs: Callable[[Outputs, Outputs], float]
    """(a rival's outputs, ours) on the small problem → error as a share of the tolerance."""
    rivals: Mapping[str, Contender[P]] = field(default_factory=dict)
    baselines: Mapping[str, Contender[P]] = field(default_factory=dict)
    """Other work to compare with; nothing to hold it to."""
    n_bytes: float | None = None
    flops: float | None = None
    reduced: str = ""
    role: str = "rival"
    """``variant`` where the rivals are other ways to run our own operator."""
    seconds: float = 0.7
    """How long one of them may be measured."""


def race(bench: Bench, work: Work[P]) -> Iterator[Timing]:
    """Times baselines, ours, rivals. What a rival cannot do is noted; an error of ours is an error."""
    problem = work.large()
    yield from (_time(bench, work, problem, who, "baseline", c) for who, c in work.baselines.items())
    yield _time(bench, work, problem, "ours", "ours", work.ours)
    yield from (_time(bench, work, problem, who, work.role, c) for who, c in work.rivals.items())


def _time(bench: Bench, work: Work[P], problem: P, who: str, role: str, contender: Contender[P]) -> Timing:
    timing = Timing(work.operator, work.name, work.what, who, role, work.n_bytes, work.flops, work.reduced)
    call: Callable[[], Any] | None = None
    try:
        if role in ("rival", "variant"):
            off = work.differs(_answer(bench, work, contender), _answer(bench, work, work.ours))
            if not off <= 1:
                timing.note = f"wrong: off by {off:.2g} × the tolerance"
                return timing
        call = contender(problem)
        timing.peak_gib = bench.peak_gib(call)  # the first run: it compiles and fills caches, too
        timing.median_ms, timing.p10_ms, timing.p90_ms = bench.times(call, work.seconds)
    except torch.OutOfMemoryError:
        if role == "ours":
            raise
        timing.note = "out of memory"
    except ImportError as obstacle:
        if role == "ours":
            raise
        timing.note = f"not installed: {obstacle.name or obstacle}"
    except Exception as obstacle:
        if role == "ours":
            raise
        timing.note = f"{type(obstacle).__name__}: {str(obstacle).strip().partition(chr(10))[0][:160]}"
    finally:
        call = None
        bench.release()
    return timing


def _answer(bench: Bench, work: Work[P], contender: Contender[P]) -> Outputs:
    bench.reseed(f"{work.operator} {work.name}")
    outputs: Outputs = contender(work.small())()
    return outputs


# Chunks of the operators that stream lists; more registers or fewer waiting loads decide between them.
CHUNKS = [{"BLOCK": block, "num_warps": warps} for block, warps in ((1024, 4), (2048, 4), (4096, 8), (8192, 8))]


# Variants of ours -----------------------------------------------------------------------------------------------------


def with_variants(work: Work[P], variants: Mapping[str, Contender[P]]) -> Work[P]:
    """The same work, done by ours and by other ways to run ours."""
    return replace(work, rivals=variants, baselines={}, role="variant", seconds=0.3)


def with_backend(ours: Contender[P], setting: str) -> Contender[P]:
    """``ours`` on the implementation that FISHERTUNE_BACKEND names."""

    def contender(problem: P) -> Callable[[], Any]:
        call = ours(problem)

        def run() -> Any:
            before = os.environ.get("FISHERTUNE_BACKEND")
            os.environ["FISHERTUNE_BACKEND"] = setting
            try:
                return call()
            finally:
                if before is None:
                    del os.environ["FISHERTUNE_BACKEND"]
                else:
                    os.environ["FISHERTUNE_BACKEND"] = before

        return run

    return contender


def tiles(
    operator: str,
    ours: Contender[P],
    configs: Sequence[Mapping[str, int]],
    table: Callable[[ModuleType], dict[str, int]] = lambda module: module.CONFIG,
) -> dict[str, Contender[P]]:
    """Variants that run ``ours`` with other tile sizes in the table of the operator's Triton module."""
    return {
        " ".join(f"{key}={value}" for key, value in config.items()): _with_tile(operator, ours, config, table)
        for config in configs
    }


def _with_tile(
    operator: str, ours: Contender[P], config: Mapping[str, int], table: Callable[[ModuleType], dict[str, int]]
) -> Contender[P]:
    def contender(problem: P) -> Callable[[], Any]:
        entries = table(importlib.import_module(f"fishertune_kernels.{operator}.triton"))
        call = ours(problem)

        def run() -> Any:
            with _replaced(entries, config):
                return call()

        return run

    return contender


@contextmanager
def _replaced(entries: dict[str, int], config: Mapping[str, int]) -> Iterator[None]:
    before = dict(entries)
    entries.update(config)
    try:
        yield
    finally:
        entries.clear()
        entries.update(before)
