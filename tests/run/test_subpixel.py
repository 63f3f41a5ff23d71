"""Sub-pixel keypoints: by hand, and the same in numpy, in torch, in the graph; who has them by default."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import photograph
from helpers import KINDS, score_map

from superpoint_trt import SuperPoint, packaged
from superpoint_trt.checkpoint import layouts, reference
from superpoint_trt.convert.export import ExportOptions, export, to_onnx
from superpoint_trt.core.types import DecodeOptions, ModelDescription, OutputType, Sampling, SuperPointError
from superpoint_trt.run import decode

SUBPIXEL = DecodeOptions(subpixel=True)


def test_by_hand():
    scores = np.zeros((32, 40), np.float32)
    scores[10, 20], scores[10, 21] = 0.6, 0.2  # a quarter of the way to the right
    scores[20, 30], scores[18, 28] = 0.5, 0.5 / 4  # a fifth of 2 px, up and to the left
    scores[20, 27] = 0.4  # 3 px away: beyond the 5x5 pixels
    xy, found = decode.select(scores, SUBPIXEL)
    np.testing.assert_allclose(xy, [[20.25, 10], [29.6, 19.6]], atol=1e-6)
    np.testing.assert_allclose(found, [0.6, 0.5])


def test_low_scores_count_though_they_are_no_keypoints():
    scores = np.zeros((32, 40), np.float32)
    scores[10, 20], scores[11, 20] = 0.008, 0.004  # below the threshold
    xy, _ = decode.select(scores, SUBPIXEL)
    np.testing.assert_allclose(xy, [[20, 10 + 1 / 3]], atol=1e-6)


def test_outside_the_image_counts_nothing():
    scores = np.full((16, 24), 0.1, np.float32)
    scores[0, 0] = scores[15, 23] = 0.4
    xy, _ = decode.select(scores, replace(SUBPIXEL, remove_borders_px=0, nms_radius_px=9, max_keypoints=2))
    # 3x3 pixels are inside: 0.4 + 8 * 0.1 in all, along each axis 3 * (1 + 2) * 0.1 to the inside.
    np.testing.assert_allclose(xy, [[0.75, 0.75], [22.25, 14.25]], atol=1e-5)


def test_beside_what_is_no_number_a_point_stays():
    scores = np.zeros((32, 40), np.float32)
    scores[10, 20], scores[10, 21], scores[20, 30] = 0.6, 0.2, 0.5
    scores[8, 22] = np.nan
    np.testing.assert_allclose(decode.refine(np.array([[20, 10], [30, 20]]), scores), [[20, 10], [30, 20]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("radius", "border"), [(4, 4), (1, 0), (0, 2)])
def test_numpy_equals_torch(kind, radius, border):
    for seed in range(3):
        scores = score_map(kind, seed)
        options = DecodeOptions(radius, border, subpixel=True)
        xy, found = decode.select(scores, options)
        whole_xy, whole_found = decode.select(scores, replace(options, subpixel=False))
        np.testing.assert_array_equal(found, whole_found)  # the same points in the same order
        assert np.abs(xy - whole_xy).max(initial=0) <= decode.SUBPIXEL_REACH_PX
        descriptors = torch.randn(1, 4, scores.shape[0] // 8, scores.shape[1] // 8)
        descriptors /= descriptors.norm(dim=1, keepdim=True)
        (in_torch,) = reference.decode(torch.from_numpy(scores)[None], descriptors, options, Sampling.HALF_PIXEL)
        np.testing.assert_allclose(xy, in_torch[0].numpy(), atol=1e-3)
        sampled = decode.sample_descriptors(xy, descriptors[0].numpy(), 8, Sampling.HALF_PIXEL)
        np.testing.assert_allclose(sampled, in_torch[2].numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("opset", "dynamic"),
    [
        (17, False),
        (11, True),
        *(pytest.param(o, d, marks=pytest.mark.exhaustive) for o in (13, 16, 20) for d in (0, 1)),
    ],
)
def test_the_graph_equals_torch(opset, dynamic, tmp_path):
    photo = photograph(240, 320)
    options = ExportOptions(
        OutputType.KEYPOINTS, height_px=240, width_px=320, opset=opset, dynamic=bool(dynamic), max_keypoints=400
    )
    model = export(packaged.WEIGHTS, tmp_path / "m.onnx", options)
    network = reference.SuperPoint.from_file(packaged.WEIGHTS, max_num_keypoints=400)
    with torch.inference_mode():
        expected = network({"image": torch.from_numpy(photo)[None, None] / 255})
    with SuperPoint(model) as superpoint:
        found = superpoint.extract(photo)
    expected_xy = expected["keypoints"][0].numpy()
    assert len(found) == len(expected_xy) > 100
    assert np.abs(found.xy - np.rint(found.xy)).mean() > 0.1  # really between pixels
    np.testing.assert_allclose(found.xy, expected_xy, atol=1e-3)
    np.testing.assert_allclose(found.descriptors, expected["descriptors"][0].numpy(), atol=1e-4)


@pytest.mark.parametrize(("layout", "own"), [("packaged", True), ("magicleap", False), ("v6", False)])
def test_who_has_them_by_default(checkpoint_file, tmp_path, layout, own):
    path = checkpoint_file(layout)
    assert layouts.load(path).subpixel is own
    rewritten = layouts.save(layouts.load(path), tmp_path / "w.safetensors")
    assert layouts.load(rewritten).subpixel is own  # also once its layout is this project's
    for kind in OutputType:
        model = to_onnx(layouts.load(path), ExportOptions(kind, height_px=64, width_px=64, max_keypoints=16))
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["superpoint_trt.subpixel"] == ("true" if own else "false")
        asked = ExportOptions(kind, height_px=64, width_px=64, max_keypoints=16, decode=DecodeOptions(subpixel=not own))
        metadata = {entry.key: entry.value for entry in to_onnx(layouts.load(path), asked).metadata_props}
        assert metadata["superpoint_trt.subpixel"] == ("false" if own else "true")
    with SuperPoint(path) as superpoint:
        assert superpoint.options.subpixel is own


def test_models_of_before_have_whole_pixels(tmp_path):
    model = onnx.load(export(packaged.WEIGHTS, tmp_path / "m.onnx", ExportOptions(height_px=240, width_px=320)))
    kept = [entry for entry in model.metadata_props if entry.key != "superpoint_trt.subpixel"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    onnx.save(model, tmp_path / "old.onnx")
    with SuperPoint(tmp_path / "old.onnx") as superpoint:
        whole = superpoint.extract(photograph())
    np.testing.assert_array_equal(whole.xy, np.rint(whole.xy))
    with SuperPoint(tmp_path / "m.onnx", subpixel=False) as superpoint:
        np.testing.assert_array_equal(superpoint.extract(photograph()).xy, whole.xy)


def test_a_graph_cannot_be_asked_otherwise(tmp_path):
    options = ExportOptions(OutputType.KEYPOINTS, height_px=64, width_px=64, max_keypoints=16)
    model = export(packaged.WEIGHTS, tmp_path / "m.onnx", options)
    with pytest.raises(SuperPointError, match="export it with --no-subpixel"):
        SuperPoint(model, subpixel=False)
    SuperPoint(model, subpixel=True).close()


@pytest.mark.parametrize("value", ["1", '"yes"', "2"])
def test_metadata_that_is_no_flag_is_refused(value):
    with pytest.raises(SuperPointError, match="subpixel"):
        ModelDescription.from_metadata({"superpoint_trt.type": "dense", "superpoint_trt.subpixel": value})


def test_on_the_command_line(tmp_path):
    def superpoint(*arguments: str) -> str:
        command = [sys.executable, "-m", "superpoint_trt", *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    cv2.imwrite(str(tmp_path / "photo.png"), photograph())
    size = ("--height", "240", "--width", "320")
    assert "sub-pixel" in superpoint("export", "--output", "m.onnx", *size)
    assert "whole pixels" in superpoint("export", "--output", "whole.onnx", "--no-subpixel", *size)
    for flags, words in (((), "sub-pixel"), (("--no-subpixel",), "whole pixels")):
        said = superpoint("infer", "--model", "m.onnx", "--image", "photo.png", "--save", "f.npz", *flags)
        assert words in said
        xy = np.load(tmp_path / "f.npz")["keypoints"]
        assert (xy == np.rint(xy)).all() == bool(flags)
