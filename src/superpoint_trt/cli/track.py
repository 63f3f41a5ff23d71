"""The command track: points followed through a video, a folder or a camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from superpoint_trt.cli.extract import SOME_FAILED
from superpoint_trt.cli.options import MODEL, ExtractArgs, OptionGroup, RuntimeArgs, option
from superpoint_trt.cli.progress import phase_bar
from superpoint_trt.cli.terminal import check_outputs, open_model, print_aside, print_row

if TYPE_CHECKING:
    from superpoint_trt.pipeline.track_video import SourceOptions, TrackOutputs, TrackSummary
    from superpoint_trt.pipeline.tracks import TrackOptions

MAX_KEYPOINTS = 1000
_MOST_LEFT_OUT = 5


@dataclass(frozen=True)
class TrackArgs(OptionGroup):
    """Which points are the same, and which images are taken. Names with "_" are the original demo's."""

    max_distance: float = option(
        "--max-distance", "--nn_thresh", type=float, default=0.7, help="Descriptor distance must not be greater."
    )
    min_length: int = option(
        "--min-length", "--min_length", type=int, default=2, help="Images that a track has at least."
    )
    max_length: int = option(
        "--max-length", "--max_length", type=int, default=5, help="Images that its path is drawn in."
    )
    every: int = option("--every", "--skip", type=int, default=1, help="Of each so many images take the first.")
    image_glob: str | None = option("--image-glob", "--img_glob", metavar="GLOB", help='Of a folder: "*.png".')
    fps: float = option("--fps", type=float, default=10.0, help="Images a second of a folder's images.")
    camera: int = option("--camera", "--camid", type=int, default=0, help="Number of the camera.")

    def tracking(self) -> TrackOptions:
        """Which points are the same."""
        from superpoint_trt.pipeline.tracks import TrackOptions

        return TrackOptions(self.max_distance, self.min_length, self.max_length)

    def source(self) -> SourceOptions:
        """Which images are taken."""
        from superpoint_trt.pipeline.track_video import SourceOptions

        return SourceOptions(self.every, self.image_glob, self.fps, self.camera)


@dataclass(frozen=True)
class TrackOutputArgs(OptionGroup):
    """What is made of the tracks."""

    output: str | None = option(
        "--output", metavar="VIDEO", help="Video of the tracks to write: .mp4, .mkv, .mov, .avi."
    )
    save: str | None = option("--save", help="Tracks to write: .npz with track, frame, xy, scores, names, times_s.")
    write_dir: str | None = option("--write-dir", "--write_dir", help="Folder for a picture of each image.")
    display: bool | None = option(
        "--display/--no-display",
        " /--no_display",
        default=None,
        help="Show the tracks in a window.  [default: if nothing is written]",
    )

    def outputs(self) -> TrackOutputs:
        """The outputs of `track`."""
        from superpoint_trt.pipeline.track_video import TrackOutputs

        written = any((self.output, self.save, self.write_dir))
        window = not written if self.display is None else self.display
        return TrackOutputs(self.output, self.save, self.write_dir, window)


@click.command()
@MODEL
@click.argument("source", metavar="VIDEO|FOLDER|camera")
@TrackOutputArgs.declare("writing")
@TrackArgs.declare("args")
@ExtractArgs.declare(
    "extract",
    max_keypoints={"default": MAX_KEYPOINTS, "show_default": True},
    threshold={"aliases": ("--conf_thresh",)},
    nms_radius_px={"aliases": ("--nms_dist",)},
)
@RuntimeArgs.declare("runtime")
@click.pass_context
def track(
    context: click.Context,
    model: str,
    source: str,
    writing: TrackOutputArgs,
    args: TrackArgs,
    extract: ExtractArgs,
    runtime: RuntimeArgs,
) -> None:
    """Follow points through a video, a folder of images, or a camera. Exit code 1: some images were left out."""
    from superpoint_trt.pipeline.track_video import track as run_track

    check_outputs((writing.output, writing.save), (source, model))
    outputs, tracking, images = writing.outputs(), args.tracking(), args.source()
    with open_model(model, runtime, extract) as superpoint, phase_bar("looking for images") as progress:
        found = run_track(source, superpoint, outputs, tracking, images, progress)
    print_tracks(found, outputs)
    if found.left_out:
        context.exit(SOME_FAILED)


def print_tracks(found: TrackSummary, outputs: TrackOutputs) -> None:
    """Prints what was followed."""
    lengths = found.tracks.lengths
    print_row("images", f"{found.frames}, {found.frames / max(found.seconds, 1e-9):.1f} a second")
    longest = f", the longest through {lengths.max()} images, {lengths.mean():.1f} on average" if len(lengths) else ""
    print_row("tracks", f"{len(lengths)}{longest}")
    for label, path in (("video", outputs.video), ("saved", outputs.tracks), ("pictures", outputs.pictures)):
        if path is not None:
            print_row(label, path)
    for line in found.left_out[:_MOST_LEFT_OUT]:
        print_aside("left out", line)
    if len(found.left_out) > _MOST_LEFT_OUT:
        print_aside("left out", f"{len(found.left_out) - _MOST_LEFT_OUT} more images")
