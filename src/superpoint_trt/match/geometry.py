"""Fits one geometry to matches with OpenCV's robust estimators."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Matrix, SuperPointError


class Model(str, enum.Enum):
    """The geometry that ties two images together."""

    HOMOGRAPHY = "homography"
    """Planar scene or pure rotation; 3x3, first image to second."""
    FUNDAMENTAL = "fundamental"
    """Any rigid scene; 3x3 with x2' F x1 = 0."""


class Estimator(str, enum.Enum):
    """OpenCV's robust estimators."""

    RANSAC = "ransac"
    """Fischler and Bolles 1981."""
    MAGSAC = "magsac"
    """MAGSAC++, Barath et al. 2020."""


@dataclass(frozen=True)
class Geometry:
    """A robustly estimated model, or none."""

    model: Model
    matrix: Matrix | None
    """(3, 3), or None when the matches support none."""
    inliers: NDArray[np.bool_]
    """(M,) which matches agree with the matrix."""


_FEWEST = {Model.HOMOGRAPHY: 4, Model.FUNDAMENTAL: 8}
"""Matches that an estimator needs."""

MOST_ITERATIONS = 10_000
CONFIDENCE = 0.9999


def estimate(
    first_xy: Float32,
    second_xy: Float32,
    model: Model = Model.HOMOGRAPHY,
    estimator: Estimator = Estimator.MAGSAC,
    threshold_px: float = 3.0,
    order: int = 0,
) -> Geometry:
    """Fits a geometry to matched points with OpenCV.

    The same matches give the same result, in any order and whatever the state of OpenCV's random generator, which is
    neither used nor changed: its robust estimators start a generator of their own at each call.

    Args:
        first_xy: (M, 2) points in the first image.
        second_xy: (M, 2) the same points in the second.
        model: homography or fundamental matrix.
        estimator: OpenCV's method.
        threshold_px: largest distance of an inlier from the model.
        order: a number other than 0 shuffles the matches, so that random sampling draws other samples.

    Returns:
        The geometry; its matrix is None if the matches support none.

    Raises:
        SuperPointError: threshold_px is not above 0.
    """
    import cv2

    if not 0 < threshold_px < np.inf:
        raise SuperPointError(f"inlier distance is {threshold_px} px; expected more than 0 (3 is usual).")
    none = Geometry(model, None, np.zeros(len(first_xy), dtype=bool))
    if len(first_xy) < _FEWEST[model]:
        return none
    # Random sampling depends on the order of the matches. Sorted, they give the same result in any order.
    rows = np.lexsort((*second_xy.T, *first_xy.T))
    if order:
        rows = np.random.default_rng(order).permutation(rows)
    first_xy, second_xy = first_xy[rows], second_xy[rows]
    method = cv2.USAC_MAGSAC if estimator is Estimator.MAGSAC else cv2.RANSAC
    if model is Model.FUNDAMENTAL:
        method = cv2.USAC_MAGSAC if estimator is Estimator.MAGSAC else cv2.FM_RANSAC
        arguments: tuple[Any, ...] = (method, threshold_px, CONFIDENCE, MOST_ITERATIONS)
        matrix, mask = cv2.findFundamentalMat(first_xy, second_xy, *arguments)
    else:
        matrix, mask = cv2.findHomography(
            first_xy, second_xy, method, threshold_px, maxIters=MOST_ITERATIONS, confidence=CONFIDENCE
        )
    if matrix is None or mask is None or matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        return none
    inliers = np.zeros(len(rows), dtype=bool)
    inliers[rows] = mask.ravel().astype(bool)
    return Geometry(model, matrix, inliers)
