"""What a part finds: plain records that go into the JSON file and come back from it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

FIGURE = {"measured": True}
"""Marks a field that holds a figure of the machine."""


@dataclass
class Record:
    KIND: ClassVar[str]

    def without_figures(self) -> Record:
        """As a quick run keeps it: nothing in it can be quoted."""
        measured = {f.name: None for f in dataclasses.fields(self) if f.metadata == FIGURE}
        return dataclasses.replace(self, **measured)


@dataclass
class Check(Record):
    KIND = "check"
    operator: str
    case: str
    error: float | None
    """Largest error as a share of the tolerance; None is infinite or NaN (JSON has neither)."""
    repeatable: bool | None = None
    """Whether a second run gave the same bits; None where it was not tried."""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= 1 and self.repeatable is not False


@dataclass
class Limit(Record):
    """Something this card can do at most, measured."""

    KIND = "limit"
    name: str
    what: str
    per_second: float | None = field(default=None, metadata=FIGURE)
    """Bytes or operations."""


@dataclass
class Timing(Record):
    KIND = "timing"
    operator: str
    work: str
    """Which work of this operator, the same at every size."""
    what: str
    """The work with its size."""
    who: str
    role: str
    """``ours``, ``baseline`` (other work, to compare with), ``rival`` (the same work) or ``variant`` (of ours)."""
    n_bytes: float | None = None
    """What the work has to move at least."""
    flops: float | None = None
    reduced: str = ""
    """Why the work is smaller than it should be; empty where it is not."""
    note: str = ""
    """Why there is no time: not installed, out of memory, wrong, …"""
    median_ms: float | None = field(default=None, metadata=FIGURE)
    p10_ms: float | None = field(default=None, metadata=FIGURE)
    p90_ms: float | None = field(default=None, metadata=FIGURE)
    peak_gib: float | None = field(default=None, metadata=FIGURE)
    """Memory at the peak beyond what the problem itself holds."""


@dataclass
class Launches(Record):
    KIND = "launches"
    operator: str
    case: str
    groups: int
    """Groups of dtypes in the lists: as many launches are promised."""
    launches: int | None = field(default=None, metadata=FIGURE)
    kernels: dict[str, int] | None = field(default=None, metadata=FIGURE)
    note: str = ""


@dataclass
class Profile(Record):
    KIND = "profile"
    what: str
    note: str = ""
    wall_ms: float | None = field(default=None, metadata=FIGURE)
    kernel_ms: float | None = field(default=None, metadata=FIGURE)
    launches: int | None = field(default=None, metadata=FIGURE)
    slowest: list[list[Any]] | None = field(default=None, metadata=FIGURE)
    """[kernel, ms, launches], slowest first."""


KINDS: dict[str, type[Record]] = {kind.KIND: kind for kind in (Check, Limit, Timing, Launches, Profile)}


def to_json(record: Record) -> dict[str, Any]:
    return {"kind": record.KIND, **vars(record)}


def from_json(entry: dict[str, Any]) -> Record:
    return KINDS[entry["kind"]](**{name: value for name, value in entry.items() if name != "kind"})


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
