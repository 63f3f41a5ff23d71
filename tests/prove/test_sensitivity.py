"""Networks in int8 on real photographs: what passes the gates, what must not, and which layers it costs.

Which planted fault fails which gate belongs to the weights of version 1. All packaged networks have to pass by default.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from conftest import photograph
from onnx import numpy_helper

from superpoint_trt import int8, packaged
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.convert.onnx_file import convolutions, load_onnx
from superpoint_trt.convert.quantize import gptq
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.options import COARSE, FirstConvolution, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import quantize
from superpoint_trt.convert.quantize.ranges_file import Calibration, save_calibration
from superpoint_trt.core.types import OutputType, SuperPointError
from superpoint_trt.gpu.engine_file import read_plan
from superpoint_trt.prove import sensitivity
from superpoint_trt.prove.gates import GATE_NAMES, Gate
from superpoint_trt.prove.sensitivity import LayerCost, fewest_kept, rank
from superpoint_trt.prove.verify import Verification, verify

SIZE = (240, 320)
SEEN = ("coffee", "chelsea", "coins", "brick", "gravel", "rocket")
PROOF = ("astronaut", "camera")
FP16 = FirstConvolution.FP16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """fp32.onnx of the weights, and the photographs of the proof."""
    folder = tmp_path_factory.mktemp("int8")
    export("full-v1", folder / "fp32.onnx", ExportOptions(OutputType.HEADS, *SIZE))
    (folder / "photos").mkdir()
    for name in PROOF:
        cv2.imwrite(str(folder / "photos" / f"{name}.png"), photograph(*SIZE, name=name))
    return folder


@pytest.fixture(scope="module")
def ranges(folder) -> Calibration:
    """Measured on photographs that the proof does not see."""
    return calibrate(folder / "fp32.onnx", [(name, photograph(*SIZE, name=name)) for name in SEEN])


@pytest.fixture(scope="module")
def proven(folder, ranges) -> Callable[[onnx.ModelProto], Verification]:
    """A quantised graph -> the verdict on it."""

    def verified(model: onnx.ModelProto) -> Verification:
        (folder / "int8.onnx").write_bytes(model.SerializeToString())
        return verify(folder / "int8.onnx", folder / "fp32.onnx", folder / "photos")

    return verified


@pytest.fixture(scope="module")
def sound(folder, ranges) -> onnx.ModelProto:
    """As `superpoint quantize` makes it."""
    return quantize(load_onnx(folder / "fp32.onnx"), ranges)


def values(found: Verification) -> dict[str, float | None]:
    return {gate.name: gate.value for gate in found.gates}


def test_the_weights_keep_their_points_in_int8(proven, sound):
    found = proven(sound)
    assert found.passed, values(found)


@pytest.mark.parametrize("name", [network.name for network in packaged.NETWORKS])
def test_packaged_networks_keep_their_points_by_default(folder, name, tmp_path, monkeypatch):
    """As `superpoint quantize` makes them: weights rounded with feedback, coarse layers in fp16."""
    monkeypatch.setattr(gptq, "POSITIONS", 300)
    fp32, output = tmp_path / "fp32.onnx", tmp_path / "int8.onnx"
    export(name, fp32, ExportOptions(OutputType.HEADS, *SIZE))
    images = [(seen, photograph(*SIZE, name=seen)) for seen in SEEN]
    rounded = gptq.round_weights(fp32, calibrate(fp32, images), images)
    output.write_bytes(quantize(load_onnx(fp32), rounded, QuantizeOptions(keep_fp16=(COARSE,))).SerializeToString())
    found = verify(output, fp32, folder / "photos")
    assert found.passed and values(found)["keypoints_found_share"] > 0.9, values(found)


# ------------------------------------------------------------------------------------------------------------- faults


def with_constant(model: onnx.ModelProto, name: str, change) -> onnx.ModelProto:
    """A copy with one initializer changed."""
    changed = copy.deepcopy(model)
    (constant,) = (w for w in changed.graph.initializer if w.name == name)
    constant.CopyFrom(numpy_helper.from_array(np.asarray(change(numpy_helper.to_array(constant))), name))
    return changed


def wrong_scale(model, ranges):
    """One activation's range an eighth of what it is: most of it is clipped."""
    return with_constant(model, "conv2b.pool.q.scale", lambda scale: scale / np.float32(8))


def one_scale_for_all_channels(model, ranges):
    """Weights rounded channel by channel, and read back with the first channel's scale."""
    changed = copy.deepcopy(model)
    scale = next(numpy_helper.to_array(w) for w in model.graph.initializer if w.name == "conv2a.weight.q.scale")
    alone = numpy_helper.from_array(np.full_like(scale, scale[0]), "alone")
    changed.graph.initializer.append(alone)
    for node in changed.graph.node:
        if node.output[0] == "conv2a.weight.dq":
            node.input[1] = "alone"
    return changed


