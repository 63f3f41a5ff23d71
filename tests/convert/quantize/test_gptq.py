"""int8 weights rounded with error feedback: by hand, on a real network, on disk and on the command line."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import COMPACT, photograph
from helpers import cases, run_in_onnxruntime
from onnx import helper, numpy_helper

from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.convert.onnx_file import load_onnx
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.gptq import _feed_back, _Layer, _patches, _Window, round_weights
from superpoint_trt.convert.quantize.options import CalibrationOptions, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import quantize, quantize_file
from superpoint_trt.convert.quantize.ranges_file import load_calibration, save_calibration
from superpoint_trt.core.files import sha256
from superpoint_trt.core.types import OutputType, Precision, SuperPointError

NAMES = ("camera", "coffee", "brick", "grass")


def layer(*weights: float) -> _Layer:
    """One output channel of a 1x1 convolution, a step of int8 worth 1."""
    return _Layer("w", np.array(weights, np.float32).reshape(1, -1, 1, 1), np.ones(1, np.float32), "x", _Window(1))


@pytest.fixture(scope="module")
def given():
    return [(name, photograph(96, 128, name)) for name in NAMES]


@pytest.fixture(scope="module")
def model(checkpoint_file, tmp_path_factory):
    """A small random network: its weights are rounded in no time."""
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    return export(checkpoint_file("magicleap"), path, ExportOptions(OutputType.HEADS, height_px=96, width_px=128))


@pytest.fixture(scope="module")
def ranges(model, given):
    return calibrate(model, given, CalibrationOptions(equalize=False))


@pytest.fixture(scope="module")
def rounded(model, ranges, given):
    return round_weights(model, ranges, given)


def test_what_two_equal_inputs_lose_is_made_up_for():
    """0.3 and 0.3 of the same input are 0.6 of it: nearer to 1 than to 0, which is what each alone is nearest to."""
    assert _feed_back(layer(0.3, 0.3), np.ones((2, 2))).ravel().tolist() == [0, 1]
    assert _feed_back(layer(0.3, -0.3), np.array([[1, -1], [-1, 1]])).ravel().tolist() == [0, -1]


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_the_nearest():
    values = np.random.default_rng(0).uniform(-126, 126, 50)
    np.testing.assert_array_equal(_feed_back(layer(*values), np.eye(50)).ravel(), np.rint(values.astype(np.float32)))


def test_no_weight_leaves_the_range_of_int8():
    found = _feed_back(layer(127, 126.6, 127, 126.6, 126.6), np.ones((5, 5)))
    assert found.dtype == np.int8 and found.max() == 127


@pytest.mark.parametrize("window", [_Window(3, 1, 1), _Window(4, 2, 1), _Window(2, 2, 0), _Window(1)], ids=str)
def test_patches_are_what_a_convolution_reads(window):
    values = np.random.default_rng(1).normal(size=(3, 6, 8)).astype(np.float32)
    side, step, edge = window.side, window.stride, window.padding
    weight = np.random.default_rng(2).normal(size=(3, side, side)).astype(np.float32)
    whole = torch.nn.functional.conv2d(*map(torch.from_numpy, (values[None], weight[None])), None, step, edge)
    sums = _patches(values, window, np.random.default_rng(3)) @ weight.ravel()
    assert {round(float(value), 3) for value in sums} == {round(value, 3) for value in whole.ravel().tolist()}


def test_every_convolution_of_a_topology_is_rounded(checkpoint_file, given, tmp_path):
    """Even kernels and strides too; the rounding helps."""
    path = export(checkpoint_file("compact"), tmp_path / "net.onnx", ExportOptions(OutputType.HEADS, 96, 128))
    ranges = calibrate(path, given)
    rounded = round_weights(path, ranges, given)
    parts = {f"{name}.weight.parts" for name in ("stem0", "patches")}
    assert set(rounded.weights) == parts | {f"{row[0]}.weight" for row in COMPACT} - {"stem0.weight", "patches.weight"}
    image = photograph(96, 128, "chelsea").astype(np.float32) / 255
    exact = run_in_onnxruntime(load_onnx(path), image, tmp_path)
    nearest, fed_back = (
        run_in_onnxruntime(quantize(load_onnx(path), found), image, tmp_path) for found in (ranges, rounded)
    )
    for truth, one, other in zip(exact, nearest, fed_back):
        assert np.abs(other - truth).mean() < np.abs(one - truth).mean()


@pytest.mark.parametrize("weights", cases(["magicleap", "packaged"], fast=lambda weights: weights == "magicleap"))
def test_the_network_comes_nearer_to_fp32_on_a_photograph_it_has_not_seen(checkpoint_file, given, tmp_path, weights):
    path = tmp_path / "net.onnx"
    source = load_onnx(export(checkpoint_file(weights), path, ExportOptions(OutputType.HEADS, 96, 128)))
    ranges = calibrate(path, given, CalibrationOptions(equalize=False))
    rounded = round_weights(path, ranges, given)
    image = photograph(96, 128, "chelsea").astype(np.float32) / 255
    exact = run_in_onnxruntime(source, image, tmp_path)
    nearest, fed_back = (run_in_onnxruntime(quantize(source, found), image, tmp_path) for found in (ranges, rounded))
    for truth, one, other in zip(exact, nearest, fed_back):
        assert np.abs(other - truth).mean() < 0.9 * np.abs(one - truth).mean()


def test_the_graph_differs_in_its_integers_only(model, ranges, rounded):
    graphs = [quantize(load_onnx(model), found) for found in (ranges, rounded)]
    assert [node.SerializeToString() for node in graphs[0].graph.node] == [
        node.SerializeToString() for node in graphs[1].graph.node
    ]
    one, other = ({w.name: numpy_helper.to_array(w) for w in graph.graph.initializer} for graph in graphs)
    changed = {name for name in one if not np.array_equal(one[name], other[name])}
    assert changed == set(rounded.weights) and "conv1a.weight.parts" in changed
    for name in changed - {"conv1a.weight.parts"}:
        steps = other[name] / other[f"{name}.q.scale"].reshape(-1, 1, 1, 1)
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        assert np.abs(other[name] - one[name]).max() > 0.5 * other[f"{name}.q.scale"].min()


def test_layers_that_are_kept_keep_their_weights(model, rounded):
    kept = quantize(load_onnx(model), rounded, QuantizeOptions(keep_fp16=("conv3b",)))
    exact, got = (
        {w.name: numpy_helper.to_array(w) for w in graph.graph.initializer} for graph in (load_onnx(model), kept)
    )
    np.testing.assert_array_equal(got["conv3b.weight"], exact["conv3b.weight"])


def test_fp8_has_no_use_for_steps_of_int8(model, ranges, rounded):
    one, other = (quantize(load_onnx(model), found, QuantizeOptions(Precision.FP8)) for found in (ranges, rounded))
    assert one.SerializeToString() == other.SerializeToString()


def test_files_give_the_same_model_byte_for_byte(model, rounded, given, tmp_path):
    path = save_calibration(rounded, tmp_path / "net.calibration.json")
    assert {found.name for found in tmp_path.iterdir()} == {"net.calibration.json", "net.calibration.int8.safetensors"}
    again = load_calibration(path)
    assert again.summary().endswith("weights rounded with feedback")
    quantize_file(model, tmp_path / "from_files.onnx", path)
    expected = quantize(load_onnx(model), rounded).SerializeToString()
    assert (tmp_path / "from_files.onnx").read_bytes() == expected
    anew = round_weights(model, replace(again, weights={}), given)
    assert quantize(load_onnx(model), anew).SerializeToString() == expected


def test_weights_that_are_missing_or_others_are_refused(rounded, tmp_path):
    path = save_calibration(rounded, tmp_path / "net.calibration.json")
    weights = tmp_path / "net.calibration.int8.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(SuperPointError, match=r"is not the file that .*net.calibration.json was written with"):
        load_calibration(path)
    weights.unlink()
    with pytest.raises(SuperPointError, match=r"net\.calibration\.int8\.safetensors"):
        load_calibration(path)


def test_weights_of_another_network_are_refused(model, rounded):
    """Of the same names and shapes, and of a tool that says nothing of where its networks are from."""
    other = load_onnx(model)
    for constant in other.graph.initializer:
        if constant.name == "conv2a.weight":
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * 1.01, constant.name))
    with pytest.raises(SuperPointError, match=r"rounded other weights than this model's conv2a\.weight"):
        quantize(other, rounded)


def test_damaged_weights_of_the_right_digest_are_refused(rounded, tmp_path):
    path = save_calibration(rounded, tmp_path / "net.calibration.json")
    (tmp_path / "net.calibration.int8.safetensors").write_bytes(b"no tensors")
    digest = sha256((tmp_path / "net.calibration.int8.safetensors").read_bytes())
    flat = json.loads(path.read_text())
    path.write_text(json.dumps({**flat, "weights_sha256": digest}))
    with pytest.raises(SuperPointError, match="cannot be read as rounded weights"):
        load_calibration(path)


def test_convolutions_that_read_otherwise_are_left_to_the_nearest_step(model, ranges, given, tmp_path):
    """Another tool's network, say, with a dilated convolution."""
    other = load_onnx(model)
    node = next(node for node in other.graph.node if node.op_type == "Conv" and "conv4b.weight" in node.input)
    del node.attribute[:]
    node.attribute.extend([helper.make_attribute("dilations", [2, 2]), helper.make_attribute("pads", [2] * 4)])
    onnx.save(other, tmp_path / "dilated.onnx")
    found = round_weights(tmp_path / "dilated.onnx", ranges, given)
    assert "conv4b.weight" not in found.weights and len(found.weights) == 11


