"""Q/DQ pairs where CPUs can use them: every runtime on a CPU then computes the convolutions in 8-bit integers.

`qdq.py` places pairs for TensorRT: none on outputs and biases, and symmetric int8. onnxruntime's CPU kernels fuse
nothing of that: its 8-bit convolution (QLinearConv) also takes an integer bias and writes an integer output. Without
both it dequantizes the inputs, convolves in float32, and does so in a slower memory layout. So here

- the output of a quantized convolution has a pair, too. It lies where the ReLU was: uint8 with zero point 0 cannot be
  negative, so the pair is the ReLU. Activations have 255 steps instead of 127, and the image is exact in them.
- a max-pool lies between two pairs of one scale, so it runs in uint8;
- biases are int32, in steps of the input's scale times the weights';
- weights are stored in int8, per output channel, as in `qdq.py`.

A convolution whose output is behind no ReLU stays in float32 (the last one of each head). TensorRT does not take these
graphs: it has no uint8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.convert.onnx_file import constants, node_name

STEPS = 255
"""Steps of uint8 from zero point 0."""

SIGNED_ZERO, SIGNED_STEPS = 128, 127
"""Zero point and steps to each side of it, for a tensor that can be negative."""


@dataclass(frozen=True)
class _Grid:
    """The numbers that a uint8 tensor can hold."""

    name: str
    """Prefix of the scale's and the zero point's names."""
    scale: float
    zero: int

    @classmethod
    def up_to(cls, largest: float, negative: bool, name: str) -> _Grid:
        return cls(name, largest / (SIGNED_STEPS if negative else STEPS), SIGNED_ZERO if negative else 0)


class _Relus:
    """The ReLUs around a graph's convolutions."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._outputs = {node_name(n): n.output[0] for n in model.graph.node if n.op_type == "Conv"}

    def before(self, tensor: str) -> set[str]:
        """The outputs of the ReLUs that a tensor is made of; none of them is ever larger than the tensor's range."""
        maker = self._makers.get(tensor)
        if maker is None or not self.never_negative(tensor):
            return set()
        if maker.op_type == "Relu":
            return {str(maker.output[0])}
        parts = maker.input if maker.op_type in ("Concat", "Add") else maker.input[:1]
        return {relu for name in parts for relu in self.before(name)}

    def never_negative(self, tensor: str) -> bool:
        """Whether a tensor is made of ReLUs' outputs by operations that keep the sign."""
        maker = self._makers.get(tensor)
        if maker is None:
            return False
        if maker.op_type in ("Concat", "Add"):
            return all(map(self.never_negative, maker.input))
        return maker.op_type == "Relu" or (
            maker.op_type in ("MaxPool", "Resize", "Slice") and self.never_negative(maker.input[0])
        )

    def of(self, convolution: str) -> str | None:
        """The output of the ReLU that alone reads a convolution, by its name; None if there is none."""
        readers = self._readers.get(self._outputs[convolution], [])
        return str(readers[0].output[0]) if [reader.op_type for reader in readers] == ["Relu"] else None


