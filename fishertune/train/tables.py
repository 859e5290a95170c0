"""The one table a run ends with: methods down, domains across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def metrics_table(runs: Sequence[dict[str, Any]]) -> Table:
    """mIoU in per cent of each run (a ``metrics.json``) on the source and every unseen domain."""
    unseen = [name for name in runs[0]["domains"] if name != "source"]
    table = Table(title="mIoU, %")
    table.add_column("method")
    table.add_column("tuned", justify="right")
    table.add_column("source (held out)", justify="right")
    for name in unseen:
        table.add_column(name, justify="right")
    table.add_column("unseen mean", justify="right", style="bold")
    for run in runs:
        domains = run["domains"]
        table.add_row(
            run["method"],
            f"{run['tuned_parameters']:,}",
            _percent(domains.get("source", {}).get("miou")),
            *(_percent(domains[name]["miou"]) if name in domains else "" for name in unseen),
            _percent(run["unseen_mean"]),
        )
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"
