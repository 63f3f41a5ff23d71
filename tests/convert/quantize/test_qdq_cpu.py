"""int8 for CPUs: that onnxruntime runs it in integers, that it computes what it says, and that it finds the points."""

from __future__ import annotations

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import photograph
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt import packaged
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.engine import BuildOptions, build
from superpoint_trt.convert.onnx_file import convolutions
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.options import FirstConvolution, Method, Placement, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import quantize
from superpoint_trt.convert.quantize.qdq_cpu import integer_convolutions
from superpoint_trt.convert.quantize.ranges_file import Calibration
from superpoint_trt.core.networks import packaged_network
from superpoint_trt.core.types import ModelDescription, OutputType, Precision, SuperPointError
from superpoint_trt.prove.verify import verify
from superpoint_trt.run.backends import open_backend

CPU = QuantizeOptions(placement=Placement.CPU)
HEADS_LAST = {"convPb", "convDb"}
PHOTOGRAPHS = "astronaut", "coffee", "camera", "chelsea"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in PHOTOGRAPHS:
        assert cv2.imwrite(str(folder / f"{name}.png"), photograph(240, 320, name))
    return folder


@pytest.fixture(scope="module")
def calibration(exported, images):
    return calibrate(exported("packaged", OutputType.HEADS, 240, 320), sorted(images.iterdir()))


@pytest.fixture(scope="module")
def quantized(exported, calibration, tmp_path_factory):
    """Export options and quantize options -> the quantized file, made once."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def get(kind="heads", options=CPU, dynamic=False):
        key = kind, options, dynamic
        if key not in made:
            source = onnx.load(exported("packaged", OutputType(kind), 240, 320, dynamic=dynamic))
            made[key] = folder / f"{len(made)}.onnx"
            made[key].write_bytes(quantize(source, calibration, options).SerializeToString())
        return made[key]

    return get


def operators(path, folder) -> list[str]:
    """The operators that onnxruntime really runs, after its rewrites."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    disabled = ["ReluQuantRewrite", "WeightBiasQuantization"]  # as this package does
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


# --------------------------------------------------------------------------------------------------------------- where


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnxruntime_runs_these_convolutions_in_integers(quantized, tmp_path, dynamic):
    found = operators(quantized(dynamic=dynamic), tmp_path)
    assert found.count("QLinearConv") == 9 and found.count("Conv") + found.count("FusedConv") == 3


def test_of_tensorrts_placement_it_runs_none_in_integers(quantized, tmp_path):
    """Why there is a placement of its own. If this fails, onnxruntime has learnt it: measure again."""
    found = operators(quantized(options=QuantizeOptions()), tmp_path)
    assert "QLinearConv" not in found and "ConvInteger" not in found


def test_what_stays_in_fp32_is_named(exported, quantized):
    model = onnx.load(exported("packaged", OutputType.HEADS, 240, 320))
    assert set(convolutions(model)) - set(integer_convolutions(model)) == HEADS_LAST
    with open_backend(quantized(), "cpu") as backend:
        described = backend.description
        assert backend.runtime.precision == "int8"
    assert set((described.kept_layers or "").split()) == HEADS_LAST | {"conv1a"}
    assert (described.placement, described.precision) == ("cpu", Precision.INT8)
    with open_backend(quantized(options=QuantizeOptions()), "cpu") as backend:
        assert "computed in fp32 (slow: superpoint quantize --for cpu)" in backend.runtime.precision


# ---------------------------------------------------------------------------------------------------------------- what


