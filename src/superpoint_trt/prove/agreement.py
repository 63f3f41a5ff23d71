"""Do two sets of keypoints agree? Nearest points, shares within a distance, and cosines of their descriptors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Keypoints

FOUND_WITHIN_PX = 1.0
"""A point counts as found again if the other set has one within this distance."""

_BLOCK_ROWS = 1024


def nearest(a: Float32, b: Float32) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Finds the nearest point of b for each point of a.

    Args:
        a: (N, 2) points in pixels.
        b: (M, 2) points in pixels.

    Returns:
        (N,) rows of b, and (N,) distances in pixels. If b is empty: row 0 and an infinite distance.
    """
    if not len(b):
        return np.zeros(len(a), np.int64), np.full(len(a), np.inf)
    rows = np.zeros(len(a), np.int64)
    distances = np.zeros(len(a))
    # In blocks: the full (N, M) matrix of tens of thousands of points does not fit into memory.
    for start in range(0, len(a), _BLOCK_ROWS):
        end = start + _BLOCK_ROWS
        block: NDArray[np.floating] = np.linalg.norm(a[start:end, None] - b[None], axis=2)
        rows[start:end] = block.argmin(axis=1)
        distances[start:end] = block.min(axis=1)
    return rows, distances


def within(a: Float32, b: Float32, distance_px: float = FOUND_WITHIN_PX) -> NDArray[np.bool_]:
    """Says which points of a (N, 2) have a point of b (M, 2) within a distance.

    Returns:
        (N,) bool.
    """
    near: NDArray[np.bool_] = nearest(a, b)[1] <= distance_px
    return near


def mutual_within(a: Float32, b: Float32, distance_px: float = FOUND_WITHIN_PX) -> NDArray[np.int64]:
    """Pairs points of a (N, 2) and b (M, 2) that are each other's nearest and within a distance.

    Returns:
        (P, 2) int64: row of a, row of b.
    """
    if not len(a) or not len(b):
        return np.zeros((0, 2), np.int64)
    there, distance = nearest(a, b)
    back, _ = nearest(b, a)
    rows = np.arange(len(a))
    kept = (back[there] == rows) & (distance <= distance_px)
    pairs: NDArray[np.int64] = np.stack([rows, there], axis=1)[kept]
    return pairs


def cosines(a: Keypoints, b: Keypoints, pairs: NDArray[np.int64]) -> Float32:
    """Computes the cosine of both descriptors of each pair.

    Args:
        a: keypoints with unit descriptors.
        b: keypoints with unit descriptors.
        pairs: (P, 2) rows of a and of b.

    Returns:
        (P,) float32; -1 where a descriptor is not finite.
    """
    products = (a.descriptors[pairs[:, 0]] * b.descriptors[pairs[:, 1]]).sum(axis=1)
    finite: Float32 = np.nan_to_num(products, nan=-1.0)
    return finite


def rank_correlation(a: Float32, b: Float32) -> float | None:
    """Computes the correlation of the ranks of two equally long arrays (Spearman 1904).

    Returns:
        -1 to 1. None for fewer than three values, or if all values of one array are equal.
    """
    if len(a) < 3 or not np.ptp(a) or not np.ptp(b):
        return None
    return float(np.asarray(np.corrcoef([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Float32) -> NDArray[np.float64]:
    """Ranks from 1 up; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    ranks: NDArray[np.float64] = mean_rank[place]
    return ranks
