"""Matches descriptors: nearest neighbors by L2 distance, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, SuperPointError

BLOCK_ROWS = 1024
"""Rows of the distance matrix in memory at a time: 10,000 x 10,000 descriptors then need 46 MB instead of 400."""


@dataclass(frozen=True)
class MatchOptions:
    """Which nearest neighbors are matches."""

    mutual: bool = True
    """Whether both must be each other's nearest."""
    max_ratio: float | None = None
    """Distance to the nearest over distance to the second nearest must be smaller (Lowe 2004, section 7.1)."""
    max_distance: float | None = None
    """The L2 distance must not be greater; between unit descriptors it is 0 to 2."""

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


NO_MATCHES = Matches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32))


def match(first: Float32, second: Float32, options: MatchOptions | None = None) -> Matches:
    """Matches each descriptor of the first set with its nearest of the second, by L2 distance.

    Args:
        first: (N, D) descriptors, any float type; compared in float32.
        second: (M, D) descriptors.
        options: which nearest neighbors are matches; default `MatchOptions()`.

    Returns:
        The matches; none if either set is empty. Of equally near neighbors the lowest row wins.

    Raises:
        SuperPointError: the descriptors have different lengths.
    """
    options = options or MatchOptions()
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise SuperPointError(
            f"descriptors are {first.shape} and {second.shape}; expected (N, D) and (M, D), equal D: "
            "extract both images with one network."
        )
    if not len(first) or not len(second):
        return NO_MATCHES
    return select(_neighbors(first.astype(np.float32, copy=False), second.astype(np.float32, copy=False)), options)


@dataclass(frozen=True)
class Neighbors:
    """The nearest neighbors of two sets of descriptors, in both directions; neither set is empty."""

    nearest: NDArray[np.integer[Any]]
    """(N,) row of the second set that is nearest to each row of the first."""
    distance: Float32
    """(N,) distance to it."""
    second_distance: Float32
    """(N,) distance to the second nearest; infinite if the second set has one row."""
    back: NDArray[np.integer[Any]]
    """(M,) row of the first set that is nearest to each row of the second."""


def select(found: Neighbors, options: MatchOptions) -> Matches:
    """The neighbors that are matches."""
    rows = np.arange(len(found.nearest))
    keep = np.ones(len(rows), dtype=bool)
    if options.mutual:
        keep &= found.back[found.nearest] == rows
    if options.max_ratio is not None:
        keep &= found.distance < options.max_ratio * found.second_distance
    if options.max_distance is not None:
        keep &= found.distance <= options.max_distance
    return Matches(np.stack([rows, found.nearest], axis=1)[keep], found.distance[keep])


def _neighbors(first: Float32, second: Float32) -> Neighbors:
    """Finds nearest neighbors in both directions, in one pass over blocks of the first set's rows.

    |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, in float32.
    """
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
        # In parts, because numpy copies an array to search along its first axis.
        closest = np.concatenate([part.argmin(axis=0) for part in np.split(distance, splits, axis=1)])
        # Strictly closer: of equal distances the first block's row stays.
        closer = distance[closest, np.arange(m)] < back_best
        back[closer] = closest[closer] + start
        back_best[closer] = distance[closest, np.arange(m)][closer]
        columns = distance.argmin(axis=1)
        nearest[start : start + len(block)] = columns
        best[start : start + len(block)] = distance[rows, columns]
        if m > 1:
            distance[rows, columns] = np.inf
            runner_up[start : start + len(block)] = distance.min(axis=1)
    return Neighbors(nearest, _root(best), _root(runner_up), back)


def _root(squared: Float32) -> Float32:
    """Distances of squared distances, which rounding can leave slightly negative."""
    distance: Float32 = np.sqrt(np.maximum(squared, np.float32(0)))
    return distance
