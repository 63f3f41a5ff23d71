"""Matching descriptors and checking the matches against one geometry."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Keypoints, Matrix, SuperPointError

BLOCK_ROWS = 1024
"""Rows of the distance matrix held at a time: 10,000 x 10,000 descriptors then need 46 MB, not 400."""


@dataclass(frozen=True)
class MatchOptions:
    """Which nearest neighbours are matches."""

    mutual: bool = True
    """Both must be each other's nearest."""
    max_ratio: float | None = None
    """Nearest over second nearest distance must be smaller (Lowe 2004, section 7.1)."""
    max_distance: float | None = None
    """L2 distance must not be greater; of unit descriptors it runs from 0 to 2."""

    def __post_init__(self) -> None:
        if self.max_ratio is not None and not 0 < self.max_ratio <= 1:
            raise SuperPointError(f"ratio is {self.max_ratio:g}; expected 0 < ratio <= 1 (0.8 to 0.95 is usual).")
        if self.max_distance is not None and not 0 < self.max_distance < np.inf:
            raise SuperPointError(f"largest distance is {self.max_distance:g}; expected more than 0 (0.7 is usual).")


@dataclass(frozen=True)
class Matches:
    """Pairs of rows, in the order of the first image's rows."""

    rows: NDArray[np.int64]
    """(M, 2): row in the first set, row in the second."""
    distances: Float32
    """(M,) L2 distance of the two descriptors."""

    def __len__(self) -> int:
        return len(self.rows)


def match(first: Float32, second: Float32, options: MatchOptions | None = None) -> Matches:
    """Nearest neighbours by L2 distance.

    Args:
        first: (N, D) descriptors.
        second: (M, D) descriptors.
        options: which neighbours count.

    Returns:
        The matches; none if either set is empty. Of equally near neighbours the lowest row wins.

    Raises:
        SuperPointError: the descriptors have different lengths.
    """
    options = options or MatchOptions()
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise SuperPointError(f"descriptors are {first.shape} and {second.shape}; expected (N, D) and (M, D), equal D.")
    if not len(first) or not len(second):
        return Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32))
    found = _neighbors(first.astype(np.float32, copy=False), second.astype(np.float32, copy=False))
    rows = np.arange(len(first))
    keep = np.ones(len(first), dtype=bool)
    if options.mutual:
        keep &= found.back[found.nearest] == rows
    if options.max_ratio is not None:
        keep &= found.distance < options.max_ratio * found.second_distance
    if options.max_distance is not None:
        keep &= found.distance <= options.max_distance
    return Matches(np.stack([rows, found.nearest], axis=1)[keep], found.distance[keep])


@dataclass(frozen=True)
class _Neighbors:
    nearest: NDArray[np.int64]
    distance: Float32
    second_distance: Float32
    back: NDArray[np.int64]
    """(M,) nearest row of the first set to each of the second."""


def _neighbors(first: Float32, second: Float32) -> _Neighbors:
    """Both directions in one pass over blocks of rows: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b in float32."""
    n, m = len(first), len(second)
    nearest, best, runner_up = np.zeros(n, np.int64), np.zeros(n, np.float32), np.full(n, np.inf, np.float32)
    back, back_best = np.zeros(m, np.int64), np.full(m, np.inf, np.float32)
    squares = np.einsum("nd,nd->n", second, second)
    splits = range(BLOCK_ROWS, m, BLOCK_ROWS)
    held = np.empty((min(n, BLOCK_ROWS), m), np.float32)
    for start in range(0, n, BLOCK_ROWS):
        block = first[start : start + BLOCK_ROWS]
        rows = np.arange(len(block))
        distance = np.matmul(block, second.T, out=held[: len(block)])
        distance *= -2
        distance += squares
        distance += np.einsum("nd,nd->n", block, block)[:, None]
        # By parts: numpy copies what it searches along the first axis.
        closest = np.concatenate([part.argmin(axis=0) for part in np.split(distance, splits, axis=1)])
        closer = distance[closest, np.arange(m)] < back_best
        back[closer] = closest[closer] + start
        back_best[closer] = distance[closest, np.arange(m)][closer]
        columns = distance.argmin(axis=1)
        nearest[start : start + len(block)] = columns
        best[start : start + len(block)] = distance[rows, columns]
        if m > 1:
            distance[rows, columns] = np.inf
            runner_up[start : start + len(block)] = distance.min(axis=1)
    return _Neighbors(nearest, _root(best), _root(runner_up), back)


def _root(squared: Float32) -> Float32:
    """Rounding can leave a squared distance slightly negative."""
    distance: Float32 = np.sqrt(np.maximum(squared, np.float32(0)))
    return distance


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
    """(M,) which matches agree with it."""


_FEWEST = {Model.HOMOGRAPHY: 4, Model.FUNDAMENTAL: 8}
SEED = 0
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
    """Fits a geometry to matched points with OpenCV; the same matches in any order give the same answer.

    Args:
        first_xy: (M, 2) points in the first image.
        second_xy: (M, 2) the same points in the second.
        model: homography or fundamental matrix.
        estimator: OpenCV's method.
        threshold_px: how far from the model an inlier may lie.
        order: another number shuffles the matches in another way, so that random sampling meets other luck.
    """
    import cv2

    if not 0 < threshold_px < np.inf:
        raise SuperPointError(f"inlier distance is {threshold_px} px; expected more than 0 (3 is usual).")
    none = Geometry(model, None, np.zeros(len(first_xy), dtype=bool))
    if len(first_xy) < _FEWEST[model]:
        return none
    # Random sampling depends on the order; the answer should not, so the matches are put into one of their own.
    rows = np.lexsort((*second_xy.T, *first_xy.T))
    if order:
        rows = np.random.default_rng(order).permutation(rows)
    first_xy, second_xy = first_xy[rows], second_xy[rows]
    cv2.setRNGSeed(SEED)
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


@dataclass(frozen=True)
class ImageMatches:
    """Two images, matched."""

    first: Keypoints
    second: Keypoints
    matches: Matches
    geometry: Geometry

    def places(self) -> tuple[Float32, Float32]:
        """The matched points in both images, each (M, 2) in their own pixels."""
        return self.first.xy[self.matches.rows[:, 0]], self.second.xy[self.matches.rows[:, 1]]


def match_images(
    first: Keypoints,
    second: Keypoints,
    options: MatchOptions | None = None,
    model: Model = Model.HOMOGRAPHY,
    estimator: Estimator = Estimator.MAGSAC,
    threshold_px: float = 3.0,
) -> ImageMatches:
    """Matches the keypoints of two images and fits one geometry to the matches."""
    matches = match(first.descriptors, second.descriptors, options)
    xy = first.xy[matches.rows[:, 0]], second.xy[matches.rows[:, 1]]
    return ImageMatches(first, second, matches, estimate(*xy, model, estimator, threshold_px))
