"""The literature's metrics for keypoints and descriptors on pairs with a known homography. Arrays in, numbers out.

In all functions `first` and `second` are the keypoints of two images, by falling score. `homography` (3, 3) maps pixels
of the first image to pixels of the second. A point is shared if its place in the other image lies inside that image.
`count` limits each image to its best points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Keypoints, Matrix
from superpoint_trt.match.geometry import Estimator, Model, estimate
from superpoint_trt.match.nearest import MatchOptions, match

Matching = Callable[[Keypoints, Keypoints], NDArray[np.int64]]
"""Keypoints of both images -> (M, 2) rows that are matches."""


def mutual_neighbors(first: Keypoints, second: Keypoints) -> NDArray[np.int64]:
    """Rows (M, 2) of mutual nearest neighbors."""
    return match(first.descriptors, second.descriptors).rows


def warp(xy: NDArray[np.floating], homography: Matrix) -> NDArray[np.float64]:
    """Maps points (N, 2) in pixels through a homography (3, 3); returns (N, 2). Points at infinity become infinite."""
    with np.errstate(all="ignore"):
        homogeneous = np.concatenate([xy, np.ones((len(xy), 1))], axis=1) @ homography.T
        warped: NDArray[np.float64] = homogeneous[:, :2] / homogeneous[:, 2:]
    return warped


def shared(keypoints: Keypoints, homography: Matrix, other_size: tuple[int, int], count: int) -> Keypoints:
    """Selects the `count` best keypoints whose place lies inside the other image, of size (width, height)."""
    place = warp(keypoints.xy, homography)
    inside = ((place >= 0) & (place < np.array(other_size))).all(axis=1)
    return keypoints.rows(np.flatnonzero(inside)[:count])


@dataclass(frozen=True)
class Repeatability:
    """The detector's figures of one pair; both None if neither image has a shared point."""

    share: float | None
    localization_error_px: float | None
    """Mean distance of the points that were found again."""


def repeatability(
    first: Keypoints, second: Keypoints, homography: Matrix, count: int = 300, threshold_px: float = 3.0
) -> Repeatability:
    """The share of shared points that have a point of the other image within a distance, counted in both directions.

    DeTone et al. 2018, appendix on metrics ("Repeatability", "Localization Error"), as rpautrat/SuperPoint's
    detector_evaluation.py computes it: distances in the second image, the best `count` points of each image.
    """
    a = shared(first, homography, second.image_size, count)
    b = shared(second, np.linalg.inv(homography), first.image_size, count)
    if not len(a) + len(b):
        return Repeatability(None, None)
    if not len(a) or not len(b):
        return Repeatability(0.0, None)
    distance = _distances(warp(a.xy, homography), b.xy)
    nearest = np.concatenate([distance.min(axis=1), distance.min(axis=0)])
    found = nearest[nearest <= threshold_px]
    return Repeatability(len(found) / len(nearest), float(found.mean()) if len(found) else None)


def homography_error_px(
    first: Keypoints,
    second: Keypoints,
    homography: Matrix,
    count: int = 1000,
    estimator: Estimator = Estimator.RANSAC,
    ransac_px: float = 3.0,
    order: int = 0,
    matching: Matching = mutual_neighbors,
) -> float:
    """Mean distance of the first image's corners under the estimated and the true homography; inf if none is found.

    DeTone et al. 2018, appendix on metrics ("Homography Estimation") and rpautrat/SuperPoint's
    descriptor_evaluation.py: the `count` best shared points, mutual nearest neighbors, RANSAC. A pair is correct at
    e px if this error is at most e. The corners are the centers of the corner pixels: (0, 0) to (W - 1, H - 1).

    Args:
        first: keypoints of the first image.
        second: keypoints of the second image.
        homography: (3, 3), the true one.
        count: how many shared points of each image take part.
        estimator: OpenCV's method.
        ransac_px: how far an inlier may lie from the estimate.
        order: the number of an order of the matches (`match.geometry.estimate`).
        matching: what matches the points.
    """
    a = shared(first, homography, second.image_size, count)
    b = shared(second, np.linalg.inv(homography), first.image_size, count)
    rows = matching(a, b)
    found = estimate(a.xy[rows[:, 0]], b.xy[rows[:, 1]], Model.HOMOGRAPHY, estimator, ransac_px, order).matrix
    if found is None:
        return float("inf")
    right, bottom = first.image_size[0] - 1, first.image_size[1] - 1
    corners = np.array([[0, 0], [right, 0], [0, bottom], [right, bottom]], dtype=np.float64)
    with np.errstate(all="ignore"):
        error = np.linalg.norm(warp(corners, found) - warp(corners, homography), axis=1).mean()
    return float(error) if np.isfinite(error) else float("inf")


