"""Matchers that prepare an image once: equal to matching two sets of descriptors, and which one is opened."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.match import matcher
from superpoint_trt.match.matcher import HostMatcher, open_matcher
from superpoint_trt.match.nearest import MatchOptions, match


def unit(count: int, seed: int, dim: int = 32) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_many_pairs_are_matched_as_one(dtype):
    images = [unit(count, count).astype(dtype) for count in (30, 0, 50, 1)]
    options = MatchOptions(max_ratio=0.99)
    with HostMatcher(options) as opened:
        prepared = [opened.prepare(image) for image in images]
        pairs = [(i, j) for i in range(4) for j in range(4)]
        for (i, j), found in zip(pairs, opened.match([(prepared[i], prepared[j]) for i, j in pairs])):
            assert found.rows.tolist() == match(images[i], images[j], options).rows.tolist()


def test_the_transposed_view_of_a_feature_file_is_taken():
    image = unit(20, 0)
    opened = HostMatcher()
    held = opened.prepare(np.ascontiguousarray(image.T).T)
    assert opened.match([(held, held)])[0].rows.tolist() == [[i, i] for i in range(20)]
    assert (held.count, held.dim, held.nbytes) == (20, 32, 20 * 32 * 4)


def test_lengths_that_differ_are_refused():
    opened = HostMatcher()
    with pytest.raises(SuperPointError, match="have 32 and 64 numbers"):
        opened.match([(opened.prepare(unit(2, 0)), opened.prepare(unit(2, 0, 64)))])


def test_the_cpu_says_why_a_gpu_is_not_used(monkeypatch):
    def fails(*_):
        raise SuperPointError("NVRTC is missing.")

    monkeypatch.setattr(matcher, "DeviceMatcher", fails)
    monkeypatch.setattr(cuda, "driver", lambda: None)
    assert open_matcher().runs_on == "numpy on the CPU"
    monkeypatch.setattr(cuda, "driver", lambda: object())
    assert open_matcher().runs_on == "numpy on the CPU; the GPU cannot be used: NVRTC is missing."
    with pytest.raises(SuperPointError, match="NVRTC is missing"):
        open_matcher(device="cuda")
    assert open_matcher(device="cpu").runs_on == "numpy on the CPU"
    with pytest.raises(SuperPointError, match="device is 'tpu'"):
        open_matcher(device="tpu")
