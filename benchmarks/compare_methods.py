"""Methods side by side on one configuration: several seeds, each learning rate chosen on held-out source frames.

    python benchmarks/compare_methods.py configs/camvid_dinov2_s.yaml --out runs/camvid --seeds 0 1 2

Every run has the same warm-up, batches and budget of steps. The rate of a method is the one with the best mIoU on the
held-out source frames, averaged over the seeds of the search; unseen domains play no part in it. Finished runs are
kept: the command can be stopped and given again, and several seeds can run side by side in one ``--out``. Writes
``result.json`` and ``result.md`` there.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fishertune.files import atomic_write, save_json
from fishertune.train.config import RunConfig, load_config, to_plain
from fishertune.train.pipeline import run
from fishertune.train.progress import Reporter

METHODS = ("freeze", "full", "random", "fisher", "fishertune")
RATES = {"full": (1e-5, 3e-5, 1e-4), "freeze": (0.0,)}
SPARSE_RATES = (1e-4, 3e-4, 1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument(
        "--rates", nargs="*", default=[], metavar="METHOD=RATE,RATE", help="rates to try instead of the built-in ones"
    )
    parser.add_argument("--search-seeds", nargs="+", type=int, default=[0], help="seeds the rate is chosen on")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    reporter = Reporter()
    rates_of = {method: RATES.get(method, SPARSE_RATES) for method in options.methods}
    for item in options.rates:
        method, _, values = item.partition("=")
        rates_of[method] = tuple(float(value) for value in values.split(","))
    chosen: dict[str, float] = {}
    searched: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        rates = rates_of[method]
        trials = {
            rate: [_run(config, method, rate, seed, options.out, reporter) for seed in options.search_seeds]
            for rate in rates
        }
        source = {
            rate: statistics.mean(item["domains"]["source"]["miou"] for item in runs) for rate, runs in trials.items()
        }
        chosen[method] = max(source, key=lambda rate: source[rate])
        searched[method] = {
            f"{rate:g}": {"source": source[rate], "unseen_mean": statistics.mean(item["unseen_mean"] for item in runs)}
            for rate, runs in trials.items()
        }
    results = {
        method: [_run(config, method, chosen[method], seed, options.out, reporter) for seed in options.seeds]
        for method in options.methods
    }
    summary = {
        "config": to_plain(config),
        "seeds": options.seeds,
        "search_seeds": options.search_seeds,
        "learning_rates": chosen,
        "search": searched,
        "methods": {method: _summary(runs) for method, runs in results.items()},
        "versions": next(iter(results.values()))[0]["versions"],
        "device": next(iter(results.values()))[0]["device"],
    }
    save_json(options.out / "result.json", summary)
    table = markdown(summary)
    with atomic_write(options.out / "result.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(table)


def _run(config: RunConfig, method: str, rate: float, seed: int, out: Path, reporter: Reporter) -> dict[str, Any]:
    folder = out / f"{method}-lr{rate:g}-seed{seed}"
    reporter.line(f"[bold]{method}[/bold], learning rate {rate:g}, seed {seed}")
    settings = replace(config, method=method, seed=seed, tune=replace(config.tune, lr=rate))
    return run(settings, folder, resume=True, reporter=reporter, cache=out / "shared")


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    domains = {name: [item["domains"][name]["miou"] for item in runs] for name in runs[0]["domains"]}
    domains["unseen mean"] = [item["unseen_mean"] for item in runs]
    return {
        "tuned_parameters": runs[0]["tuned_parameters"],
        "miou": domains,
        "mean": {name: statistics.mean(values) for name, values in domains.items()},
        "spread": {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in domains.items()},
        "seconds": [sum(stage["seconds"] for stage in item["stages"].values()) for item in runs],
    }


def markdown(summary: dict[str, Any]) -> str:
    """The table of ``result.md``: mean and standard deviation over seeds, in per cent."""
    names = list(next(iter(summary["methods"].values()))["mean"])
    lines = [
        "| method | learning rate | weights tuned | " + " | ".join(names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for method, result in summary["methods"].items():
        cells = [f"{100 * result['mean'][name]:.2f} ± {100 * result['spread'][name]:.2f}" for name in names]
        rate = summary["learning_rates"][method]
        lines.append(f"| {method} | {rate:g} | {result['tuned_parameters']:,} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(
        f"mIoU in %, mean ± standard deviation over seeds {summary['seeds']}; “source” is held-out source frames."
    )
    lines.append("")
    lines.append("| method | learning rate | source (chooses) | unseen mean (does not) |")
    lines.append("|---|---|---|---|")
    for method, rates in summary["search"].items():
        for rate, values in rates.items():
            lines.append(f"| {method} | {rate} | {100 * values['source']:.2f} | {100 * values['unseen_mean']:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