def swapped_scales(model, ranges):
    """Two tensors' ranges exchanged, the largest and the smallest."""
    order = sorted((name for name in ranges.ranges if name != "image"), key=ranges.ranges.__getitem__)
    changed = dict(ranges.ranges)
    changed[order[0]], changed[order[-1]] = changed[order[-1]], changed[order[0]]
    for name in (order[0], order[-1]):
        model = with_constant(model, f"{name}.q.scale", lambda _, name=name: np.float32(changed[name] / 127))
    return model


@pytest.mark.parametrize("fault", [wrong_scale, one_scale_for_all_channels, swapped_scales])
def test_a_fault_in_the_scales_fails(proven, sound, ranges, fault):
    found = proven(fault(sound, ranges))
    assert not found.passed
    assert "keypoints_found_share" in [gate.name for gate in found.gates if not gate.passed], values(found)


# -------------------------------------------------------------------------------------------------------- sensitivity


def test_a_layer_with_a_bad_range_comes_first(folder, ranges):
    """Planted: conv3a's input is clipped to a twentieth, so conv3a costs most, and the others what they cost anyway."""
    spoiled = replace(ranges, ranges={**ranges.ranges, "conv2b.pool": ranges.ranges["conv2b.pool"] / 20})
    told: list[tuple[int, int]] = []
    paths = sorted((folder / "photos").iterdir())[:1]
    costs = rank(folder / "fp32.onnx", spoiled, paths, progress=lambda *report: told.append(report))
    layers = list(convolutions(load_onnx(folder / "fp32.onnx")))
    assert sorted(cost.layer for cost in costs) == sorted(layers)
    assert costs[0].layer == "conv3a"
    shares = [cost.keypoints_found_share for cost in costs]
    assert shares == sorted(shares) and shares[0] < 0.8 < shares[1]
    by_layer = {cost.layer: cost for cost in costs}
    assert by_layer["convDb"].keypoints_found_share == 1.0, "the descriptors' head moves no point"
    assert by_layer["convPb"].descriptor_cosine_median == pytest.approx(1.0, abs=1e-6), "nor the detector's a vector"
    assert told[-1] == (13, 13)


def test_the_fewest_layers_are_kept(folder, ranges):
    """The same plant: keeping conv3a is enough, and it is kept though the ranks say conv4b first."""
    spoiled = replace(ranges, ranges={**ranges.ranges, "conv2b.pool": ranges.ranges["conv2b.pool"] / 20})
    costs = [LayerCost("conv4b", 0.5, 1.0), LayerCost("conv3a", 0.6, 0.9), LayerCost("conv1b", 0.99, 1.0)]
    gates = {name: (-1.0 if name not in ("score_error_max", "findings") else 99.0) for name in GATE_NAMES}
    gates["keypoints_found_share"] = 0.6
    paths = sorted((folder / "photos").iterdir())[:1]
    choice = fewest_kept(folder / "fp32.onnx", spoiled, paths, costs, QuantizeOptions(keep_fp16=("convPb",)), gates)
    assert choice.passed and choice.kept == ["conv3a", "convPb"]
    assert [step.kept for step in choice.steps] == [
        ["convPb"],
        ["conv4b", "convPb"],
        ["conv3a", "conv4b", "convPb"],
        ["conv3a", "convPb"],
    ]
    assert [bool(step.failed) for step in choice.steps] == [True, True, False, False]
    assert "conv4b alone costs most of keypoints_found_share: 0.5000" in choice.steps[1].because


class Played:
    """In place of `verify`: the gate holds once these layers are kept."""

    def __init__(self, gate: str, enough: set[str]) -> None:
        self.gate, self.enough = gate, enough

    def __call__(self, model, reference, images, limits, device, progress):
        quantized = {n.name for n in load_onnx(model).graph.node if n.op_type == "Conv" and ".dq" in n.input[0]}
        value = 0.0 if self.enough & quantized else 1.0
        return type("Found", (), {"gates": [Gate(self.gate, value, 0.9, True)]})


@pytest.mark.parametrize(
    ("gate", "expected"),
    [("keypoints_found_share", ["convPa"]), ("descriptor_cosine_p1", ["convDa"]), ("matches_kept_share", ["conv2a"])],
)
def test_the_gate_that_fails_says_which_rank_counts(folder, ranges, monkeypatch, gate, expected):
    costs = [LayerCost("convPa", 0.7, 1.0), LayerCost("conv2a", 0.75, 0.9), LayerCost("convDa", 1.0, 0.8)]
    monkeypatch.setattr(sensitivity, "verify", Played(gate, set(expected)))
    choice = fewest_kept(folder / "fp32.onnx", ranges, [], costs)
    assert choice.passed and choice.kept == expected


