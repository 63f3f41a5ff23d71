"""Channels brought to similar ranges: factors worked out by hand, and which tensors can be scaled."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from superpoint_trt.convert.quantize.equalize import equalize, factors, scalable_tensors
from superpoint_trt.core.types import SuperPointError


def two_convolutions(first: list[float], second: list[float], **attributes) -> onnx.ModelProto:
    """Image -> 1x1 convolution to one channel for each weight -> ReLU -> 1x1 convolution back to one channel."""
    weights = {
        "a.weight": np.array(first, np.float32).reshape(-1, 1, 1, 1),
        "a.bias": np.zeros(len(first), np.float32),
        "b.weight": np.array(second, np.float32).reshape(1, -1, 1, 1),
        "b.bias": np.zeros(1, np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "a.weight", "a.bias"], ["a"], name="a"),
        helper.make_node("Relu", ["a"], ["r"], name="r"),
        helper.make_node("Conv", ["r", "b.weight", "b.bias"], ["b"], name="b", **attributes),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 4, 4])
    output = helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 1, 4, 4])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", [image], [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


def values(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}


def test_a_factor_is_the_square_root_of_weight_over_range():
    """Ranges 4 and 1, read by weights 1 and 4: sqrt(1/4 / 4) to sqrt(1 / 1) is 1 to 4.

    Then both channels reach as far, and both are read by weights as large: neither side is left the smaller.
    """
    model = two_convolutions([4.0, 1.0], [1.0, 4.0])
    found = factors(model, {"r": np.array([4.0, 1.0])})
    assert found == {"r": [0.25, 1.0]}
    scaled = values(equalize(model, found))
    np.testing.assert_allclose(scaled["a.weight"].ravel(), [1.0, 1.0])
    np.testing.assert_allclose(scaled["b.weight"].ravel(), [4.0, 4.0])


def test_ranges_alone_and_weights_alone_are_halved_in_the_logarithm():
    """16 times the range is scaled by 4, not by 16: the weights take the other half of the difference."""
    model = two_convolutions([16.0, 1.0], [1.0, 1.0])
    assert factors(model, {"r": np.array([16.0, 1.0])}) == {"r": [0.25, 1.0]}
    assert factors(two_convolutions([1.0, 1.0], [1.0, 16.0]), {"r": np.array([1.0, 1.0])}) == {"r": [0.25, 1.0]}


def test_a_dead_channel_gets_no_boundless_factor():
    """A range below a thousandth of the largest counts as a thousandth."""
    found = factors(two_convolutions([1.0, 1.0], [1.0, 1.0]), {"r": np.array([1.0, 0.0])})
    assert found["r"] == [pytest.approx(np.sqrt(1e-3), rel=1e-2), 1.0]


def test_the_network_computes_the_same():
    model = two_convolutions([4.0, -1.0, 0.5], [1.0, 4.0, -2.0])
    image = np.random.default_rng(0).normal(size=(1, 1, 4, 4)).astype(np.float32)
    before, after = (
        ReferenceEvaluator(graph).run(None, {"image": image})[0]
        for graph in (model, equalize(model, {"r": [0.25, 1.0, 0.5]}))
    )
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_what_cannot_be_scaled_is_refused():
    model = two_convolutions([1.0, 1.0], [1.0, 1.0])
    assert scalable_tensors(model) == ["r"], "the image has no maker"
    with pytest.raises(SuperPointError, match="channels of image cannot be scaled"):
        equalize(model, {"image": [1.0]})
    with pytest.raises(SuperPointError, match="has 2 channels, the calibration 3"):
        equalize(model, {"r": [1.0, 1.0, 1.0]})
    model.graph.output.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, None))
    assert scalable_tensors(model) == [], "somebody else reads it"
