"""Names of devices."""

from __future__ import annotations

import pytest

from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.types import SuperPointError


@pytest.mark.parametrize(
    ("text", "kind", "index"),
    [
        ("auto", "auto", None),
        ("cpu", "cpu", None),
        ("cuda", "cuda", None),
        ("cuda:0", "cuda", 0),
        ("cuda:12", "cuda", 12),
    ],
)
def test_what_is_read(text, kind, index):
    choice = DeviceChoice.parse(text)
    assert (choice.kind, choice.index, str(choice)) == (kind, index, text)


@pytest.mark.parametrize("text", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "cpu:0", "auto:1", "1"])
def test_what_is_refused(text):
    with pytest.raises(SuperPointError, match="expected auto, cpu, cuda, cuda:N"):
        DeviceChoice.parse(text)


@pytest.mark.parametrize(
    ("text", "unit", "fp32", "named"),
    [
        ("openvino", "CPU", False, "openvino:CPU"),
        ("openvino:fp32", "CPU", True, "openvino:CPU:fp32"),
        ("openvino:CPU", "CPU", False, "openvino:CPU"),
        ("openvino:GPU", "GPU", False, "openvino:GPU"),
        ("openvino:GPU.1:fp32", "GPU.1", True, "openvino:GPU.1:fp32"),
        ("openvino:NPU", "NPU", False, "openvino:NPU"),
    ],
)
def test_openvino_and_its_devices(text, unit, fp32, named):
    choice = DeviceChoice.parse(text)
    assert (choice.kind, choice.index, choice.unit, choice.fp32) == ("openvino", None, unit, fp32)
    assert str(choice) == named and DeviceChoice.parse(named) == choice


@pytest.mark.parametrize(
    "text",
    ["openvino:", "openvino:cpu", "openvino:AUTO", "openvino:CPU.0", "openvino:bf16", "cpu:fp32", "openvino:GPU."],
)
def test_what_openvino_is_not_asked_for(text):
    with pytest.raises(SuperPointError, match="expected auto, cpu, cuda, cuda:N, openvino"):
        DeviceChoice.parse(text)
