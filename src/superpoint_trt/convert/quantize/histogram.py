"""Histograms of magnitudes, and the ranges that percentile and entropy read off them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import SuperPointError

BINS = 4096

LEVELS = 128
"""Magnitudes that int8 has for either sign, 0 included."""

_CHUNK_VALUES = 1 << 20
"""Values counted at a time, so that temporaries stay in the processor's cache."""


class Histogram:
    """Counts of magnitudes in equal bins from 0 up, in one pass and bounded memory.

    The upper end is a power of two. It doubles when a value lies beyond it, and pairs of bins become one. So the counts
    do not depend on the order of the values.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        """How many values lie in each bin, zeros left out."""
        self.zeros = 0
        self.end = 0.0
        """Upper end of the last bin."""
        self.largest = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Counts every value.

        Raises:
            SuperPointError: a value is not finite.
        """
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK_VALUES):
            self._add(np.abs(flat[start : start + _CHUNK_VALUES]))

    def _add(self, magnitudes: NDArray[np.floating]) -> None:
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise SuperPointError("the network's own values are not finite on this image.")
        if largest == 0.0:
            self.zeros += magnitudes.size
            return
        self._reach(largest)
        bins = np.minimum((magnitudes * np.float32(BINS / self.end)).astype(np.int32), BINS - 1)
        found = np.bincount(bins, minlength=BINS)
        zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
        found[0] -= zeros
        self.zeros += zeros
        self.counts += found

    def _reach(self, largest: float) -> None:
        self.largest = max(self.largest, largest)
        if not self.end:
            self.end = float(2.0 ** np.ceil(np.log2(largest)))
        while self.end < largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.end *= 2

    @property
    def bin_width(self) -> float:
        """In the values' own unit."""
        return self.end / BINS


def percentile_range(histogram: Histogram, percentile: float) -> float:
    """The smallest bin edge with `percentile` percent of all values, zeros included, below it."""
    total = histogram.zeros + int(histogram.counts.sum())
    below = histogram.zeros + np.cumsum(histogram.counts)
    bins = int(np.searchsorted(below, total * percentile / 100.0)) + 1
    return min(bins * histogram.bin_width, histogram.largest)


def entropy_range(histogram: Histogram) -> float:
    """The range whose 128 levels lose least of the distribution (Migacz, "8-bit inference with TensorRT", GTC 2017).

    For each candidate range, P is the distribution with everything beyond the range in its last bin. Q is P in 128
    levels, each level's mass spread over its occupied bins. The candidate with the smallest Kullback-Leibler divergence
    of P from Q wins. Exact zeros are left out, because every symmetric quantizer keeps them.
    """
    counts = histogram.counts.astype(np.float64)
    used = int(np.flatnonzero(counts)[-1]) + 1
    coarse = max(1, used // 2048)  # as many candidates as TensorRT's 2048 bins give, at least
    candidates = sorted({*range(LEVELS, used + 1, coarse), used})
    divergences = [divergence(counts, bins) for bins in candidates if bins >= min(LEVELS, used)]
    best = candidates[int(np.argmin(divergences))]
    return float(min(best * histogram.bin_width, histogram.largest))


def divergence(counts: NDArray[np.float64], bins: int) -> float:
    """Kullback-Leibler divergence of a distribution clipped to its first `bins` bins from its 128 levels.

    Args:
        counts: (BINS,) mass of each bin.
        bins: how many bins the range covers.

    Returns:
        0 or more; infinite if P has mass where Q has none.
    """
    kept = counts[:bins]
    clipped = kept.copy()
    clipped[-1] += counts[bins:].sum()
    level = np.arange(bins) * LEVELS // bins
    occupied = kept > 0
    mass = np.bincount(level, weights=kept, minlength=LEVELS)
    places = np.bincount(level, weights=occupied, minlength=LEVELS)
    spread = np.where(occupied, (mass / np.maximum(places, 1))[level], 0.0)
    there = clipped > 0
    if not spread[there].all():
        return float("inf")
    p, q = clipped[there] / clipped.sum(), spread[there] / spread.sum()
    return float((p * np.log(p / q)).sum())