def matching_accuracy(
    first: Keypoints,
    second: Keypoints,
    homography: Matrix,
    thresholds_px: tuple[int, ...],
    count: int = 1000,
    matching: Matching = mutual_neighbors,
) -> list[float]:
    """The share of matches whose reprojection error is at most each threshold; 0 without matches.

    Matches are mutual nearest neighbors unless asked otherwise.
    Dusmanu et al. 2019 (D2-Net), section 5.1; the mean over pairs is their "mean matching accuracy". All points of both
    images take part, shared or not.
    """
    error = match_errors_px(first.top(count), second.top(count), homography, matching)
    return accuracy_of(error, thresholds_px)


def accuracy_of(errors_px: NDArray[np.float64], thresholds_px: tuple[int, ...]) -> list[float]:
    """The share of errors (M,) that are at most each threshold; 0 without errors."""
    return [float((errors_px <= threshold).mean()) if len(errors_px) else 0.0 for threshold in thresholds_px]


def match_errors_px(
    first: Keypoints, second: Keypoints, homography: Matrix, matching: Matching = mutual_neighbors
) -> NDArray[np.float64]:
    """Reprojection errors (M,) of all matches, in pixels of the second image."""
    rows = matching(first, second)
    with np.errstate(all="ignore"):
        error: NDArray[np.float64] = np.linalg.norm(
            warp(first.xy[rows[:, 0]], homography) - second.xy[rows[:, 1]], axis=1
        )
    return error


def right_share(
    first: Keypoints, second: Keypoints, homography: Matrix, count: int = 1000, threshold_px: float = 3.0
) -> float:
    """Right matches as a share of the first image's shared points; 0 without such points.

    A match is a mutual nearest neighbor; it is right if its reprojection error is at most the threshold. Unlike
    `matching_accuracy` it counts points that find no partner: few sure matches are not better than many.
    """
    a = shared(first, homography, second.image_size, count)
    right = match_errors_px(a, second.top(count), homography) <= threshold_px
    return float(right.sum() / len(a)) if len(a) else 0.0


def matching_score(
    first: Keypoints, second: Keypoints, homography: Matrix, count: int = 1000, threshold_px: float = 3.0
) -> float:
    """The share of shared points whose nearest descriptor is the right point, averaged over both directions.

    DeTone et al. 2018, appendix on metrics ("Matching Score"): the correspondences that the whole pipeline recovers,
    over the points that it proposes in the shared region. An image without shared points counts 0.
    """
    sides = _nearest_both_ways(first, second, homography, count, threshold_px)
    return float(np.mean([side.correct.mean() if len(side.correct) else 0.0 for side in sides]))


def nn_average_precision(
    first: Keypoints, second: Keypoints, homography: Matrix, count: int = 1000, threshold_px: float = 3.0
) -> float:
    """Area under precision over recall of nearest neighbors by rising distance, averaged over both directions.

    DeTone et al. 2018, appendix on metrics ("Nearest Neighbor mAP"), with the recall of Mikolajczyk and Schmid 2005:
    out of the points that have a right partner at all. A direction without such points counts 0.
    """
    sides = _nearest_both_ways(first, second, homography, count, threshold_px)
    return float(np.mean([_average_precision(side) for side in sides]))


@dataclass(frozen=True)
class _Nearest:
    """One direction: each shared point and its nearest descriptor in the other image."""

    distance: Float32
    """(N,) distance of the two descriptors."""
    correct: NDArray[np.bool_]
    """(N,) whether that neighbor lies within the threshold of the true place."""
    possible: NDArray[np.bool_]
    """(N,) whether any point of the other image lies there."""


def _nearest_both_ways(
    first: Keypoints, second: Keypoints, homography: Matrix, count: int, threshold_px: float
) -> tuple[_Nearest, _Nearest]:
    back = np.linalg.inv(homography)
    a = shared(first, homography, second.image_size, count)
    b = shared(second, back, first.image_size, count)
    return (
        _nearest(a, b, _distances(warp(a.xy, homography), b.xy) <= threshold_px),
        _nearest(b, a, _distances(warp(b.xy, back), a.xy) <= threshold_px),
    )


def _nearest(a: Keypoints, b: Keypoints, near: NDArray[np.bool_]) -> _Nearest:
    if not len(a) or not len(b):
        nothing = np.zeros(len(a), dtype=bool)
        return _Nearest(np.zeros(len(a), np.float32), nothing, nothing)
    found = match(a.descriptors, b.descriptors, MatchOptions(mutual=False))
    return _Nearest(found.distances, near[found.rows[:, 0], found.rows[:, 1]], np.asarray(near.any(axis=1)))


def _average_precision(side: _Nearest) -> float:
    """Sum of the precision at each right match, over the number of possible matches.

    The precision is replaced by its upper envelope, as is usual: at each recall, the best precision from there on.
    """
    possible = int(side.possible.sum())
    if not possible:
        return 0.0
    right = side.correct[np.argsort(side.distance, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / possible)


def _distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Distances of all points a (N, 2) from all points b (M, 2): (N, M) in pixels."""
    with np.errstate(all="ignore"):
        distance: NDArray[np.float64] = np.linalg.norm(a[:, None, :] - b[None, :, :], axis=2)
    return distance
