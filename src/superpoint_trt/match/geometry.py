"""Fits one geometry to matches with OpenCV's robust estimators, and says whether chance would give as much.

A few matches always agree with some geometry. The a-contrario test of Moisan, Moulon and Monasse ("Automatic
Homographic Registration of a Pair of Images, with A Contrario Elimination of Outliers", IPOL 2012) asks how many
geometries with so many inliers are to be expected if all points of the second image lay at random, each by itself. A
geometry is supported if fewer than one is.
"""

from __future__ import annotations

import enum
import math
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

    @property
    def words(self) -> str:
        """Its name in a sentence."""
        return "homography" if self is Model.HOMOGRAPHY else "fundamental matrix"


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
    log10_nfa: float = math.inf
    """Decimal logarithm of the number of false alarms: how many such geometries matches at random would give."""

    @property
    def supported(self) -> bool:
        """Whether so many inliers are more than chance gives: fewer than one false alarm is expected."""
        return self.log10_nfa < 0


_FEWEST = {Model.HOMOGRAPHY: 4, Model.FUNDAMENTAL: 8}
"""Matches that an estimator needs."""

_SAMPLE = {Model.HOMOGRAPHY: 4, Model.FUNDAMENTAL: 7}
"""Matches that determine a model."""

_MODELS_OF_A_SAMPLE = {Model.HOMOGRAPHY: 1, Model.FUNDAMENTAL: 3}
"""Most models that one such sample has."""

MOST_ITERATIONS = 10_000
CONFIDENCE = 0.9999


def estimate(
    first_xy: Float32,
    second_xy: Float32,
    model: Model = Model.HOMOGRAPHY,
    estimator: Estimator = Estimator.MAGSAC,
    threshold_px: float = 3.0,
    order: int = 0,
    second_wh: tuple[int, int] | None = None,
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
        second_wh: (width, height) of the second image in px, in which chance could have put its points; default the
            box around them.

    Returns:
        The geometry. Its matrix is None if the estimator finds none; `supported` says whether it is more than chance.

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
    near = distances(model, matrix, first_xy, second_xy) <= threshold_px
    match_count, inlier_count = _distinct(first_xy, second_xy), _distinct(first_xy[near], second_xy[near])
    width, height = np.ptp(second_xy, axis=0) + 1 if second_wh is None else second_wh
    nfa = log10_nfa(model, match_count, inlier_count, threshold_px, (float(width), float(height)))
    return Geometry(model, matrix, inliers, nfa)


def log10_nfa(
    model: Model, match_count: int, inlier_count: int, threshold_px: float, second_wh: tuple[float, float]
) -> float:
    """Decimal logarithm of the number of false alarms, T (n - m) C(n, k) C(k, m) p^(k - m).

    Of n matches k are inliers. A sample of m has T models. p bounds the chance that a random point of the second image
    lies within t of where a model wants it: within a circle for a homography, within a band along an epipolar line for
    a fundamental matrix.

    Args:
        model: m = 4, T = 1, p = pi t^2 / (w h) for a homography; m = 7, T = 3, p = 2 t d / (w h), d the image's
            diagonal, for a fundamental matrix.
        match_count: n.
        inlier_count: k.
        threshold_px: t, largest distance of an inlier in the second image.
        second_wh: (w, h), size of the second image in px.

    Returns:
        Below 0 for what chance does not explain; infinite if the inliers are fewer than a sample.
    """
    sample = _SAMPLE[model]
    if inlier_count < sample:
        return math.inf
    width, height = second_wh
    near_px2 = math.pi * threshold_px**2 if model is Model.HOMOGRAPHY else 2 * threshold_px * math.hypot(width, height)
    chance = min(1.0, near_px2 / (width * height))
    tests = _MODELS_OF_A_SAMPLE[model] * max(match_count - sample, 1)
    ways = _log10_choose(match_count, inlier_count) + _log10_choose(inlier_count, sample)
    return math.log10(tests) + ways + (inlier_count - sample) * math.log10(chance)


def distances(model: Model, matrix: Matrix, first_xy: Float32, second_xy: Float32) -> NDArray[np.float64]:
    """How far the second image's points (M, 2) lie from where the model wants them, in px of that image.

    Returns:
        (M,) distances from the mapped point (homography) or from the epipolar line (fundamental matrix); NaN or
        infinite for a point that the model maps nowhere.
    """
    one = np.ones((len(first_xy), 1))
    mapped = np.concatenate([first_xy, one], axis=1) @ matrix.T
    with np.errstate(all="ignore"):
        if model is Model.HOMOGRAPHY:
            found = np.linalg.norm(mapped[:, :2] / mapped[:, 2:] - second_xy, axis=1)
        else:
            along = (np.concatenate([second_xy, one], axis=1) * mapped).sum(axis=1)
            found = np.abs(along) / np.linalg.norm(mapped[:, :2], axis=1)
    return np.asarray(found, dtype=np.float64)


def _distinct(first_xy: Float32, second_xy: Float32) -> int:
    """How many matches differ in both points. One-way matches may share a point, which shows nothing new."""
    return min(len(np.unique(xy, axis=0)) for xy in (first_xy, second_xy))


def _log10_choose(count: int, chosen: int) -> float:
    """Decimal logarithm of the binomial coefficient."""
    terms = math.lgamma(count + 1) - math.lgamma(chosen + 1) - math.lgamma(count - chosen + 1)
    return terms / math.log(10)
