"""Part after part, within the time: each finds something, fails, or is not begun; none stops the others."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Sequence

import torch

from .measure import Bench
from .operator import NotHere, Part
from .records import Check
from .results import Outcome, Results


class DeviceLost(Exception):
    """The GPU answers this process no longer; another process can go on."""


def run_parts(parts: Sequence[Part], bench: Bench, results: Results, until: float) -> None:
    """Runs what ``results`` does not hold yet; ``until`` is when it should be over, in seconds as of ``time.time()``.

    Raises:
        DeviceLost: after a part that failed so badly that nothing more can run here; its failure is recorded.
        KeyboardInterrupt: what was found until then is recorded.
    """
    for part in parts:
        if results.settled(part.name):
            say(f"{part.name}: in the file already")
        elif time.time() + part.seconds > until:
            left = max(0.0, until - time.time())
            results.put(part.name, Outcome("not run", note=f"takes about {part.seconds:.0f} s, {left:.0f} s were left"))
            say(f"{part.name}: not run, no time left")
        else:
            _run_part(part, bench, results, until)


def _run_part(part: Part, bench: Bench, results: Results, until: float) -> None:
    start = time.time()
    outcome = Outcome("running")
    results.put(part.name, outcome)
    bench.release()
    bench.reseed(part.name)
    try:
        for record in part.run(bench):
            outcome.records.append(record.without_figures() if bench.quick else record)
            if time.time() > until:
                outcome.state, outcome.note = "cut", "the time was up"
                break
        else:
            outcome.state = "done"
    except NotHere as reason:
        outcome.state, outcome.note = "not run", str(reason)
    except KeyboardInterrupt:
        outcome.state, outcome.note = "cut", "interrupted"
        raise
    except Exception as error:
        outcome.state, outcome.traceback = "failed", traceback.format_exc()
        outcome.note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        if not _answers(bench):
            raise DeviceLost(part.name) from error
    finally:
        if not bench.quick:
            outcome.seconds = round(time.time() - start, 1)
        results.put(part.name, outcome)
        say(f"{part.name}: {_verdict(outcome)}")


def _answers(bench: Bench) -> bool:
    """Whether the device still works: after an illegal access every call of the process fails."""
    try:
        bench.synchronize()
        return bool(torch.ones(1, device=bench.device).item())
    except RuntimeError:
        return False


def _verdict(outcome: Outcome) -> str:
    wrong = [record for record in outcome.records if isinstance(record, Check) and not record.passed]
    if wrong:
        return f"WRONG in {', '.join(check.case for check in wrong)}"
    return f"{outcome.state} {outcome.note}".strip()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def all_right(results: Results) -> bool:
    """Nothing wrong and nothing failed; parts that did not run are neither."""
    checks = [record for record in results.records() if isinstance(record, Check)]
    return not results.in_state("failed") and all(check.passed for check in checks)
