"""The tables printed at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .goals import GOALS, SHORT, Facts, Verdict, figure
from .parts.limits import COPY, PRODUCT
from .records import Check, Limit, Profile, Timing
from .results import Results

QUICK = "quick: the logic only, on a CPU at toy sizes; its times mean nothing and no GPU was measured"


def report(results: Results, verdicts: Sequence[Verdict]) -> str:
    records = list(results.records())
    facts = Facts(records)
    sections = [_checks(facts.checks)]
    if results.about["quick"]:
        sections.append(QUICK)
    else:
        timings = list(facts.timings.values())
        sections += [
            _limits(facts.limits.values()),
            _timings(timings, facts.limits),
            _variants(timings),
            _launches(facts),
            *(_profile(record) for record in records if isinstance(record, Profile) and record.slowest),
        ]
    sections += [_troubles(results), _goals(verdicts)]
    return "\n\n".join(section for section in sections if section)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rows = [header, *rows]
    if len(rows) == 1:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _checks(checks: Sequence[Check]) -> str:
    """A row per operator; every case that is wrong has one of its own."""
    rows = []
    for operator in dict.fromkeys(check.operator for check in checks):
        ours = [check for check in checks if check.operator == operator]
        passed = [check for check in ours if check.passed]
        worst = max((check.error or 0.0 for check in passed), default=0.0)
        rows.append((operator, f"{len(passed)} of {len(ours)} right", f"{worst:.2g}", ""))
        rows += [
            (operator, check.case, "∞" if check.error is None else f"{check.error:.2g}", _wrong(check))
            for check in ours
            if not check.passed
        ]
    return table(("operator", "checks", "error / tolerance", ""), rows)


def _wrong(check: Check) -> str:
    return "WRONG" if check.error is None or check.error > 1 else "WRONG: a second run gave other bits"


def _limits(limits: Iterable[Limit]) -> str:
    units = {COPY: (1e9, "GB/s")}
    rows = []
    for limit in limits:
        scale, unit = units.get(limit.name, (1e12, "TFLOP/s"))
        if limit.per_second is not None:
            rows.append((limit.name, f"{limit.per_second / scale:.4g} {unit}", limit.what))
    return table(("this card", "measured", ""), rows)


def _timings(timings: Sequence[Timing], limits: dict[str, Limit]) -> str:
    rows = []
    for ours in timings:
        if ours.role != "ours" or ours.median_ms is None:
            continue
        beside = [t for t in timings if (t.operator, t.work) == (ours.operator, ours.work) and t.role != "variant"]
        others = [
            f"{t.who} {t.note if t.median_ms is None else f'{t.median_ms / ours.median_ms:.2f} ×'}"
            for t in beside
            if t is not ours
        ]
        spread = f"{ours.median_ms:.3f} ({ours.p10_ms:.3f}–{ours.p90_ms:.3f})"
        memory = "" if ours.peak_gib is None else f"{ours.peak_gib:.2f}"
        rows.append((ours.operator, ours.what, spread, share(ours, limits), memory, ", ".join(others)))
    header = ("operator", "work", "median ms (10–90 %)", "of limit", "extra GiB", "others' time / ours")
    return table(header, rows)


def share(timing: Timing, limits: dict[str, Limit]) -> str:
    """Of the roof above it: the bandwidth or the product rate, whichever would take this work longer."""
    if timing.median_ms is None:
        return ""
    floors = []
    for name, amount in ((COPY, timing.n_bytes), (PRODUCT, timing.flops)):
        rate = limits[name].per_second if name in limits else None
        if amount and rate:
            floors.append(amount / rate * 1e3)
    return f"{max(floors) / timing.median_ms:.0%}" if floors else ""


def _variants(timings: Sequence[Timing]) -> str:
    rows = []
    for operator, work in dict.fromkeys((t.operator, t.work) for t in timings if t.role == "variant"):
        those = [t for t in timings if (t.operator, t.work) == (operator, work) and t.role in ("ours", "variant")]
        timed = sorted((t for t in those if t.median_ms is not None), key=lambda t: t.median_ms or 0.0)
        for place, timing in enumerate(timed):
            rows.append((operator, work, timing.who, f"{timing.median_ms:.3f}", "wins" if place == 0 else ""))
        rows += [(operator, work, t.who, "", t.note) for t in those if t.median_ms is None]
    return table(("operator", "work", "variant", "median ms", ""), rows)


def _launches(facts: Facts) -> str:
    rows = [
        (record.operator, record.case, "" if record.launches is None else str(record.launches), str(record.groups),
         record.note)
        for record in facts.launches
    ]  # fmt: skip
    return table(("operator", "call", "launches", "groups of dtypes", ""), rows)


def _profile(record: Profile) -> str:
    assert record.slowest is not None
    rows = [(str(name)[:80], f"{ms:.3f}", str(number)) for name, ms, number in record.slowest[:6]]
    title = f"{record.what}: {record.launches} launches, kernels {record.kernel_ms:.3f} ms of {record.wall_ms:.3f} ms"
    return title + "\n" + table(("slowest kernels", "ms", "launches"), rows)


def _troubles(results: Results) -> str:
    rows = [(name, outcome.state, outcome.note) for name, outcome in results.in_state("failed").items()]
    rows += [
        (name, "not run" if outcome.state != "cut" else "cut", outcome.note)
        for name, outcome in results.in_state("not run", "cut", "running").items()
    ]
    return table(("part", "what became of it", ""), rows)


def _goals(verdicts: Sequence[Verdict]) -> str:
    units = {goal.name: goal.unit for goal in GOALS}
    rows = [
        (
            verdict.goal,
            verdict.asked,
            "" if verdict.found is None else figure(verdict.found, units[verdict.goal]),
            verdict.state.upper() if verdict.state == SHORT else verdict.state,
            verdict.note,
        )
        for verdict in verdicts
    ]
    return table(("goal", "asked", "found", "verdict", "note"), rows)
