"""Matching against neighbors found by hand and by a brute-force loop."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.nearest import BLOCK_ROWS, MatchOptions, match

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


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, BLOCK_ROWS), (3, BLOCK_ROWS + 3), (BLOCK_ROWS - 1, 2 * BLOCK_ROWS)]
)
def test_of_equally_near_rows_the_lowest_wins(low, high):
    """In both directions, within a block of rows and across blocks: rows `low` and `high` are the same descriptor."""
    far = np.arange(2 * BLOCK_ROWS + 2, dtype=np.float32)[:, None] * 10 + 1000
    far[low] = far[high] = 1.0
    one = np.array([[2.0], [-9000.0]], np.float32)
    found = match(far, one).rows.tolist()
    assert [low, 0] in found and [high, 0] not in found, "the second set's nearest"
    assert [0, low] in match(one, far).rows.tolist(), "the first set's nearest"


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
