"""Precision as a stage of its own: fp32 .onnx -> typed .onnx whose convolutions run in fp16 or bf16.

TensorRT 10.12 deprecates its precision flags and 11 has none: a strongly typed network takes the types of its graph. So
the types are written into the graph, once, for every runtime: the convolutions and what lies between them get the low
type, everything else (softmax, L2 norms, suppression, indices, sampling) stays float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from superpoint_trt.convert.onnx_file import (
    FULL_TYPE,
    LOW_TYPES,
    QUANTIZED_TYPES,
    constants,
    convolution_type,
    has_low_type,
    load_onnx,
    note_metadata,
)
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, write_atomically
from superpoint_trt.core.types import Precision, SuperPointError

_BETWEEN_CONVOLUTIONS = {"Conv", "Relu", "LeakyRelu", "PRelu", "Clip", "MaxPool", "AveragePool", "BatchNormalization"}
_BETWEEN_CONVOLUTIONS |= {"Add", "Sub", "Mul", "Div", "Concat", "Identity", "Dropout", "Pad"}
"""What the low type is safe and worthwhile for, where it lies between convolutions."""

_AFTER_CONVOLUTION = {"BatchNormalization", "Relu", "Transpose", "Reshape", "Gather", "Squeeze", "Unsqueeze"}
"""What still gets the low type behind a last convolution: its own BatchNorm and ReLU, and what only moves values, which
the cast may just as well follow."""

_IN_A_KERNEL = {"LeakyRelu", "PRelu", "Clip", "MaxPool", "AveragePool", "Identity"}
"""What else may become part of a quantised convolution's kernel, or run in its type."""

_FP16_MAX = float(np.finfo(np.float16).max)


def cast(model_path: PathLike, output: PathLike, precision: Precision) -> Path:
    """Rewrites one .onnx file in another precision, for builders other than this package's own (trtexec say).

    Args:
        model_path: an fp32 SuperPoint .onnx, ours or another tool's; or a quantised one.
        output: the .onnx; written beside and renamed.
        precision: FP16 or BF16 (FP32 and TF32 only note the precision in the metadata).

    Returns:
        The path written.

    Raises:
        SuperPointError: as `load_onnx` and `to_precision`; nothing is written then.
    """
    output = check_writable(output)
    if output.suffix.lower() != ".onnx":
        raise SuperPointError(f"output {output}: a model's name ends in .onnx.")
    check_distinct(output, model_path)
    typed = to_precision(load_onnx(model_path), precision)
    return write_atomically(output, typed.SerializeToString())


