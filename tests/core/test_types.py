"""`Keypoints` for OpenCV, and the metadata of published models."""

from __future__ import annotations

from dataclasses import fields

import cv2
import numpy as np
import pytest

from superpoint_trt.core.types import Family, Keypoints, ModelDescription, OutputType, Precision, Sampling


def keypoints(dtype=np.float32) -> Keypoints:
    xy = np.array([[10.25, 20.5], [0, 3], [99, 49]], np.float32)
    descriptors = np.eye(3, 4, dtype=dtype)
    return Keypoints(xy, np.array([0.9, 0.5, 0.25], np.float32), descriptors, (100, 50))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_to_cv2(dtype):
    points, descriptors = keypoints(dtype).to_cv2()
    assert [point.pt for point in points] == [(10.25, 20.5), (0, 3), (99, 49)]
    assert [point.response for point in points] == [pytest.approx(0.9), 0.5, 0.25]
    assert {(point.size, point.angle, point.octave) for point in points} == {(8.0, -1.0, 0)}
    assert descriptors.dtype == np.float32 and descriptors.flags.c_contiguous and descriptors.shape == (3, 4)


def test_opencvs_matcher_and_drawing_take_it():
    points, descriptors = keypoints().to_cv2()
    matches = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(descriptors, descriptors[::-1].copy())
    assert sorted((one.queryIdx, one.trainIdx, one.distance) for one in matches) == [(0, 2, 0), (1, 1, 0), (2, 0, 0)]
    drawn = cv2.drawKeypoints(np.zeros((50, 100, 3), np.uint8), points, None, color=(0, 255, 0))
    assert drawn.any()


def test_none_found():
    points, descriptors = keypoints().top(0).to_cv2()
    assert points == [] and descriptors.shape == (0, 4)


def test_the_keys_of_published_metadata_stay():
    model = ModelDescription(
        OutputType.HEADS, Precision.INT8, fp16_with_int8_input="conv4a", kept_layers="conv4a conv4b"
    )
    metadata = model.to_metadata()
    assert metadata["superpoint_trt.handed_over"] == "conv4a"
    assert "superpoint_trt.fp16_with_int8_input" not in metadata
    assert ModelDescription.from_metadata(metadata) == model
    assert ModelDescription.from_metadata({**metadata, "superpoint_trt.of_the_future": "1"}) == model


SAMPLE_OF_TYPE = {
    "OutputType": OutputType.KEYPOINTS,
    "Precision": Precision.INT8,
    "Sampling": Sampling.LEGACY,
    "Family": Family.V6,
    "str": "1e3",  # text that JSON would read as a number
    "bool": True,
    "int": 24,
    "float": 0.25,
}


def test_every_field_of_a_description_comes_back_from_metadata():
    values = {field.name: SAMPLE_OF_TYPE[str(field.type).split(" | ")[0]] for field in fields(ModelDescription)}
    model = ModelDescription(**values)
    assert ModelDescription.from_metadata(model.to_metadata()) == model
