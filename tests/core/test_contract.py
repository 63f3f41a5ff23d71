"""What a model is: the shapes decide, and metadata that contradict them are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from superpoint_trt.core.contract import check_output_shapes, recognize
from superpoint_trt.core.types import ModelDescription, OutputType, SuperPointError

PATH = Path("m.onnx")
IMAGE = {"image": [1, 1, 48, 64]}
DENSE = {"scores": [1, 48, 64], "descriptors": [1, 4, 6, 8]}
HEADS = {"logits": ["b", 65, "h", "w"], "coarse_descriptors": ["b", 4, "h", "w"]}
KEYPOINTS = {"keypoints": [1, 32, 2], "scores": [1, 32], "descriptors": [1, 32, 4], "num_keypoints": [1]}
STATIC = ModelDescription(OutputType.DENSE, height_px=48, width_px=64, descriptor_dim=4)
DYNAMIC = ModelDescription(OutputType.HEADS, height_px=48, width_px=64, dynamic=True, descriptor_dim=4)
FREE = {"image": ["batch", 1, "height", "width"]}


def test_metadata_that_fit_are_believed():
    assert recognize(PATH, STATIC, IMAGE, DENSE, "x") == STATIC
    assert recognize(PATH, DYNAMIC, FREE, HEADS, "x") == DYNAMIC
    keypoints = replace(STATIC, type=OutputType.KEYPOINTS, max_keypoints=32)
    assert recognize(PATH, keypoints, IMAGE, KEYPOINTS, "x") == keypoints


def test_sizes_that_the_metadata_lack_come_from_the_shapes():
    assert recognize(PATH, replace(STATIC, height_px=None, width_px=None), IMAGE, DENSE, "x") == STATIC


@pytest.mark.parametrize(
    ("described", "says"),
    [
        (replace(STATIC, stride_px=16), "metadata say stride_px 16, the tensors 8"),
        (replace(STATIC, descriptor_dim=256), "metadata say descriptor_dim 256, the tensors 4"),
        (replace(STATIC, dynamic=True), "metadata say dynamic true, the tensors false"),
        (replace(STATIC, width_px=640), "metadata say width_px 640, the tensors 64"),
        (replace(STATIC, max_batch_size=8), "metadata say max_batch_size 8, the tensors 1"),
        (replace(STATIC, type=OutputType.HEADS), "not one of this project's models"),
    ],
)
def test_metadata_that_contradict_the_shapes_are_refused(described, says):
    with pytest.raises(SuperPointError, match=says) as error:
        recognize(PATH, described, IMAGE, DENSE, "export it again")
    assert "m.onnx" in str(error.value) and "export it again" in str(error.value)


def test_channels_of_the_detector_tell_the_stride():
    with pytest.raises(SuperPointError, match="metadata say stride_px 4, the tensors 8"):
        recognize(PATH, replace(DYNAMIC, stride_px=4), FREE, HEADS, "x")
    foreign = {"logits": ["b", 17, "h", "w"], "coarse_descriptors": ["b", 4, "h", "w"]}
    assert recognize(PATH, None, FREE, foreign, "x").stride_px == 4


@pytest.mark.parametrize("rows", [5, 48, 100])
def test_cells_of_no_whole_size_are_refused(rows):
    outputs = {"scores": [1, 48, 64], "descriptors": [1, 4, rows, 8]}
    with pytest.raises(SuperPointError, match="has cells of"):
        recognize(PATH, None, IMAGE, outputs, "x")


def test_free_sizes_are_checked_when_the_model_runs():
    dense = replace(STATIC, dynamic=True)
    shapes = {"scores": (2, 80, 96), "descriptors": (2, 4, 10, 12)}
    check_output_shapes(dense, (2, 1, 80, 96), shapes)
    with pytest.raises(
        SuperPointError, match=r"output descriptors is \[2, 4, 10, 12\].*expected \[2, 4, 5, 6\].*stride_px 16"
    ):
        check_output_shapes(replace(dense, stride_px=16), (2, 1, 80, 96), shapes)
    with pytest.raises(SuperPointError, match="output scores"):
        check_output_shapes(dense, (2, 1, 80, 96), {**shapes, "scores": (2, 72, 96)})


def test_keypoints_of_another_tool_may_be_of_any_number():
    model = ModelDescription(OutputType.KEYPOINTS, descriptor_dim=4)
    shapes = {"keypoints": (1, 7, 2), "scores": (1, 7), "descriptors": (1, 7, 4), "num_keypoints": (1, 1)}
    check_output_shapes(model, (1, 1, 48, 64), shapes)
    with pytest.raises(SuperPointError, match="output keypoints"):
        check_output_shapes(model, (1, 1, 48, 64), {**shapes, "keypoints": (1, 8, 2)})
