"""What it costs to rank a model's weights by Fisher information: every estimator, in one picture and one table.

    python benchmarks/estimation_cost.py                                   # the built-in model on built-in scenes
    python benchmarks/estimation_cost.py --weights FILE --data FOLDER      # DINOv2-S on CamVid
    python benchmarks/estimation_cost.py --model vit_large_patch14_dinov2 --device cuda --data FOLDER

The head is warmed up first. The yardstick is the exact per-sample Fisher of a large sample of images; every estimator
then works on images of *other* frames, and what counts is the share of the top 5 % it finds, against what it costs in
plain forward and backward passes. Two disjoint large samples against one another are the ceiling: more than that no
estimator can reach against this yardstick.

Three phases, each resumed where it stopped: ``overlap`` (what is found, the same whatever else the machine does),
``variants`` (what else moves the overlap: labels drawn from the model, whole frames) and ``cost`` (time and memory;
give it an idle machine, ``--again`` measures anew). The picture, the table and the figures are written after each,
to ``estimation-cost-<model>-<date>.{png,md,json}`` in ``--out``.
Needs the packages of ``pip install 'fishertune[dev]'``. A timm model without ``--weights`` starts from random ones:
cost and memory mean the same then, overlap does not.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fisher_study import cost, picture
from fisher_study.compare import Reference, effective_sample_size, rank_correlation
from fisher_study.estimates import (
    POSTERIORS,
    ExactSums,
    boundaries,
    image_weights,
    posterior_estimates,
    shrunk,
    squared_batches,
)
from fisher_study.problem import Problem, build, with_model

from fishertune import collect_env
from fishertune.files import load_json, save_json
from fishertune.train.config import RunConfig, load_config, to_plain
from fishertune.train.progress import Reporter

ROOT = Path(__file__).resolve().parents[1]
BUILT_IN = ROOT / "fishertune" / "assets" / "demo.yaml"
CAMVID = ROOT / "configs" / "camvid_dinov2_s.yaml"
QUICK = ["data.source.count=24", "data.source.size=[32, 48]", "augment.crop=[32, 48]", "warmup.steps=6"]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        counts: numbers of images at which estimates are looked at.
        reference: images of each of the two large samples.
        group: images of one replicate.
        posterior: the posterior estimators see at most so many images.
        traces: images whose own weight in the sum is measured.
        batch, rounds: of the cost phase.
        memory: whether memory is measured, each time in a process of its own.
    """

    counts: tuple[int, ...] = (25, 50, 100, 200, 400)
    reference: int = 1000
    group: int = 200
    posterior: int = 400
    traces: int = 200
    batch: int = 8
    rounds: int = 3
    memory: bool = True


TOY = Plan((8,), reference=16, group=8, posterior=8, traces=2, batch=2, rounds=1, memory=False)