def to_precision(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """The same network with its convolutions in another type.

    Args:
        model: fp32 graph, or one with Q/DQ pairs in fp32; left as it is.
        precision: FP32 and TF32 keep the graph; FP16 and BF16 retype it.

    Returns:
        A new model: inputs as before; outputs that come straight from a convolution (the `heads` type) have the low
        type, all others stay float32. Of a quantised graph what is left of fp32 between the convolutions is retyped.
        The metadata name the precision, the quantised one first.

    Raises:
        SuperPointError: no convolutions, not fp32, weights beyond the type's range, or an unknown precision.
    """
    found = convolution_type(model)
    quantized = found in QUANTIZED_TYPES and not has_low_type(model)
    if found is not Precision.FP32 and not quantized:
        what = "its convolutions are " + found.value if found else "no convolution with plain fp32 weights was found"
        raise SuperPointError(f"precision {precision.value} needs an fp32 .onnx, but {what}; export it with fp32.")
    if precision in (Precision.FP32, Precision.TF32):
        typed = copy.deepcopy(model)
    elif precision in LOW_TYPES:
        typed = _Retyped(model, precision).model()
    else:
        raise SuperPointError(f"precision {precision.value} is no plain type; expected fp32, tf32, fp16 or bf16.")
    note_metadata(typed, precision=(found if found and quantized else precision).value)
    return typed


class _Retyped:
    """One rewriting: which nodes get the low type, and the casts along the seam."""

    def __init__(self, model: onnx.ModelProto, precision: Precision) -> None:
        self._source = onnx.shape_inference.infer_shapes(model)
        self._precision = precision
        self._type = LOW_TYPES[precision]
        self._suffix = "." + precision.value
        self._constants = constants(self._source.graph)
        self._float_names = _float_tensors(self._source.graph)
        self._nodes: list[onnx.NodeProto] = []
        self._low_constants: dict[str, onnx.TensorProto] = {}
        self._casts: set[str] = set()
        self._low_tensors: set[str] = set()

    def model(self) -> onnx.ModelProto:
        outputs = {value.name for value in self._source.graph.output}
        low = _low_nodes(self._source.graph)
        quantized = quantized_chain(self._source.graph)
        for index, node in enumerate(self._source.graph.node):
            if index in low:
                self._add_low(node)
            else:
                self._add_full(node)
        for name in sorted(outputs & quantized):  # a raw head: in the low type too, as of any other precision
            self._lower_output(name)
        typed = copy.deepcopy(self._source)
        graph = typed.graph
        del graph.node[:]
        del graph.value_info[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend(self._low_constants.values())
        used = {name for node in self._nodes for name in node.input} | outputs
        kept = [constant for constant in graph.initializer if constant.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
        for value in graph.output:
            if value.name in self._low_tensors:
                value.type.tensor_type.elem_type = self._type
        # ONNX lists bfloat16 convolutions from opset 22 on; parsers of older opsets take them all the same.
        strict = self._precision is not Precision.BF16
        return onnx.shape_inference.infer_shapes(typed, check_type=strict) if strict else typed

    def _add_low(self, node: onnx.NodeProto) -> None:
        node = copy.deepcopy(node)
        node.input[:] = [self._low_name(name) for name in node.input]
        self._low_tensors.update(node.output)
        self._nodes.append(node)

    def _add_full(self, node: onnx.NodeProto) -> None:
        node = copy.deepcopy(node)
        if node.op_type != "Shape":  # which takes any type
            node.input[:] = [self._full_name(name) for name in node.input]
        self._nodes.append(node)

    def _lower_output(self, name: str) -> None:
        """Casts an output behind the node that gives it; only where nothing in the graph reads it."""
        if any(name in node.input for node in self._nodes):
            return
        for node in self._nodes:
            node.output[:] = [name + ".fp32" if output == name else output for output in node.output]
        self._nodes.append(helper.make_node("Cast", [name + ".fp32"], [name], name=name + self._suffix, to=self._type))
        self._low_tensors.add(name)

    def _low_name(self, name: str) -> str:
        if name in self._low_tensors or name not in self._float_names:
            return name
        if name in self._constants:
            self._low_constants.setdefault(name, self._low_constant(self._constants[name]))
            return name + self._suffix
        return self._cast(name, self._type, self._suffix)

    def _full_name(self, name: str) -> str:
        return self._cast(name, FULL_TYPE, ".fp32") if name in self._low_tensors else name

    def _cast(self, name: str, to: int, suffix: str) -> str:
        if name not in self._casts:
            self._casts.add(name)
            self._nodes.append(helper.make_node("Cast", [name], [name + suffix], name=name + suffix, to=to))
        return name + suffix

    def _low_constant(self, constant: onnx.TensorProto) -> onnx.TensorProto:
        values = numpy_helper.to_array(constant).astype(np.float32)
        if self._precision is Precision.FP16 and np.abs(values).max(initial=0) > _FP16_MAX:
            raise SuperPointError(
                f"{constant.name} holds {np.abs(values).max():.3g}, beyond fp16's largest number {_FP16_MAX:g}; "
                "use bf16 (TensorRT 10 or newer) or fp32."
            )
        name = constant.name + self._suffix
        if self._precision is Precision.FP16:
            return numpy_helper.from_array(values.astype(np.float16), name)
        return helper.make_tensor(name, self._type, values.shape, _bfloat16_bits(values).tobytes(), raw=True)


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 -> the upper 16 bits, rounded to nearest, ties to even; the values are finite weights."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _low_nodes(graph: onnx.GraphProto) -> set[int]:
    """Indices of the nodes that get the low type: convolutions, what lies between two of them, and what is left of one.

    What comes before the first convolution (an image's scaling) and after the last (softmax, norms, decode) stays out,
    and so do quantised convolutions: their kernels take what the Q/DQ pairs say.
    """
    quantized = quantized_chain(graph)
    after: set[str] = set()  # tensors computed from a convolution by nothing but castable nodes
    forward: set[int] = set()
    for index, node in enumerate(graph.node):
        reached = any(name in after for name in node.input)
        if node.output[0] in quantized:
            continue
        if node.op_type == "Conv" or (reached and node.op_type in _BETWEEN_CONVOLUTIONS):
            forward.add(index)
            after.update(node.output)
    before: set[str] = set()  # tensors that lead to a convolution's data input by nothing but castable nodes
    low: set[int] = set()
    for index in reversed(sorted(forward)):
        node = graph.node[index]
        if node.op_type == "Conv" or any(name in before for name in node.output):
            low.add(index)
            before.update(node.input)
    return low | set(_tails(graph, low))


def _tails(graph: onnx.GraphProto, low: Iterable[int]) -> Iterator[int]:
    """What hangs straight on a last convolution, by its data input."""
    ends = {name for index in low for name in graph.node[index].output}
    for index, node in enumerate(graph.node):
        if index not in low and node.op_type in _AFTER_CONVOLUTION and node.input[0] in ends:
            ends.update(node.output)
            yield index


def quantized_chain(graph: onnx.GraphProto) -> set[str]:
    """Tensors that quantised convolutions give, and what follows them up to the next Q, convolution or decode step."""
    pairs = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    chain: set[str] = set()
    for node in graph.node:
        if node.op_type == "Conv":
            belongs = node.input[0] in pairs and node.input[1] in pairs  # with one of them alone it computes in fp16
        else:
            belongs = node.op_type in _IN_A_KERNEL | _AFTER_CONVOLUTION and node.input[0] in chain
        if belongs:
            chain.update(node.output)
    return chain


def _float_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the float32 tensors, as far as shape inference knows their types."""
    values: list[Any] = [*graph.input, *graph.value_info, *graph.output]
    typed = {value.name for value in values if value.type.tensor_type.elem_type == FULL_TYPE}
    return typed | {name for name, constant in constants(graph).items() if constant.data_type == FULL_TYPE}
