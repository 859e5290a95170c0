"""What a file in ``parts/`` provides, and the parts that are made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .compare import Case, check
from .measure import Bench
from .race import Work, race
from .records import Record


@dataclass(frozen=True)
class Part:
    """What runs or does not run as a whole."""

    name: str
    seconds: float
    """How long it takes about, compiling included: it is not begun with less time left."""
    run: Callable[[Bench], Iterator[Record]]


@dataclass(frozen=True)
class Timed:
    """Works that are timed in one part."""

    name: str
    works: Callable[[Bench], Iterator[Work[Any]]]
    seconds: float = 8
    goal: bool = False
    """Whether a goal waits for it: it then runs before those that none does."""


@dataclass(frozen=True)
class Call:
    """One call whose kernel launches are counted."""

    case: str
    groups: int
    """Groups of dtypes in its lists: as many launches are promised."""
    run: Callable[[], object]


@dataclass(frozen=True)
class Operator:
    """One or a few public functions that stand in one folder of the kernel package."""

    name: str
    functions: tuple[str, ...]
    cases: Callable[[Bench], Iterator[Case]]
    """Against float64."""
    large: Callable[[Bench], Iterator[Case]] | None = None
    """With more than 2³¹ elements."""
    large_bytes: int = 0
    """What the largest of these needs."""
    timed: tuple[Timed, ...] = field(default_factory=tuple)
    variants: Callable[[Bench], Iterator[Work[Any]]] | None = None
    """Works whose rivals are other ways to run ours; the table says which one wins."""
    calls: Callable[[Bench], Iterator[Call]] | None = None
    """Calls that promise one launch per group of dtypes."""
    check_seconds: float = 12

    def checks(self) -> Part:
        return Part(f"check {self.name}", self.check_seconds, self._check)

    def large_checks(self) -> list[Part]:
        return [Part(f"check {self.name} beyond 2**31", 8, self._check_large)] if self.large else []

    def timings(self, goal: bool) -> list[Part]:
        return [
            Part(f"time {self.name}: {timed.name}", timed.seconds, _races(timed.works))
            for timed in self.timed
            if timed.goal == goal
        ]

    def variant_timings(self) -> list[Part]:
        return [Part(f"variants {self.name}", 15, _races(self.variants))] if self.variants else []

    def _check(self, bench: Bench) -> Iterator[Record]:
        for case in self.cases(bench):
            yield check(self.name, case)

    def _check_large(self, bench: Bench) -> Iterator[Record]:
        assert self.large is not None
        if not bench.quick and bench.free_bytes() < 1.1 * self.large_bytes:
            raise NotHere(
                f"needs {self.large_bytes / 2**30:.0f} GiB of free GPU memory, {bench.free_bytes() / 2**30:.0f} are"
            )
        for case in self.large(bench):
            yield check(self.name, case)


class NotHere(Exception):
    """This machine cannot run the part, for the reason given."""


def _races(works: Callable[[Bench], Iterator[Work[Any]]]) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        for work in works(bench):
            yield from race(bench, work)

    return run
