"""The command match: two images -> matches and one geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from superpoint_trt.cli.matcher import MatcherArgs, note_another_network
from superpoint_trt.cli.options import MODEL, ExtractArgs, OptionGroup, RuntimeArgs, given_flags, option
from superpoint_trt.cli.terminal import check_outputs, open_model, print_row
from superpoint_trt.core.types import Keypoints
from superpoint_trt.match.geometry import Estimator, Model
from superpoint_trt.match.images import ImageMatches, match_images, save_matches
from superpoint_trt.match.nearest import MatchOptions

if TYPE_CHECKING:
    from pathlib import Path

    from superpoint_trt.core.image_file import ReadOptions
    from superpoint_trt.match.learned import LearnedMatcher
    from superpoint_trt.run.captions import Picture

MAX_LINES = click.option(
    "--max-lines", type=click.IntRange(0), default=150, show_default=True, help="Matches drawn, spread over the image."
)
MAX_KEYPOINTS = 2048
"""Of each image, unless asked otherwise: matching all takes long and adds few inliers."""


@dataclass(frozen=True)
class NeighborArgs(OptionGroup):
    """Which mutual nearest neighbors are matches."""

    ratio: float | None = option(
        "--ratio", type=float, help="Nearest over second nearest distance must be smaller.  [default: no test]"
    )
    max_distance: float | None = option(
        "--max-distance", type=float, help="Descriptor distance must not be greater.  [default: no limit]"
    )

    def neighbors(self) -> MatchOptions:
        """The options of `match.nearest`."""
        return MatchOptions(max_ratio=self.ratio, max_distance=self.max_distance)


@dataclass(frozen=True)
class MatchArgs(NeighborArgs):
    """Which matches count, and what geometry they must agree with."""

    geometry: str = option(
        "--geometry", type=click.Choice([model.value for model in Model]), default=Model.HOMOGRAPHY.value
    )
    estimator: str = option(
        "--estimator", type=click.Choice([name.value for name in Estimator]), default=Estimator.MAGSAC.value
    )
    inlier_px: float = option("--inlier-px", type=float, default=3.0, help="How far an inlier may lie.")

    def match(self, first: Keypoints, second: Keypoints, matcher: LearnedMatcher | None = None) -> ImageMatches:
        """Matches the keypoints of two images, by their nearest neighbors or by a trained matcher."""
        geometry = Model(self.geometry), Estimator(self.estimator), self.inlier_px
        return match_images(first, second, self.neighbors(), *geometry, matcher=matcher)


@click.command()
@MODEL
@click.argument("first")
@click.argument("second")
@click.option("--output", help="Picture to write: both images, inliers yellow to blue, outliers grey.")
@MAX_LINES
@click.option("--save", help="Matches to write: .npz with both feature sets, matches, distances, inliers, geometry.")
@MatchArgs.declare("matching")
@MatcherArgs.declare("matcher_args")
@ExtractArgs.declare("extract", max_keypoints={"default": MAX_KEYPOINTS, "show_default": True})
@RuntimeArgs.declare("runtime")
def match(
    model: str,
    first: str,
    second: str,
    output: str | None,
    max_lines: int,
    save: str | None,
    matching: MatchArgs,
    matcher_args: MatcherArgs,
    extract: ExtractArgs,
    runtime: RuntimeArgs,
) -> None:
    """Match two images and draw the inliers of one geometry."""
    from superpoint_trt.run.draw import check_picture_name
    from superpoint_trt.run.store import check_npz

    check_outputs((output, save), (first, second, model))
    if output:
        check_picture_name(output)
    if save:
        check_npz(save)
    with matcher_args.opened(runtime) as matcher, open_model(model, runtime, extract) as superpoint:
        if matcher and given_flags(("ratio", "max_distance")):
            raise click.UsageError("--ratio and --max-distance are for --matcher nearest; use --min-score.")
        found = matching.match(superpoint.extract(first), superpoint.extract(second), matcher)
        note_another_network(matcher, superpoint.description.features_sha256, model)
    print_matches(found)
    if output:
        print_row("picture", _draw(found, (first, second), model, extract.reading(), max_lines, output))
    if save:
        print_row("saved", save_matches(save, found))


def print_matches(found: ImageMatches) -> None:
    """Prints how many matches there are, and whether they support a geometry."""
    print_row("keypoints", f"{len(found.first)} and {len(found.second)}")
    print_geometry(found)


def print_geometry(found: ImageMatches) -> None:
    """Prints how many matches agree with the geometry, and whether that is more than chance gives."""
    geometry = found.geometry
    kind = geometry.model.words
    matches, inliers = len(found.matches), int(geometry.inliers.sum())
    print_row("matches", f"{matches}, {inliers} inliers of one {kind}")
    if geometry.matrix is None:
        print_row("geometry", f"none: the matches support no {kind}")
        return
    doubt = f"not supported: {inliers} inliers of {matches} matches are what chance gives"
    said = "supported" if geometry.supported else doubt
    print_row("geometry", f"{said} (10^{geometry.log10_nfa:.1f} such models expected by chance)")


def _draw(
    found: ImageMatches, images: tuple[str, str], model: str, reading: ReadOptions, max_lines: int, output: str
) -> Path:
    from superpoint_trt.core.image import load_image, to_picture
    from superpoint_trt.run.draw import save_picture

    first, second = (to_picture(load_image(image, reading)) for image in images)
    return save_picture(output, picture_of(found, first, second, model, max_lines))


def picture_of(found: ImageMatches, first_rgb: Picture, second_rgb: Picture, model: str, max_lines: int) -> Picture:
    """Both images with the matches and a caption."""
    from superpoint_trt.run.draw import MatchDrawing, draw_matches

    first_xy, second_xy = found.places()
    inliers, away, caption = found.geometry.inliers, found.distances_px(), found.caption(model)
    return draw_matches(first_rgb, second_rgb, first_xy, second_xy, inliers, away, caption, MatchDrawing(max_lines))
