"""Every metric on hand-made keypoints and homographies, with results worked out on paper."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt.core.types import Keypoints
from superpoint_trt.prove import metrics

SIZE = (100, 80)  # width, height
SHIFT = np.array([[1.0, 0, 10], [0, 1, 0], [0, 0, 1]])  # 10 px to the right


def keypoints(xy, descriptors=None, size=SIZE) -> Keypoints:
    xy = np.array(xy, np.float32).reshape(-1, 2)
    count = len(xy)
    if descriptors is None:
        descriptors = np.eye(max(count, 1), 8)[:count]
    return Keypoints(xy, np.linspace(0.9, 0.1, count).astype(np.float32), np.array(descriptors, np.float32), size)


def test_warp_by_hand():
    homography = np.array([[2.0, 0, 1], [0, 3, -1], [0, 0.5, 1]])
    # (2, 4): (2*2+1, 3*4-1) / (0.5*4+1) = (5, 11) / 3
    np.testing.assert_allclose(metrics.warp(np.array([[2.0, 4.0]]), homography), [[5 / 3, 11 / 3]])


def test_shared_points_by_hand():
    # After 10 px to the right, x = 95 leaves a 100 px wide image; x = 89 lands on 99, x = 90 on 100, outside.
    found = metrics.shared(keypoints([[5, 5], [95, 5], [89, 5], [90, 5], [20, 79]]), SHIFT, SIZE, 10)
    assert found.xy.tolist() == [[5, 5], [89, 5], [20, 79]]
    assert len(metrics.shared(keypoints([[5, 5], [6, 5], [7, 5]]), SHIFT, SIZE, 2)) == 2


def test_repeatability_by_hand():
    """First: A B C and one that leaves. Second: A exactly, B off by 2 px, C by 4 px, one with no place in the first."""
    first = keypoints([[10, 10], [30, 30], [50, 50], [95, 20]])
    second = keypoints([[20, 10], [42, 30], [60, 54], [4, 70]])
    # 3 shared of each; A and B are found within 3 px both ways: 4 of 6. Errors 0, 2, 0, 2.
    found = metrics.repeatability(first, second, SHIFT)
    assert found.share == pytest.approx(4 / 6)
    assert found.localization_error_px == pytest.approx(1.0)
    # A limit of 1 px leaves A alone.
    assert metrics.repeatability(first, second, SHIFT, threshold_px=1.0).share == pytest.approx(2 / 6)
    # The best point of each only: A.
    assert metrics.repeatability(first, second, SHIFT, count=1).share == 1.0


def test_repeatability_counts_at_the_threshold_and_not_mutually():
    # Two points of the second image near one of the first, at exactly 3 px and at 1 px: 1 of 1 and 2 of 2.
    first, second = keypoints([[10, 10]]), keypoints([[23, 10], [20, 11]])
    found = metrics.repeatability(first, second, SHIFT)
    assert found.share == 1.0
    assert found.localization_error_px == pytest.approx((1 + 3 + 1) / 3)


def test_repeatability_without_points():
    nothing = keypoints([])
    assert metrics.repeatability(nothing, nothing, SHIFT).share is None
    assert metrics.repeatability(keypoints([[10, 10]]), nothing, SHIFT).share == 0.0


GRID = [[x, y] for x in (15, 35, 55, 75) for y in (15, 40, 65)][:8]


def test_homography_error_by_hand():
    first = keypoints(GRID)
    moved = keypoints(np.array(GRID) + np.array([10, 0]))
    assert metrics.homography_error_px(first, moved, SHIFT) == pytest.approx(0, abs=1e-3)
    # Everything 4 px too low: the estimate is that shift, so each corner is off by 4 px.
    low = keypoints(np.array(GRID) + np.array([10, 4]))
    assert metrics.homography_error_px(first, low, SHIFT) == pytest.approx(4, abs=1e-2)


def test_the_corners_are_the_centers_of_the_corner_pixels():
    """Under a shear that moves x by y / 10, only the lower corners are wrong: by 7.9 px at y = 79, not 8 at y = 80."""
    shear = np.array([[1.0, 0.1, 0], [0, 1, 0], [0, 0, 1]])
    first = keypoints(GRID)
    assert metrics.homography_error_px(first, keypoints(metrics.warp(first.xy, shear)), np.eye(3), 8) == pytest.approx(
        (0 + 0 + 7.9 + 7.9) / 4, abs=1e-2
    )
    # x moves by x / 10: only the right corners are wrong, by 9.9 px at x = 99, not 10 at x = 100.
    stretch = np.diag([1.1, 1, 1])
    assert metrics.homography_error_px(first, keypoints(metrics.warp(first.xy, stretch)), np.eye(3), 8) == (
        pytest.approx((0 + 9.9 + 0 + 9.9) / 4, abs=1e-2)
    )


def test_homography_error_without_enough_matches():
    three = keypoints(GRID[:3])
    assert metrics.homography_error_px(three, three, np.eye(3)) == float("inf")
    assert metrics.homography_error_px(keypoints([]), keypoints([]), np.eye(3)) == float("inf")


def test_matching_accuracy_by_hand():
    first = keypoints([[10, 10], [30, 30], [50, 50], [70, 70]])
    # Errors of the four matches: 0, 1, 2.5 and 40 px.
    second = keypoints([[20, 10], [41, 30], [60, 52.5], [40, 70]])
    assert metrics.matching_accuracy(first, second, SHIFT, (1, 2, 3, 10)) == [0.5, 0.5, 0.75, 0.75]
    assert metrics.matching_accuracy(first, keypoints([]), SHIFT, (1, 3)) == [0.0, 0.0]


def test_matching_score_by_hand():
    """One of four points is one of five moved ... : two right, one confused, one without a partner."""
    e = np.eye(8)
    first = keypoints([[10, 10], [30, 30], [50, 50]], e[[0, 1, 2]])
    # The second image swaps the last two descriptors and has a fourth point alone.
    second = keypoints([[20, 10], [40, 30], [60, 50], [80, 20]], e[[0, 2, 1, 3]])
    # First to second: only the first is right, 1/3. Second to first: 1 of 4.
    assert metrics.matching_score(first, second, SHIFT) == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert metrics.matching_score(first, keypoints([]), SHIFT) == 0.0


def test_average_precision_by_hand():
    """Three points; by rising descriptor distance their neighbours are right, wrong, right: AP = (1 + 2/3) / 3."""
    first = keypoints([[10, 10], [30, 30], [50, 50]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    second = keypoints(
        [[20, 10], [40, 30], [60, 50]],
        # Distances to first: 0.0 (right); the second's own place holds a far descriptor, its nearest is third's: wrong.
        [[1, 0, 0], [0, 0, 5], [0, 0.4, 0.8]],
    )
    # a0 -> b0 at 0.0, right. a1 -> b2 at |(0, 0.6, -0.8)| = 1.0, wrong. a2 -> b2 at |(0, 0.4, 0.2)| = 0.447, right.
    # In order: right, right, wrong: (1 + 1) / 3.
    # Back: b0 -> a0 at 0.0, right. b1 -> a2 at 4, wrong. b2 -> a2 at 0.447, right: (1 + 1) / 3.
    assert metrics.nn_average_precision(first, second, SHIFT) == pytest.approx(2 / 3)


def test_average_precision_punishes_a_confident_mistake():
    first = keypoints([[10, 10], [30, 30]], [[1, 0], [0, 1]])
    second = keypoints([[20, 10], [40, 30]], [[0.6, 0.8], [0, 1.0]])
    # a1 -> b1 at 0, right; a0 -> b0 at |(0.4, -0.8)| = 0.894, right: 1. Back: b1 right at 0; b0 -> a1 at 0.632, wrong:
    # precision 1 at the only right match of two possible: 1/2.
    assert metrics.nn_average_precision(first, second, SHIFT) == pytest.approx((1 + 1 / 2) / 2)
    # Swapped descriptors: the first of the list is wrong, and so is the second.
    swapped = keypoints([[20, 10], [40, 30]], [[0, 1.0], [1, 0]])
    assert metrics.nn_average_precision(first, swapped, SHIFT) == 0.0


def test_average_precision_counts_only_points_with_a_partner():
    first = keypoints([[10, 10], [30, 30]], [[1, 0], [0, 1]])
    second = keypoints([[20, 10]], [[1, 0]])
    # First to second: one possible, found first: 1. Second to first: 1.
    assert metrics.nn_average_precision(first, second, SHIFT) == 1.0
    assert metrics.nn_average_precision(first, keypoints([]), SHIFT) == 0.0
