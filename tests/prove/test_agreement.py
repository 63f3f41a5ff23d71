"""Agreement of two sets of points, with results worked out on paper."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt.core.types import Keypoints
from superpoint_trt.prove.agreement import cosines, mutual_within, nearest, rank_correlation, within

NOTHING = np.zeros((0, 2), np.float32)


def points(*xy):
    return np.array(xy, np.float32).reshape(-1, 2)


def test_nearest_by_hand():
    rows, distances = nearest(points([0, 0], [10, 0]), points([7, 4], [0, 2], [10, 1]))
    assert rows.tolist() == [1, 2]
    assert distances.tolist() == [2.0, 1.0]
    rows, distances = nearest(points([3, 3]), NOTHING)
    assert (rows.tolist(), distances.tolist()) == ([0], [np.inf])


def test_nearest_across_blocks():
    """3,000 points go through in three blocks of rows."""
    there = points(*((x, 0) for x in range(3000)))
    rows, distances = nearest(there, there[::-1])
    assert rows.tolist() == list(range(2999, -1, -1))
    assert not distances.any()


def test_within_counts_at_the_distance():
    assert within(points([0, 0], [5, 0], [9, 0]), points([0, 1], [5, 1.25])).tolist() == [True, False, False]
    assert within(points([5, 0]), points([5, 1.25]), 2.0).tolist() == [True]
    assert within(points([5, 0]), NOTHING).tolist() == [False]


def test_mutual_pairs_by_hand():
    # The first two points of a are nearest to the same b, which is nearest to the second of them.
    a, b = points([0, 0], [0.8, 0], [20, 0], [40, 0]), points([1, 0], [20, 1], [44, 0])
    assert mutual_within(a, b).tolist() == [[1, 0], [2, 1]]
    assert mutual_within(a, b, 4.0).tolist() == [[1, 0], [2, 1], [3, 2]]
    assert mutual_within(a, NOTHING).shape == mutual_within(NOTHING, b).shape == (0, 2)


def test_cosines_by_hand():
    def described(rows):
        count = len(rows)
        return Keypoints(
            np.zeros((count, 2), np.float32), np.ones(count, np.float32), np.array(rows, np.float32), (9, 9)
        )

    a, b = described([[1, 0], [0.6, 0.8], [np.nan, 0]]), described([[0, 1], [1, 0]])
    assert cosines(a, b, np.array([[0, 0], [0, 1], [1, 0], [2, 1]])).tolist() == pytest.approx([0, 1, 0.8, -1])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.1, 0.2, 0.3], [10, 20, 30], 1.0),
        ([0.1, 0.2, 0.3], [30, 20, 10], -1.0),
        ([3, 1, 2], [1, 2, 3], -0.5),
        # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: deviations' product 4.5, squares 4.5 and 5.
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),
        # Ranks 2, 2, 2, 4 against 4, 2.5, 2.5, 1.
        ([5, 5, 5, 9], [8, 7, 7, 6], -3 / (3 * 4.5) ** 0.5),
        ([1, 2, 3], [7, 7, 7], None),
        ([7, 7, 7], [1, 2, 3], None),
        ([1, 2], [1, 2], None),
        ([], [], None),
    ],
)
def test_rank_correlation_by_hand(a, b, expected):
    found = rank_correlation(np.array(a, np.float32), np.array(b, np.float32))
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))
