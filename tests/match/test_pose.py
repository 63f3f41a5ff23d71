"""Relative poses of exact, noisy and random matches."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.pose import relative_pose
from superpoint_trt.prove.poses import direction_error_deg, rotation_error_deg

K0 = np.array([[900.0, 0, 500], [0, 920, 380], [0, 0, 1]])
K1 = np.array([[700.0, 0, 320], [0, 700, 240], [0, 0, 1]])


def project(xyz: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    seen = xyz @ intrinsics.T
    return (seen[:, :2] / seen[:, 2:]).astype(np.float32)


def views(count: int = 200, seed: int = 0):
    rng = np.random.default_rng(seed)
    rotation = cv2.Rodrigues(np.array([0.1, -0.3, 0.05]))[0]
    translation = np.array([1.0, 0.1, 0.2])
    world = rng.uniform([-3, -2, 4], [3, 2, 10], (count, 3))
    return project(world, K0), project(world @ rotation.T + translation, K1), rotation, translation


def test_exact_matches_give_the_exact_pose():
    first, second, rotation, translation = views()
    found = relative_pose(first, second, K0, K1)
    assert found.inliers.all()
    assert rotation_error_deg(found.rotation, rotation) < 0.01
    assert direction_error_deg(found.translation, translation) < 0.05


def test_a_third_of_wrong_matches_is_left_out():
    first, second, rotation, translation = views()
    second = second.copy()
    second[:66] = np.random.default_rng(1).uniform(0, 600, (66, 2))
    order = np.random.default_rng(2).permutation(len(first))
    found = relative_pose(first[order], second[order], K0, K1)
    assert rotation_error_deg(found.rotation, rotation) < 0.5
    assert direction_error_deg(found.translation, translation) < 1
    wrong = order < 66
    assert found.inliers[~wrong].mean() > 0.95 and found.inliers[wrong].mean() < 0.1


def test_too_few_matches_give_none():
    first, second, *_ = views(4)
    found = relative_pose(first, second, K0, K1)
    assert found.rotation is None and found.translation is None and not found.inliers.any()
    same = np.ones((30, 2), np.float32)
    relative_pose(same, same, K0, K1)  # degenerate, but no crash
    with pytest.raises(SuperPointError, match="inlier distance is 0 px"):
        relative_pose(first, second, K0, K1, 0)
