"""What CUDA's errors say on machines without a driver, or with an old one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (None, "no NVIDIA driver, so engines cannot run here; run the .onnx"),
        (SimpleNamespace(), "the NVIDIA driver is older than this CUDA"),
    ],
    ids=["none", "old"],
)
def test_no_driver_is_told_from_an_old_one(monkeypatch, driver, says):
    """CUDA gives one error for both."""
    insufficient = SimpleNamespace(
        cudaGetDevice=lambda: (35,),
        cudaGetErrorName=lambda error: (0, b"cudaErrorInsufficientDriver"),
        cudaGetErrorString=lambda error: (0, b"CUDA driver version is insufficient for CUDA runtime version"),
    )
    monkeypatch.setattr(cuda, "runtime", lambda: insufficient)
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    with pytest.raises(SuperPointError, match=says):
        cuda.current_device()
