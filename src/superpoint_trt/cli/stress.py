"""`superpoint evaluate --stress`: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    print_table,
    write_json,
)
from superpoint_trt.core.image import find_images
from superpoint_trt.prove.changes import Change
from superpoint_trt.prove.stress import (
    BASELINE,
    TURNED_AND_SHRUNK,
    UNCHANGED,
    ModelStress,
    StressOptions,
    StressReport,
    stress,
)
from superpoint_trt.prove.stress_plot import check_stress_plot, plot_stress
from superpoint_trt.prove.tables import Cell, Column, check_table_name, write_table
from superpoint_trt.prove.tables import Table as FigureTable

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
    table: str | None,
    json_path: str | None,
    runtime: RuntimeArgs,
) -> None:
    """Judges models on changed photographs; prints, draws and writes the figures."""
    judged = [*models]
    judged += [BASELINE] if baselines and BASELINE not in judged else []
    check_outputs((table, json_path, arguments.plot), (*models, *(path for one in photos for path in find_images(one))))
    if table:
        check_table_name(table)
    if arguments.plot:
        check_stress_plot(arguments.plot, len(judged))
    with progress_bar("stress: pictures") as progress:
        report = stress(
            photos,
            judged,
            arguments.options(subpixel),
            runtime.device,
            runtime.threads,
            progress,
            runtime.allow_host_code,
        )
    print_stress(report)
    if table:
        print_row("table", write_table(table, stress_table(report)))
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
    if len(report.models) > 1:
        print_table(stress_table(report))


def stress_table(report: StressReport) -> FigureTable:
    """Right matches of several models: a row for each change, a column for each model."""
    rows: list[list[Cell]] = [
        [words, *(stressed.figures[change].right for stressed in report.models)]
        for section in _sections(report.options)
        for words, change in section.items()
    ]
    rows.append([_AGAINST_NONE, *(stressed.of_unturned for stressed in report.models)])
    return FigureTable([Column("right"), *(Column(stressed.model) for stressed in report.models)], rows)


def _table(stressed: ModelStress, options: StressOptions) -> Table:
    """All figures of one model: a row for each change."""
    table = Table("change", "right", "MMA@1", "MMA@3", "rep.")
    for section in _sections(options):
        for words, change in section.items():
            row = stressed.figures[change]
            table.add_row(words, *(f"{figure:.3f}" for figure in (row.right, row.mma1, row.mma3, row.repeatability)))
        table.add_section()
    table.add_row(_AGAINST_NONE, f"{stressed.of_unturned:.3f}")
    return table


_AGAINST_NONE = "against none"


def _sections(options: StressOptions) -> Iterator[dict[str, Change]]:
    """The changes by what a row says of them, with the unchanged picture once."""
    yield {"none": UNCHANGED}
    for name, curve in options.curves.items():
        yield {_WORDS[name].format(at): change for at, change in curve.items() if change != UNCHANGED}
    yield {"turned 90 degrees and shrunk to 0.5": TURNED_AND_SHRUNK}
