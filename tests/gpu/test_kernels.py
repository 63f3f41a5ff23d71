"""What TensorRT made of the graph, by its own layer inspector."""

from __future__ import annotations

import re

import pytest

from superpoint_trt.run.backends.tensorrt import TensorRTBackend

CONVOLUTIONS = [f"conv{stage}{half}" for stage in (1, 2, 3, 4) for half in "ab"] + [
    "convPa",
    "convPb",
    "convDa",
    "convDb",
]


@pytest.fixture(scope="module")
def layers(engine):
    """Name and type of each layer of the fp16 dense engine."""
    with TensorRTBackend(engine("dense", "fp16")) as backend:
        found = backend.engine.layers()
    if not found:
        pytest.skip("this TensorRT tells no more than names")
    return [(layer["Name"], layer["LayerType"]) for layer in found]


def parts(name: str) -> list[str]:
    return re.split(r"\s*(?:\+|\|\|)\s*", name)


def test_one_kernel_for_each_convolution_with_its_relu(layers):
    for convolution in CONVOLUTIONS:
        holding = [name for name, kind in layers if convolution in parts(name) and kind != "NoOp"]
        assert len(holding) == 1, holding
        if convolution not in ("convPb", "convDb"):
            assert f"{convolution}.relu" in parts(holding[0])


def test_no_casts_but_the_three_of_the_graph(layers):
    casts = [name for name, kind in layers if "Reformat" in kind]
    assert len(casts) == 3, casts
    assert casts[0] == "image.fp16" and all(name.endswith(".fp32") for name in casts[1:])
