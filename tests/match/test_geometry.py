"""Robust estimation against geometries known in advance, and without touching the caller's random generator."""

from __future__ import annotations

import math
import threading

import cv2
import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.geometry import Estimator, Geometry, Model, distances, estimate, log10_nfa


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


def drawn() -> list[float]:
    """The next numbers of this thread's OpenCV generator."""
    values = np.zeros((1, 8), np.float32)
    cv2.randu(values, 0, 1)
    return values.ravel().tolist()


def scattered(seed: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Matches of which most are wrong, so that random sampling draws many samples."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(0, 600, (150, 2)).astype(np.float32)
    b = a + np.float32([20, -10])
    b[:100] = rng.uniform(0, 600, (100, 2))
    return a, b


@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize("model", Model)
def test_the_callers_random_numbers_stay_his_and_have_no_say(estimator, model):
    a, b = scattered()
    found = []
    for seed in (0, 1, 12345):
        cv2.setRNGSeed(seed)
        expected = drawn() + drawn()
        cv2.setRNGSeed(seed)
        start = drawn()
        found.append(estimate(a, b, model, estimator))
        assert start + drawn() == expected
    for other in found[1:]:
        np.testing.assert_array_equal(found[0].matrix, other.matrix)
        np.testing.assert_array_equal(found[0].inliers, other.inliers)


def test_threads_find_the_same():
    a, b = scattered()
    expected = estimate(a, b)
    found = []
    threads = [threading.Thread(target=lambda: found.append(estimate(a, b))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        np.testing.assert_array_equal(one.matrix, expected.matrix)


def test_another_order_draws_other_samples():
    a, b = scattered()
    assert not np.array_equal(
        estimate(a, b, Model.FUNDAMENTAL).matrix, estimate(a, b, Model.FUNDAMENTAL, order=7).matrix
    )


@pytest.mark.parametrize("threshold", [0, -1.0, float("nan"), float("inf")])
def test_a_threshold_that_is_none_is_refused(threshold):
    with pytest.raises(SuperPointError, match="inlier distance is"):
        estimate(*scattered(), threshold_px=threshold)


@pytest.mark.parametrize(
    ("matches", "inliers", "nfa"),
    [
        # p = pi 10^2 / (100 pi * 1000) = 1/1000.
        (10, 4, 6 * 210 * 1 * 1.0),
        (10, 5, 6 * 252 * 5 * 1e-3),
        (10, 6, 6 * 210 * 15 * 1e-6),
        (10, 10, 6 * 1 * 210 * 1e-18),
        (4, 4, 1.0),  # four matches always fit
        (5, 5, 1 * 1 * 5 * 1e-3),
    ],
)
def test_false_alarms_of_a_homography_worked_out_by_hand(matches, inliers, nfa):
    found = log10_nfa(Model.HOMOGRAPHY, matches, inliers, 10.0, (100 * math.pi, 1000))
    assert found == pytest.approx(math.log10(nfa), abs=1e-9)


@pytest.mark.parametrize(
    ("matches", "inliers", "nfa"),
    [
        # d = 500 and p = 2 * 3 * 500 / (300 * 400) = 1/40.
        (12, 7, 3 * 5 * 792 * 1 * 1.0),
        (12, 10, 3 * 5 * 66 * 120 / 40**3),
        (12, 11, 3 * 5 * 12 * 330 / 40**4),
        (8, 8, 3 * 1 * 1 * 8 / 40),
    ],
)
def test_false_alarms_of_a_fundamental_matrix_worked_out_by_hand(matches, inliers, nfa):
    found = log10_nfa(Model.FUNDAMENTAL, matches, inliers, 3.0, (300, 400))
    assert found == pytest.approx(math.log10(nfa), abs=1e-9)


@pytest.mark.parametrize(("model", "few"), [(Model.HOMOGRAPHY, 3), (Model.FUNDAMENTAL, 6)])
def test_fewer_inliers_than_a_sample_support_nothing(model, few):
    assert log10_nfa(model, 100, few, 3.0, (640, 480)) == math.inf


def test_a_circle_larger_than_the_image_proves_nothing():
    assert log10_nfa(Model.HOMOGRAPHY, 10, 10, 1000.0, (64, 64)) > 0


@pytest.mark.parametrize(("figure", "supported"), [(-0.1, True), (0.0, False), (7.9, False), (math.inf, False)])
def test_fewer_than_one_false_alarm_is_support(figure, supported):
    assert Geometry(Model.HOMOGRAPHY, np.eye(3), np.ones(5, bool), figure).supported is supported


def test_distances_worked_out_by_hand():
    first, second = np.float32([[10, 10], [0, 0]]), np.float32([[15, 17], [2, 3]])
    shift = np.array([[1, 0, 2], [0, 1, 3], [0, 0, 1]], float)
    assert distances(Model.HOMOGRAPHY, shift, first, second).tolist() == [5, 0]
    sideways = np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]], float)  # epipolar lines are the rows
    assert distances(Model.FUNDAMENTAL, sideways, first, second).tolist() == [7, 3]


@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize("model", Model)
@pytest.mark.parametrize("count", [8, 30, 200])
def test_matches_at_random_support_nothing(model, estimator, count):
    for seed in range(5):
        a, b = np.random.default_rng(seed).uniform(0, 600, (2, count, 2)).astype(np.float32)
        found = estimate(a, b, model, estimator, second_wh=(600, 600))
        assert not found.supported, (seed, found.log10_nfa, found.inliers.sum())


@pytest.mark.parametrize("estimator", Estimator)
@pytest.mark.parametrize("model", Model)
def test_a_shift_among_wrong_matches_is_supported(model, estimator):
    found = estimate(*scattered(), model, estimator)
    assert found.supported and found.log10_nfa < -10


def test_one_way_matches_to_one_point_support_nothing():
    """A homography that maps everything to that point agrees with all of them."""
    a = np.random.default_rng(6).uniform(0, 600, (100, 2)).astype(np.float32)
    b = np.random.default_rng(7).uniform(0, 600, (100, 2)).astype(np.float32)
    b[:80] = 300
    assert not estimate(a, b, second_wh=(600, 600)).supported
