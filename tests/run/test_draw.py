"""Pictures of keypoints and matches: where circles and lines are drawn, in which colors, how many, and their words."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from superpoint_trt import Keypoints, SuperPointError
from superpoint_trt.run.captions import LETTERS_SHARE, PAPER, Sign, add_caption, letters_px, text_width
from superpoint_trt.run.draw import (
    BEST,
    BLUES,
    OUTLIER,
    WORST,
    WRONG,
    MatchDrawing,
    chosen_lines,
    circle_radii_px,
    draw_keypoints,
    draw_matches,
    keypoints_caption,
    ramp,
    spread,
)

GREY = 128


def plain(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def near(pixel, color, tolerance=40) -> bool:
    return bool(np.abs(pixel.astype(int) - np.array(color)).max() <= tolerance)


def points(*xy, size=(200, 100)) -> Keypoints:
    count = len(xy)
    return Keypoints(
        np.array(xy, np.float32).reshape(-1, 2),
        np.linspace(0.9, 0.1, count, dtype=np.float32),
        np.zeros((count, 4), np.float32),
        size,
    )


def luminance(rgb: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB (IEC 61966-2-1)."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])


# ---------------------------------------------------------------------------------------------------------------- ramp


def test_the_ramp_is_told_apart_without_colors():
    """It gets darker all the way, and its ends differ as much as text and ground should (WCAG: 3 to 1)."""
    colors = ramp(50)
    assert tuple(colors[0]) == BEST and tuple(colors[-1]) == WORST
    light = luminance(colors.astype(float))
    assert (np.diff(light) < 0).all()
    assert (light[0] + 0.05) / (light[-1] + 0.05) > 3


# How linear RGB looks to people without red, green or blue cones (Machado, Oliveira and Fernandes 2009, severity 1).
CONES_MISSING = {
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def seen_without(cones: str, rgb) -> np.ndarray:
    """Colors (N, 3) in CIE L*a*b*, as seen without one kind of cones."""
    linear = (np.asarray(rgb, float) / 255) ** 2.2
    seen = np.clip(linear @ np.array(CONES_MISSING[cones]).T, 0, 1) ** (1 / 2.2)
    return cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]


@pytest.mark.parametrize("cones", CONES_MISSING)
def test_lines_are_told_apart_by_color_blind_people(cones):
    """A difference of 2 in L*a*b* is seen side by side; lines are thin and apart, so ten times as much is asked for."""
    right, wrong = seen_without(cones, ramp(50, BLUES)), seen_without(cones, [WRONG])
    assert np.linalg.norm(right - wrong, axis=1).min() > 40, "pictures of failures"
    best, worst = seen_without(cones, [BEST, WORST])
    assert np.linalg.norm(best - worst) > 40, "the ramp's ends"
    assert np.linalg.norm(seen_without(cones, [BEST, WORST]) - seen_without(cones, [OUTLIER]), axis=1).min() > 20


# ----------------------------------------------------------------------------------------------------------- keypoints


def test_circles_lie_on_their_points_and_shrink_with_the_score():
    places = [(40, 50), (100, 50), (160, 50)]
    picture = draw_keypoints(plain(100, 200), points(*places))
    assert picture.shape == (100, 200, 3)
    radii = circle_radii_px(3, 200)
    assert radii[0] == pytest.approx(3 * radii[2]) and radii[0] > radii[1] > radii[2] > 2
    for (x, y), radius in zip(places[:2], radii):
        assert near(picture[y, x], [GREY] * 3, 5), "a circle is open"
        for dx, dy in ((radius, 0), (-radius, 0), (0, radius)):
            assert not near(picture[round(y + dy), round(x + dx)], [GREY] * 3, 30)
        changed = np.abs(picture[:, x - 25 : x + 26].astype(int) - GREY).max(axis=2) > 20
        rows, columns = np.nonzero(changed)
        assert abs(rows.mean() - y) < 0.5 and abs(columns.mean() - 25) < 0.5
        assert abs((rows.max() - rows.min()) / 2 - radius) <= 3, "and its line and rim"
    assert near(picture[50, 40 + round(float(radii[0]))], BEST)


def test_no_keypoints():
    np.testing.assert_array_equal(draw_keypoints(plain(20, 20), points()), plain(20, 20))
    assert draw_keypoints(plain(20, 300), points(), "full: 0 keypoints").shape[1] == 300
    assert keypoints_caption(points(), "folder/my.onnx") == "my.onnx: 0 keypoints"


# ------------------------------------------------------------------------------------------------------------- matches


def test_a_line_joins_the_points_of_both_pictures():
    """The second picture is twice as large, so it is halved; its pixel (120.5, 100.5) becomes (60, 50)."""
    inlier = np.array([True])
    picture = draw_matches(
        plain(100, 120), plain(200, 240), np.float32([[20, 50]]), np.float32([[120.5, 100.5]]), inlier
    )
    assert picture.shape == (100, 120 + 8 + 120, 3)
    end = 120 + 8 + 60
    assert near(picture[50, 20], BEST) and near(picture[50, end], BEST)
    assert near(picture[50, 70], BEST) and near(picture[50, 150], BEST)
    for x in (10, end + 10):
        assert near(picture[50, x], [GREY] * 3, 1)
    changed = np.nonzero((picture[:, :120] != GREY).any(axis=(1, 2)))[0]
    assert 50 - 6 <= changed.min() < 50 < changed.max() <= 50 + 6


def test_wide_pictures_lie_one_above_the_other():
    one, other = np.float32([[100, 25]]), np.float32([[50, 12.5]])
    picture = draw_matches(plain(50, 200), plain(50, 100), one, other, np.array([True]))
    assert picture.shape == (50 + 8 + 100, 200, 3)
    assert near(picture[25, 100], BEST) and near(picture[54, 100], BEST) and near(picture[58 + 26, 101], BEST, 90)
    upright = draw_matches(plain(200, 100), plain(200, 100), one, other, np.array([True]))
    assert upright.shape == (200, 208, 3)


def test_colors_tell_how_well_a_match_agrees():
    xy = np.float32([[10, 20], [10, 60], [10, 100], [10, 140]])
    inliers, distances = np.array([True, True, True, False]), np.array([0.0, 3.0, np.nan, 50.0])
    picture = draw_matches(plain(160, 100), plain(160, 100), xy, xy, inliers, distances)
    grounds = [picture[y, 50] for y in (20, 60, 100, 140)]
    assert near(grounds[0], BEST, 30) and near(grounds[1], WORST, 30) and near(grounds[2], WORST, 30)
    assert near(grounds[3], OUTLIER, 30)
    marked = draw_matches(
        plain(160, 100), plain(160, 100), xy, xy, inliers, distances, options=MatchDrawing(outlier_rgb=WRONG)
    )
    assert near(marked[140, 50], WRONG, 60)


@pytest.mark.parametrize(
    "good, bad, most, expected",
    [
        (500, 90, 150, (120, 30)),  # a fifth are outliers
        (500, 3, 150, (147, 3)),
        (20, 400, 150, (20, 130)),  # few inliers: all of them
        (40, 10, 150, (40, 10)),
        (0, 0, 150, (0, 0)),
        (500, 90, 0, (0, 0)),
    ],
)
def test_how_many_lines(good, bad, most, expected):
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 100, (good + bad, 2)).astype(np.float32)
    inliers = rng.permutation(np.arange(good + bad) < good)
    rows = chosen_lines(xy, inliers, most)
    assert len(set(rows.tolist())) == len(rows)
    assert (int(inliers[rows].sum()), int((~inliers[rows]).sum())) == expected


def test_lines_are_counted_in_the_picture():
    """Points on a grid whose lines do not meet: as many bright rows in the gap as lines."""
    y = np.arange(10, 200, 10, dtype=np.float32)
    xy = np.stack([np.full_like(y, 20), y], axis=1)
    inliers = np.ones(len(y), bool)
    picture = draw_matches(plain(200, 100), plain(200, 100), xy, xy, inliers, options=MatchDrawing(5))
    column = np.array([near(pixel, BEST, 60) for pixel in picture[:, 104]])
    assert int((np.diff(column.astype(int)) == 1).sum()) == 5


def test_spread_takes_points_far_apart():
    cluster = np.float32([[x, 0] for x in range(20)])
    xy = np.concatenate([cluster, np.float32([[100, 0], [0, 100]])])
    assert set(spread(xy, 3).tolist()) == {0, 20, 21}
    np.testing.assert_array_equal(spread(xy, 50), np.arange(22))
    assert spread(xy[:0], 3).tolist() == []


def test_bad_options():
    with pytest.raises(SuperPointError, match="-1 lines"):
        MatchDrawing(-1)


# ------------------------------------------------------------------------------------------------------------ captions


@pytest.mark.parametrize("width", [320, 648, 1032, 4000])
def test_letters_can_be_read_at_400_px(width):
    """Capitals are at least 7 px high when the picture is shown 400 px wide, and never below 8 px."""
    assert letters_px(width) * 400 / width >= 7
    picture = add_caption(plain(100, width), ["HHH"])
    ink = (picture[100:] < 200).all(axis=2)
    rows = np.nonzero(ink.any(axis=1))[0]
    assert abs((rows.max() - rows.min() + 1) - letters_px(width)) <= max(2, 0.25 * letters_px(width))


def test_a_caption_is_below_the_picture_and_breaks_between_words():
    short = add_caption(plain(60, 400), ["few words"])
    assert short.shape[1] == 400
    np.testing.assert_array_equal(short[:60], plain(60, 400))
    words = "a line of words that is much too long for a picture of this width " * 2
    long = add_caption(plain(60, 400), [words])
    capital = letters_px(400)
    rows = round((long.shape[0] - 60 - capital) / round(1.9 * capital))
    assert rows >= text_width(words, capital) / 400 > 1
    for picture in (short, long):
        assert (picture[60:, :4] == PAPER).all() and (picture[60:, -4:] == PAPER).all(), "no word touches the edge"


def test_a_legend_has_its_colors():
    picture = add_caption(plain(40, 400), [], [Sign("good", ramp(64)), Sign("bad", [OUTLIER]), Sign("p", [WORST], 6.0)])
    below = picture[40:].reshape(-1, 3)
    for color in (BEST, WORST, OUTLIER):
        assert (np.abs(below.astype(int) - color).max(axis=1) < 12).any()


def test_a_name_in_other_letters_is_written():
    assert text_width("模型: 3", 10) == text_width("??: 3", 10)
    assert add_caption(plain(8, 8), ["模型.onnx: 3 keypoints"]).shape[1] == 240


def test_the_share_is_what_the_docstring_says():
    assert pytest.approx(7.1, abs=0.05) == 400 * LETTERS_SHARE
