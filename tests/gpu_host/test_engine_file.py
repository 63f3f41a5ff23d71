"""The .json beside an engine: what it holds, and which machines it lets run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from superpoint_trt.core.types import ModelDescription, OutputType, Precision, ShapeRange, SuperPointError
from superpoint_trt.gpu.engine_file import EngineMetadata, check_runs_here
from superpoint_trt.gpu.tensorrt_api import Flavor

METADATA = EngineMetadata(
    description=ModelDescription(OutputType.HEADS, Precision.INT8, fp16_with_int8_input="conv4a conv4b"),
    flavor=Flavor.TENSORRT,
    tensorrt_version="8.6.0",
    targets=("sm86",),
    gpu_name="NVIDIA A10",
    profile=ShapeRange((1, 480, 640), (1, 480, 640), (4, 480, 640)),
    plan_sha256="0" * 64,
    onnx_sha256="1" * 64,
    rebuild="superpoint build --onnx a.onnx",
    build={"seconds": 1.5},
)
PATH = Path("a.engine")


def test_what_was_written_is_read():
    assert EngineMetadata.from_json(METADATA.to_json(), PATH) == METADATA


def test_the_keys_of_published_files_stay():
    flat = json.loads(METADATA.to_json())
    assert list(flat) == [
        "format",
        "description",
        "flavour",
        "tensorrt_version",
        "targets",
        "gpu_name",
        "profile",
        "plan_sha256",
        "onnx_sha256",
        "rebuild",
        "build",
    ]
    assert flat["flavour"] == "tensorrt"
    assert flat["description"]["superpoint_trt.handed_over"] == "conv4a conv4b"


@pytest.mark.parametrize("here", ["sm75", "sm80", "sm8", "sm860", "sm87", "sm89", "sm90", "sm100", "sm120", "sm121"])
def test_other_gpus_are_refused(here):
    """Those below and those above, by number and by letters."""
    with pytest.raises(SuperPointError, match=f"was built for sm86 .*, this GPU is {here}: engines do not travel"):
        check_runs_here(METADATA, PATH, Flavor.TENSORRT, "8.6.0", here)


@pytest.mark.parametrize("here", ["sm75", "sm86", "sm120"])
def test_every_target_is_taken(here):
    check_runs_here(replace(METADATA, targets=("sm75", "sm86", "sm120")), PATH, Flavor.TENSORRT, "8.6.0", here)


def test_what_lies_between_two_targets_is_refused():
    with pytest.raises(SuperPointError, match="this GPU is sm86"):
        check_runs_here(replace(METADATA, targets=("sm75", "sm89")), PATH, Flavor.TENSORRT, "8.6.0", "sm86")


@pytest.mark.parametrize(
    ("flavor", "version"), [(Flavor.RTX, "8.6.0"), (Flavor.TENSORRT, "8.6.1"), (Flavor.TENSORRT, "10.0")]
)
def test_another_tensorrt_is_refused(flavor, version):
    with pytest.raises(SuperPointError, match=r"was built by tensorrt 8\.6\.0, here is "):
        check_runs_here(METADATA, PATH, flavor, version, "sm86")