class Results:
    """The figures so far, on disk after every change."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        self.data: dict[str, Any] = {"settings": settings, "overlap": {}, "spread": {}, "cost": {}}
        if path.is_file():
            earlier = load_json(path)
            if earlier["settings"] != settings:
                changed = next(key for key in settings if earlier["settings"].get(key) != settings[key])
                raise SystemExit(
                    f"{path} was measured with {changed}={earlier['settings'].get(changed)!r}, now it is "
                    f"{settings[changed]!r}. Give another folder (--work) or the earlier settings."
                )
            self.data = earlier

    def save(self) -> None:
        save_json(self._path, self.data)

    def add_point(self, label: str, images: int, comparison: dict[str, float]) -> None:
        points = self.data["overlap"].setdefault(label, [])
        points[:] = sorted(
            [p for p in points if p["images"] != images] + [{"images": images, **comparison}], key=_images
        )
        self.save()

    def has(self, label: str, images: int) -> bool:
        return any(point["images"] == images for point in self.data["overlap"].get(label, []))


def _images(point: dict[str, Any]) -> int:
    return int(point["images"])


# What is found --------------------------------------------------------------------------------------------------------


def measure_overlap(config: RunConfig, plan: Plan, results: Results, reporter: Reporter, work: Path) -> None:
    problem = build(config, reporter, work)
    cuts = boundaries(plan.counts, plan.reference, plan.group)
    samples = {name: ExactSums(problem, work, name, cuts, "empirical") for name in ("reference", "estimate")}
    for name, sums in samples.items():
        with reporter.bar(f"exact, {name}", plan.reference) as bar:
            sums.compute(_steps(bar))
    fisher = samples["reference"].sum(0, plan.reference).div_(plan.reference)
    reference = Reference(fisher, problem.candidates, problem.k)
    _exact_curves(problem, plan, samples, reference, results)
    _spread(problem, plan, samples, results, reporter)

    counts = plan.counts
    label = "batch-squared, {} images".format
    if not results.has(label(8), counts[-1] - counts[-1] % 8):
        with reporter.bar("batch-squared", counts[-1]) as bar:
            for name, used, values in squared_batches(problem, counts, _steps(bar)):
                results.add_point(name, used, reference.compare(values))
    threshold = float(fisher[problem.candidates].topk(problem.k).values[-1])
    results.data["threshold"] = threshold
    results.data["chance"] = problem.k / int(problem.candidates.sum())
    wanted = [count for count in counts if count <= plan.posterior]
    for settings in POSTERIORS:
        if results.has(settings.label, wanted[-1] - wanted[-1] % 8):
            continue
        with reporter.bar(settings.label, wanted[-1]) as bar:
            path = work / f"{settings.label.replace(' ', '-')}.safetensors"
            for used, values in posterior_estimates(problem, settings, threshold, wanted, path, _steps(bar)):
                results.add_point(settings.label, used, reference.compare(values, everything=False))


def _steps(bar: Any) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            bar.advance()

    return advance


def _exact_curves(
    problem: Problem, plan: Plan, samples: dict[str, ExactSums], reference: Reference, results: Results
) -> None:
    for count in (*plan.counts, plan.reference):
        for label, sample in (("exact", "estimate"), ("exact, nested", "reference")):
            if not results.has(label, count):
                results.add_point(label, count, reference.compare(samples[sample].sum(0, count)))
        if not results.has("exact, shrunk", count):
            values = shrunk(problem, samples["estimate"].sum(0, count), count)
            results.add_point("exact, shrunk", count, reference.compare(values))


def _spread(problem: Problem, plan: Plan, samples: dict[str, ExactSums], results: Results, reporter: Reporter) -> None:
    """What limits the overlap: how far samples of one size differ, and how unequal the images are."""
    spread = results.data["spread"]
    if "samples" not in spread:
        spread["samples"] = _samples_against_one_another(problem, plan, samples)
        results.save()
    if "relative_variance" not in spread:
        spread["relative_variance"] = _relative_variance(problem, plan, samples)
        results.save()
    if "images" not in spread:
        with reporter.bar("weight of each image", plan.traces) as bar:
            traces, losses = image_weights(problem, plan.traces, _steps(bar))
        ordered = traces.sort(descending=True).values
        spread["images"] = {
            "count": plan.traces,
            "effective": round(effective_sample_size(traces), 1),
            "share_of_heaviest_5_percent": round(float(ordered[: max(1, plan.traces // 20)].sum() / ordered.sum()), 4),
            "heaviest_over_median": round(float(ordered[0] / traces.median()), 2),
            "rank_correlation_with_loss": round(rank_correlation(traces, losses), 3),
        }
        results.save()


def _samples_against_one_another(
    problem: Problem, plan: Plan, samples: dict[str, ExactSums]
) -> dict[str, dict[str, Any]]:
    """Overlap of replicates with the large sample of the other frames (``disjoint``), with the one that contains them
    (``nested``), with one another (``pairs``), and of the two large samples (``ceiling``)."""
    starts = range(0, plan.reference - plan.group + 1, plan.group)
    groups = {name: [sums.sum(start, start + plan.group) for start in starts] for name, sums in samples.items()}
    found: dict[str, list[float]] = {"disjoint": [], "nested": [], "pairs": [], "ceiling": []}
    large = {name: sums.sum(0, plan.reference) for name, sums in samples.items()}
    for yardstick in samples:
        against = Reference(large[yardstick], problem.candidates, problem.k)
        for name, values in groups.items():
            found["nested" if name == yardstick else "disjoint"] += map(against.overlap, values)
        if yardstick == "reference":
            found["ceiling"].append(against.overlap(large["estimate"]))
    for one, other in zip(*groups.values(), strict=True):
        found["pairs"].append(Reference(one, problem.candidates, problem.k).overlap(other))
    return {
        kind: {
            "overlaps": [round(value, 5) for value in overlaps],
            "mean": round(statistics.mean(overlaps), 5),
            "deviation": round(statistics.stdev(overlaps), 5) if len(overlaps) > 1 else None,
        }
        for kind, overlaps in found.items()
    }


def _relative_variance(problem: Problem, plan: Plan, samples: dict[str, ExactSums]) -> dict[str, float]:
    """Var(g²)/E(g²)² of one image's squared gradient, from the scatter of the replicates, for elements of the top 5 %.

    A Gaussian gradient has 2. What is above it is images that weigh unequally.
    """
    total = samples["reference"].sum(0, plan.reference) + samples["estimate"].sum(0, plan.reference)
    total.masked_fill_(~problem.candidates, -1)
    chosen = total.topk(problem.k).indices
    chosen = chosen[:: max(1, len(chosen) // 200_000)]
    starts = range(0, plan.reference - plan.group + 1, plan.group)
    groups = torch.stack(
        [sums.sum(start, start + plan.group)[chosen].double() for sums in samples.values() for start in starts]
    )
    ratios = plan.group * groups.var(0) / groups.mean(0).square()
    quartiles = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return {name: round(float(value), 3) for name, value in zip(("low", "median", "high"), quartiles, strict=True)}


def measure_variants(config: RunConfig, plan: Plan, results: Results, reporter: Reporter, work: Path) -> None:
    """How far samples differ under other labels and on other images: each against yardsticks of its own kind."""
    problem = build(config, reporter, work)
    found = results.data["spread"].setdefault("variants", {})
    for name, kind, labels, total in (
        ("labels drawn from the model", "", "sampled", plan.reference),
        ("whole frames, no augmentation", "-whole", "empirical", plan.group),
    ):
        if name in found:
            continue
        samples = {}
        for sample in ("reference", "estimate"):
            samples[sample] = ExactSums(problem, work, sample + kind, boundaries([], total, plan.group), labels)
            with reporter.bar(f"{name}, {sample}", total) as bar:
                samples[sample].compute(_steps(bar))
        found[name] = _samples_against_one_another(problem, replace(plan, reference=total), samples)
        results.save()


# What it costs --------------------------------------------------------------------------------------------------------


def measure_cost(config: RunConfig, plan: Plan, results: Results, reporter: Reporter, again: bool) -> None:
    rows = results.data["cost"]
    if again:
        rows.clear()
    missing = [label for label in cost.CONTENDERS if label not in rows]
    if not missing:
        return
    command = [sys.executable, *(item for item in sys.argv if item != "--again"), "--memory-of"]
    with reporter.bar("cost", len(cost.CONTENDERS), len(cost.CONTENDERS) - len(missing)) as bar:
        bench = cost.Bench(config, plan.batch, plan.rounds, command if plan.memory else None)
        if "plain" not in rows:
            rows["plain"] = {"ratio": 1.0, "covered": 1.0, **bench.memory("plain")}
        for label in missing:
            rows[label] = bench.measure(label)
            results.save()
            bar.advance(label)
    results.data["cost_measured_on"] = machine(config)
    results.save()


# The command ----------------------------------------------------------------------------------------------------------


def machine(config: RunConfig) -> dict[str, Any]:
    report = collect_env.collect()
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "machine": report["machine"],
        "GPU": report["GPU"],
        "versions": {name: version for name, version in report["versions"].items() if version != "not installed"},
        "threads": torch.get_num_threads(),
        "device": config.device,
        "commit": commit,
    }


def make_config(options: argparse.Namespace) -> RunConfig:
    base = options.config or (CAMVID if options.data or options.weights else BUILT_IN)
    overrides = list(options.overrides)
    if options.data:
        overrides.append(f"data.root={Path(options.data).resolve()}")
    if options.weights:
        overrides.append(f"backbone.weights={Path(options.weights).resolve()}")
    if options.device:
        overrides.append(f"device={options.device}")
    if options.quick:
        overrides += QUICK
    config = load_config(base, overrides)
    if options.model:
        weights = str(Path(options.weights).resolve()) if options.weights else None
        config = with_model(config, options.model, weights)
    return config


def settings_of(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What the figures depend on, without the paths of this machine."""
    plain = to_plain(config)
    plain["backbone"]["weights"] = Path(config.backbone.weights).name if config.backbone.weights else None
    source = plain["data"]["source"]
    for key in ("images", "labels", "manifest"):
        if source.get(key):
            source[key] = Path(source[key]).name
    sections = {key: plain[key] for key in ("seed", "backbone", "head", "augment", "warmup", "select")}
    return sections | {"source": source, "reference": plan.reference, "group": plan.group}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the configuration")
    parser.add_argument("--config", type=Path, help="a run's YAML file; by default the demo's, with --data CamVid's")
    parser.add_argument("--weights", help="safetensors file of the backbone, in timm's names")
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--model", help="any ViT of timm; features of two middle blocks go to the head")
    parser.add_argument("--device", help="auto, cpu or cuda")
    parser.add_argument("--images", type=int, nargs="+", default=list(Plan.counts), metavar="N")
    parser.add_argument("--reference", type=int, default=Plan.reference, help="images of the yardstick (%(default)s)")
    parser.add_argument(
        "--posterior-images", type=int, default=Plan.posterior, help="at most, for posterior estimators"
    )
    parser.add_argument("--phase", choices=("all", "overlap", "variants", "cost", "report"), default="all")
    parser.add_argument("--again", action="store_true", help="measure cost anew")
    parser.add_argument("--work", type=Path, help="folder of sums and figures so far (runs/estimation-cost-<model>)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, its figures mean nothing")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    config = make_config(options)
    plan = Plan(tuple(options.images), options.reference, posterior=options.posterior_images)
    if options.quick:
        plan = TOY
    if options.memory_of:
        print(cost.extra_memory(config, options.memory_of, plan.batch))
        return
    model = config.backbone.name.partition(".")[0].replace("_", "-") + ("-quick" if options.quick else "")
    work = options.work or Path("runs") / f"estimation-cost-{model}"
    reporter = Reporter()
    results = Results(work / "result.json", settings_of(config, plan))
    if options.phase in ("all", "overlap"):
        measure_overlap(config, plan, results, reporter, work)
        results.data["overlap_measured_on"] = machine(config)
        results.save()
    if options.phase in ("all", "variants"):
        measure_variants(config, plan, results, reporter, work)
    if options.phase in ("all", "cost"):
        measure_cost(config, plan, results, reporter, options.again)
    stem = options.out / f"estimation-cost-{model}-{datetime.date.today()}"
    for path in picture.write(results.data, stem):
        reporter.line(f"wrote {path}")


if __name__ == "__main__":
    main()
