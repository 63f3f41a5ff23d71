"""Changed pictures by known answers: where dots go, what blur does to a dot, that nothing flickers when it shrinks."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt.prove.changes import SIDES_OF_PX, Change, changed, disc, line
from superpoint_trt.prove.metrics import warp

CHANGES = (
    Change(),
    Change(turn_deg=90),
    Change(turn_deg=137),
    Change(zoom=0.5),
    Change(zoom=0.25, turn_deg=45),
    Change(defocus_px=3),
    Change(motion_px=8),
)


def dots(height=192, width=256, step=64, sigma=4.0):
    """Gray with soft dots; and where their centers are, (N, 2) px."""
    centers = np.array([[x + 0.3, y - 0.2] for y in range(32, height, step) for x in range(32, width, step)])
    y, x = np.mgrid[:height, :width]
    gray = np.full((height, width), 0.2)
    for cx, cy in centers:
        gray += 0.6 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * sigma**2))
    return gray.astype(np.float32), centers


def center_near(gray, place, reach):
    """The center of the light within a square around a place."""
    x0, y0 = np.round(place).astype(int)
    y, x = np.mgrid[y0 - reach : y0 + reach + 1, x0 - reach : x0 + reach + 1]
    light = gray[y, x].astype(np.float64)
    light = np.clip(light - np.percentile(light, 20), 0, None)
    return np.array([(x * light).sum(), (y * light).sum()]) / light.sum()


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_dots_are_where_the_homography_says(change):
    gray, centers = dots()
    picture = changed(gray, change, seed=5)
    reach = max(4, round(20 * change.zoom))
    for place in warp(centers, picture.homography):
        assert np.linalg.norm(center_near(picture.gray, place, reach) - place) < 0.1


def test_a_turn_of_90_degrees_is_clockwise_and_no_change_is_exact():
    gray, _ = dots()
    for seed in range(20):
        matrix = changed(gray, Change(turn_deg=90), seed).homography
        zoom, angle = np.hypot(matrix[0, 0], matrix[1, 0]), np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0]))
        assert 0.96 <= zoom <= 1
        assert 0 < abs(angle - 90) <= 3
        right = warp(np.array([[0.0, 0], [100, 0]]), matrix)
        assert right[1, 1] > right[0, 1] + 90  # what was to the right is below


def test_the_whole_picture_is_seen_and_the_sides_are_few():
    gray, _ = dots(150, 203)
    corners = np.array([[0, 0], [202, 0], [202, 149], [0, 149]])
    for change in CHANGES:
        picture = changed(gray, change, 1)
        height, width = picture.gray.shape
        assert height % SIDES_OF_PX == width % SIDES_OF_PX == 0
        there = warp(corners, picture.homography)
        assert (there > -0.5).all() and (there < np.array([width, height]) - 0.5).all()


def test_the_same_seed_gives_the_same_picture_and_others_do_not():
    gray, _ = dots()
    first, again, other = (changed(gray, CHANGES[1], seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.gray, again.gray)
    assert not np.array_equal(first.homography, other.homography)
    turned, shrunk = (changed(gray, change, 1).homography for change in (Change(), Change(zoom=0.5)))
    np.testing.assert_allclose(shrunk[:2, :2], turned[:2, :2] / 2)


def test_stripes_too_fine_for_the_small_picture_become_gray():
    stripes = np.tile(np.array([0, 1], np.float32), (256, 128))
    small = changed(stripes, Change(zoom=0.25), 3).gray
    assert small[20:40, 20:40].std() < 0.02
    assert abs(small[20:40, 20:40].mean() - 0.5) < 0.02


def test_pictures_have_the_steps_of_a_camera():
    gray, _ = dots()
    picture = changed(gray, Change(turn_deg=30), 0).gray
    assert picture.dtype == np.float32 and picture.min() >= 0 and picture.max() <= 1
    np.testing.assert_allclose(picture * 255, np.round(picture * 255), atol=1e-4)


@pytest.mark.parametrize("radius", [1, 2.5, 6])
def test_a_disc_spreads_a_dot_as_its_radius_says(radius):
    """As the points of an even disc do, each counted at the middle of its pixel."""
    fine = np.linspace(-radius, radius, 1001)
    within = np.hypot(*np.meshgrid(fine, fine)) <= radius
    spread = (np.round(fine) ** 2 * within).sum() / within.sum()
    kernel = disc(radius)
    reach = len(kernel) // 2
    x = np.arange(-reach, reach + 1)
    assert abs(kernel.sum() - 1) < 1e-9
    np.testing.assert_allclose(kernel, kernel.T)
    assert (kernel.sum(axis=0) * x**2).sum() == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("direction_deg", [0, 45, 110])
def test_a_line_spreads_a_dot_along_its_direction_only(direction_deg):
    """An even line has the variance length^2 / 12 along it."""
    angle, length = np.radians(direction_deg), 15
    kernel = line(length, angle)
    reach = len(kernel) // 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    assert abs(kernel.sum() - 1) < 1e-9
    assert (kernel * along**2).sum() == pytest.approx(length**2 / 12, rel=0.1)
    assert (kernel * across**2).sum() < 0.5
