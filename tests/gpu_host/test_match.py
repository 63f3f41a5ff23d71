"""The host's side of matching on a GPU: how images, jobs and results lie in memory. match.cu is played by numpy."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from gpu_host.fake_gpu import at

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.kernels import match as kernel
from superpoint_trt.match.matcher import DeviceMatcher, HostMatcher
from superpoint_trt.match.nearest import MatchOptions

pytest_plugins = ["gpu_host.gpu_fixtures"]

TILE = 128


def image_at(address: int, count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors and half squares of all rows, as match.cu reads them."""
    rows = -(-count // TILE) * TILE
    descriptors = at(address, (rows, dim), np.float16).astype(np.float32)
    return descriptors, at(address + rows * dim * 2, (rows,), np.float32)


def keys(closeness: np.ndarray) -> np.ndarray:
    bits = closeness.astype(np.float32).view(np.uint32)
    ordered = np.where(bits & 0x80000000, ~bits, bits | 0x80000000).astype(np.uint64)
    rows = np.arange(len(closeness), dtype=np.uint32)[:, None]
    return ordered << np.uint64(32) | (~rows).astype(np.uint64)


def play_nearest(kernel_name, grid, stream, arguments, threads=0):
    """What match.cu's kernel `nearest` writes."""
    name, dim = kernel_name
    assert name == "nearest" and threads == 0
    pairs, nearest, distances, seconds, columns, capacity = (getattr(one, "value", one) for one in arguments)
    for index, job in enumerate(at(pairs, (grid[1],), kernel._PAIR)):
        n, m = int(job["first_count"]), int(job["second_count"])
        assert grid[0] >= -(-n // TILE) and capacity >= max(n, m)
        (first, first_squares), (second, second_squares) = (
            image_at(int(job[side]), count, dim) for side, count in (("first", n), ("second", m))
        )
        with np.errstate(invalid="ignore"):
            closeness = first @ second.T - first_squares[:, None] - second_squares
        assert np.isneginf(closeness[n:]).all() and np.isneginf(closeness[:, m:]).all()
        start = index * capacity
        best = np.sort(closeness[:n], axis=1)[:, ::-1]
        at(nearest + 4 * start, (n,), np.int32)[:] = closeness[:n].argmax(axis=1)
        at(distances + 4 * start, (n,), np.float32)[:] = np.sqrt(np.maximum(-2 * best[:, 0], 0))
        at(seconds + 4 * start, (n,), np.float32)[:] = np.sqrt(np.maximum(-2 * best[:, 1], 0))
        found = at(columns + 8 * start, (m,), np.uint64)
        assert not found.any(), "the keys are zero before the launch"
        found[:] = keys(closeness[:n, :m]).max(axis=0)


@pytest.fixture()
def device(gpu, monkeypatch):
    """A matcher on the last of the GPUs."""
    monkeypatch.setattr(kernel, "function", lambda file, name, defines: (name, int(defines[0].split("=")[1])))
    monkeypatch.setattr(kernel, "launch", play_nearest)

    def make(options=None):
        return DeviceMatcher(options, gpu.gpus - 1)

    return make


def unit(count, dim, seed):
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize("options", [MatchOptions(), MatchOptions(False, 0.95, 1.2)], ids=str)
@pytest.mark.parametrize("dim", [64, 50])
def test_matches_are_those_of_the_cpu(device, dim, options):
    """Launch after launch, with more and fewer pairs, larger and smaller ones."""
    images = [unit(count, dim, count) for count in (1, 2, 127, 0, 128, 129, 300)]
    groups = [[(0, 1)], [(2, 4), (3, 2), (5, 6), (6, 5)], [(1, 0), (4, 4)], [(6, 0), (0, 6), (3, 3)]]
    with device(options) as there, HostMatcher(options) as here:
        assert there.runs_on.startswith("GPU ")
        far, near = ([matcher.prepare(image) for image in images] for matcher in (there, here))
        for group in groups:
            found = there.match([(far[i], far[j]) for i, j in group])
            for one, other in zip(found, here.match([(near[i], near[j]) for i, j in group])):
                assert one.rows.tolist() == other.rows.tolist()
                np.testing.assert_allclose(one.distances, other.distances, atol=1e-5)


def test_results_are_copies(device):
    """The next launch writes over the memory that they came from."""
    with device() as matcher:
        one, other = (matcher.prepare(unit(40, 32, seed)) for seed in (1, 2))
        (first,) = matcher.match([(one, one)])
        kept = first.rows.copy(), first.distances.copy()
        matcher.match([(one, other)])
        np.testing.assert_array_equal(first.rows, kept[0])
        np.testing.assert_array_equal(first.distances, kept[1])


def test_memory_is_freed(gpu, device):
    with device() as matcher:
        held = [matcher.prepare(unit(200, 64, seed)) for seed in range(3)]
        assert all(one.nbytes >= 256 * (64 * 2 + 4) for one in held)
        matcher.match([(held[0], held[1]), (held[1], held[2])])
    del held, matcher
    gc.collect()
    assert not gpu.memory and not gpu.streams
    assert gpu.current == 0, "the caller's GPU is current again"


def test_what_cannot_be_compared(device):
    with device() as matcher:
        with pytest.raises(SuperPointError, match="not finite in float16"):
            matcher.prepare(np.full((1, 32), 1e30, np.float32))
        with pytest.raises(SuperPointError, match="have 64 and 50 numbers"):
            matcher.match([(matcher.prepare(unit(1, 64, 0)), matcher.prepare(unit(1, 50, 0)))])


def test_a_gpu_that_is_not_there(gpu):
    with pytest.raises(SuperPointError, match="cuda:9"):
        DeviceMatcher(None, 9)
    assert cuda.call("cudaGetDevice") == 0
