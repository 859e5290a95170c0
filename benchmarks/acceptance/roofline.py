"""The picture: every operator's arithmetic intensity against what it achieved, under this card's measured roofs."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from .parts.limits import COPY, PRODUCT
from .records import Limit, Record, Timing

BESIDE = ((0, 7), (0, -14), (-11, -4), (11, -4))
"""Where a point's number stands, in turn: neighbours would cover one another's."""


def points(records: Iterable[Record]) -> list[tuple[str, float, float]]:
    """What, operations per byte, operations per second: of every timed work of ours whose operations are known."""
    return [
        (f"{r.operator}, {r.what}", r.flops / r.n_bytes, 1e3 * r.flops / r.median_ms)
        for r in records
        if isinstance(r, Timing) and r.role == "ours" and r.flops and r.n_bytes and r.median_ms
    ]


def draw(records: Iterable[Record], about: dict[str, Any]) -> bytes | None:
    """A PNG; None where the roofs or every point are missing.

    Raises:
        ImportError: without matplotlib.
    """
    records = list(records)
    limits = {r.name: r.per_second for r in records if isinstance(r, Limit)}
    bandwidth, product = limits.get(COPY), limits.get(PRODUCT)
    found = points(records)
    if not (bandwidth and product and found):
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.add_subplot()
    low = min(min(x for _, x, _ in found), 1.0) / 2
    high = max(max(x for _, x, _ in found), product / bandwidth) * 4
    ridge = product / bandwidth
    axes.plot([low, ridge, high], [low * bandwidth, product, product], color="black", linewidth=1.2)
    middle = (low * ridge) ** 0.5
    axes.annotate(
        f"copy {bandwidth / 1e9:.0f} GB/s", (middle, middle * bandwidth), xytext=(-10, 6), textcoords="offset points",
        ha="right",
    )  # fmt: skip
    axes.annotate(
        f"bf16 product {product / 1e12:.0f} TFLOP/s", (high, product), xytext=(-6, 6), textcoords="offset points",
        ha="right",
    )  # fmt: skip
    for number, (what, x, y) in enumerate(found, 1):
        roof = min(x * bandwidth, product)
        axes.scatter([x], [y], s=36, color=f"C{number % 10}", zorder=3, label=f"{number}  {y / roof:.0%}  {what}")
        beside = BESIDE[number % len(BESIDE)]
        axes.annotate(str(number), (x, y), xytext=beside, textcoords="offset points", ha="center", fontsize=8)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(None, product * 3))
    axes.set(xlabel="FLOP per byte that has to move", ylabel="FLOP/s achieved")
    axes.set_title(f"{about['device'].replace('_', ' ')}, {about['date'][:10]}, {about['commit']}", loc="left")
    axes.grid(True, which="major", alpha=0.3)
    legend = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "fontsize": 7, "frameon": False}
    axes.legend(title="share of the roof above it", handletextpad=0.3, **legend)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
