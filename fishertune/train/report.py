"""``report.html``: what a run measured, as one file that opens without a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader
from PIL import Image

from fishertune.files import atomic_write, load_json, load_tensors
from fishertune.methods import get_method
from fishertune.segmentation.classes import IGNORE_INDEX, palette_of
from fishertune.train.run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("Q", "K", "V", "FFN")


def write_report(path: str | Path) -> Path:
    """Writes the report of the finished run in ``path`` and returns the file.

    Raises:
        ValueError: if the run is not finished.
    """
    folder = RunFolder(path)
    config = folder.load_config()
    if not folder.metrics.is_file():
        raise ValueError(
            f"The run in {folder.path} is not finished: it has no metrics.json. Continue it with --resume."
        )
    metrics = load_json(folder.metrics)
    pictures, metadata = load_tensors(folder.pictures)
    classes = metadata["classes"]
    colours = palette_of(tuple(classes))
    selection = metrics["selection"]
    page = (
        _environment()
        .get_template("report.html")
        .render(
            css=_css(),
            metrics=metrics,
            domains=metrics["domains"],
            classes=classes,
            summary=get_method(metrics["method"]).summary,
            backbone=config.backbone.name,
            percent=_percent,
            selection=selection,
            selection_figures=_selection_figures(selection) if selection else [],
            legend=list(zip(classes, colours)),
            pictures=_picture_rows(pictures, colours),
            curves=_curves(metrics["curves"]),
            config=folder.config.read_text(encoding="utf-8"),
        )
    )
    return _write(folder.report, page)


def write_comparison(out: str | Path, runs: Sequence[dict[str, Any]]) -> Path:
    """Writes ``out/report.html`` for several finished runs in ``out/METHOD`` and returns the file."""
    out = Path(out)
    unseen = [name for name in runs[0]["domains"] if name != "source"]
    shots = {run["method"]: load_tensors(RunFolder(out / run["method"]).pictures) for run in runs}
    classes = next(iter(shots.values()))[1]["classes"]
    colours = palette_of(tuple(classes))
    rows = []
    first = next(iter(shots.values()))[0]
    for name in ["source", *unseen]:
        key = f"{name}/0"
        row = [
            {"title": f"{name}: image", "source": _png(first[f"{key}/image"].permute(1, 2, 0).numpy())},
            {"title": "ground truth", "source": _png(_colour(first[f"{key}/label"], colours))},
        ]
        row += [
            {"title": method, "source": _png(_colour(tensors[f"{key}/prediction"], colours))}
            for method, (tensors, _) in shots.items()
        ]
        rows.append(row)
    means = [run["unseen_mean"] for run in runs if run["unseen_mean"] is not None]
    page = (
        _environment()
        .get_template("comparison.html")
        .render(
            css=_css(),
            runs=runs,
            unseen=unseen,
            best=max(means, default=None),
            percent=_percent,
            bars=_bars(runs, unseen),
            legend=list(zip(classes, colours)),
            pictures=rows,
        )
    )
    return _write(out / "report.html", page)


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("fishertune.train", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def _css() -> str:
    return (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")


def _write(path: Path, page: str) -> Path:
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


# -- figures -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _source(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _data_uri(buffer)


def _png(image_HWC: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="png", optimize=True)
    return _data_uri(buffer)


def _data_uri(png: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def _colour(label_HW: torch.Tensor, colours: Sequence[tuple[int, int, int]]) -> np.ndarray:
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(colours)] = colours
    table[IGNORE_INDEX] = (0, 0, 0)
    return table[label_HW.numpy()]


def _picture_rows(pictures: dict[str, torch.Tensor], colours: Sequence[tuple[int, int, int]]) -> list[dict[str, str]]:
    rows = []
    for key in pictures:
        if not key.endswith("/image"):
            continue
        stem = key.removesuffix("/image")
        rows.append(
            {
                "domain": stem.rsplit("/", 1)[0],
                "image": _png(pictures[key].permute(1, 2, 0).numpy()),
                "label": _png(_colour(pictures[f"{stem}/label"], colours)),
                "prediction": _png(_colour(pictures[f"{stem}/prediction"], colours)),
            }
        )
    return sorted(rows, key=lambda row: (row["domain"] != "source", row["domain"]))


def _selection_figures(selection: dict[str, Any]) -> list[dict[str, str]]:
    figures = []
    if "sensitivity_by_block_and_kind" in selection:
        figures.append(
            {
                "title": "Mean score of the candidates by block and kind (as Fig. 6 of the paper; logarithmic)",
                "source": _heat_map(selection["sensitivity_by_block_and_kind"], logarithmic=True),
            }
        )
    figures.append(
        {
            "title": "Share of the selected weights by block and kind, %",
            "source": _heat_map({key: 100 * value for key, value in selection["share_by_block_and_kind"].items()}),
        }
    )
    return figures


def _heat_map(values: dict[str, float], *, logarithmic: bool = False) -> str:
    from matplotlib.colors import LogNorm

    cells = {(int(key.split(".")[0]), key.split(".")[1]): value for key, value in values.items()}
    blocks = sorted({block for block, _ in cells})
    grid = np.array([[cells.get((block, kind), np.nan) for block in blocks] for kind in KINDS])
    positive = grid[np.isfinite(grid) & (grid > 0)]
    norm = LogNorm(positive.min(), positive.max()) if logarithmic and positive.size else None
    figure = _figure(max(6.0, 0.62 * len(blocks) + 1.6), 2.7)
    axes = figure.subplots()
    shown = np.where(grid > 0, grid, np.nan) if logarithmic else grid
    image = axes.imshow(shown, aspect="auto", cmap="viridis", norm=norm)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(KINDS)), KINDS)
    axes.set_xlabel("block")
    middle = np.nanmean(np.log(positive)) if logarithmic and positive.size else None
    for row in range(len(KINDS)):
        for column in range(len(blocks)):
            value = grid[row, column]
            if np.isfinite(value):
                dark = (np.log(value) < middle) if middle is not None and value > 0 else value < np.nanmax(grid) / 2
                text = f"{value:.1e}" if logarithmic else f"{value:.1f}"
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    figure.colorbar(image, ax=axes, pad=0.01)
    return _source(figure)


def _curves(curves: dict[str, dict[str, list[float]]]) -> str | None:
    filled = {name: curve for name, curve in curves.items() if curve["loss"]}
    if not filled:
        return None
    figure = _figure(10, 2.8)
    for axes, (name, curve) in zip(np.atleast_1d(figure.subplots(1, len(filled))), filled.items()):
        loss = np.asarray(curve["loss"])
        window = max(1, len(loss) // 25)
        axes.plot(loss, color="0.8", linewidth=0.8)
        smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(window - 1, len(loss)), smooth, color="#0b63c5")
        axes.set(title=name, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    return _source(figure)


def _bars(runs: Sequence[dict[str, Any]], unseen: Sequence[str]) -> str:
    names = ["source", *unseen]
    figure = _figure(10, 3.2)
    axes = figure.subplots()
    width = 0.8 / len(runs)
    for number, run in enumerate(runs):
        heights = [100 * run["domains"][name]["miou"] for name in names]
        axes.bar(np.arange(len(names)) + number * width, heights, width, label=run["method"])
    axes.set_xticks(np.arange(len(names)) + 0.4 - width / 2, names)
    axes.set_ylabel("mIoU, %")
    axes.legend(ncols=len(runs), fontsize=8, loc="upper right")
    axes.grid(axis="y", alpha=0.3)
    return _source(figure)
