"""The command colmap: images, features and matches -> database and map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from superpoint_trt.cli.options import OptionGroup, option
from superpoint_trt.cli.progress import phase_bar
from superpoint_trt.cli.terminal import console, print_aside, print_row

if TYPE_CHECKING:
    from superpoint_trt.pipeline.colmap_map import ColmapOptions, MapReport

MAPS = ("incremental", "global")
CAMERAS = ("auto", "single", "per-folder", "per-image")
_MOST_NAMES = 5


@dataclass(frozen=True)
class ColmapArgs(OptionGroup):
    """What COLMAP assumes about the cameras, and how it maps."""

    cameras: str = option(
        "--cameras",
        type=click.Choice(CAMERAS),
        default="auto",
        help="Which images have one camera; auto: those whose size and EXIF agree.",
    )
    camera_model: str = option("--camera-model", default="SIMPLE_RADIAL", help="COLMAP's name of the lens model.")
    camera_params: str | None = option(
        "--camera-params",
        metavar="F,CX,CY,...",
        help="The camera's parameters in COLMAP's order, which are then kept.  [default: estimated]",
    )
    verify_px: float = option("--verify-px", type=float, default=4.0, help="How far an inlier of a pair may lie.")

    def options(self, kind: str | None) -> ColmapOptions:
        """The options of `make_map`."""
        from superpoint_trt.pipeline.colmap_map import CameraSharing, ColmapOptions
        from superpoint_trt.pipeline.colmap_process import MapKind

        return ColmapOptions(
            MapKind(kind) if kind else None,
            CameraSharing(self.cameras),
            self.camera_model,
            _numbers(self.camera_params),
            self.verify_px,
        )


def _numbers(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r}; expected numbers with commas: 1000,640,360") from None


@click.command()
@click.option("--images", required=True, help="Folder that the names of the images start from.")
@click.option("--features", required=True, help="Feature file: .h5, or a folder of .npz.")
@click.option("--matches", required=True, help="Match file of the same images: .h5.")
@click.option("--output", required=True, help="Folder for database.db, sparse/, report.json and map.png.")
@click.option("--map", "kind", type=click.Choice(MAPS), help="How to map.  [default: no map, only the database]")
@ColmapArgs.declare("args")
def colmap(images: str, features: str, matches: str, output: str, kind: str | None, args: ColmapArgs) -> None:
    """Make a COLMAP database with verified geometry, and a map."""
    from superpoint_trt.pipeline.colmap_map import make_map

    options = args.options(kind)
    with phase_bar("reading the names") as progress:
        report = make_map(images, features, matches, output, options, progress)
    print_map(report, output)


def print_map(report: MapReport, output: str) -> None:
    """Prints what the database and the map hold."""
    from rich.table import Table

    table = Table(show_header=False)
    for label, value in report.rows():
        table.add_row(label, value)
    console().print(table)
    if report.map and report.left_out:
        names = ", ".join(report.left_out[:_MOST_NAMES]) + (", ..." if len(report.left_out) > _MOST_NAMES else "")
        print_aside("left out", f"{len(report.left_out)} of {report.images} images have no place in the map: {names}")
    print_row("output", output)
