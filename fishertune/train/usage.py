"""Seconds and peak memory of a stage."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch


@dataclass
class Usage:
    """Measures a ``with`` block; resumed stages add up.

    Attributes:
        seconds: wall time spent, over all sessions that worked on the stage.
        peak_memory_bytes: largest memory in use, of the GPU where there is one, else of the process.
    """

    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def __enter__(self) -> Usage:
        self._start = time.perf_counter()
        _reset_peak()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stamp()

    def stamp(self) -> None:
        """Brings both figures up to now; for checkpoints inside the block."""
        now = time.perf_counter()
        self.seconds += now - self._start
        self._start = now
        self.peak_memory_bytes = max(self.peak_memory_bytes, _peak())

    def to_plain(self) -> dict[str, float | int]:
        return {"seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_memory_bytes}


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:  # Linux: 5 resets the high-water mark of resident memory
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # elsewhere the figure is the process's peak so far


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
