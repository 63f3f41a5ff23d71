"""What `SuperPoint` opens, what it says of itself, and on which device it runs."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from gpu_host import fake_gpu

from superpoint_trt import SuperPoint, SuperPointError, packaged
from superpoint_trt.convert.default_model import default_model
from superpoint_trt.core.image import load_image
from superpoint_trt.gpu import cuda
from superpoint_trt.run.backends import onnxruntime as onnxruntime_backend
from superpoint_trt.run.backends import open_backend


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The packaged model is exported once for this file, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERPOINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_without_a_model_the_packaged_weights_are_opened():
    image = load_image(packaged.PHOTO)
    with SuperPoint(max_keypoints=200) as superpoint, SuperPoint(default_model(), max_keypoints=200) as named:
        found, expected = superpoint.extract(image), named.extract(image)
        assert repr(superpoint) == f"SuperPoint({packaged.DEFAULT!r}, dense, {superpoint.runtime})"
        assert repr(named) == f"SuperPoint({str(default_model())!r}, dense, {named.runtime})"
    assert len(found) == 200
    np.testing.assert_array_equal(found.xy, expected.xy)


def test_what_it_says_of_itself():
    with SuperPoint(device="cpu", threads=1) as superpoint:
        runtime = f"onnxruntime {onnxruntime.__version__}, cpu (CPUExecutionProvider, 1 threads), fp32"
        assert repr(superpoint) == f"SuperPoint({packaged.DEFAULT!r}, dense, {runtime})"


@pytest.mark.parametrize("name", ["model.onnx", "model.engine", "model.safetensors"])
def test_a_device_of_another_name_is_refused_before_the_file_is_read(name):
    with pytest.raises(SuperPointError, match="device is 'gpu'; expected auto, cpu, cuda or cuda:N"):
        open_backend(name, "gpu")


class Session:
    """Notes what an onnxruntime session is asked for."""

    asked = None

    def __init__(self, data, options, providers, disabled_optimizers) -> None:
        Session.asked = providers
        raise RuntimeError("no GPU here")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("auto", [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]),
        ("cuda", [("CUDAExecutionProvider", {"use_tf32": "0"})]),
        ("cuda:1", [("CUDAExecutionProvider", {"use_tf32": "0", "device_id": "1"})]),
        ("cpu", [("CPUExecutionProvider", {})]),
    ],
)
def test_onnxruntime_is_asked_for_that_gpu(monkeypatch, device, expected):
    runtime = fake_gpu.Runtime(gpus=2)
    monkeypatch.setattr(cuda, "runtime", lambda: runtime)
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: both)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(SuperPointError, match="no GPU here"):
        open_backend(default_model(), device)
    assert Session.asked == expected
    with pytest.raises(SuperPointError, match=r"cuda:2 was asked for, .* has only cuda:0 \(GPU 0\), cuda:1 \(GPU 1\)"):
        open_backend(default_model(), "cuda:2")


def test_onnxruntime_on_another_gpu_names_it():
    parsed = onnxruntime_backend.DeviceChoice.parse("cuda:1")
    assert onnxruntime_backend._device("CUDAExecutionProvider", parsed, None) == "cuda:1 (CUDAExecutionProvider)"
    parsed = onnxruntime_backend.DeviceChoice.parse("auto")
    assert onnxruntime_backend._device("CUDAExecutionProvider", parsed, None) == "cuda (CUDAExecutionProvider)"


def test_torch_names_the_gpus_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    with pytest.raises(SuperPointError, match=r"cuda:1 was asked for, .* has only cuda:0 \(NVIDIA H200\)"):
        open_backend(packaged.WEIGHTS, "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SuperPointError, match="device cuda:0 was asked for, but torch sees no GPU"):
        open_backend(packaged.WEIGHTS, "cuda:0")


def test_the_gpu_of_a_number_and_the_callers_own(monkeypatch):
    runtime = fake_gpu.Runtime(gpus=2)
    monkeypatch.setattr(cuda, "runtime", lambda: runtime)
    assert cuda.current_device().name == "GPU 0" and cuda.device(1).name == "GPU 1"
    scope = cuda.DeviceScope(1)
    with scope:
        assert runtime.current == 1
        with scope:
            assert runtime.current == 1
        assert runtime.current == 1
    assert runtime.current == 0
    with pytest.raises(KeyError), scope:
        raise KeyError("inside")
    assert runtime.current == 0
