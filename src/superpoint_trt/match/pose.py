"""How a second camera stands relative to a first, from matched points, by OpenCV's MAGSAC."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Matrix, SuperPointError

FEWEST_MATCHES = 5
"""An essential matrix needs so many."""

CONFIDENCE = 0.99999
MOST_ITERATIONS = 10_000


@dataclass(frozen=True)
class RelativePose:
    """x2 = R x1 + t, up to the length of t; or none."""

    rotation: Matrix | None
    """(3, 3), or None when the matches give no pose."""
    translation: NDArray[np.float64] | None
    """(3,) of unit length."""
    inliers: NDArray[np.bool_]
    """(M,) matches that agree with it and lie in front of both cameras."""


def relative_pose(
    first_xy: Float32,
    second_xy: Float32,
    first_intrinsics: Matrix,
    second_intrinsics: Matrix,
    threshold_px: float = 1.0,
    order: int = 0,
) -> RelativePose:
    """Fits an essential matrix to matches, and takes the pose out of it that most matches lie in front of.

    The same matches give the same result, in any order: OpenCV's estimator starts from a seed of its own.

    Args:
        first_xy: (M, 2) points in the first image, px.
        second_xy: (M, 2) the same points in the second.
        first_intrinsics: (3, 3) of the first camera, pixel centers at integers.
        second_intrinsics: (3, 3) of the second camera.
        threshold_px: largest distance of an inlier from its epipolar line, as seen with the mean focal length.
        order: a number other than 0 shuffles the matches, so that random sampling draws other samples.

    Raises:
        SuperPointError: threshold_px is not above 0.
    """
    import cv2

    if not 0 < threshold_px < np.inf:
        raise SuperPointError(f"inlier distance is {threshold_px} px; expected more than 0 (1 is usual).")
    none = RelativePose(None, None, np.zeros(len(first_xy), dtype=bool))
    if len(first_xy) < FEWEST_MATCHES:
        return none
    rows = np.lexsort((*second_xy.T, *first_xy.T))
    if order:
        rows = np.random.default_rng(order).permutation(rows)
    first, second = (
        _normalized(xy[rows], matrix) for xy, matrix in ((first_xy, first_intrinsics), (second_xy, second_intrinsics))
    )
    focal = np.mean([matrix[axis, axis] for matrix in (first_intrinsics, second_intrinsics) for axis in (0, 1)])
    try:
        essential, mask = cv2.findEssentialMat(
            first,
            second,
            np.eye(3),
            method=cv2.USAC_MAGSAC,
            prob=CONFIDENCE,
            threshold=float(threshold_px / focal),
            maxIters=MOST_ITERATIONS,
        )
    except cv2.error:  # degenerate matches
        return none
    if essential is None or mask is None or not np.isfinite(essential).all():
        return none
    best = none
    for candidate in essential.reshape(-1, 3, 3):
        count, rotation, translation, front = cv2.recoverPose(candidate, first, second, np.eye(3), mask=mask.copy())
        if count > best.inliers.sum():
            inliers = np.zeros(len(rows), dtype=bool)
            inliers[rows] = front.ravel() > 0
            best = RelativePose(rotation, np.asarray(translation, np.float64).ravel(), inliers)
    return best


def _normalized(xy: Float32, intrinsics: Matrix) -> NDArray[np.float64]:
    """Pixels (M, 2) as directions (x / z, y / z)."""
    one = np.concatenate([xy, np.ones((len(xy), 1))], axis=1)
    directions: NDArray[np.float64] = (one @ np.linalg.inv(intrinsics).T)[:, :2]
    return np.ascontiguousarray(directions)