def simulated(model: onnx.ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    """The graph node by node in numpy, float64: Q and DQ as ONNX defines them, convolution by torch."""
    import torch

    values = {"image": image.astype(np.float64)}
    values.update({w.name: numpy_helper.to_array(w) for w in model.graph.initializer})
    for node in model.graph.node:
        given = [values[name] for name in node.input]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            first, scale, zero = given[0].astype(np.float64), given[1].astype(np.float64), given[2].astype(np.float64)
            if scale.ndim:
                shape = [-1] + [1] * (first.ndim - 1)
                scale, zero = scale.reshape(shape), zero.reshape(shape)
            limits = np.iinfo(given[2].dtype)
            values[node.output[0]] = (
                np.clip(np.rint(first / scale) + zero, limits.min, limits.max).astype(given[2].dtype)
                if node.op_type == "QuantizeLinear"
                else (first - zero) * scale
            )
            continue
        tensors = [torch.from_numpy(np.array(one)).double() for one in given]
        if node.op_type == "Conv":
            found = torch.nn.functional.conv2d(*tensors, padding=attributes["pads"][0])
        elif node.op_type == "Relu":
            found = tensors[0].relu()
        elif node.op_type == "MaxPool":
            found = torch.nn.functional.max_pool2d(tensors[0], 2)
        else:
            raise AssertionError(node.op_type)
        values[node.output[0]] = found.numpy()
    return {value.name: values[value.name] for value in model.graph.output}


@pytest.mark.parametrize("device", ["cpu", "openvino:fp32"])
def test_it_computes_what_it_says(quantized, exported, device):
    """Against a simulation in numpy. A value on the edge of a step may fall to either side, so a share may differ.

    How large that share is depends on the photograph, so four count together.
    """
    if device != "cpu":
        pytest.importorskip("openvino", reason="openvino is not installed")
    path = quantized()
    off, rounding = {"logits": [], "coarse_descriptors": []}, {"logits": [], "coarse_descriptors": []}
    fp32 = exported("packaged", OutputType.HEADS, 240, 320)
    with open_backend(path, device) as rounded, open_backend(fp32, "cpu") as exact:
        for name in PHOTOGRAPHS:
            image = photograph(240, 320, name)[None, None] / np.float32(255)
            found, unrounded = rounded.infer(image), exact.infer(image)
            for head, expected in simulated(onnx.load(path), image).items():
                off[head].append(np.abs(found[head] - expected))
                rounding[head].append(np.abs(unrounded[head] - expected))
    for head in off:
        assert np.median(off[head]) < 0.1 * np.median(rounding[head]), "far closer to the simulation than to fp32"


def test_8_bit_images_are_exact_in_the_first_convolution(calibration, exported):
    model = onnx.load(exported("packaged", OutputType.HEADS, 240, 320))
    made = quantize(
        model, calibration, QuantizeOptions(first_convolution=FirstConvolution.WHOLE, placement=Placement.CPU)
    )
    known = {w.name: numpy_helper.to_array(w) for w in made.graph.initializer}
    levels = (np.arange(256) / np.float32(255)).astype(np.float32)
    steps = np.rint(levels / known["image.q.scale"]).astype(int)
    assert (steps == np.arange(256)).all() and known["image.q.zero"] == 0


@pytest.mark.parametrize("device", ["cpu", "openvino"])
@pytest.mark.parametrize(("kind", "dynamic"), [("heads", False), ("dense", True), ("keypoints", False)])
def test_it_finds_the_references_points(quantized, images, kind, dynamic, device):
    if device != "cpu":
        pytest.importorskip("openvino", reason="openvino is not installed")
    found = verify(quantized(kind, dynamic=dynamic), packaged.WEIGHTS, images, device=device, threads=1)
    assert found.passed, [(gate.name, gate.value, gate.limit) for gate in found.failed]


def test_the_small_network_keeps_its_points(exported, images, tmp_path):
    """Networks with a topology, too: an addition, a concatenation, an image that two convolutions read."""
    source = exported("small", OutputType.HEADS, 240, 320)
    found = quantize(onnx.load(source), calibrate(source, sorted(images.iterdir())), CPU)
    (tmp_path / "int8.onnx").write_bytes(found.SerializeToString())
    result = verify(tmp_path / "int8.onnx", packaged_network("small").weights, images, device="cpu", threads=1)
    assert result.passed, [(gate.name, gate.value, gate.limit) for gate in result.failed]
    assert operators(tmp_path / "int8.onnx", tmp_path).count("QLinearConv") > 8


def test_a_range_cut_to_an_eighth_is_found(exported, calibration, images, tmp_path):
    broken = dict(calibration.ranges)
    broken["conv3a.relu"] /= 8
    cut = Calibration(calibration.method, 99.99, "any", calibration.checkpoint_sha256, calibration.images, broken)
    cut.channels.update(calibration.channels)
    model = onnx.load(exported("packaged", OutputType.HEADS, 240, 320))
    (tmp_path / "cut.onnx").write_bytes(quantize(model, cut, CPU).SerializeToString())
    assert not verify(tmp_path / "cut.onnx", packaged.WEIGHTS, images, device="cpu", threads=1).passed


def test_sums_and_concatenations(tmp_path):
    """A branch added to another and a concatenation: pairs of their own, never negative, and onnxruntime agrees."""
    rng = np.random.default_rng(0)

    def conv(name, source, c_in, c_out):
        weight = rng.normal(0, 0.2, (c_out, c_in, 3, 3)).astype(np.float32)
        bias = rng.normal(0, 0.1, c_out).astype(np.float32)
        constants.extend(
            [numpy_helper.from_array(weight, f"{name}.weight"), numpy_helper.from_array(bias, f"{name}.bias")]
        )
        inputs = [source, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Conv", inputs, [name], name, pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"]))

    nodes, constants = [], []
    conv("a", "image", 1, 8)
    conv("b", "a.relu", 8, 8)
    nodes.append(helper.make_node("Add", ["a.relu", "b.relu"], ["sum"]))
    conv("c", "sum", 8, 8)
    nodes.append(helper.make_node("Concat", ["c.relu", "b.relu"], ["both"], axis=1))
    conv("d", "both", 16, 8)
    conv("e", "d.relu", 8, 8)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, 16, 16]) for n, c in (("image", 1), ("e", 8))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert integer_convolutions(model) == ["a", "b", "c", "d"], "b is read by a sum and a concatenation only"
    image = rng.random((1, 1, 16, 16)).astype(np.float32)
    inputs = dict.fromkeys(node.input[0] for node in convolutions(model).values())
    ranges = Calibration(Method.MAX, None, "any", None, {}, {name: 6.0 for name in inputs})
    made = quantize(model, ranges, CPU)
    zeros = {w.name: numpy_helper.to_array(w) for w in made.graph.initializer if w.name.endswith("q.zero")}
    assert zeros["sum.q.zero"] == zeros["both.q.zero"] == 0
    sessions = [onnxruntime.InferenceSession(m.SerializeToString()) for m in (model, made)]
    expected, found = (session.run(["e"], {"image": image})[0] for session in sessions)
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    (tmp_path / "made.onnx").write_bytes(made.SerializeToString())
    assert operators(tmp_path / "made.onnx", tmp_path).count("QLinearConv") == 3


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (QuantizeOptions(Precision.FP8, placement=Placement.CPU), "fp8 is for TensorRT"),
        (QuantizeOptions(first_convolution=FirstConvolution.PARTS, placement=Placement.CPU), "for TensorRT only"),
    ],
)
def test_what_does_not_go_together(exported, calibration, options, told):
    with pytest.raises(SuperPointError, match=told):
        quantize(onnx.load(exported("packaged", OutputType.HEADS, 240, 320)), calibration, options)


