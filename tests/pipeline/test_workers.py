"""What is written while images are read and run."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from superpoint_trt.core.orientation import UPRIGHT
from superpoint_trt.core.types import Keypoints
from superpoint_trt.pipeline.inputs import Item
from superpoint_trt.pipeline.shards import Shard, ShardFolder
from superpoint_trt.pipeline.workers import _WRITE_HELPERS, WorkOptions, _Source, _Writer

pytest.importorskip("h5py")


def test_a_whole_shard_is_finished_though_the_run_is_interrupted(tmp_path):
    """Its last step waits behind other work when the interrupt comes."""
    folder = ShardFolder(tmp_path / "f.h5")
    folder.folder.mkdir()
    item = Item("a.png", "a.png")
    found = Keypoints(np.ones((1, 2), np.float32), np.ones(1, np.float32), np.ones((1, 4), np.float32), (16, 8))
    writer = _Writer(folder, WorkOptions(None, {}), SimpleNamespace(runtime="a model"))
    with pytest.raises(KeyboardInterrupt), writer:
        for _ in range(_WRITE_HELPERS):
            writer._helpers.submit(time.sleep, 0.1)
        writer.add([_Source(Shard(0, [item]), item, UPRIGHT, 1.0)], [found])
        for _ in range(_WRITE_HELPERS):
            writer._helpers.submit(time.sleep, 0.3)
        while not writer._writing[0][1].running():
            time.sleep(0.001)
        raise KeyboardInterrupt
    assert sorted(path.name for path in folder.folder.iterdir()) == ["00000.json", "00000.packed"]