def test_every_gate_says_what_it_looks_at():
    cost = LayerCost("convPa", 0.75, 0.5)
    lost = {gate: cost.lost(gate) for gate in GATE_NAMES}
    points, descriptors = 0.25, 0.5
    assert lost == {
        "score_error_max": points,
        "keypoints_found_share": points,
        "score_rank_correlation": points,
        "descriptor_cosine_median": descriptors,
        "descriptor_cosine_p1": descriptors,
        "matches_kept_share": points + descriptors,
        "findings": points,
    }
    with pytest.raises(KeyError):
        cost.lost("descriptor_of_a_new_gate")


def test_the_first_convolution_is_a_layer_to_choose_too(folder, ranges, monkeypatch):
    """Where its parts cost the points, it alone goes back to fp16; asked for in fp16, it is there from the start."""
    monkeypatch.setattr(sensitivity, "verify", Played("keypoints_found_share", {"conv1a"}))
    costs = [LayerCost("conv1a", 0.7, 1.0), LayerCost("conv2a", 0.8, 1.0)]
    options = {first: QuantizeOptions(first_convolution=first) for first in (None, FP16)}
    chosen = {first: fewest_kept(folder / "fp32.onnx", ranges, [], costs, options[first]) for first in options}
    assert [choice.kept for choice in chosen.values()] == [["conv1a"], ["conv1a"]]
    assert [[step.kept for step in choice.steps] for choice in chosen.values()] == [[[], ["conv1a"]], [["conv1a"]]]


def test_gates_that_nothing_meets_are_not_met(folder, ranges, monkeypatch):
    costs = [LayerCost("convPa", 0.7, 1.0), LayerCost("conv2a", 0.8, 1.0), LayerCost("convDa", 1.0, 0.8)]
    monkeypatch.setattr(sensitivity, "verify", Played("keypoints_found_share", {"convDb"}))
    choice = fewest_kept(folder / "fp32.onnx", ranges, [], costs)
    assert not choice.passed and len(choice.steps) == 3


def test_black_pictures_rank_nothing(folder, ranges, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros(SIZE, np.uint8))
    with pytest.raises(SuperPointError, match="finds no keypoint"):
        rank(folder / "fp32.onnx", ranges, [tmp_path / "a.png"])


@pytest.fixture
def loose(folder, ranges, tmp_path) -> list[str]:
    """Words of the command line: ranges, one photograph, and gates that hold at once."""
    save_calibration(ranges, tmp_path / "r.json")
    limits = {**dict.fromkeys(GATE_NAMES, 0), "findings": 9, "score_error_max": 1}
    gates = [word for name, limit in limits.items() for word in ("--gate", f"{name}={limit}")]
    photo = folder / "photos" / "camera.png"
    return ["--calibration", str(tmp_path / "r.json"), "--calibration-images", str(photo), "--auto", *gates]


def test_auto_on_the_command_line(folder, loose, tmp_path, capsys):
    """Nothing more is kept, the table and the figures are there, the model is proven."""
    words = ["--onnx", folder / "fp32.onnx", "--output", tmp_path / "q.onnx", "--json", tmp_path / "s.json"]
    assert run(cli, ["quantize", *map(str, words), *loose]) == 0
    told = capsys.readouterr().out
    assert "only this layer in int8" in told and "kept in fp16  nothing\n" in told and "PASSED" in told
    report = json.loads((tmp_path / "s.json").read_text())
    assert len(report["layers"]) == 12 and report["auto"]["kept"] == [] and report["auto"]["passed"]
    assert (tmp_path / "q.onnx").exists()


def test_build_chooses_layers_too(folder, loose, tmp_path, capsys, monkeypatch):
    """An engine for another machine: its .onnx is what is proven here."""
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(int8, "rank", lambda *_: [LayerCost("conv4b", 0.9, 1.0), LayerCost("convPa", 1.0, 1.0)])
    words = ["--onnx", folder / "fp32.onnx", "--engine", tmp_path / "a.engine", "--precision", "int8"]
    words += ["--runtime", "rtx", "--target", "sm89", "--keep-fp16", "convPb"]
    assert run(cli, ["build", *map(str, words), *loose]) == 0
    told = capsys.readouterr().out
    assert "kept in fp16  convPb\n" in told and "its .onnx is verified here" in told and "PASSED" in told
    built = read_plan(tmp_path / "a.engine")[1].description
    assert (built.kept_layers, built.first_convolution) == ("convPb", "parts")


