"""Runs the parts in a process of their own: one that kills it (an illegal access, a kernel that never ends) is recorded
as failed, and a new process goes on behind it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .results import Results
from .runner import say

FINISHED, INTERRUPTED = 0, 130
PATIENCE = 60.0
"""Seconds that any part may take beyond three times its estimate before it counts as hanging."""
GRACE = 15.0
"""Seconds that the part which runs when the time is up has to finish its current measurement."""


def supervise(
    command: Sequence[str], path: Path, estimates: Mapping[str, float], until: float, patience: float = PATIENCE
) -> int:
    """Starts ``command``, which goes on with the file at ``path``, until it says that it has finished.

    Args:
        command: a worker: it marks in the file which part it runs, and exits with 0 when no part is left.
        path: the results' file; it exists.
        estimates: seconds by part.
        until: when it should be over, as of ``time.time()``.
        patience: see PATIENCE.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        SystemExit: if a worker ends without having come further than the one before.
    """
    settled = -1
    while True:
        worker = subprocess.Popen(command)
        code, ended = _watch(worker, path, estimates, until, patience)
        if code in (FINISHED, INTERRUPTED):
            return code
        results = Results.read(path)
        running = results.in_state("running")
        for name, outcome in running.items():
            outcome.state = "cut" if ended is _LATE else "failed"
            outcome.note = ended or _how(code)
            say(f"{name}: {outcome.note}")
        results.write()
        before, settled = settled, sum(map(results.settled, estimates))
        if settled <= max(before, 0) and not running:
            raise SystemExit(f"gpu_acceptance: the worker does not come further ({_how(code)}); its message is above.")
        if settled == len(estimates) or time.time() > until:
            return FINISHED


_HUNG, _LATE = "hung, and was ended", "still ran when the time was up, and was ended"


def _watch(
    worker: subprocess.Popen[bytes], path: Path, estimates: Mapping[str, float], until: float, patience: float
) -> tuple[int, str]:
    """The worker's exit status, and why it was ended if it did not end by itself."""
    part, since = "", time.time()
    while True:
        try:
            return worker.wait(timeout=0.5), ""
        except subprocess.TimeoutExpired:
            running = next(iter(Results.read(path).in_state("running")), "")
            if running != part:
                part, since = running, time.time()
            now = time.time()
            hangs = bool(part) and now - since > 3 * estimates[part] + patience
            if hangs or (part and now > until + GRACE):
                worker.kill()
                return worker.wait(), _HUNG if hangs else _LATE
        except KeyboardInterrupt:  # the worker got it too and records what it has
            worker.wait()
            return INTERRUPTED, ""


def _how(code: int) -> str:
    return f"the process died of {signal.Signals(-code).name}" if code < 0 else f"the process ended with status {code}"