def test_a_convolution_with_groups_is_quantized_as_it_is(model, given, tmp_path):
    """Another tool's network: its channels are not equalised, its weights go to the nearest step."""
    other = load_onnx(model)
    node = next(node for node in other.graph.node if node.op_type == "Conv" and "conv4b.weight" in node.input)
    node.attribute.append(helper.make_attribute("group", 4))
    weight = next(value for value in other.graph.initializer if value.name == "conv4b.weight")
    full_weight = numpy_helper.to_array(weight)
    quarter = np.ascontiguousarray(full_weight[:, : full_weight.shape[1] // 4]) * np.float32(2)
    weight.CopyFrom(numpy_helper.from_array(quarter, "conv4b.weight"))
    path = tmp_path / "grouped.onnx"
    onnx.save(other, path)
    ranges = calibrate(path, given)
    reads = node.input[0]
    assert reads not in ranges.channels and len(ranges.channels) > 5
    found = round_weights(path, ranges, given)
    assert "conv4b.weight" not in found.weights
    gray = photograph(96, 128, "astronaut").astype(np.float32) / np.float32(255)
    full, quantized = (run_in_onnxruntime(graph, gray, tmp_path) for graph in (other, quantize(other, found)))
    for truth, ours in zip(full, quantized):
        assert np.corrcoef(truth.ravel(), ours.ravel())[0, 1] > 0.99


def test_images_that_cannot_be_used_are_refused(model, ranges):
    with pytest.raises(SuperPointError, match="none of 1 images can be used"):
        round_weights(model, ranges, [("gray", np.full((96, 128), 77, np.uint8))])


def test_another_networks_ranges_are_refused(model, ranges, given):
    with pytest.raises(SuperPointError, match="ranges belong to one network"):
        round_weights(model, replace(ranges, checkpoint_sha256="0" * 64), given)


def test_few_images_are_enough(model, ranges, given, monkeypatch):
    seen = []
    monkeypatch.setattr("superpoint_trt.convert.quantize.gptq.IMAGES", 2)
    round_weights(model, ranges, given, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (14, 14), "two images and twelve layers"


def test_on_the_command_line(model, given, tmp_path, capsys):
    """Images: rounded weights beside the ranges, and the same model from both files; nearest: ranges alone."""
    (tmp_path / "photos").mkdir()
    for name, pixels in given:
        cv2.imwrite(str(tmp_path / "photos" / f"{name}.png"), pixels)
    (tmp_path / "net.onnx").write_bytes(model.read_bytes())
    words = ["quantize", "--onnx", str(tmp_path / "net.onnx"), "--no-verify", "--output"]
    from_images = ["--calibration-images", str(tmp_path / "photos")]
    assert run(cli, [*words, str(tmp_path / "a.onnx"), *from_images]) == 0
    assert "weights rounded with feedback" in capsys.readouterr().out
    from_files = ["--calibration", str(tmp_path / "net.calibration.json")]
    assert run(cli, [*words, str(tmp_path / "b.onnx"), *from_files]) == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert run(cli, [*words, str(tmp_path / "c.onnx"), *from_images, "--rounding", "nearest"]) == 0
    assert "feedback" not in capsys.readouterr().out.splitlines()[-1]
    assert load_calibration(tmp_path / "net.calibration.json").weights == {}
    (tmp_path / "net.calibration.int8.safetensors").unlink()
    assert run(cli, [*words, str(tmp_path / "d.onnx"), *from_files]) == 0
    assert "to the nearest step: " in capsys.readouterr().out
    assert run(cli, [*words, str(tmp_path / "e.onnx"), *from_files, "--rounding", "feedback"]) == 2
    assert "--rounding is for measuring anew" in capsys.readouterr().err
    assert (tmp_path / "c.onnx").read_bytes() == (tmp_path / "d.onnx").read_bytes()


def test_rounding_where_nothing_is_rounded_is_refused(model, rounded, tmp_path, capsys):
    quantized = tmp_path / "int8.onnx"
    quantized.write_bytes(quantize(load_onnx(model), rounded).SerializeToString())
    for source, precision, why in ((model, "fp16", "are for int8 and fp8"), (quantized, "int8", "comes too late")):
        words = ["build", "--onnx", str(source), "--engine", str(tmp_path / "a.engine"), "--precision", precision]
        assert run(cli, [*words, "--rounding", "nearest"]) == 2
        assert why in capsys.readouterr().err
    assert not (tmp_path / "a.engine").exists()
