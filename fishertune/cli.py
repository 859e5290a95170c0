"""The command line. Every subcommand is a few lines over the library; errors people can mend print as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fishertune import __version__
from fishertune.train.progress import Reporter


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``fishertune``; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    reporter = Reporter(quiet=options.quiet)
    try:
        options.run(options, reporter)
    except KeyboardInterrupt:
        reporter.warn("stopped. Continue with --resume.")
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if options.traceback:
            raise
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fishertune", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--quiet", action="store_true", help="only warnings and results")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="the whole method on built-in data, a few minutes on a CPU")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    demo.add_argument("--resume", action="store_true")
    demo.set_defaults(run=_demo)

    run = commands.add_parser("run", help="one method from a configuration file")
    run.add_argument("config", type=Path)
    run.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. tune.lr=1e-4 method=full")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--resume", action="store_true", help="continue the run in --out")
    run.set_defaults(run=_run)

    evaluate = commands.add_parser("evaluate", help="evaluate a finished run again, on its own domains or on others")
    evaluate.add_argument("folder", type=Path)
    evaluate.add_argument(
        "--data", action="append", metavar="NAME|FILE.yaml", help="domains by name, or a file of further ones"
    )
    evaluate.set_defaults(run=_evaluate)

    apply = commands.add_parser("apply", help="apply a sparse delta to a public checkpoint, or take it off again")
    apply.add_argument("delta", type=Path)
    apply.add_argument("--to", type=Path, required=True, metavar="WEIGHTS")
    apply.add_argument("--out", type=Path, required=True, metavar="FILE")
    apply.add_argument("--undo", action="store_true")
    apply.set_defaults(run=_apply)

    report = commands.add_parser("report", help="write report.html of a finished run again")
    report.add_argument("folder", type=Path)
    report.set_defaults(run=_report)
    return parser


def _demo(options: argparse.Namespace, reporter: Reporter) -> None:
    from fishertune.train.demo import run_demo

    run_demo(options.out, resume=options.resume, reporter=reporter)


def _run(options: argparse.Namespace, reporter: Reporter) -> None:
    from fishertune.train.config import load_config
    from fishertune.train.pipeline import run

    metrics = run(load_config(options.config, options.overrides), options.out, resume=options.resume, reporter=reporter)
    _print_metrics([metrics])


def _evaluate(options: argparse.Namespace, reporter: Reporter) -> None:
    from fishertune.train.pipeline import evaluate_folder

    _print_metrics([evaluate_folder(options.folder, options.data, reporter=reporter)])


def _apply(options: argparse.Namespace, reporter: Reporter) -> None:
    from fishertune.delta import Delta
    from fishertune.files import load_tensors, save_tensors

    if options.out.exists():
        raise ValueError(f"--out {options.out} exists; name a new file.")
    delta = Delta.load(options.delta)
    weights, metadata = load_tensors(options.to)
    if options.undo:
        delta.undo_(weights)
    else:
        delta.apply_(weights)
    save_tensors(options.out, weights, metadata)
    action = "taken off" if options.undo else "applied to"
    reporter.line(f"{len(delta):,} values {action} {options.to}: {options.out}")


def _report(options: argparse.Namespace, reporter: Reporter) -> None:
    from fishertune.train.report import write_report

    reporter.line(f"wrote {write_report(options.folder)}")


def _print_metrics(runs: list[dict[str, object]]) -> None:
    from fishertune.train.tables import metrics_table

    Console().print(metrics_table(runs))


if __name__ == "__main__":
    sys.exit(main())