def test_first_convolution_in_fp16_on_the_command_line(folder, loose, tmp_path, capsys):
    """For an .onnx and an engine, in what is written, what is printed, and the command that makes it again."""
    pytest.importorskip("tensorrt_rtx")
    words = ["--onnx", folder / "fp32.onnx", "--calibration", loose[1], "--first-convolution", "fp16"]
    words += ["--keep-fp16", "none"]
    assert run(cli, ["quantize", "--output", str(tmp_path / "q.onnx"), *map(str, words)]) == 0
    assert "kept in fp16  conv1a\n" in capsys.readouterr().out
    words += ["--engine", tmp_path / "a.engine", "--precision", "int8", "--runtime", "rtx", "--target", "sm89"]
    assert run(cli, ["build", *map(str, words)]) == 0
    built = read_plan(tmp_path / "a.engine")[1]
    assert built.description.first_convolution == "fp16" and "--first-convolution fp16" in built.rebuild


def test_the_coarse_layers_stay_in_fp16_unless_told_otherwise(folder, loose, tmp_path, capsys):
    """What is written says so, and the command that builds an engine again does not fall back on the default."""
    pytest.importorskip("tensorrt_rtx")
    words = ["quantize", "--onnx", str(folder / "fp32.onnx"), "--output", str(tmp_path / "q.onnx"), *loose[:2]]
    kept = {(): "conv4a conv4b convPa convPb convDa convDb", ("none",): "nothing", ("conv2*",): "conv2a conv2b"}
    for patterns, layers in kept.items():
        assert run(cli, [*words, *(word for pattern in patterns for word in ("--keep-fp16", pattern))]) == 0
        told = capsys.readouterr().out
        assert f"kept in fp16  {layers}\n" in told and ("reads int8    conv4a (" in told) is (patterns == ())
    words = ["build", "--onnx", str(folder / "fp32.onnx"), "--engine", str(tmp_path / "a.engine"), *loose[:2]]
    words += ["--precision", "int8", "--runtime", "rtx", "--target", "sm89"]
    for option, again in (("coarse", "--keep-fp16 coarse"), ("none", "--keep-fp16 none")):
        assert run(cli, [*words, "--keep-fp16", option]) == 0
        assert again in read_plan(tmp_path / "a.engine")[1].rebuild


def test_auto_leaves_coarse_what_it_means(folder, ranges, monkeypatch):
    """What is tried and what is written hand over to conv4a; a layer that is added is left alone, input too."""
    tried: list[list[str]] = []

    def played(model, *_):
        graph = load_onnx(model).graph
        convs = [n for n in graph.node if n.op_type == "Conv"]
        tried.append([n.name for n in convs if ".dq" in n.input[0] and ".dq" not in n.input[1]])
        value = 0.0 if any(n.name == "conv3a" and ".dq" in n.input[1] for n in convs) else 1.0
        return type("Found", (), {"gates": [Gate("keypoints_found_share", value, 0.9, True)]})

    monkeypatch.setattr(sensitivity, "verify", played)
    choice = fewest_kept(
        folder / "fp32.onnx",
        ranges,
        [],
        [LayerCost("conv3a", 0.5, 1.0), LayerCost("conv1b", 0.9, 1.0)],
        QuantizeOptions(keep_fp16=("coarse",)),
    )
    assert choice.passed and choice.patterns == ["coarse", "conv3a"]
    assert tried == [["conv4a"], ["conv4a"]]


def test_parts_say_so(folder, loose, tmp_path, capsys):
    words = ["--onnx", folder / "fp32.onnx", "--output", tmp_path / "q.onnx", "--calibration", loose[1]]
    assert run(cli, ["quantize", *map(str, words)]) == 0
    assert "split into 4 int8 channels; 8-bit images: exact except for the value 255" in capsys.readouterr().out
    assert run(cli, ["quantize", *map(str, words), "--precision", "fp8", "--first-convolution", "parts"]) == 2
    assert "parts make an image fit for int8" in capsys.readouterr().err


def test_auto_that_fails_writes_nothing(folder, loose, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(int8, "rank", lambda *_: [LayerCost("convPb", 1.0, 1.0)])
    words = ["--onnx", folder / "fp32.onnx", "--output", tmp_path / "q.onnx", *loose, "--gate", "findings=-1"]
    assert run(cli, ["quantize", *map(str, words)]) == 1
    assert "no choice of layers meets the gates" in capsys.readouterr().err
    assert not (tmp_path / "q.onnx").exists()
