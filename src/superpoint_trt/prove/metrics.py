"""The literature's metrics for keypoints and descriptors on pairs with a known homography. Arrays in, numbers out.

Everywhere: `first` and `second` are the keypoints of two images, `homography` maps pixels of the first to pixels of the
second, and a point counts as shared if its place in the other image lies inside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Keypoints, Matrix
from superpoint_trt.match.geometry import Estimator, Model, estimate
from superpoint_trt.match.nearest import MatchOptions, match


def warp(xy: NDArray[np.floating], homography: Matrix) -> NDArray[np.float64]:
    """(N, 2) pixels through a homography; points at infinity come out as infinite."""
    homogeneous = np.concatenate([xy, np.ones((len(xy), 1))], axis=1) @ homography.T
    with np.errstate(divide="ignore", invalid="ignore"):
        warped: NDArray[np.float64] = homogeneous[:, :2] / homogeneous[:, 2:]
    return warped


def shared(keypoints: Keypoints, homography: Matrix, other_size: tuple[int, int], count: int) -> Keypoints:
    """The `count` best of the keypoints whose place in the other image (width, height) lies inside it."""
    place = warp(keypoints.xy, homography)
    inside = ((place >= 0) & (place < np.array(other_size))).all(axis=1)
    return keypoints.rows(np.flatnonzero(inside)[:count])


@dataclass(frozen=True)
class Repeatability:
    """Of one pair; both None when neither image has a shared point."""

    share: float | None
    localisation_error_px: float | None
    """Mean distance of the points that were found again."""


def repeatability(
    first: Keypoints, second: Keypoints, homography: Matrix, count: int = 300, threshold_px: float = 3.0
) -> Repeatability:
    """The share of shared points that lie within a distance of one in the other image, both ways.

    DeTone et al. 2018, appendix on metrics ("Repeatability", "Localization Error"), as rpautrat/SuperPoint's
    detector_evaluation.py computes it: distances in the second image, the best `count` points of each.
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
) -> float:
    """Mean distance of the first image's corners under the estimated and the true homography; inf if none is found.

    DeTone et al. 2018, appendix on metrics ("Homography Estimation") and rpautrat/SuperPoint's
    descriptor_evaluation.py: shared points, the best `count`, mutual nearest neighbours, RANSAC; a pair is correct at
    e px if this is at most e. `order` numbers an order of the matches (matching.estimate).
    """
    a = shared(first, homography, second.image_size, count)
    b = shared(second, np.linalg.inv(homography), first.image_size, count)
    rows = match(a.descriptors, b.descriptors).rows
    found = estimate(a.xy[rows[:, 0]], b.xy[rows[:, 1]], Model.HOMOGRAPHY, estimator, ransac_px, order).matrix
    if found is None:
        return float("inf")
    right, bottom = first.image_size[0] - 1, first.image_size[1] - 1
    corners = np.array([[0, 0], [right, 0], [0, bottom], [right, bottom]], dtype=np.float64)
    error = np.linalg.norm(warp(corners, found) - warp(corners, homography), axis=1).mean()
    return float(error) if np.isfinite(error) else float("inf")


def matching_accuracy(
    first: Keypoints,
    second: Keypoints,
    homography: Matrix,
    thresholds_px: tuple[int, ...],
    count: int = 1000,
) -> list[float]:
    """The share of mutual nearest neighbours whose reprojection error is at most each threshold; 0 without matches.

    Dusmanu et al. 2019 (D2-Net), section 5.1, "mean matching accuracy" once averaged over pairs. All points of both
    images take part, shared or not.
    """
    a, b = first.top(count), second.top(count)
    rows = match(a.descriptors, b.descriptors).rows
    if not len(rows):
        return [0.0 for _ in thresholds_px]
    error = np.linalg.norm(warp(a.xy[rows[:, 0]], homography) - b.xy[rows[:, 1]], axis=1)
    return [float((error <= threshold).mean()) for threshold in thresholds_px]


def matching_score(
    first: Keypoints, second: Keypoints, homography: Matrix, count: int = 1000, threshold_px: float = 3.0
) -> float:
    """The share of shared points whose nearest descriptor is the right point, averaged over both directions.

    DeTone et al. 2018, appendix on metrics ("Matching Score"): correspondences recovered by the whole pipeline over
    the points it proposes in the shared region. 0 if a side has none.
    """
    sides = _nearest_both_ways(first, second, homography, count, threshold_px)
    return float(np.mean([side.correct.mean() if len(side.correct) else 0.0 for side in sides]))


def nn_average_precision(
    first: Keypoints, second: Keypoints, homography: Matrix, count: int = 1000, threshold_px: float = 3.0
) -> float:
    """Area under precision over recall of nearest neighbours by rising distance, averaged over both directions.

    DeTone et al. 2018, appendix on metrics ("Nearest Neighbor mAP"), with the recall of Mikolajczyk and Schmid 2005:
    out of the points that have a right partner at all. 0 if a side has none.
    """
    sides = _nearest_both_ways(first, second, homography, count, threshold_px)
    return float(np.mean([_average_precision(side) for side in sides]))


@dataclass(frozen=True)
class _Nearest:
    """One direction: each shared point and its nearest descriptor in the other image."""

    distance: Float32
    """(N,) of the descriptors."""
    correct: NDArray[np.bool_]
    """(N,) whether that neighbour is within the threshold of the true place."""
    possible: NDArray[np.bool_]
    """(N,) whether any point is."""


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
    """Sum of precision at each right match over the number of possible ones, precision made falling as is usual."""
    possible = int(side.possible.sum())
    if not possible:
        return 0.0
    right = side.correct[np.argsort(side.distance, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[right].sum() / possible)


def _distances(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """(N, 2), (M, 2) -> (N, M) in pixels."""
    distance: NDArray[np.float64] = np.linalg.norm(a[:, None, :] - b[None, :, :], axis=2)
    return distance
