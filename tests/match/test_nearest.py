"""Matching against hand-made neighbours, a brute-force loop, and geometries known in advance."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.geometry import Estimator, Model, estimate
from superpoint_trt.match.nearest import MatchOptions, match

# On a line: a0 - b0 are 1 apart, a1 - b1 2, a2 is nearest to b1 but b1 prefers a1.
A = np.array([[0.0], [10.0], [14.5]], np.float32)
B = np.array([[1.0], [12.0], [40.0]], np.float32)


def test_mutual_neighbors_by_hand():
    found = match(A, B)
    assert found.rows.tolist() == [[0, 0], [1, 1]]
    assert found.distances.tolist() == pytest.approx([1.0, 2.0])


def test_one_way_neighbors_by_hand():
    assert match(A, B, MatchOptions(mutual=False)).rows.tolist() == [[0, 0], [1, 1], [2, 1]]


def test_ratio_and_distance_by_hand():
    # Ratios: 1/12, 2/9, 2.5/13.5.
    options = MatchOptions(mutual=False, max_ratio=0.2)
    assert match(A, B, options).rows.tolist() == [[0, 0], [2, 1]]
    options = MatchOptions(mutual=False, max_distance=2.0)
    assert match(A, B, options).rows.tolist() == [[0, 0], [1, 1]]


def test_a_single_candidate_has_no_second_nearest():
    assert match(A[:1], B[:1], MatchOptions(max_ratio=0.8)).rows.tolist() == [[0, 0]]


def test_blocks_equal_brute_force():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2500, 16)).astype(np.float32), rng.normal(size=(1100, 16)).astype(np.float32)
    there = np.array([np.square(row - b).sum(axis=1).argmin() for row in a])
    back = np.array([np.square(row - a).sum(axis=1).argmin() for row in b])
    expected = [[i, j] for i, j in enumerate(there) if back[j] == i]
    assert match(a, b).rows.tolist() == expected


def test_ten_thousand_by_ten_thousand_in_bounded_memory():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(10_000, 64)).astype(np.float32)
    order = rng.permutation(len(a))
    b = a[order]
    tracemalloc.start()
    found = match(a, b)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(order[found.rows[:, 1]], np.arange(len(a)))
    assert peak < 47e6, "the whole matrix alone would be 400 MB, a block of it is 41"


@pytest.mark.parametrize(("n", "m"), [(0, 3), (3, 0), (0, 0)])
def test_empty_sets_match_nothing(n, m):
    found = match(np.zeros((n, 8), np.float32), np.zeros((m, 8), np.float32))
    assert found.rows.shape == (0, 2)


def test_errors():
    with pytest.raises(SuperPointError, match="equal D"):
        match(A, np.zeros((3, 2), np.float32))
    with pytest.raises(SuperPointError, match=r"ratio is 1\.5"):
        MatchOptions(max_ratio=1.5)
    with pytest.raises(SuperPointError, match="distance is 0"):
        MatchOptions(max_distance=0)


@pytest.mark.parametrize("estimator", Estimator)
def test_homography_is_recovered_among_outliers(estimator):
    rng = np.random.default_rng(2)
    truth = np.array([[0.9, -0.1, 20], [0.12, 1.1, -15], [1e-4, -5e-5, 1]])
    a = rng.uniform(0, 600, (200, 2)).astype(np.float32)
    h = np.concatenate([a, np.ones((200, 1))], axis=1) @ truth.T
    b = (h[:, :2] / h[:, 2:]).astype(np.float32)
    b[:80] = rng.uniform(0, 600, (80, 2))
    found = estimate(a, b, Model.HOMOGRAPHY, estimator)
    np.testing.assert_allclose(found.matrix / found.matrix[2, 2], truth, rtol=1e-2, atol=1e-5)
    assert found.inliers[80:].all()
    assert found.inliers[:80].sum() < 4
    order = rng.permutation(len(a))
    again = estimate(a[order], b[order], Model.HOMOGRAPHY, estimator)
    np.testing.assert_array_equal(found.matrix, again.matrix)
    np.testing.assert_array_equal(found.inliers[order], again.inliers)


@pytest.mark.parametrize("estimator", Estimator)
def test_fundamental_matrix_of_a_known_camera_pair(estimator):
    """A camera that moves sideways: epipolar lines are the rows, x2' F x1 = 0."""
    rng = np.random.default_rng(3)
    points = rng.uniform([-2, -2, 4], [2, 2, 10], (150, 3))
    a = (500 * points[:, :2] / points[:, 2:] + 320).astype(np.float32)
    moved = points + np.array([0.5, 0, 0])
    b = (500 * moved[:, :2] / moved[:, 2:] + 320).astype(np.float32)
    b[:40] = rng.uniform(0, 640, (40, 2))
    found = estimate(a, b, Model.FUNDAMENTAL, estimator, threshold_px=1.0)
    assert found.inliers[40:].mean() > 0.95
    homogeneous = [np.concatenate([xy[40:], np.ones((110, 1))], axis=1) for xy in (a, b)]
    lines = homogeneous[0] @ found.matrix.T
    distance = np.abs((homogeneous[1] * lines).sum(axis=1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert np.median(distance) < 0.1


@pytest.mark.parametrize("model", Model)
@pytest.mark.parametrize("count", [0, 3])
def test_too_few_matches_have_no_geometry(model, count):
    xy = np.random.default_rng(4).uniform(0, 100, (count, 2)).astype(np.float32)
    found = estimate(xy, xy, model)
    assert found.matrix is None
    assert not found.inliers.any()
