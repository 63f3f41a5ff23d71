"""Draws the curves of `prove.stress`: a panel for each kind of change, a line for each model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from superpoint_trt.core.files import PathLike, write_atomically
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.prove.benchmark import check_plot

PANELS = {
    "rotation_deg": "turned, degrees",
    "zoom": "shrunk to (1: full size)",
    "defocus_px": "defocus, radius in px",
    "motion_px": "motion blur, length in px",
}
"""Name of a curve -> label of its axis."""

_ZOOM_TICKS = (1, 0.7, 0.5, 0.35, 0.25)

COLORS = ("#0072B2", "#D55E00", "#000000", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart by color-blind people: Okabe and Ito, "Color Universal Design", 2008."""
_MARKS = ("o-", "s--", "^:", "D-.", "v-", "P--", "X:")
"""Lines differ in black and white, too."""


def check_stress_plot(path: PathLike, models: int) -> None:
    """Checks before the work that so many models can be drawn after it.

    Raises:
        SuperPointError: too many models, no matplotlib, or it cannot write files of that ending.
    """
    check_plot(path)
    if not 1 <= models <= len(COLORS):
        raise SuperPointError(f"{models} models to draw; one plot takes 1 to {len(COLORS)}.")


def plot_stress(models: Sequence[Mapping[str, Any]], path: PathLike, titles: Mapping[str, str] | None = None) -> Path:
    """Draws right matches over each change. The picture can be read at a width of 400 px.

    Args:
        models: entries of "models" in one or several reports (`StressReport.to_json`), at most seven.
        path: picture to write: .png, .jpg, .svg or .pdf.
        titles: other names for the legend, by `model_title`.

    Raises:
        SuperPointError: too many models, no matplotlib, or the file cannot be written.
    """
    check_stress_plot(path, len(models))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    panels: Any = figure.subplots(2, 2, sharey=True)
    names = [(titles or {}).get(title, title) for title in _distinct_titles(models)]
    for axes, (curve, label) in zip(panels.flat, PANELS.items()):
        for model, name, color, mark in zip(models, names, COLORS, _MARKS):
            points = model["curves"][curve]
            at, right = [point["at"] for point in points], [point["right"] for point in points]
            axes.plot(at, right, mark, color=color, label=name, linewidth=2.2, markersize=6)
        axes.set_xlabel(label, fontsize=14)
        axes.set_ylim(0, 1)
        axes.tick_params(labelsize=12)
        axes.grid(alpha=0.3)
    rotation, zoom = panels.flat[:2]
    rotation.set_xticks(range(0, 181, 45))
    zoom.set_xscale("log")
    zoom.set_xticks(_ZOOM_TICKS, [f"{tick:g}" for tick in _ZOOM_TICKS])
    zoom.minorticks_off()
    zoom.invert_xaxis()
    figure.supylabel("right matches, share of points", fontsize=14)
    handles, labels = rotation.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, fontsize=13, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:].lower(), dpi=130, bbox_inches="tight")
    return write_atomically(path, buffer.getvalue())


def _distinct_titles(models: Sequence[Mapping[str, Any]]) -> list[str]:
    """`model_title` of each; with the folders of the files, where files of several folders have one name."""
    titles = [model_title(model) for model in models]
    return [model_title(model, whole_path=titles.count(title) > 1) for model, title in zip(models, titles)]


def model_title(model: Mapping[str, Any], whole_path: bool = False) -> str:
    """A short name of an entry of "models": the file's, the precision if it is not fp32, whole pixels if they are."""
    path = Path(model["model"])
    name = path.stem if path.suffix and not whole_path else str(path)
    precision = "" if model["precision"] == "fp32" else f", {model['precision']}"
    return f"{name}{precision}" + ("" if model["subpixel"] else ", whole pixels")
