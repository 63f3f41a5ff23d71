"""fp32 graph + ranges -> Q/DQ graph: where the pairs lie, what they hold, what builders make of them."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
from conftest import photograph
from test_precision import graph_of

from superpoint_trt import engine as engines
from superpoint_trt.calibration import Calibration, Method
from superpoint_trt.precision import convolutions, to_precision
from superpoint_trt.quantize import quantize
from superpoint_trt.spec import Precision

KINDS = ["dense", "keypoints", "heads"]


def ranges_of(model: onnx.ModelProto, value: float = 4.0) -> Calibration:
    """The same range for every tensor that a convolution reads."""
    inputs = dict.fromkeys(node.input[0] for node in convolutions(model).values())
    return Calibration(Method.MAX, None, "480x640", None, {"a.png": "0" * 64}, {name: value for name in inputs})


def run_in_onnxruntime(model: onnx.ModelProto, height=48, width=64) -> list[np.ndarray]:
    image = (photograph(height, width).astype(np.float32) / 255)[None, None]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"image": image})


# ----------------------------------------------------------------------------------------------------- what 8.6 is told


class Layer(enum.Enum):
    CONSTANT, SHAPE, CAST, QUANTIZE, DEQUANTIZE, CONVOLUTION, OTHER = range(7)


class FakeLayer:
    """As much of TensorRT 8.6's ILayer as the constraints touch."""

    def __init__(self, node: onnx.NodeProto, types: dict[str, str]) -> None:
        self.name = node.output[0]
        kinds = {"Conv": "CONVOLUTION", "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE"}
        self.type = Layer[
            kinds.get(node.op_type, node.op_type.upper() if node.op_type in ("Cast", "Shape") else "OTHER")
        ]
        self.inputs = [SimpleNamespace(name=n, dtype=types.get(n, "float32")) for n in node.input]
        self.outputs = [SimpleNamespace(name=n, dtype=types.get(n, "float32")) for n in node.output]
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)
        self.precision = None
        self.output_type = None

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]

    def set_output_type(self, index, dtype):
        self.output_type = dtype


def constrained(model: onnx.ModelProto) -> tuple[dict[str, FakeLayer], dict[str, str]]:
    """Layers by name, and the types of the outputs, as `_constrain_types` leaves them."""
    layers = [FakeLayer(node, {}) for node in model.graph.node]
    outputs = [SimpleNamespace(name=value.name, dtype="float32") for value in model.graph.output]
    network = SimpleNamespace(
        num_layers=len(layers),
        get_layer=layers.__getitem__,
        num_outputs=len(outputs),
        get_output=outputs.__getitem__,
    )
    trt = SimpleNamespace(LayerType=Layer, float32="float32", float16="float16")
    engines._constrain_types(trt, network, model)
    return {layer.name: layer for layer in layers}, {output.name: output.dtype for output in outputs}


def test_tensorrt_8_is_told_nothing_about_quantised_convolutions(checkpoint):
    model = graph_of(checkpoint, "dense", "magicleap")
    layers, outputs = constrained(quantize(model, ranges_of(model), keep=["conv3b"]))
    assert {name for name, layer in layers.items() if layer.precision == "float16"} == {"conv1a", "conv3b"}
    free = [name for name, layer in layers.items() if layer.precision is None]
    assert set(convolutions(model)) - {"conv1a", "conv3b"} <= set(free)
    assert layers["cell_probabilities"].precision == "float32", "softmax stays fp32"
    assert outputs == {"scores": "float32", "descriptors": "float32"}


def test_tensorrt_8_gives_raw_heads_in_fp16(checkpoint):
    model = graph_of(checkpoint, "heads", "magicleap")
    _, outputs = constrained(quantize(model, ranges_of(model)))
    assert outputs == {"logits": "float16", "coarse_descriptors": "float16"}


def test_tensorrt_8_gets_fp16_as_before(checkpoint):
    layers, _ = constrained(to_precision(graph_of(checkpoint, "heads", "v6"), Precision.FP16))
    assert {layer.precision for layer in layers.values() if layer.type is not Layer.CAST} == {"float16"}
