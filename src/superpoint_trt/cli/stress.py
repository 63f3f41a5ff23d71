"""`superpoint evaluate --stress`: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from superpoint_trt.cli.options import OptionGroup, RuntimeArgs, option
from superpoint_trt.cli.progress import progress_bar
from superpoint_trt.cli.terminal import (
    check_outputs,
    console,
    keypoints_at,
    print_aside,
    print_row,
    write_json,
)
from superpoint_trt.core.image import find_images
from superpoint_trt.prove.stress import (
    BASELINE,
    TURNED_AND_SHRUNK,
    UNCHANGED,
    Figures,
    ModelStress,
    StressOptions,
    StressReport,
    stress,
)
from superpoint_trt.prove.stress_plot import check_stress_plot, plot_stress

_STRESS = StressOptions()
_WORDS = {
    "rotation_deg": "turned {:g} degrees",
    "zoom": "shrunk to {:g}",
    "defocus_px": "defocus {:g} px",
    "motion_px": "motion {:g} px",
}
"""Name of a curve -> a row of the table."""


@dataclass(frozen=True)
class StressArgs(OptionGroup):
    """With --stress: which photographs and points."""

    photographs: int = option(
        "--photographs", type=int, default=_STRESS.photographs, help="--stress: use so many, spread over all."
    )
    max_keypoints: int = option(
        "--max-keypoints", type=int, default=_STRESS.max_keypoints, help="--stress: best points of each picture."
    )
    max_side: int = option(
        "--max-side", type=int, default=_STRESS.max_side_px, help="--stress: shrink larger photographs to this many px."
    )
    plot: str | None = option("--plot", help="--stress: picture to draw the curves to: .png, .jpg, .svg or .pdf.")

    def options(self, subpixel: bool | None) -> StressOptions:
        """The options of `stress`."""
        return StressOptions(self.photographs, self.max_keypoints, self.max_side, subpixel)


def run_stress(
    photos: Sequence[str],
    models: Sequence[str],
    arguments: StressArgs,
    subpixel: bool | None,
    baselines: bool,
    json_path: str | None,
    runtime: RuntimeArgs,
) -> None:
    """Judges models on changed photographs; prints, draws and writes the figures."""
    judged = [*models]
    judged += [BASELINE] if baselines and BASELINE not in judged else []
    check_outputs((json_path, arguments.plot), (*models, *(path for one in photos for path in find_images(one))))
    if arguments.plot:
        check_stress_plot(arguments.plot, len(judged))
    with progress_bar("stress: pictures") as progress:
        report = stress(photos, judged, arguments.options(subpixel), runtime.device, runtime.threads, progress)
    print_stress(report)
    if json_path:
        write_json(json_path, report.to_json())
    if arguments.plot:
        print_row("plot", plot_stress(report.to_json()["models"], arguments.plot))


def print_stress(report: StressReport) -> None:
    """Prints which photographs were used, and a table of each model."""
    for problem in report.problems:
        print_aside("left out", problem)
    for note in report.notes:
        print_aside("warning", note)
    left_out = f", {len(report.problems)} left out" if report.problems else ""
    print_row("photographs", f"{len(report.photographs)}{left_out}")
    print_row("pictures", f"up to {report.options.max_side_px} px, best {report.options.max_keypoints} points")
    for stressed in report.models:
        print_row("model", stressed.model)
        print_row("ran on", f"{stressed.backend}, {stressed.device}, {stressed.precision}")
        print_row("keypoints at", keypoints_at(stressed.subpixel))
        console().print(_table(stressed, report.options))


def _table(stressed: ModelStress, options: StressOptions) -> Table:
    """One row a change, with the unchanged picture once."""
    rows = stressed.figures
    table = Table("change", "right", "MMA@1", "MMA@3", "rep.")
    _add(table, "none", rows[UNCHANGED])
    for name, curve in options.curves.items():
        table.add_section()
        for at, change in curve.items():
            if change != UNCHANGED:
                _add(table, _WORDS[name].format(at), rows[change])
    table.add_section()
    _add(table, "turned 90 degrees and shrunk to 0.5", rows[TURNED_AND_SHRUNK])
    table.add_row("  against none", f"{stressed.of_unturned:.3f}")
    return table


def _add(table: Table, change: str, row: Figures) -> None:
    table.add_row(change, *(f"{figure:.3f}" for figure in (row.right, row.mma1, row.mma3, row.repeatability)))
