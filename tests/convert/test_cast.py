"""fp32 graph -> typed fp16 or bf16 graph: where the seam runs, what the values become, what is refused."""

from __future__ import annotations

import cv2
import numpy as np
import onnx
import pytest
from conftest import photograph
from helpers import cases, foreign, graph_of
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.cast import to_precision
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.convert.onnx_file import convolution_type, load_onnx, quantized_type
from superpoint_trt.core.types import OutputType, Precision, SuperPointError
from superpoint_trt.run.backends import open_backend
from superpoint_trt.run.extractor import SuperPoint

LOW = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}


def types(model) -> dict[str, int]:
    """Element type of every tensor, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {c.name: c.data_type for c in graph.initializer}
    values = [*graph.input, *graph.value_info, *graph.output]
    return {**found, **{value.name: value.type.tensor_type.elem_type for value in values}}


@pytest.mark.parametrize(
    ("layout", "kind", "dynamic", "opset"),
    cases(
        ["v6", "magicleap", "compact"],
        ["dense", "keypoints", "heads"],
        [False, True],
        [11, 13, 17, 23],
        fast=lambda layout, kind, dynamic, opset: (
            layout != "magicleap" and (opset == 17 or (kind == "keypoints" and dynamic))
        ),
    ),
)
def test_only_the_convolutions_are_fp16(checkpoint, layout, kind, dynamic, opset):
    model = to_precision(graph_of(checkpoint, kind, layout, opset, dynamic), Precision.FP16)
    onnx.checker.check_model(model, full_check=True)
    typed = types(model)
    for node in model.graph.node:
        if node.op_type in ("Conv", "BatchNormalization"):
            assert {typed[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}, node.name
        if node.op_type in ("Add", "Resize") and node.name.startswith("features"):
            assert {typed[name] for name in (node.input[0], *node.output)} == {TensorProto.FLOAT16}, node.name
        if node.op_type in ("Softmax", "ReduceL2", "TopK", "GridSample", "Equal", "Div", "Floor", "Where"):
            assert TensorProto.FLOAT16 not in {typed[name] for name in (*node.input, *node.output)}, node.name
    casts = [n.name for n in model.graph.node if n.op_type == "Cast" and n.name.endswith((".fp16", ".fp32"))]
    assert len(casts) == (1 if kind == "heads" else 3), casts  # one in, one behind each head
    outputs = {value.name: typed[value.name] for value in model.graph.output}
    assert outputs["logits" if kind == "heads" else "scores"] == (
        TensorProto.FLOAT16 if kind == "heads" else TensorProto.FLOAT
    )
    assert typed["image"] == TensorProto.FLOAT


@pytest.mark.parametrize("layout", ["v6", "magicleap", "compact"])
def test_fp16_values_in_exact_arithmetic(checkpoint, layout):
    """ONNX's own reference computes fp16 as fp16; onnxruntime on the CPU would quietly use float32."""
    model = graph_of(checkpoint, layout=layout, height_px=32, width_px=48)
    image = (photograph(32, 48).astype(np.float32) / 255)[None, None]
    full = ReferenceEvaluator(model).run(None, {"image": image})
    half = ReferenceEvaluator(to_precision(model, Precision.FP16)).run(None, {"image": image})
    assert [a.dtype for a in half] == [np.float32, np.float32]
    assert 0 < np.abs(full[0] - half[0]).max() < 5e-3
    assert 0.999 < (full[1] * half[1]).sum(axis=1).min() < 1.0


def test_bf16_weights_are_rounded_to_the_nearest(checkpoint):
    model = graph_of(checkpoint)
    typed = to_precision(model, Precision.BF16)
    full = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    low = {c.name: c for c in typed.graph.initializer if c.data_type == TensorProto.BFLOAT16}
    assert len(low) > 20
    for name, constant in low.items():
        bits = np.frombuffer(constant.raw_data, np.uint16).astype(np.uint32) << 16
        values = bits.view(np.float32).reshape(constant.dims)
        original = full[name[: -len(".bf16")]]
        # 8 significant bits: half a unit of the last place is 2^-9 of the value's power of two.
        assert (np.abs(values - original) <= 2.0**-9 * 2 ** np.ceil(np.log2(np.abs(original) + 1e-30))).all()
    for given, expected in ((1.00390625, 1.0), (1.01171875, 1.015625), (-3.0, -3.0)):  # ties go to the even one
        from superpoint_trt.convert.cast import bfloat16_bits

        bits = bfloat16_bits(np.array([given], np.float32)).astype(np.uint32) << 16
        assert bits.view(np.float32)[0] == expected


@pytest.mark.parametrize("kind", ["dense", "keypoints", "heads"])
def test_other_tools_models(checkpoint, kind):
    model = to_precision(foreign(graph_of(checkpoint, kind, "magicleap")), Precision.FP16)
    onnx.checker.check_model(model, full_check=True)
    typed = types(model)
    assert convolution_type(model) is Precision.FP16
    assert typed["scaled"] == TensorProto.FLOAT, "what comes before the first convolution stays"
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 12
    assert {typed[name] for node in convolutions for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}


def test_a_cast_model_runs_and_says_so(checkpoint_file, tmp_path):
    model = export(checkpoint_file("v6"), tmp_path / "a.onnx", ExportOptions(OutputType.HEADS))
    assert run(cli, ["cast", "--onnx", str(model), "--output", str(tmp_path / "b.onnx")]) == 0
    photo = tmp_path / "a.png"
    cv2.imwrite(str(photo), photograph(480, 640))
    with SuperPoint(model) as full, SuperPoint(tmp_path / "b.onnx") as half:
        assert half.runtime.precision in ("fp16", "fp16 weights, computed in fp32")
        assert half.description.precision is Precision.FP16
        one, other = full.extract(photo), half.extract(photo)
    near = np.linalg.norm(one.xy[:, None] - other.xy[None], axis=2).min(axis=1) <= 1
    assert len(one) > 20 and near.mean() > 0.97