def test_batchnorm_after_relu_keeps_its_convolutions_in_fp32(exported):
    model = onnx.load(exported("v6", OutputType.HEADS))
    assert not {"conv1b", "conv2a", "conv3b"} & set(integer_convolutions(model))


def test_tensorrt_does_not_take_it(quantized, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs a TensorRT that builds without a GPU")
    with pytest.raises(SuperPointError, match=r"quantized for CPUs .* does not take; build from the fp32 \.onnx"):
        build(quantized(), tmp_path / "a.engine", BuildOptions(Precision.INT8, targets=("sm89",)))


def test_the_command(exported, images, tmp_path, capsys):
    source = tmp_path / "heads.onnx"
    source.write_bytes(exported("packaged", OutputType.HEADS, 240, 320).read_bytes())
    output = tmp_path / "cpu.onnx"
    arguments = ["quantize", "--onnx", str(source), "--output", str(output), "--for", "cpu", "--rounding", "nearest"]
    assert run(cli, [*arguments, "--calibration-images", str(images)]) == 0
    told = capsys.readouterr().out
    assert "quantized for CPUs: onnxruntime and OpenVINO" in told and "PASSED" in told
    metadata = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert ModelDescription.from_metadata(metadata).placement == "cpu"
    assert output.stat().st_size < 0.4 * source.stat().st_size, "weights are stored in int8"
