"""What the kernels are to reach on a GPU, held against what was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .parts import OPERATORS, fisher, per_sample_squared_grad, selection, sparse_adamw
from .parts.limits import COPY
from .records import Check, Launches, Limit, Record, Timing

PASS, SHORT, NOT_RUN = "pass", "falls short", "not run"


@dataclass(frozen=True)
class Verdict:
    goal: str
    asked: str
    state: str
    found: float | None = None
    note: str = ""


class Missing(Exception):
    """A figure that was not measured, and why."""


class Facts:
    """Look-ups in the records of a run."""

    def __init__(self, records: Iterable[Record]):
        records = list(records)
        self.checks = [r for r in records if isinstance(r, Check)]
        self.limits = {r.name: r for r in records if isinstance(r, Limit)}
        self.timings = {(r.operator, r.work, r.who): r for r in records if isinstance(r, Timing)}
        self.launches = [r for r in records if isinstance(r, Launches)]

    def timing(self, operator: str, work: str, who: str = "ours") -> Timing:
        found = self.timings.get((operator, work, who))
        if found is None:
            raise Missing(f"{who} on {operator}, {work}, was not timed")
        if found.median_ms is None:
            raise Missing(f"{who} on {operator}, {work}: {found.note or 'no figure'}")
        return found

    def ms(self, operator: str, work: str, who: str = "ours") -> float:
        ms = self.timing(operator, work, who).median_ms
        assert ms is not None
        return ms

    def bytes_per_ms(self) -> float:
        limit = self.limits.get(COPY)
        if limit is None or limit.per_second is None:
            raise Missing("copy bandwidth was not measured")
        return limit.per_second / 1e3

    def wrong(self, operator: str) -> bool:
        return any(check.operator == operator and not check.passed for check in self.checks)

    def unchecked(self, operator: str) -> bool:
        return not any(check.operator == operator for check in self.checks)


@dataclass(frozen=True)
class Goal:
    name: str
    operator: str
    """Whose checks must have passed: a fast wrong answer reaches no goal."""
    bound: float
    measure: Callable[[Facts], tuple[float, str]]
    """The figure, and a note."""
    at_least: bool = True
    unit: str = "×"

    @property
    def asked(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {figure(self.bound, self.unit)}"

    def judge(self, facts: Facts) -> Verdict:
        try:
            found, note = self.measure(facts)
        except Missing as reason:
            return Verdict(self.name, self.asked, NOT_RUN, note=str(reason))
        met = found >= self.bound if self.at_least else found <= self.bound
        if facts.unchecked(self.operator):
            return Verdict(self.name, self.asked, NOT_RUN, found, f"{self.operator} was not checked. {note}".strip())
        if facts.wrong(self.operator):
            return Verdict(self.name, self.asked, SHORT, found, f"{self.operator} is wrong. {note}".strip())
        return Verdict(self.name, self.asked, PASS if met else SHORT, found, note)


def figure(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "%" else f"{value:.3g} {unit}".strip()


# The figures ----------------------------------------------------------------------------------------------------------


def bandwidth(operator: str, work: str) -> Callable[[Facts], tuple[float, str]]:
    def measure(facts: Facts) -> tuple[float, str]:
        timing = facts.timing(operator, work)
        assert timing.n_bytes is not None and timing.median_ms is not None
        return timing.n_bytes / timing.median_ms / facts.bytes_per_ms(), _note(timing)

    return measure


def reads(facts: Facts) -> tuple[float, str]:
    """One read of the scores, at the bandwidth of a copy."""
    timing = facts.timing(selection.THRESHOLD, "5 %")
    assert timing.n_bytes is not None and timing.median_ms is not None
    return timing.median_ms / (timing.n_bytes / facts.bytes_per_ms()), _note(timing)


def speedup(operator: str, work: str, rival: str) -> Callable[[Facts], tuple[float, str]]:
    def measure(facts: Facts) -> tuple[float, str]:
        timing = facts.timing(operator, work)
        return facts.ms(operator, work, rival) / facts.ms(operator, work), _note(timing)

    return measure


def product_rate(model: str) -> Callable[[Facts], tuple[float, str]]:
    def measure(facts: Facts) -> tuple[float, str]:
        """The slowest layer counts."""
        operator = per_sample_squared_grad.NAME
        works = {layer: f"{model} {layer} bf16" for layer in per_sample_squared_grad.LAYERS}
        rates = {
            layer: facts.ms(operator, work, "weight gradient") / facts.ms(operator, work)
            for layer, work in works.items()
        }
        return min(rates.values()), ", ".join(f"{layer} {rate:.0%}" for layer, rate in rates.items())

    return measure


def fisher_ratio(work: str) -> Callable[[Facts], tuple[float, str]]:
    def measure(facts: Facts) -> tuple[float, str]:
        plain = facts.ms(fisher.NAME, work, fisher.PLAIN)
        beside = []
        for (operator, work_, who), timing in facts.timings.items():
            if (operator, work_) == (fisher.NAME, work) and timing.role == "rival":
                time = timing.note if timing.median_ms is None else f"{timing.median_ms / plain:.2f} ×"
                beside.append(f"{who} {time}")
        ours = facts.timing(fisher.NAME, work)
        return facts.ms(fisher.NAME, work) / plain, ", ".join([*beside, *filter(None, [ours.reduced])])

    return measure


def extra_launches(facts: Facts) -> tuple[float, str]:
    """The most launches of any call, per group of dtypes."""
    if not facts.launches:
        raise Missing("launches were not counted")
    for record in facts.launches:
        if record.launches is None:
            raise Missing(record.note or "no figure")
    share = {f"{r.operator} ({r.case})": (r.launches or 0) / r.groups for r in facts.launches}
    worst = max(share, key=lambda name: abs(share[name] - 1))
    more = [name for name, value in share.items() if value > 1]
    return share[worst], f"more than one: {', '.join(more)}" if more else f"{len(share)} calls"


def _note(timing: Timing) -> str:
    return f"{timing.what}{'; ' + timing.reduced if timing.reduced else ''}"


STREAMS = tuple(
    (operator.name, timed.name) for operator in OPERATORS for timed in operator.timed if timed.name == "stream"
)
GOALS: tuple[Goal, ...] = (
    *(
        Goal(f"{operator}: share of the measured copy bandwidth", operator, 0.85, bandwidth(operator, work), unit="%")
        for operator, work in STREAMS
    ),
    Goal("threshold of 632 M scores: time in reads of the scores", selection.THRESHOLD, 1.5, reads, at_least=False,
         unit="reads"),
    Goal("threshold of 632 M scores: torch.topk's time / ours", selection.THRESHOLD, 30,
         speedup(selection.THRESHOLD, "5 %", "torch.topk")),
    Goal("sparse step, bf16, random 5 %: torch fused AdamW's time / ours", sparse_adamw.NAME, 4,
         speedup(sparse_adamw.NAME, "bf16 random 5 %", "torch fused AdamW, dense")),
    Goal("per-sample squares, ViT-L: share of cuBLAS's weight-gradient rate", per_sample_squared_grad.NAME, 0.6,
         product_rate("ViT-L"), unit="%"),
    Goal("per-sample squares, SAM-H: share of cuBLAS's weight-gradient rate", per_sample_squared_grad.NAME, 0.6,
         product_rate("SAM-H"), unit="%"),
    Goal("exact Fisher of ViT-L, 512 px, batch 8, bf16 autocast: time / plain pass", fisher.NAME, 1.3,
         fisher_ratio("bf16 autocast"), at_least=False),
    Goal("exact Fisher of ViT-L, 512 px, batch 8, fp32: time / plain pass", fisher.NAME, 1.3, fisher_ratio("fp32"),
         at_least=False),
    Goal("launches per group of dtypes and call, worst of all list operators", sparse_adamw.NAME, 1, extra_launches,
         at_least=False, unit=""),
)  # fmt: skip


def judge(records: Iterable[Record]) -> list[Verdict]:
    facts = Facts(records)
    return [goal.judge(facts) for goal in GOALS]


def to_json(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    return [asdict(verdict) for verdict in verdicts]
