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
    with pytest.raises(SuperPointError, match="expected auto, cpu, cuda or cuda:N"):
        DeviceChoice.parse(text)
