"""`TensorRTBackend` on a stand-in for the GPU and the engine: copies, buffers, the caller's arrays, refusals."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from gpu_host import fake_gpu

from superpoint_trt import SuperPoint
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.arrays import DeviceArray
from superpoint_trt.run.backends import tensorrt
from superpoint_trt.run.backends.tensorrt import MOST_LOANS, MOST_SHAPES, TensorRTBackend

pytest_plugins = ["gpu_host.gpu_fixtures"]


@pytest.fixture()
def backend(gpu, engine, monkeypatch):
    monkeypatch.setattr(tensorrt, "Engine", lambda path, index, allow_host_code: engine)
    tensorrt._can_convert.cache_clear()
    with TensorRTBackend("a.engine") as opened:
        yield opened
    tensorrt._can_convert.cache_clear()


def image(seed: int, batch: int = 1, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).random((batch, 1, height, width), dtype=np.float32)


def cells(values: np.ndarray) -> np.ndarray:
    batch, _, height, width = values.shape
    return values.reshape(batch, height // 8, 8, width // 8, 8).mean(axis=(2, 4))


def on_gpu(values: np.ndarray) -> DeviceArray:
    memory = cuda.DeviceMemory(values.nbytes)
    fake_gpu.at(memory.address, values.shape, values.dtype)[:] = values
    return DeviceArray(memory.address, values.shape, values.dtype, 0, memory)


def test_host_to_host(backend):
    images = [image(seed, 1 + seed % 2) for seed in range(MOST_LOANS + 3)]
    found = [backend.infer(one) for one in images]
    for outputs, one in zip(found, images):
        assert list(outputs) == ["logits", "coarse_descriptors"]
        np.testing.assert_allclose(outputs["logits"][:, 0], cells(one), atol=1e-6)
    backend.close()
    np.testing.assert_allclose(found[0]["logits"][:, 0], cells(images[0]), atol=1e-6)


def test_uint8_is_the_float_image(backend):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 1, 16, 16), dtype=np.uint8)
    expected = backend.infer(pixels.astype(np.float32) / np.float32(255))["logits"]
    np.testing.assert_allclose(backend.infer(pixels)["logits"], expected, atol=1e-6)
    assert len(backend.runners) == 2


def test_steps_are_timed(backend):
    outputs, spans = backend.infer_timed(image(0))
    assert list(spans) == ["host_to_device", "network", "device_to_host"] and next(iter(outputs)) == "logits"


def test_arrays_on_the_gpu_are_used_where_they_lie(backend):
    one = image(1)
    source = on_gpu(one)
    found = backend.infer_device(source)
    np.testing.assert_allclose(fake_gpu.at(found["logits"].address, (1, 65, 2, 3), np.float32)[:, 0], cells(one))
    assert backend.runners[-1].input_address == source.address
    mine = on_gpu(np.zeros((1, 65, 2, 3), np.float32))
    found = backend.infer_device(source, out={"logits": mine}, stream=7)
    assert found["logits"] is not None and found["logits"].address == mine.address
    np.testing.assert_allclose(fake_gpu.at(mine.address, mine.shape, np.float32)[:, 0], cells(one))
    with pytest.raises(SuperPointError, match="outputs are logits, coarse_descriptors"):
        backend.infer_device(source, out={"scores": mine})
    with pytest.raises(SuperPointError, match=r"out\['coarse_descriptors'\] is float32 \(1, 65, 2, 3\)"):
        backend.infer_device(source, out={"coarse_descriptors": mine})


def test_shapes_stay_bounded(backend):
    for width in range(16, 16 + 8 * 6, 8):
        for height in (16, 24):
            backend.infer(image(0, 1, height, width))
    assert len(backend.runners) == MOST_SHAPES


def test_closed_and_forgotten(gpu, backend):
    backend.infer(image(0))
    backend.close()
    with pytest.raises(SuperPointError, match="this model was closed"):
        backend.infer(image(0))
    gc.collect()
    assert gpu.memory == {} and gpu.streams == 0 and gpu.current == 0


def test_what_is_refused(backend):
    with pytest.raises(SuperPointError, match="24x16 px, batch 9; this engine was built for 16x16 to 64x64 px"):
        backend.infer(image(0, 9))
    with pytest.raises(SuperPointError, match="runs on cuda"):
        TensorRTBackend("a.engine", "cpu")


def test_superpoint_decodes_on_the_gpu_and_says_so(gpu, engine, monkeypatch, tmp_path):
    """And without kernels it decodes on the host, and says why."""
    monkeypatch.setattr(tensorrt, "Engine", lambda path, index, allow_host_code: engine)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    with SuperPoint("model.engine", max_keypoints=3) as superpoint:
        gpu_name = f"cuda:{engine.gpu.index} (GPU {engine.gpu.index}, sm90)"
        expected = f"SuperPoint('model.engine', heads, TensorRT, {gpu_name}, fp32, decode on the GPU (CUDA))"
        assert repr(superpoint) == expected
        assert len(superpoint.extract(picture)) == 3
        assert len(superpoint.extract_device(picture).scores.shape) == 1
        assert [len(one) for one in superpoint.extract_many([picture] * 5, 2)] == [3] * 5
        assert len(superpoint.decode(superpoint.infer(superpoint.prepare(picture)[0][None, None]), [])) == 0

    def missing(*_: object) -> None:
        raise SuperPointError("compiling kernels needs NVRTC")

    monkeypatch.setattr(tensorrt.kernels, "function", missing)
    tensorrt._can_convert.cache_clear()
    with SuperPoint("model.engine") as superpoint:
        assert "decode on the CPU (numpy): compiling kernels needs NVRTC" in repr(superpoint)
        superpoint.extract(picture)
        with pytest.raises(SuperPointError, match=r"heads engine only.*needs NVRTC"):
            superpoint.extract_device(picture)
    tensorrt._can_convert.cache_clear()
