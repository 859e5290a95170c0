"""Is every kernel right and fast on this NVIDIA GPU? One command, a table last, one JSON file, one picture.

    python benchmarks/gpu_acceptance.py              # benchmarks/results/<gpu>-<date>-<commit>.json and .png
    python benchmarks/gpu_acceptance.py --quick      # the same code paths on a CPU at toy sizes; no figures
    python benchmarks/gpu_acceptance.py --cpu        # the streaming operators on this CPU, beside its own bandwidth

Right: every operator against float64 on fresh random data (the seed is printed and can be given), outputs allocated
over NaN, odd shapes, strided and unaligned inputs, the same bits twice, more than 2³¹ elements where memory allows.
Fast: beside the strongest rival, this card's own copy bandwidth and product rate, and the goals of the project.

The file is written after every part. Given again for the same code on the same card, the command goes on where it was
cut or ran out of time; a part that failed is tried again with --retry. Sizes shrink to fit the card's free memory, and
the table says so. Needs torch, triton and this repository, nothing installed; timm for the Fisher pass of a whole
model; BackPACK and matplotlib if they are there. Exit status 1 if anything was wrong or failed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from acceptance import goals, roofline  # noqa: E402
from acceptance.measure import Bench  # noqa: E402
from acceptance.operator import Part  # noqa: E402
from acceptance.parts import all_parts, cpu_parts  # noqa: E402
from acceptance.report import report  # noqa: E402
from acceptance.results import Results, about, write_whole  # noqa: E402
from acceptance.runner import DeviceLost, all_right, run_parts, say  # noqa: E402
from acceptance.supervise import INTERRUPTED, supervise  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DEVICE_LOST = 3


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    begin = time.time()
    until = begin + 60 * options.minutes
    on_cpu = options.quick or options.cpu
    if not on_cpu and not torch.cuda.is_available():
        raise SystemExit(
            "gpu_acceptance: no CUDA device is visible to torch, so nothing was measured. Run it on a machine with an "
            "NVIDIA GPU and a CUDA build of torch, or pass --quick to run its logic on this CPU."
        )
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    parts = cpu_parts() if options.cpu else all_parts()
    if options.worker is not None:
        results = Results.read(options.worker)
        return _work(parts, results, Bench(device, results.about["seed"]), options.until)

    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    folder = options.out or (None if options.quick else RESULTS)
    results = Results.open(folder, about(device, options.quick, seed), options.seed, options.fresh)
    if not on_cpu:
        _require_gpu_kernels(results.about["backends"])
    say(f"seed {results.about['seed']}")
    if results.path is not None:
        say(f"{'going on with' if results.parts else 'writing'} {results.path}")
    if options.retry:
        for name in results.in_state("failed"):
            del results.parts[name]
    results.write()
    if options.quick:
        code = _work(parts, results, Bench(device, results.about["seed"], quick=True), until)
    else:
        assert results.path is not None
        command = [sys.executable, __file__, "--worker", str(results.path), "--until", str(until)]
        command += ["--cpu"] if options.cpu else []
        code = supervise(command, results.path, {part.name: part.seconds for part in parts}, until)
        results = Results.read(results.path)
    verdicts = [] if options.cpu else goals.judge(results.records())
    results.goals = goals.to_json(verdicts)
    results.write()
    _draw(results)
    print(report(results, verdicts))
    if results.in_state("not run", "cut", "running") and not options.quick:
        print("\nNot everything ran: the same command goes on with the rest.")
    return code or (0 if all_right(results) else 1)


def _work(parts: list[Part], results: Results, bench: Bench, until: float) -> int:
    """Runs the parts in this process."""
    try:
        run_parts(parts, bench, results, until)
    except DeviceLost:
        return DEVICE_LOST
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _draw(results: Results) -> None:
    if results.path is None or results.about["quick"]:
        return
    try:
        picture = roofline.draw(results.records(), results.about)
    except ImportError:
        say("no picture: matplotlib is not installed")
        return
    if picture is not None:
        write_whole(results.path.with_suffix(".png"), picture)


def _require_gpu_kernels(backends: dict[str, str]) -> None:
    others = [f"{name} ({backend})" for name, backend in backends.items() if backend in ("reference", "native")]
    if others:
        raise SystemExit(
            f"gpu_acceptance: these operators would not run their GPU kernels: {', '.join(others)}. "
            "Install triton and unset FISHERTUNE_BACKEND."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="run the logic on a CPU at toy sizes; no figures")
    parser.add_argument("--cpu", action="store_true", help="measure the streaming operators on this CPU instead")
    parser.add_argument("--minutes", type=float, default=7.5, help="time in all; parts that would exceed it do not run")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on with an earlier file")
    parser.add_argument("--retry", action="store_true", help="run the parts again that failed")
    parser.add_argument("--seed", type=int, default=None, help="of the random data; a fresh one by default")
    parser.add_argument("--out", type=Path, default=None, help="folder for the files (quick writes none by default)")
    parser.add_argument("--worker", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=None, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
