"""How results lie in the memory that the GPU writes, and what a run is told of it. Needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt.gpu.kernels.decode import TARGET_NBYTES, Rows
from superpoint_trt.run.lanes import parts_of


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("batch", "capacity", "dim"), [(1, 1024, 256), (3, 17, 100), (2, 1, 1)])
def test_parts_share_nothing_and_fit(batch, capacity, dim, half):
    rows = Rows(batch, capacity, dim, half)
    block = np.zeros(rows.nbytes, np.uint8)
    names = ("keypoints", "scores", "descriptors", "num_keypoints")
    parts = parts_of(rows, block, names)
    assert [part.shape for part in parts] == [(batch, capacity, 2), (batch, capacity), (batch, capacity, dim), (batch,)]
    assert parts[2].dtype == (np.float16 if half else np.float32)
    for mark, part in enumerate(parts, start=1):
        part.view(np.uint8)[...] = mark
        assert part.ctypes.data % 16 == block.ctypes.data % 16, "the kernel writes 16 bytes at a time"
    for mark, part in enumerate(parts, start=1):
        assert (part.view(np.uint8) == mark).all(), "no part lies on another"
    assert np.count_nonzero(block) == sum(part.nbytes for part in parts)


def test_what_a_run_is_told():
    """Four addresses in the order of decode.cu's Target, then (width, height) of each image."""
    rows, start = Rows(2, 5, 8, half=True), 0x7F0000000000
    job = rows.job(start, [(640, 480), (0, 0)])
    assert len(job) == rows.job_nbytes == TARGET_NBYTES + 16
    order = ("keypoints", "scores", "descriptors", "num_keypoints")
    assert np.frombuffer(job, np.uint64, 4).tolist() == [start + rows.places[name][0] for name in order]
    assert np.frombuffer(job, np.int32, offset=TARGET_NBYTES).tolist() == [640, 480, 0, 0]
    assert rows.target(start).tobytes() == job[:TARGET_NBYTES]
