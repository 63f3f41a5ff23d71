"""Nearest neighbors on the GPU against numpy. Needs a GPU and NVRTC, no TensorRT."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.match.matcher import DeviceMatcher, HostMatcher
from superpoint_trt.match.nearest import MatchOptions

try:
    cuda.current_device()
except SuperPointError as error:
    pytest.skip(f"no GPU: {error}", allow_module_level=True)

ALL = MatchOptions(mutual=False)
COUNTS = (1, 2, 127, 128, 129, 1000, 2048, 3001)


def unit(count: int, dim: int, seed: int) -> np.ndarray:
    """Random unit descriptors, as float16 numbers."""
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(scope="module")
def gpu():
    with DeviceMatcher(ALL) as matcher:
        yield matcher


def neighbors(matcher, pairs):
    """What the kernel finds: before mutual neighbors, ratio and distance are asked for."""
    held = [(matcher.prepare(first).held, matcher.prepare(second).held) for first, second in pairs]
    return matcher._finder.find(held)


def distances(first, second):
    first, second = first.astype(np.float64), second.astype(np.float64)
    squared = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squared, 0))


def check(found, first, second):
    """Nearest rows and distances are numpy's; a row within rounding of the nearest counts as it."""
    exact = distances(first, second)
    rows, columns = np.arange(len(first)), np.arange(len(second))
    assert found.nearest.shape == (len(first),) and found.back.shape == (len(second),)
    np.testing.assert_allclose(exact[rows, found.nearest], exact.min(axis=1), atol=1e-3)
    np.testing.assert_allclose(exact[found.back, columns], exact.min(axis=0), atol=1e-3)
    np.testing.assert_allclose(found.distances, exact.min(axis=1), atol=2e-3)
    if len(second) == 1:
        assert np.isinf(found.seconds).all()
    else:
        np.testing.assert_allclose(found.seconds, np.partition(exact, 1, axis=1)[:, 1], atol=2e-3)
    assert (found.nearest == exact.argmin(axis=1)).mean() > 0.99 and (found.back == exact.argmin(axis=0)).mean() > 0.99


@pytest.mark.parametrize("dim", [1, 31, 32, 64, 100, 128, 256, 512])
def test_every_length_of_descriptor(gpu, dim):
    first, second = unit(300, dim, 1), unit(200, dim, 2)
    (found,) = neighbors(gpu, [(first, second)])
    if dim > 1:
        check(found, first, second)
    else:  # all are 1 or -1
        np.testing.assert_array_equal(first[:, 0], second[found.nearest, 0])


@pytest.mark.parametrize("dim", [64, 256])
def test_counts_beside_whole_tiles(gpu, dim):
    """All in one launch: pairs of different sizes do not disturb each other."""
    pairs = [(unit(n, dim, n), unit(m, dim, 10_000 + m)) for n in COUNTS for m in COUNTS]
    for (first, second), found in zip(pairs, neighbors(gpu, pairs)):
        check(found, first, second)


def test_of_equally_near_rows_the_lowest_wins(gpu):
    """Within a tile and across tiles, in both directions."""
    rng = np.random.default_rng(0)
    distinct, here, there = unit(40, 64, 3), rng.integers(0, 40, 700), rng.integers(0, 40, 900)
    (found,) = neighbors(gpu, [(distinct[here], distinct[there])])
    np.testing.assert_array_equal(found.nearest, [np.flatnonzero(there == which)[0] for which in here])
    np.testing.assert_array_equal(found.back, [np.flatnonzero(here == which)[0] for which in there])
    np.testing.assert_allclose(found.seconds, 0, atol=2e-3)  # every descriptor is there several times


def test_descriptors_that_are_not_of_unit_length(gpu):
    first, second = unit(300, 128, 1) * np.float16(3), unit(400, 128, 2)
    second[::2] *= np.float16(0.25)
    (found,) = neighbors(gpu, [(first, second)])
    check(found, first, second)


@pytest.mark.parametrize(
    "options",
    [MatchOptions(), MatchOptions(max_ratio=0.9), MatchOptions(max_distance=0.6), MatchOptions(False, 0.9, 0.7)],
    ids=str,
)
def test_matches_are_those_of_the_cpu(options):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(1500, 256))
    views = []
    for _ in range(4):
        view = base[rng.permutation(1500)[:1200]] + 0.3 * rng.normal(size=(1200, 256))
        views.append((view / np.linalg.norm(view, axis=1, keepdims=True)).astype(np.float16))
    pairs = [(views[i], views[j]) for i in range(4) for j in range(i)]
    with DeviceMatcher(options) as there, HostMatcher(options) as here:
        found, expected = (
            matcher.match([(matcher.prepare(a), matcher.prepare(b)) for a, b in pairs]) for matcher in (there, here)
        )
    for one, other in zip(found, expected):
        same = {tuple(row) for row in one.rows.tolist()} ^ {tuple(row) for row in other.rows.tolist()}
        assert len(other) > 300 and len(same) <= 0.01 * len(other), "but for ties and limits within rounding"


def test_images_without_descriptors(gpu):
    none, some = gpu.prepare(unit(0, 64, 0)), gpu.prepare(unit(5, 64, 0))
    assert [len(found) for found in gpu.match([(none, some), (some, some), (some, none), (none, none)])] == [0, 5, 0, 0]


def test_the_same_result_every_time(gpu):
    first, second = unit(2048, 256, 1), unit(2048, 256, 2)
    (once,) = neighbors(gpu, [(first, second)])
    for found in neighbors(gpu, [(first, second)] * 70):
        for name in ("nearest", "distances", "seconds", "back"):
            np.testing.assert_array_equal(getattr(found, name), getattr(once, name))


def test_numbers_that_float16_does_not_hold(gpu):
    with pytest.raises(SuperPointError, match="not finite in float16"):
        gpu.prepare(np.full((2, 64), 1e6, np.float32))


def test_lengths_that_differ(gpu):
    with pytest.raises(SuperPointError, match="have 64 and 65 numbers"):
        gpu.match([(gpu.prepare(unit(3, 64, 0)), gpu.prepare(unit(3, 65, 0)))])
