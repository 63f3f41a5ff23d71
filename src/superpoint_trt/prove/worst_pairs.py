"""Pictures of the pairs that an evaluation got wrong: which matches are right, and which are not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, make_folder
from superpoint_trt.core.image import load_image, to_picture
from superpoint_trt.core.types import Keypoints, Matrix
from superpoint_trt.prove.metrics import warp
from superpoint_trt.prove.protocol import resize_to_protocol
from superpoint_trt.run.draw import BLUES, WRONG, MatchDrawing, draw_matches, save_picture

MOST_LINES = 100
"""Wrong lines cross each other, so fewer are drawn than of a good pair."""

if TYPE_CHECKING:
    from superpoint_trt.prove.evaluate import Evaluation, PairResult
    from superpoint_trt.run.captions import Picture


@dataclass(frozen=True)
class JudgedPair:
    """A pair as the evaluation matched it."""

    result: PairResult
    first: Keypoints
    """The points that the homography was estimated from, in pixels of the resized image, like `second`."""
    second: Keypoints
    homography: Matrix
    """(3, 3): pixels of the first resized image to pixels of the second."""
    matches: NDArray[np.int64]
    """(M, 2) rows of `first` and `second`."""

    @property
    def error_px(self) -> float:
        """Mean error of the estimated homography's corners; of several orders of the matches the median."""
        return median_error_px(self.result)


def median_error_px(result: PairResult) -> float:
    """Mean error of the estimated homography's corners; of several orders of the matches the median."""
    return float(np.median(result.homography_errors_px))


class WorstPairs:
    """Keeps the pairs with the largest error of the homography.

    worst = WorstPairs(5)
    evaluation = evaluate(model, folder, worst=worst)
    draw_worst_pairs(evaluation, worst, "pictures")
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.pairs: list[JudgedPair] = []
        """The largest error first; of equal ones the earlier pair."""

    def wants(self, result: PairResult) -> bool:
        """Whether a pair with this result would be kept."""
        return len(self.pairs) < self.count or median_error_px(result) > self.pairs[-1].error_px

    def add(self, pair: JudgedPair) -> None:
        """Looks at one more pair."""
        self.pairs = sorted([*self.pairs, pair], key=lambda one: -one.error_px)[: self.count]


def draw_worst_pairs(evaluation: Evaluation, worst: WorstPairs, folder: PathLike) -> list[Path]:
    """Draws each kept pair to a folder: `01_NAME_OF_SEQUENCE_FIRST_SECOND.jpg` is the worst.

    Args:
        evaluation: what the pairs were judged in.
        worst: filled by `evaluate`.
        folder: made if it is not there.

    Raises:
        SuperPointError: the folder cannot be written, or an image is gone.
    """
    target = make_folder(folder)
    paths = []
    for number, pair in enumerate(worst.pairs, 1):
        of = pair.result.pair
        name = re.sub(r"[^\w.-]", "_", f"{number:02}_{of.sequence}_{of.first.stem}_{of.second.stem}")
        paths.append(save_picture(target / f"{name}.jpg", draw_pair(evaluation, pair)))
    return paths


def folder_of(folder: PathLike, name: str) -> str:
    """FOLDER/NAME, an evaluation's own folder of pictures; what file names cannot have becomes _."""
    return str(Path(folder) / (re.sub(r"[^\w.-]+", "_", name).strip("_.") or "model"))


def draw_pair(evaluation: Evaluation, pair: JudgedPair) -> Picture:
    """Draws a pair's matches: right ones from light to dark blue, wrong ones in vermilion."""
    protocol, of = evaluation.protocol, pair.result.pair
    first_xy, second_xy = pair.first.xy[pair.matches[:, 0]], pair.second.xy[pair.matches[:, 1]]
    away = np.linalg.norm(warp(first_xy, pair.homography) - second_xy, axis=1)
    right = away <= protocol.matching_px
    size, rule = protocol.descriptor_size_hw, protocol.resize
    views = [resize_to_protocol(to_picture(load_image(path)), size, rule)[0] for path in (of.first, of.second)]
    caption = pair_caption(evaluation.name, pair, int(right.sum()), len(right))
    lines = lines_of_known_truth(protocol.matching_px)
    return draw_matches(views[0], views[1], first_xy, second_xy, right, away, caption, lines)


def lines_of_known_truth(right_px: float) -> MatchDrawing:
    """How matches are drawn that are known to be right or wrong: light to dark blue, and vermilion.

    Args:
        right_px: farthest from its true place that a right match lies.
    """
    return MatchDrawing(
        most_lines=MOST_LINES,
        inlier_ramp=BLUES,
        far_px=right_px,
        outlier_rgb=WRONG,
        inlier_name="right",
        outlier_name="wrong",
        as_many_outliers=True,
    )


def pair_caption(name: str, pair: JudgedPair, right: int, matches: int) -> str:
    """One line: the pair, the evaluation's name, how many matches are right, and how far the homography is off."""
    of = pair.result.pair
    off = "no homography found" if np.isinf(pair.error_px) else f"homography off by {pair.error_px:.1f} px"
    names = f"{of.sequence} {of.first.stem} and {of.second.stem}"
    return f"{names}, {Path(name).name}: {right} of {matches} matches right, {off}"
