"""A stand-in for CUDA, for tests of the host's side of the runtime."""

from __future__ import annotations

import gc

import pytest
from gpu_host import fake_gpu

from superpoint_trt.gpu import cuda, kernels
from superpoint_trt.run import lanes


@pytest.fixture(params=[1, 2], ids=["one GPU", "the second of two"])
def gpu(request, monkeypatch):
    """The CUDA runtime, with one GPU or two."""
    gc.collect()
    runtime = fake_gpu.Runtime(request.param)
    monkeypatch.setattr(cuda, "runtime", lambda: runtime)
    monkeypatch.setattr(kernels, "function", lambda file, name, defines=(): name)
    monkeypatch.setattr(kernels, "launch", fake_gpu.launch)
    monkeypatch.setattr(lanes, "Decoder", fake_gpu.FakeDecoder)
    yield runtime
    gc.collect()


@pytest.fixture()
def engine(gpu):
    """An engine on the last GPU."""
    return fake_gpu.FakeEngine(gpu.gpus - 1)
