"""Draws docs/images/networks.csv: right homographies over the time of an image, a mark for each network.

    python scripts/network_chart.py docs/images/networks.csv docs/images/networks.png

A further network is a line of the file: name, whether it is this project's ("yes" or "no"), milliseconds of a 640x480
image on one core (benchmarks/networks.py), what it ran in, GFLOP, millions of parameters, MMA@3, H@3, licence, source.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from superpoint_trt.core.types import SuperPointError

OURS, OTHERS, INK = "#0072B2", "#8A8A8A", "#202020"
"""Blue of Okabe and Ito against grey: told apart by color-blind people, and in black and white."""


DPI = 150
_TICKS_MS = (30, 100, 300, 1000)
_KINDS = (
    (True, "this project, in onnxruntime", {"marker": "o", "s": 190, "color": OURS}),
    (False, "others, as published: PyTorch, OpenCV", {"marker": "D", "s": 70, "color": OTHERS}),
)
"""Whether networks are this project's, what the legend says of them, and their mark."""


@dataclass(frozen=True)
class NetworkRow:
    """One line of the file."""

    name: str
    is_ours: bool
    ms: float
    """Of a 640x480 image, on one core."""
    h3: float
    """Share of the pairs whose corners are within 3 px under the estimated homography."""
    source: str


def read_networks(path: Path) -> list[NetworkRow]:
    """Reads the networks of a file.

    Raises:
        SuperPointError: a line lacks its ms, its H@3, or its source.
    """
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.DictReader(file), 2):
            try:
                ms, h3 = float(line["ms"]), float(line["h3"])
                row = NetworkRow(line["name"], line["ours"] == "yes", ms, h3, line["source"])
            except (KeyError, ValueError, TypeError) as error:
                raise SuperPointError(f"{path}, line {number}: expected name, ours, ms, h3, source.") from error
            if not row.source:
                raise SuperPointError(f"{path}, line {number}: {row.name} has no source.")
            rows.append(row)
    return rows


def draw_chart(rows: list[NetworkRow], output: Path) -> Path:
    """Draws the chart; it can be read at a width of 400 px."""
    figure, _ = chart(rows)
    figure.savefig(output, dpi=DPI)
    return output


def chart(rows: list[NetworkRow]) -> tuple[Any, list[Any]]:
    """The chart as matplotlib's figure, and the boxes of its names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    axes.set_xscale("log")
    axes.set_xlim(20, 2500)
    axes.set_ylim(0.48, 0.84)
    axes.set_xlabel("ms for a 640x480 image, one CPU core (left is faster)", fontsize=15)
    axes.set_ylabel("right homographies (within 3 px)", fontsize=15)
    axes.set_xticks(_TICKS_MS, [str(tick) for tick in _TICKS_MS])
    axes.minorticks_off()
    axes.tick_params(labelsize=13)
    axes.grid(alpha=0.25)
    placed: list[Any] = []
    for is_ours, who, style in _KINDS:
        some = [row for row in rows if row.is_ours is is_ours]
        axes.scatter([row.ms for row in some], [row.h3 for row in some], label=who, zorder=3, **style)
    axes.legend(loc="lower right", fontsize=12.5, handletextpad=0.2, borderpad=0.5)
    figure.draw_without_rendering()
    marks = [_around(axes, row.ms, row.h3) for row in rows]
    for row in sorted(rows, key=lambda row: not row.is_ours):
        placed.append(_label(figure, axes, row, marks, placed))
    return figure, placed


def _around(axes: Any, ms: float, h3: float) -> Any:
    """The box of a mark, in the figure's dots."""
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((ms, h3))
    return Bbox.from_extents(x - 12, y - 12, x + 12, y + 12)


_PLACES = (
    (12, 0, "left", "center"),
    (0, 12, "center", "bottom"),
    (0, -12, "center", "top"),
    (-12, 0, "right", "center"),
    (8, 8, "left", "bottom"),
    (8, -8, "left", "top"),
    (-8, 8, "right", "bottom"),
    (-8, -8, "right", "top"),
    (0, 30, "center", "bottom"),
    (0, -30, "center", "top"),
)
"""Where a label may stand beside its mark: offset in points, and how it is aligned."""


def _label(figure: Any, axes: Any, row: NetworkRow, marks: list[Any], placed: list[Any]) -> Any:
    """Writes a network's name at the first place where it covers no mark and no other name; returns its box."""
    color, weight, size = (OURS, "bold", 16) if row.is_ours else (INK, "normal", 12.5)
    frame = axes.get_window_extent()
    for last, (x, y, horizontal, vertical) in zip((False,) * (len(_PLACES) - 1) + (True,), _PLACES):
        text = axes.annotate(
            row.name,
            (row.ms, row.h3),
            (x, y),
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            color=color,
            weight=weight,
            fontsize=size,
        )
        box = text.get_window_extent(figure.canvas.get_renderer()).expanded(1.02, 1.1)
        is_inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        is_free = not any(box.overlaps(mark) for mark in marks) and not any(box.overlaps(other) for other in placed)
        if last or (is_inside and is_free):
            return box
        text.remove()
    return None


@click.command()
@click.argument("figures", type=click.Path(path_type=Path, exists=True))
@click.argument("output", type=click.Path(path_type=Path))
def main(figures: Path, output: Path) -> None:
    """Draws the chart of all networks."""
    print(draw_chart(read_networks(figures), output))


if __name__ == "__main__":
    main()
