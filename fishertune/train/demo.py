"""The main job on built-in data: procedural street scenes, the tiny pretrained backbone, four methods, one table."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console

from fishertune.train.compare import compare
from fishertune.train.config import ConfigError, load_config
from fishertune.train.progress import Reporter
from fishertune.train.report import write_comparison
from fishertune.train.tables import metrics_table

METHODS = ("freeze", "full", "random", "fishertune")
# Best on held-out clear scenes, of 1e-4, 3e-4, 1e-3 (full), 1e-3, 3e-3 (random) and 3e-4, 1e-3, 3e-3 (FisherTune).
LEARNING_RATES = {"full": 1e-3, "random": 3e-3, "fishertune": 3e-3}


def run_demo(out: Path, *, resume: bool = False, reporter: Reporter | None = None) -> None:
    """Runs every method in ``out``, prints the table and writes ``out/report.html``.

    Raises:
        ConfigError: if ``out`` is in use and ``resume`` is not set.
    """
    reporter = reporter or Reporter()
    if out.exists() and any(out.iterdir()) and not resume:
        raise ConfigError(f"--out {out} is not empty. Add --resume to continue the demo in it, or name another folder.")
    with as_file(files("fishertune") / "assets" / "demo.yaml") as path:
        config = load_config(path)
    reporter.line(
        "Trains on clear street scenes and looks at fog, night, rain and snow it never saw. A few minutes on two cores."
    )
    results = compare(config, METHODS, out, learning_rates=LEARNING_RATES, resume=True, reporter=reporter)
    report = write_comparison(out, results)
    Console(width=max(Console().width, 100)).print(metrics_table(results))
    reporter.line(f"Pictures and curves: {report}")
