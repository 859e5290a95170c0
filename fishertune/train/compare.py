"""Several methods from one configuration, sharing warm-up and estimates, one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fishertune.train.config import RunConfig
from fishertune.train.pipeline import run
from fishertune.train.progress import Reporter
from fishertune.train.setup import build_data


def compare(
    config: RunConfig,
    methods: Sequence[str],
    out: str | Path,
    *,
    learning_rates: dict[str, float] | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Runs each method in ``out/METHOD``; the same warm-up, the same batches, the same budget of steps.

    Args:
        config: everything but the method.
        methods: names of :func:`fishertune.methods.list_methods`.
        out: folder of the runs.
        learning_rates: rate of the backbone by method, where it differs from the configuration's.
        resume: continue earlier runs; finished ones are kept.
        reporter: where progress goes.

    Returns:
        The metrics of each run, in the order of ``methods``.
    """
    reporter = reporter or Reporter()
    out = Path(out)
    data = build_data(config.data, reporter)
    results = []
    for number, method in enumerate(methods, start=1):
        reporter.line(f"[bold]{method}[/bold] ({number} of {len(methods)})")
        lr = (learning_rates or {}).get(method, config.tune.lr)
        chosen = replace(config, method=method, tune=replace(config.tune, lr=lr))
        results.append(run(chosen, out / method, resume=resume, reporter=reporter, cache=out / "shared", data=data))
    return results
