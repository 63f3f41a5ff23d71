"""Scenes mapped twice, with nearest neighbors and with the learned matcher: `superpoint reconstruct --matcher` of each.

    python benchmarks/map_matchers.py SCENE [SCENE ...] [--output FOLDER] [--model full]

A SCENE is a folder of photographs, or one with cameras.json and images/ (`superpoint evaluate --poses` takes such
folders, too), whose intrinsics are then given to COLMAP. Prints the table of docs/matcher.md. Needs '.[bulk,colmap]'.
Started again with the same --output, it goes on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from superpoint_trt.convert.default_matcher import default_matcher
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.pipeline.colmap_map import CameraSharing, ColmapOptions, MapReport
from superpoint_trt.pipeline.extract import ExtractOptions
from superpoint_trt.pipeline.match_pairs import PairMatchOptions
from superpoint_trt.pipeline.reconstruct import ReconstructOptions, reconstruct
from superpoint_trt.prove.posed_pairs import CAMERAS, load_posed_pairs

MATCHERS = ("nearest", "learned")
HALF_PIXEL = 0.5
"""Pixel centers are at integers in cameras.json, at halves in COLMAP."""


def map_with(
    matcher: str, scene: Path, output: Path, model: str = "full", progress: PhaseProgress | None = None
) -> MapReport:
    """Maps a scene with one of `MATCHERS`; the folder of the output then holds what `reconstruct` writes."""
    settings = {"max_keypoints": 2048, "max_side_px": 1024}
    matching = PairMatchOptions(matcher=default_matcher() if matcher == "learned" else None)
    has_cameras = (scene / CAMERAS).is_file()
    options = ReconstructOptions(
        ExtractOptions(model, settings),
        matching=matching,
        colmap=_known_camera(scene) if has_cameras else ColmapOptions(),
    )
    return reconstruct(scene / "images" if has_cameras else scene, output, options, progress).map


def _known_camera(scene: Path) -> ColmapOptions:
    """The intrinsics of a scene's first camera, for all of its images."""
    k = load_posed_pairs(scene)[0].first_intrinsics
    parameters = (k[0, 0], k[1, 1], k[0, 2] + HALF_PIXEL, k[1, 2] + HALF_PIXEL)
    return ColmapOptions(cameras=CameraSharing.SINGLE, camera_model="PINHOLE", camera_params=parameters)


def row(scene: str, matcher: str, report: MapReport) -> str:
    """A line of the table."""
    error = "-" if report.reprojection_px is None else f"{report.reprojection_px:.2f}"
    length = "-" if report.track_length is None else f"{report.track_length:.2f}"
    return f"| {scene}, {matcher} | {report.registered} of {report.images} | {report.points:,} | {error} | {length} |"


@contextmanager
def _kept(output: Path | None) -> Iterator[Path]:
    if output:
        yield output
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@click.command()
@click.argument("scenes", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--output", type=click.Path(path_type=Path), help="Keeps features, matches and maps.  [default: no]")
@click.option("--model", default="full", show_default=True)
def main(scenes: tuple[Path, ...], output: Path | None, model: str) -> None:
    """Maps scenes with nearest neighbors and with the learned matcher."""
    print(
        "| scene, matcher | images in the map | points | reprojection error, px | track length |\n|---|---|---|---|---|"
    )
    with _kept(output) as folder:
        for scene in scenes:
            for matcher in MATCHERS:
                report = map_with(matcher, scene, folder / f"{scene.name}-{matcher}", model)
                print(row(scene.name, matcher, report), flush=True)


if __name__ == "__main__":
    main()
