"""The picture, the table and the figures of the study, from one dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fishertune.files import atomic_write, save_json

# curve → (row of the cost table, colour, marker, what the picture calls it)
CURVES = {
    "exact": ("ours", "#0b5394", "o", "exact per-sample Fisher"),
    "exact, shrunk": ("ours", "#3d85c6", "h", "exact, shrunk to rows × columns"),
    "batch-squared, 8 images": ("batch-squared", "#b45f06", "s", "squared mean gradient of 8"),
    "batch-squared, 32 images": ("batch-squared", "#e69138", "D", "squared mean gradient of 32"),
    "natural, tau 0.001": ("natural", "#274e13", "d", "natural, τ = 0.001"),
    "natural, tau 0.01": ("natural", "#38761d", "^", "natural, τ = 0.01"),
    "natural, tau 0.1": ("natural", "#93c47d", "v", "natural, τ = 0.1"),
    "local, antithetic": ("local, antithetic", "#741b47", "P", "local, antithetic"),
    "local": ("local", "#c27ba0", "X", "local"),
    "sgvb, antithetic": ("sgvb, antithetic", "#434343", "<", "sgvb, antithetic"),
    "sgvb": ("sgvb", "#999999", ">", "sgvb"),
}
NOMINAL = {"local, antithetic": 2.0, "sgvb, antithetic": 2.0}
SAME_QUANTITY = ("one by one", "vmap(grad)", "BackPACK", "Opacus")
GOAL = 0.9


def write(data: dict[str, Any], stem: Path) -> list[Path]:
    """Writes ``stem`` with .json, .md and .png; returns the paths."""
    paths = [stem.parent / f"{stem.name}.{ending}" for ending in ("json", "md", "png")]
    save_json(paths[0], data)
    with atomic_write(paths[1]) as temporary:
        temporary.write_text(markdown(data), encoding="utf-8")
    with atomic_write(paths[2]) as temporary:
        draw(data).savefig(temporary, format="png", dpi=160)
    return paths


def ratio(data: dict[str, Any], row: str) -> float:
    """Cost of one image in plain passes: as measured, else the number of passes."""
    return float(data["cost"].get(row, {}).get("ratio", NOMINAL.get(row, 1.0)))


def title(data: dict[str, Any]) -> str:
    settings = data["settings"]
    model = settings["backbone"]["name"].partition(".")[0]
    source = settings["source"]
    name = (
        "built-in scenes" if source["kind"] == "scenes" else "CamVid" if source["label_map"] == "camvid" else "folder"
    )
    height, width = settings["augment"]["crop"]
    return f"{model}, {name} {height}×{width}"


def draw(data: dict[str, Any]) -> Any:
    """Overlap against cost, one line an estimator."""
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    axes = figure.subplots()
    reference = data["settings"]["reference"]
    curves = data["overlap"]
    ends: list[tuple[float, float, str, str]] = []
    for label, (row, colour, marker, name) in CURVES.items():
        if label not in curves:
            continue
        x = [point["images"] * ratio(data, row) for point in curves[label]]
        y = [point["overlap"] for point in curves[label]]
        wide = label == "exact"
        axes.plot(
            x, y, color=colour, marker=marker, linewidth=2.6 if wide else 1.5, markersize=7 if wide else 5, zorder=3
        )
        ends.append((x[-1], y[-1], name, colour))
    exact = curves.get("exact", [])
    for point in exact[:-1]:
        if point["images"] in (25, 200):
            axes.annotate(
                f"{point['images']} images: {point['overlap']:.2f}",
                (point["images"] * ratio(data, "ours"), point["overlap"]),
                xytext=(2, -17),
                textcoords="offset points",
                ha="center",
                color=CURVES["exact"][1],
                fontsize=9,
            )
    if exact and exact[-1]["images"] == reference:
        ceiling = exact[-1]["overlap"]
        axes.axhline(ceiling, color="#0b5394", linestyle=":", linewidth=1.2)
        axes.text(
            0.012,
            ceiling + 0.008,
            f"ceiling {ceiling:.2f}: two disjoint exact samples of {reference:,} images",
            transform=axes.get_yaxis_transform(),
            color="#0b5394",
            fontsize=9,
        )
    share = data["settings"]["select"]["fraction"]
    _rivals(data, axes, exact)
    chance = data.get("chance", share)
    axes.axhline(chance, color="#999999", linestyle=":", linewidth=1.2)
    axes.text(
        0.99,
        chance - 0.028,
        f"chance {chance:.3f}",
        transform=axes.get_yaxis_transform(),
        ha="right",
        color="#777777",
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_ylim(0, 1.06)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    _name_the_ends(axes, ends, [(point["images"] * ratio(data, "ours"), point["overlap"]) for point in exact])
    ticks = [25, 50, 100, 200, 400, 1000, 2000]
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * 2.3)
    measured = "measured" if "ours" in data["cost"] else "nominal: cost not measured yet"
    axes.set_xlabel(f"cost: forward + backward passes of one image ({measured})")
    axes.set_ylabel(f"share of the exact Fisher's top {share:.0%} that is found")
    axes.set_title(
        f"What it costs to find the weights that matter · {title(data)}\n"
        f"yardstick: exact per-sample Fisher of {reference:,} images; every estimator sees other frames",
        fontsize=11,
        loc="left",
    )
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _rivals(data: dict[str, Any], axes: Any, exact: list[dict[str, Any]]) -> None:
    """Others that compute the exact Fisher too: the same overlap at another cost, drawn at one number of images."""
    point = next((p for p in exact if p["images"] == 200), None)
    if point is None:
        return
    rows = sorted((data["cost"][row]["ratio"], row) for row in SAME_QUANTITY if "ratio" in data["cost"].get(row, {}))
    for number, (cost, row) in enumerate(rows):
        x, y = 200 * cost, point["overlap"]
        axes.plot([x], [y], marker="o", markerfacecolor="white", markeredgecolor="#0b5394", markersize=7, zorder=4)
        axes.annotate(
            f"{row}: the same result at {cost:.2f} passes an image",
            (x, y),
            xytext=(1.3 * 200 * rows[-1][0], 1.045 - 0.033 * number),  # the leftmost highest: no lines cross
            va="center",
            fontsize=8.5,
            color="#0b5394",
            arrowprops={"arrowstyle": "-", "color": "#9fb8d3", "linewidth": 0.8, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def _name_the_ends(axes: Any, ends: list[tuple[float, float, str, str]], taken: list[tuple[float, float]]) -> None:
    """Names beside the last points, moved off one another and off ``taken`` places (x, y): the upper ones downwards,
    the lowest upwards."""
    height, width = 0.036, 3.0  # of a name: in overlap, and as a factor of cost
    upper = sorted((end for end in ends if end[1] >= 0.2), key=lambda end: -end[1])
    lower = sorted((end for end in ends if end[1] < 0.2), key=lambda end: end[1])
    for step, group in ((-0.004, upper), (0.004, lower)):
        for x, y, name, colour in group:
            while any(1 / width < x / other < width and abs(y - at) < height for other, at in taken):
                y += step
            taken.append((x, y))
            bold = "bold" if name.startswith("exact per") else "normal"
            axes.text(x * 1.07, y, name, va="center", color=colour, fontsize=9.5, fontweight=bold)


def markdown(data: dict[str, Any]) -> str:
    """The tables and what they say, in figures only."""
    settings, curves, rows = data["settings"], data["overlap"], data["cost"]
    reference = settings["reference"]
    lines = [f"# Cost of Fisher estimation: {title(data)}", ""]
    lines += [
        f"Yardstick: exact per-sample Fisher of {reference:,} images (augmented crops). Estimators see images of other "
        f"frames. Overlap: share of the yardstick's top {settings['select']['fraction']:.0%} (of the backbone's size, "
        "chosen among Q, K, V and FFN) that an estimate finds; equal scores count by their chance. Cost: one image in "
        "plain forward + backward passes. Memory: growth of the peak over one pass in a fresh process.",
        "",
    ]
    counts = sorted({point["images"] for label in ("exact", "exact, nested") for point in curves.get(label, [])})
    lines.append(
        "| estimator | cost of an image | memory, MiB | "
        + " | ".join(f"overlap at {count:,} images" for count in counts)
        + " | rank correlation, most images |"
    )
    lines.append("|---|---|---|" + "---|" * (len(counts) + 1))
    for label in ("exact", "exact, nested", *list(CURVES)[1:]):
        if label in curves:
            row = rows.get(CURVES.get(label, ("ours",))[0], {})
            cells = [_at(curves[label], count) for count in counts]
            name = f"{label}: part of the yardstick's own images" if label == "exact, nested" else label
            lines.append(
                f"| {name} | {_figure(row.get('ratio'))} | {_figure(row.get('extra_mib'), 0)} | "
                + " | ".join(cells)
                + f" | {curves[label][-1]['spearman']:.3f} |"
            )
    lines += ["", "A number of images that a batch does not divide is rounded down to whole batches.", ""]
    lines += ["| over all backbone parameters | " + " | ".join(f"{count:,}" for count in counts) + " |"]
    lines += ["|---|" + "---|" * len(counts)]
    for label, points in curves.items():
        if "overlap_all" in points[0]:
            lines.append(f"| {label} | " + " | ".join(_at(points, count, "overlap_all") for count in counts) + " |")
    if rows:
        lines += ["", "The same exact quantity by other means (each agreed with autograd, one image at a time):", ""]
        lines += ["| | cost of an image | memory, MiB | backbone parameters covered |", "|---|---|---|---|"]
        for label in ("plain", "ours", *SAME_QUANTITY):
            row = rows.get(label, {})
            name = "plain forward + backward" if label == "plain" else label
            if "error" in row:
                lines.append(f"| {name} | does not run: {row['error']} | | |")
            elif row:
                lines.append(
                    f"| {name} | {_figure(row['ratio'])} | {_figure(row.get('extra_mib'), 0)} | {row['covered']:.1%} |"
                )
    lines += ["", *_limits(data), "", *_where(data)]
    return "\n".join(lines) + "\n"


def _at(points: list[dict[str, Any]], count: int, key: str = "overlap") -> str:
    """The point of ``count`` images or, in whole batches, just below."""
    near = [point for point in points if count - 32 < point["images"] <= count and point["images"] > count / 2]
    return f"{near[-1][key]:.3f}" if near else "–"


def _figure(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _limits(data: dict[str, Any]) -> list[str]:
    spread, settings = data["spread"], data["settings"]
    lines = []
    if "samples" in spread:
        lines += [
            f"What limits it: samples of {settings['group']} images against one another and against large ones of "
            f"{settings['reference']:,}, mean ± standard deviation over replicates (goal from 200 images: {GOAL}).",
            "",
            f"| | {settings['group']} against other {settings['reference']:,} | against the {settings['reference']:,} "
            f"that contain them | against other {settings['group']} | two large ones: the ceiling |",
            "|---|---|---|---|---|",
            _samples_row("ground truth, augmented crops", spread["samples"]),
        ]
        for name, samples in spread.get("variants", {}).items():
            lines.append(_samples_row(name, samples))
        lines.append("")
    if "relative_variance" in spread:
        value = spread["relative_variance"]
        lines.append(
            f"* Var(g²)/E(g²)² of one image's squared gradient, elements of the top: median {value['median']:.1f} "
            f"(quartiles {value['low']:.1f} and {value['high']:.1f}); a Gaussian gradient has 2."
        )
    if "images" in spread:
        value = spread["images"]
        lines.append(
            f"* Weights of {value['count']} images in the sum: as good as {value['effective']:.0f} equal ones; the "
            f"heaviest 5 % hold {value['share_of_heaviest_5_percent']:.0%}, the heaviest has "
            f"{value['heaviest_over_median']:.0f} times the median. Rank correlation of weight and loss: "
            f"{value['rank_correlation_with_loss']:.2f}."
        )
    return lines


def _samples_row(name: str, samples: dict[str, Any]) -> str:
    """One line of the table; a variant that was measured at one size has no large samples."""
    cells = []
    for kind in ("disjoint", "nested", "pairs", "ceiling"):
        value = samples[kind]
        only_size = samples["nested"]["mean"] == 1
        spread = "" if value["deviation"] is None else f" ± {value['deviation']:.3f}"
        cells.append("–" if only_size and kind != "pairs" else f"{value['mean']:.3f}{spread}")
    return f"| {name} | " + " | ".join(cells) + " |"


def _where(data: dict[str, Any]) -> list[str]:
    lines = []
    for key, what in (("overlap_measured_on", "Overlap"), ("cost_measured_on", "Time and memory")):
        if key in data:
            place = data[key]
            gpu = next(iter(place["GPU"].items()))
            lines.append(
                f"{what}: {place['machine']['processor']}, {place['threads']} thread(s), GPU {gpu[0]} ({gpu[1]}), "
                f"torch {place['versions']['torch']}, commit {place['commit']}."
            )
    return lines
