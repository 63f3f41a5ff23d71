"""Collects the nodes and constants of a graph, at any opset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.core.types import SuperPointError


class GraphWriter:
    """Nodes and constants of a graph being written. Only this class knows where the opsets differ.

    Every method that adds a node returns the name of the tensor that the node makes.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Adds a constant, once, and returns its name."""
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Adds a node with one output; both get the name `output`, or one made of the operator and a number."""
        if op == "Squeeze" and self.opset >= 13:
            inputs = [*inputs, self._axes(attributes.pop("axes"))]
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self._check_new(output)
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name, wherever it appears."""
        self._check_new(new)
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    def _check_new(self, name: str) -> None:
        """Refuses a second tensor of one name: a checkpoint may call its layers what other tensors are called.

        Raises:
            SuperPointError: there is such a tensor.
        """
        if name in self.constants or any(name in node.output for node in self.nodes):
            raise SuperPointError(f"two tensors would be called {name}; rename the layer {name} of the checkpoint.")

    def unsqueeze(self, x: str, axis: int) -> str:
        """Inserts an axis of size 1."""
        if self.opset >= 13:
            return self.node("Unsqueeze", [x, self._axes([axis])])
        return self.node("Unsqueeze", [x], axes=[axis])

    def reduce(self, op: str, x: str, axis: int, keepdims: int = 1, output: str | None = None) -> str:
        """Adds a reduction ("ReduceSum", "ReduceL2") along one axis."""
        takes_input = self.opset >= (13 if op == "ReduceSum" else 18)
        if takes_input:
            return self.node(op, [x, self._axes([axis])], output=output, keepdims=keepdims)
        return self.node(op, [x], output=output, axes=[axis], keepdims=keepdims)

    def slice(self, x: str, axis: int, start: int, stop: int, step: int = 1) -> str:
        """Cuts start to stop, stop excluded, out of one axis, or every step-th of them."""
        bounds = [self._axes([value]) for value in ((start, stop, axis) if step == 1 else (start, stop, axis, step))]
        return self.node("Slice", [x, *bounds])

    def concat(self, parts: Sequence[str], output: str) -> str:
        """Joins tensors along their channels; one alone stays as it is."""
        return self.node("Concat", parts, output=output, axis=1) if len(parts) > 1 else parts[0]

    def repeat_2x2(self, x: str, base: str, output: str) -> str:
        """Repeats every value of (B, C, h, w) 2x2, and cuts the result to the size of `base` (B, C, H, W).

        Nearest neighbors at places rounded down give just that, for a size of 2 h as for 2 h - 1. So the node takes the
        size of `base`, and nothing is left to cut. It does so in a graph of fixed size as well, because calibration
        runs that on images of any size; runtimes compute the size before the first run.
        """
        nothing = self.constant("no_floats", np.array([], np.float32)) if self.opset < 13 else ""
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.node("Resize", [x, nothing, nothing, self.node("Shape", [base])], output=output, **how)

    def reshape(self, x: str, shape: Sequence[int], output: str | None = None) -> str:
        """Reshapes as ONNX does: 0 keeps a size, -1 takes what is left."""
        name = "shape_" + "_".join(re.sub("-", "m", str(size)) for size in shape)
        return self.node("Reshape", [x, self.constant(name, np.array(shape, np.int64))], output=output)

    def top_k(self, x: str, k: int) -> tuple[str, str]:
        """The k largest along the last axis, sorted: values and int64 indices."""
        values, indices = f"topk_{len(self.nodes)}", f"topk_{len(self.nodes)}_index"
        count = self.constant(f"k_{k}", np.array([k], np.int64))
        self.nodes.append(
            helper.make_node("TopK", [x, count], [values, indices], name=values, axis=-1, largest=1, sorted=1)
        )
        return values, indices

    def dim(self, x: str, axis: int) -> str:
        """One dimension of a tensor, an int64 scalar."""
        index = self.constant(f"dim_{axis}", np.array(axis, np.int64))
        return self.node("Gather", [self.node("Shape", [x]), index], axis=0)

    def as_vector(self, scalar: str) -> str:
        """A scalar as a tensor of shape (1,)."""
        return self.reshape(scalar, [1])

    def as_column(self, x: str) -> str:
        """(B, N) int64 -> (B, N, 1) float32."""
        return self.unsqueeze(self.node("Cast", [x], to=TensorProto.FLOAT), 2)

    def _axes(self, values: Sequence[int]) -> str:
        name = "ints_" + "_".join(re.sub("-", "m", str(value)) for value in values)
        return self.constant(name, np.array(values, np.int64))
