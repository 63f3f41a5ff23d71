"""TensorRT 10's dispatch or lean runtime runs what TensorRT 8.6 built, on the same GPU.

SUPERPOINT_VERSION_COMPATIBLE   the folder that `benchmarks/dispatch.py build` filled under the full TensorRT
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from superpoint_trt import SuperPoint, SuperPointError
from superpoint_trt.core.image import synthetic_photograph
from superpoint_trt.gpu.engine_file import VersionCompatible, read_plan
from superpoint_trt.gpu.tensorrt_api import Part
from superpoint_trt.run.backends import open_backend

FOLDER = os.environ.get("SUPERPOINT_VERSION_COMPATIBLE")
pytestmark = pytest.mark.skipif(not FOLDER, reason="SUPERPOINT_VERSION_COMPATIBLE names no folder")

NAMES = ("heads-fp16", "heads-fp32", "dense-fp16", "keypoints-fp16")
IMAGE = synthetic_photograph(480, 640)


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


def engine_of(name: str) -> Path:
    return Path(str(FOLDER)) / f"{name}.compatible.engine"


@pytest.fixture
def backend(name):
    with open_backend(engine_of(name), allow_host_code=True) as opened:
        if opened.engine.tensorrt.part is Part.FULL:
            pytest.skip("the full TensorRT is installed here, and runs before its dispatch and lean runtimes")
        yield opened


def test_which_runtime_runs_is_named(backend):
    part = backend.engine.tensorrt.part
    assert str(backend.runtime).startswith(f"TensorRT {part.value} runtime 10.")
    _, metadata = read_plan(engine_of("heads-fp16"))
    assert metadata.version_compatible is VersionCompatible.LEAN_INSIDE


def test_outputs_are_those_of_the_builders_own_runtime(backend, name):
    """To the bit. The first run of a shape is plain, the second is captured, so each image is run twice."""
    with np.load(engine_of(name).with_name(f"{name}.npz")) as kept:
        for index in range(4):
            image = np.roll(IMAGE, 40 * index, axis=1)[None, None]
            for _ in range(2):
                for output, found in backend.infer(image).items():
                    np.testing.assert_array_equal(found, kept[f"{output}{index}"])


def test_formats_agree_with_the_json(backend):
    _, metadata = read_plan(engine_of("heads-fp16"))
    for tensor, format_ in backend.engine.formats().items():
        if backend.description.type.value == "heads" and backend.description.precision.value == "fp16":
            assert format_ == metadata.format_of(tensor)


def test_without_the_permission_it_is_refused(name):
    with pytest.raises(SuperPointError, match="carries host code"):
        open_backend(engine_of(name))


def test_keypoints_on_the_gpu_and_in_a_stream():
    """The whole way: the CUDA decode, several batches in flight."""
    with SuperPoint(engine_of("heads-fp16"), allow_host_code=True, max_keypoints=500) as superpoint:
        assert "decode on the GPU" in str(superpoint.runtime)
        alone = superpoint.extract(IMAGE)
        streamed = list(superpoint.extract_many([IMAGE] * 6, in_flight=3))
    assert len(alone) > 100
    for found in streamed:
        np.testing.assert_array_equal(found.xy, alone.xy)
        np.testing.assert_array_equal(found.descriptors, alone.descriptors)