def integer_convolutions(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions that can run in integers: a ReLU reads them, and its range is measured.

    Ranges are measured where convolutions read, so one must read that ReLU, or its max-pool.
    """
    relus = _Relus(model)
    convolutions = {node_name(node): node for node in model.graph.node if node.op_type == "Conv"}
    measured = {relu for node in convolutions.values() for relu in relus.before(node.input[0])}
    return [name for name in convolutions if relus.of(name) in measured]


class CpuPairWriter:
    """Writes pairs into one graph, in place.

    Args:
        model: fp32 graph, with channels scaled as the ranges want it.
        ranges: tensor name -> largest magnitude, for the input of each convolution to quantize.
        weights: name of a convolution's weights -> int8 values (O, I, K, K) and the size of one step (O,) float32.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        ranges: Mapping[str, float],
        weights: Mapping[str, tuple[NDArray[np.int8], NDArray[np.float32]]],
    ) -> None:
        self._graph = model.graph
        self._ranges, self._weights = ranges, weights
        self._image = model.graph.input[0].name
        self._relus = _Relus(model)
        self._grids: dict[str, _Grid] = {}
        """Name of a dequantized tensor -> its numbers."""
        self._nodes: list[onnx.NodeProto] = []

    def run(self, chosen: Sequence[str]) -> None:
        """Quantizes these convolutions, by name, some of `integer_convolutions`."""
        grids = self._planned(chosen)
        for node in list(self._graph.node):
            if node.op_type == "Relu" and node.output[0] in grids:
                self._add_pair(node.input[0], node.output[0], grids[node.output[0]])
            elif node.op_type == "MaxPool" and node.input[0] in self._grids:
                self._add_pool(node)
            elif node.op_type == "Conv" and node_name(node) in chosen:
                self._add_convolution(node)
            else:
                self._nodes.append(node)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._nodes]
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(nodes)
        self._drop_unread()

    def _convolutions(self) -> list[onnx.NodeProto]:
        return [node for node in self._graph.node if node.op_type == "Conv"]

    def _planned(self, chosen: Sequence[str]) -> dict[str, _Grid]:
        """Name of each ReLU's output that is quantized -> its numbers. A quantized convolution makes it or reads it."""
        behind_chosen = {self._relus.of(name) for name in chosen}
        largest: dict[str, float] = {}
        for node in self._convolutions():
            for relu in self._relus.before(node.input[0]):
                if relu in behind_chosen or node_name(node) in chosen:
                    largest[relu] = min(largest.get(relu, np.inf), self._ranges[node.input[0]])
        return {name: _Grid.up_to(value, False, name) for name, value in largest.items()}

    # ------------------------------------------------------------------------------------------------------- writing

    def _add_pair(self, source: str, target: str, grid: _Grid) -> None:
        """Q and DQ from one tensor to another."""
        scale, zero = self._scalars(grid)
        self._nodes.append(helper.make_node("QuantizeLinear", [source, scale, zero], [f"{target}.q"], f"{target}.q"))
        self._nodes.append(helper.make_node("DequantizeLinear", [f"{target}.q", scale, zero], [target], f"{target}.dq"))
        self._grids[target] = grid

    def _scalars(self, grid: _Grid) -> tuple[str, str]:
        """Names of the constants of a grid."""
        scale, zero = f"{grid.name}.q.scale", f"{grid.name}.q.zero"
        if not any(constant.name == scale for constant in self._graph.initializer):
            self._add_constants({scale: np.float32(grid.scale), zero: np.uint8(grid.zero)})
        return scale, zero

    def _add_constants(self, values: Mapping[str, object]) -> None:
        self._graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in values.items())

    def _add_pool(self, node: onnx.NodeProto) -> None:
        """A max-pool between two pairs of one scale."""
        target = node.output[0]
        pool = onnx.NodeProto.FromString(node.SerializeToString())
        pool.output[0] = f"{target}.pooled"
        self._nodes.append(pool)
        self._add_pair(pool.output[0], target, self._grids[node.input[0]])

    def _add_convolution(self, node: onnx.NodeProto) -> None:
        """A convolution that reads dequantized input, weights and bias."""
        made = onnx.NodeProto.FromString(node.SerializeToString())
        if made.input[0] not in self._grids:
            read = f"{made.input[0]}.quantized"
            if read not in self._grids:
                self._add_pair(made.input[0], read, self._input_grid(made.input[0]))
            made.input[0] = read
        grid = self._grids[made.input[0]]
        weight = made.input[1]
        steps, scale = self._weights[weight]
        made.input[1] = self._add_dequantized(weight, steps, scale)
        if len(made.input) > 2 and made.input[2]:
            bias = numpy_helper.to_array(constants(self._graph)[made.input[2]])
            step = (np.float32(grid.scale) * scale).astype(np.float32)
            limits = np.iinfo(np.int32)
            whole = np.clip(np.rint(bias.astype(np.float64) / step), limits.min, limits.max).astype(np.int32)
            made.input[2] = self._add_dequantized(made.input[2], whole, step)
        self._nodes.append(made)

    def _input_grid(self, name: str) -> _Grid:
        """The numbers of a tensor that is no ReLU's output; the image has 255 steps from 0 to 1."""
        if name == self._image:
            return _Grid.up_to(1.0, False, name)
        return _Grid.up_to(self._ranges[name], not self._relus.never_negative(name), name)

    def _add_dequantized(self, name: str, values: NDArray[np.generic], scale: NDArray[np.float32]) -> str:
        """Integers with a step for each output channel, and the DQ that reads them."""
        target = f"{name}.dq"
        if not any(target in node.output for node in self._nodes):
            zeros = np.zeros(len(scale), values.dtype)
            self._add_constants({f"{name}.q": values, f"{name}.q.scale": scale, f"{name}.q.zero": zeros})
            inputs = [f"{name}.q", f"{name}.q.scale", f"{name}.q.zero"]
            self._nodes.append(helper.make_node("DequantizeLinear", inputs, [target], target, axis=0))
        return target

    def _drop_unread(self) -> None:
        """Removes the float32 weights that nothing reads any more."""
        read = {name for node in self._graph.node for name in node.input}
        kept = [TensorProto.FromString(c.SerializeToString()) for c in self._graph.initializer if c.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
