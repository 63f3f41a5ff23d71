"""Reading an .onnx: what is inconsistent is refused before anything is made of it."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt import SuperPointError, packaged
from superpoint_trt.convert.cast import cast
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.convert.onnx_file import constants, infer_shapes, read_onnx
from superpoint_trt.core.types import OutputType, Precision


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    return export(packaged.WEIGHTS, path, ExportOptions(OutputType.HEADS, height_px=48, width_px=64, dynamic=True))


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
@pytest.mark.parametrize("opset", [11, 17])
def test_models_of_every_precision_and_opset_are_read(tmp_path, precision, opset):
    path = export(packaged.WEIGHTS, tmp_path / "m.onnx", ExportOptions(height_px=48, width_px=64, opset=opset))
    assert read_onnx(cast(path, tmp_path / "low.onnx", precision)).description.precision is precision


def changed(model, tmp_path, change):
    proto = onnx.load(model)
    change(proto.graph)
    path = tmp_path / "odd.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def unknown_type(graph):
    graph.initializer[0].data_type = 99


def short(graph):
    graph.initializer[0].raw_data = graph.initializer[0].raw_data[:-8]


def flat_weights(graph):
    weight = next(one for one in graph.initializer if len(one.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).reshape(-1), weight.name))


def empty_constant(graph):
    graph.node.append(helper.make_node("Constant", [], ["nothing"]))


def external(graph):
    graph.initializer[0].data_location = TensorProto.EXTERNAL
    graph.initializer[0].ClearField("raw_data")
    graph.initializer[0].external_data.add(key="location", value="/etc/passwd")


def external_constant(graph):
    tensor = TensorProto(name="t", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    graph.node.append(helper.make_node("Constant", [], ["nothing"], value=tensor))


def no_outputs(graph):
    del graph.node[1].output[:]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (unknown_type, "cannot be read"),
        (short, "cannot be read|not a valid"),
        (flat_weights, "has weights"),
        (empty_constant, "has no value"),
        (external, "another file"),
        (external_constant, "another file"),
        (no_outputs, "not a valid ONNX model"),
    ],
)
def test_an_inconsistent_graph_is_refused(model, tmp_path, change, says):
    path = changed(model, tmp_path, change)
    with pytest.raises(SuperPointError, match=says) as error:
        read_onnx(path)
    assert "odd.onnx" in str(error.value)


def test_a_constant_without_a_value_is_no_constant():
    graph = helper.make_graph([helper.make_node("Constant", [], ["nothing"])], "g", [], [])
    assert constants(graph) == {}


def test_types_that_an_operator_does_not_take_are_an_error():
    values = [helper.make_tensor_value_info(name, TensorProto.BOOL, [1, 1, 8, 8]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    with pytest.raises(SuperPointError, match="contradict each other"):
        infer_shapes(helper.make_model(graph), check_type=True)
