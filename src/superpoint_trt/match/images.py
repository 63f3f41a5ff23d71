"""Matches the keypoints of two images: neighbors, then one geometry; and their file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, write_npz
from superpoint_trt.core.types import Float32, Keypoints
from superpoint_trt.match.geometry import Estimator, Geometry, Model, distances, estimate
from superpoint_trt.match.nearest import Matches, MatchOptions, match

if TYPE_CHECKING:
    from superpoint_trt.match.learned import LearnedMatcher


@dataclass(frozen=True)
class ImageMatches:
    """The matches of two images."""

    first: Keypoints
    """All keypoints of the first image."""
    second: Keypoints
    """All keypoints of the second image."""
    matches: Matches
    """Pairs of rows of `first` and `second`."""
    geometry: Geometry
    """The geometry that fits the matches, and whether they support it; its `inliers` are rows of `matches`."""

    def places(self) -> tuple[Float32, Float32]:
        """The matched points in both images, each (M, 2) in their own pixels."""
        return self.first.xy[self.matches.rows[:, 0]], self.second.xy[self.matches.rows[:, 1]]

    def distances_px(self) -> NDArray[np.float64]:
        """How far each match is from the geometry (M,), in px of the second image; infinite if there is none."""
        if self.geometry.matrix is None:
            return np.full(len(self.matches), np.inf)
        return distances(self.geometry.model, self.geometry.matrix, *self.places())

    def caption(self, model: str) -> str:
        """One line for a picture: what found the points, and how many matches agree.

        Args:
            model: name or file of the model.
        """
        kind = self.geometry.model.words
        found = f"{Path(model).name}: {len(self.matches)} matches"
        if self.geometry.matrix is None:
            return f"{found}, no {kind}"
        doubt = "" if self.geometry.supported else ", no more than chance gives"
        return f"{found}, {int(self.geometry.inliers.sum())} inliers of one {kind}{doubt}"


def match_images(
    first: Keypoints,
    second: Keypoints,
    options: MatchOptions | None = None,
    model: Model = Model.HOMOGRAPHY,
    estimator: Estimator = Estimator.MAGSAC,
    threshold_px: float = 3.0,
    matcher: LearnedMatcher | None = None,
) -> ImageMatches:
    """Matches the keypoints of two images and fits one geometry to the matches.

    Args:
        first: keypoints of the first image.
        second: keypoints of the second image, from the same model.
        options: which nearest neighbors are matches; default mutual ones.
        model: the geometry, homography or fundamental matrix.
        estimator: OpenCV's method.
        threshold_px: largest distance of an inlier from the geometry.
        matcher: a trained one, which takes the place of nearest neighbors and their options.

    Raises:
        SuperPointError: the descriptors have different lengths, or threshold_px is not above 0.
    """
    matches: Matches = (
        matcher.match(first, second) if matcher else match(first.descriptors, second.descriptors, options)
    )
    xy = first.xy[matches.rows[:, 0]], second.xy[matches.rows[:, 1]]
    geometry = estimate(*xy, model, estimator, threshold_px, second_wh=second.image_size)
    return ImageMatches(first, second, matches, geometry)


def save_matches(path: PathLike, found: ImageMatches) -> Path:
    """Writes both feature sets (`keypoints0`, `keypoints1`, ...), matches, distances, inliers and geometry as .npz.

    `matches` is (M, 2) rows of the two sets, `inliers` (M,) bool, `geometry` (3, 3), all zeros if there is none.
    `geometry_supported` is False if chance gives as many inliers; `geometry_log10_nfa` is the figure behind that
    (`Geometry.log10_nfa`).

    Raises:
        SuperPointError: the file cannot be written; a file that was there is unchanged.
    """
    arrays = {
        f"{name}{index}": array
        for index, features in enumerate((found.first, found.second))
        for name, array in features.to_dict().items()
    }
    matrix = np.zeros((3, 3)) if found.geometry.matrix is None else found.geometry.matrix
    arrays.update(matches=found.matches.rows, distances=found.matches.distances)
    arrays.update(inliers=found.geometry.inliers, geometry=matrix, geometry_type=np.array(found.geometry.model.value))
    arrays.update(geometry_supported=np.array(found.geometry.supported))
    arrays.update(geometry_log10_nfa=np.array(found.geometry.log10_nfa))
    return write_npz(path, arrays)
