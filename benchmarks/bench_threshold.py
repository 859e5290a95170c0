"""Exact selection of the top 5 % of 100 M scores on a CPU: the threshold, then the indices.

    python -m pytest benchmarks/bench_threshold.py

Rivals run in the same process on the same scores, are checked against one another before timing and run before every
round of ours, so that a busy machine disturbs both sides alike. Required, as ratios of medians: the threshold ≥ 14 ×
faster than torch.kthvalue, ≥ 2 × faster than numpy.partition and without their copy of the scores; compaction ≥ 10 ×
faster than torch.nonzero. torch.sum, one read of the scores, is timed beside them as what neither can beat. Ours uses
every thread, numpy and kthvalue one. FISHERTUNE_BENCH_ELEMENTS sets another number of scores.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fishertune_kernels as fk

N = int(float(os.environ.get("FISHERTUNE_BENCH_ELEMENTS", "1e8")))
K = N // 20
MEDIANS: dict[str, float] = {}
EXTRA_BYTES: dict[str, int] = {}


@pytest.fixture(scope="module")
def scores() -> torch.Tensor:
    """Heavy-tailed like squared gradients, most of them small, over many binades."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(N).normal_(generator=generator).square_().mul_(torch.rand(N, generator=generator).pow_(4))


@pytest.fixture(scope="module")
def threshold(scores: torch.Tensor) -> fk.Threshold:
    return fk.select_threshold(scores, K)


def peak_growth(work: Callable[[], object]) -> int | None:
    """Bytes by which the resident set grew at most during ``work``; None where the kernel does not tell (not Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None

    def resident(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))

    before = resident("VmRSS")
    work()
    return max(0, resident("VmHWM") - before)


def timed(
    benchmark, name: str, work: Callable[[], object], rivals: dict[str, Callable[[], object]] | None = None
) -> None:
    """``rivals`` run before every round of ``work``."""
    work()
    for what, run in {name: work, **(rivals or {})}.items():
        grown = peak_growth(run)
        if grown is not None:
            EXTRA_BYTES[what] = round(grown / N, 3)
    seconds: dict[str, list[float]] = {rival: [] for rival in rivals or {}}

    def run_rivals() -> None:
        for rival, run in (rivals or {}).items():
            start = time.perf_counter()
            run()
            seconds[rival].append(time.perf_counter() - start)

    benchmark.pedantic(work, setup=run_rivals, rounds=11, warmup_rounds=1)
    MEDIANS[name] = benchmark.stats.stats.median
    MEDIANS.update({rival: statistics.median(times) for rival, times in seconds.items()})
    benchmark.extra_info |= {
        "threads": torch.get_num_threads(),
        "median_seconds": {what: MEDIANS[what] for what in (name, *seconds)},
        "extra_bytes_per_score": {what: EXTRA_BYTES[what] for what in (name, *seconds) if what in EXTRA_BYTES},
    }


@pytest.mark.benchmark(group="threshold")
def test_one_read(benchmark, scores):
    timed(benchmark, "torch.sum", lambda: scores.sum())


@pytest.mark.benchmark(group="threshold")
def test_threshold(benchmark, scores, threshold):
    array = scores.numpy()
    assert threshold.n_greater + threshold.n_ties_kept == K
    assert np.partition(array, N - K)[N - K] == threshold.value
    assert torch.kthvalue(scores, N - K + 1).values.item() == threshold.value
    rivals = {
        "numpy.partition": lambda: np.partition(array, N - K),
        "kthvalue": lambda: torch.kthvalue(scores, N - K + 1),
    }
    timed(benchmark, "threshold", lambda: fk.select_threshold(scores, K), rivals)


@pytest.mark.benchmark(group="compaction")
def test_compaction(benchmark, scores, threshold):
    [index] = fk.compact([scores], threshold)
    found = (scores > threshold.value).nonzero().squeeze(1)
    assert len(index) == K and len(found) == threshold.n_greater
    assert torch.isin(found, index, assume_unique=True).all()
    rivals = {"torch.nonzero": lambda: (scores >= threshold.value).nonzero()}
    timed(benchmark, "compaction", lambda: fk.compact([scores], threshold), rivals)


def test_goals():
    if len(MEDIANS) < 6:
        pytest.skip("needs the whole file in one run")
    ratios = {
        "threshold against kthvalue": (MEDIANS["kthvalue"] / MEDIANS["threshold"], 14),
        "threshold against numpy.partition": (MEDIANS["numpy.partition"] / MEDIANS["threshold"], 2),
        "compaction against torch.nonzero": (MEDIANS["torch.nonzero"] / MEDIANS["compaction"], 10),
    }
    for name in ("threshold", "compaction"):
        print(f"{name}: {MEDIANS[name] / MEDIANS['torch.sum']:.2f} reads of the scores")
    for name, (ratio, goal) in ratios.items():
        print(f"{name}: {ratio:.1f} x (goal {goal})")
    if "threshold" in EXTRA_BYTES:
        print(f"extra bytes per score: {EXTRA_BYTES}")
        assert EXTRA_BYTES["threshold"] < 0.1
    missed = [f"{name}: {ratio:.2f} < {goal}" for name, (ratio, goal) in ratios.items() if ratio < goal]
    assert not missed