def test_a_bf16_model_is_refused_in_words_where_it_cannot_run(checkpoint_file, tmp_path):
    model = export(checkpoint_file("v6"), tmp_path / "a.onnx")
    run(cli, ["cast", "--onnx", str(model), "--output", str(tmp_path / "b.onnx"), "--precision", "bf16"])
    with pytest.raises(SuperPointError, match="bf16 models are for TensorRT"):
        SuperPoint(tmp_path / "b.onnx")


@pytest.mark.parametrize("ending", ["onnx", "pth"])
def test_uint8_is_the_float_image(checkpoint_file, tmp_path, ending):
    weights = checkpoint_file("v6")
    model = export(weights, tmp_path / "a.onnx") if ending == "onnx" else weights
    pixels = photograph(480, 640)[None, None]
    with open_backend(model) as backend:
        from_bytes, from_floats = (backend.infer(x) for x in (pixels, pixels.astype(np.float32) / np.float32(255)))
        for name, values in from_bytes.items():
            np.testing.assert_array_equal(values, from_floats[name])
        with pytest.raises(SuperPointError, match="image is float64; expected float32"):
            backend.infer(pixels / 255)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            lambda m: m.graph.initializer.remove(next(w for w in m.graph.initializer if w.name == "conv1a.weight")),
            "fp32",
        ),
        (lambda m: m.graph.node.clear(), "fp32"),
    ],
    ids=["weights missing", "no convolution"],
)
def test_what_is_no_fp32_model_is_refused(checkpoint, spoil, says):
    model = graph_of(checkpoint)
    spoil(model)
    if model.graph.node:
        for weight in model.graph.initializer:
            if weight.name == "conv1b.weight":
                weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    with pytest.raises(SuperPointError, match=says):
        to_precision(model, Precision.FP16)


def test_twice_is_refused(checkpoint):
    typed = to_precision(graph_of(checkpoint), Precision.FP16)
    with pytest.raises(SuperPointError, match="its convolutions are fp16"):
        to_precision(typed, Precision.BF16)


def test_weights_beyond_fp16_are_refused_by_name(checkpoint):
    model = graph_of(checkpoint)
    weight = next(w for w in model.graph.initializer if w.name == "conv3a.weight")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = 7e4
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(SuperPointError, match=r"conv3a.weight holds 7e\+04.*use bf16"):
        to_precision(model, Precision.FP16)
    to_precision(model, Precision.BF16)


def test_weights_in_another_file_are_refused(checkpoint, tmp_path):
    onnx.save(
        graph_of(checkpoint), tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0
    )
    with pytest.raises(SuperPointError, match="in another file"):
        load_onnx(tmp_path / "a.onnx")


def test_cast_keeps_what_was_there(checkpoint_file, tmp_path, capsys):
    model = export(checkpoint_file("v6"), tmp_path / "a.onnx")
    before = model.read_bytes()
    assert run(cli, ["cast", "--onnx", str(model), "--output", str(model)]) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert run(cli, ["cast", "--onnx", str(model), "--output", str(tmp_path / "b.engine")]) == 2
    assert model.read_bytes() == before and not (tmp_path / "b.engine").exists()


@pytest.mark.parametrize("rounded", [("data", "weight"), ("data",), ("weight",)], ids="+".join)
@pytest.mark.parametrize("zero_point", [True, False])
def test_a_convolution_is_computed_in_int8_if_input_and_weights_are(rounded, zero_point):
    """Another tool's graph, weights as int8: with one of both rounded it computes in fp16, as the rest."""
    int8 = numpy_helper.from_array(np.ones((4, 1, 3, 3), np.int8), "weight.int8")
    one, zero = (numpy_helper.from_array(np.array(v), n) for v, n in ((np.float32(1), "one"), (np.int8(0), "zero")))
    full = numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "weight")
    last = numpy_helper.from_array(np.ones((2, 4, 1, 1), np.float32), "last")
    by = ["one", "zero"] if zero_point else ["one"]
    nodes = []
    if "data" in rounded:
        nodes.append(helper.make_node("QuantizeLinear", ["image", "one", "zero"], ["data.q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["data.q", "one", "zero"], ["data.dq"]))
    if "weight" in rounded:
        nodes.append(helper.make_node("DequantizeLinear", ["weight.int8", *by], ["weight.dq"]))
    reads = ["data.dq" if "data" in rounded else "image", "weight.dq" if "weight" in rounded else "weight"]
    nodes.append(helper.make_node("Conv", reads, ["a"], name="a", kernel_shape=[3, 3]))
    nodes.append(helper.make_node("Relu", ["a"], ["r"]))
    nodes.append(helper.make_node("Conv", ["r", "last"], ["b"], name="b", kernel_shape=[1, 1]))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 8])
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 2, 6, 6])
    graph = helper.make_graph(nodes, "g", [image], [output], [int8, full, last, one, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    assert quantized_type(model) is Precision.INT8
    typed = onnx.shape_inference.infer_shapes(to_precision(model, Precision.FP16), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    assert types["a"] == (TensorProto.FLOAT if len(rounded) == 2 else TensorProto.FLOAT16)
