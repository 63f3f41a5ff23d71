"""The command reconstruct: photographs or a video -> a map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from superpoint_trt.cli.colmap import MAPS, ColmapArgs, print_map
from superpoint_trt.cli.extract import SOME_FAILED, print_summary
from superpoint_trt.cli.match import NeighborArgs
from superpoint_trt.cli.match_pairs import pair_options, print_pair_matches
from superpoint_trt.cli.matcher import MatcherArgs
from superpoint_trt.cli.options import MODEL, ExtractArgs, OptionGroup, RuntimeArgs, option
from superpoint_trt.cli.progress import rate_bar
from superpoint_trt.cli.terminal import print_aside, print_row

if TYPE_CHECKING:
    from superpoint_trt.pipeline.pairs import PairOptions
    from superpoint_trt.pipeline.reconstruct import ReconstructOptions, ReconstructSummary

MAX_KEYPOINTS, MAX_SIDE_PX = 2048, 1024


@dataclass(frozen=True)
class ReconstructArgs(OptionGroup):
    """Which images, and which pairs of them."""

    every: int = option("--every", type=int, default=1, help="Of a video, every N-th frame.")
    fps: float | None = option("--fps", type=float, help="Of a video, at most so many frames a second.  [default: 2]")
    exhaustive: bool = option("--exhaustive", is_flag=True, help="Match every image with every other.")
    sequential: int | None = option(
        "--sequential", type=int, metavar="K", help="Match every image with the K that follow it, by name."
    )
    loop_every: int | None = option(
        "--loop-every", type=int, metavar="M", help="With --sequential: every M-th image with every other of these."
    )
    kind: str = option("--map", type=click.Choice(MAPS), default="incremental", help="How to map.")
    overwrite: bool = option("--overwrite", is_flag=True, help="Start anew, whatever the folder has.")

    def pairs(self) -> PairOptions | None:
        """Which pairs; None: by the number of images."""
        from superpoint_trt.pipeline.pairs import PairOptions

        if not (self.exhaustive or self.sequential or self.loop_every):
            return None
        return PairOptions(self.exhaustive, self.sequential, self.loop_every)

    def options(
        self,
        model: str,
        neighbors: NeighborArgs,
        matcher: MatcherArgs,
        colmap: ColmapArgs,
        extract: ExtractArgs,
        runtime: RuntimeArgs,
    ) -> ReconstructOptions:
        """The options of `pipeline.reconstruct.reconstruct`."""
        from superpoint_trt.pipeline.extract import ExtractOptions
        from superpoint_trt.pipeline.inputs import InputOptions
        from superpoint_trt.pipeline.reconstruct import ReconstructOptions

        settings = {**extract.settings(), **runtime.settings()}
        inputs = InputOptions(None, self.every, self.fps)
        return ReconstructOptions(
            ExtractOptions(model, settings, inputs, overwrite=self.overwrite),
            self.pairs(),
            pair_options(neighbors, matcher, device=runtime.device, overwrite=self.overwrite),
            colmap.options(self.kind),
        )


@click.command()
@click.argument("source", metavar="FOLDER|VIDEO")
@click.option("--output", required=True, help="Folder for features, matches, frames of a video, and the map.")
@MODEL
@ReconstructArgs.declare("args")
@NeighborArgs.declare("neighbors")
@MatcherArgs.declare("matcher")
@ColmapArgs.declare("colmap")
@ExtractArgs.declare(
    "extract",
    max_keypoints={"default": MAX_KEYPOINTS, "show_default": True},
    max_side_px={"default": MAX_SIDE_PX, "show_default": True},
)
@RuntimeArgs.declare("runtime")
@click.pass_context
def reconstruct(
    context: click.Context,
    source: str,
    output: str,
    model: str,
    args: ReconstructArgs,
    neighbors: NeighborArgs,
    matcher: MatcherArgs,
    colmap: ColmapArgs,
    extract: ExtractArgs,
    runtime: RuntimeArgs,
) -> None:
    """Make a map of photographs or a video: extract, pairs, match-pairs and colmap in a row.

    Killed at any time, it goes on where it was when it is started again. Exit code 1: some images failed.
    """
    from superpoint_trt.pipeline.reconstruct import reconstruct as run_reconstruct

    options = args.options(model, neighbors, matcher, colmap, extract, runtime)
    with rate_bar("items") as progress:
        found = run_reconstruct(source, output, options, progress)
    print_reconstruction(found, output)
    if found.extracted.failed:
        context.exit(SOME_FAILED)


def print_reconstruction(found: ReconstructSummary, output: str) -> None:
    """Prints what each step did."""
    print_summary(found.extracted)
    near = f"every image with the next {found.paired.sequential}"
    print_row("pairing", "every image with every other" if found.paired.exhaustive else near)
    print_pair_matches(found.matched)
    if found.map_was_there:
        print_aside("note", "the map of the last run was kept: it was made of the same")
    print_map(found.map, output)
