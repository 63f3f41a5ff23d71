"""fp32 .onnx -> typed .onnx whose convolutions run in fp16 or bf16.

TensorRT 10.12 deprecates its precision flags and 11 has none: a strongly typed network takes the types of its graph.
So this stage writes the types into the graph, for every runtime. The convolutions and the nodes between them get the
16-bit type ("low" in the names here). Softmax, L2 norms, suppression, indices and sampling stay float32.
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
    infer_shapes,
    model_description,
    read_onnx,
    set_metadata,
)
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, write_atomically
from superpoint_trt.core.types import Precision, SuperPointError

_BETWEEN_CONVOLUTIONS = {"Conv", "Relu", "LeakyRelu", "PRelu", "Clip", "MaxPool", "AveragePool", "BatchNormalization"}
_BETWEEN_CONVOLUTIONS |= {"Add", "Sub", "Mul", "Div", "Concat", "Identity", "Dropout", "Pad", "Resize"}
"""Operators that get the low type where they lie between two convolutions: there it is safe and saves time."""

_AFTER_CONVOLUTION = {"BatchNormalization", "Relu", "Transpose", "Reshape", "Gather", "Squeeze", "Unsqueeze"}
"""Operators that get the low type behind a last convolution: its own BatchNorm and ReLU, and operators that only move
values."""

_IN_A_KERNEL = {"LeakyRelu", "PRelu", "Clip", "MaxPool", "AveragePool", "Identity"}
"""More operators that TensorRT may run inside a quantized convolution's kernel, or in its type."""

_FP16_MAX = float(np.finfo(np.float16).max)


def cast(model_path: PathLike, output: PathLike, precision: Precision) -> Path:
    """Writes an .onnx file in another precision, for other builders than this package's (trtexec, say).

    Args:
        model_path: an fp32 SuperPoint .onnx of this package or another tool, or a quantized one.
        output: the .onnx to write.
        precision: FP16 or BF16. FP32 and TF32 only set the precision in the metadata.

    Returns:
        The path written.

    Raises:
        SuperPointError: the file cannot be read (`read_onnx`) or cast (`to_precision`). Nothing is written then.
    """
    output = check_writable(output)
    if output.suffix.lower() != ".onnx":
        raise SuperPointError(f"output {output}: a model's name ends in .onnx.")
    check_distinct(output, model_path)
    source = read_onnx(model_path)
    typed = to_precision(source.model, precision)
    model_description(typed, source.path)  # nothing is written that no command would read
    return write_atomically(output, typed.SerializeToString())


def to_precision(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """Casts a network's convolutions to another type.

    Args:
        model: fp32 graph, with or without Q/DQ pairs; not changed.
        precision: FP16 or BF16 change the types; FP32 and TF32 keep them.

    Returns:
        A new model. Inputs stay float32. Outputs straight from a convolution (the `heads` type) get the low type, all
        others stay float32. In a quantized graph the convolutions without Q/DQ pairs are cast, and the metadata keep
        naming int8 or fp8; else they name `precision`.

    Raises:
        SuperPointError: there are no fp32 convolutions, a weight is beyond the type's range, or the precision is INT8
            or FP8.
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
    set_metadata(typed, precision=(found if found and quantized else precision).value)
    return typed


class _Retyped:
    """One graph being cast: decides which nodes get the low type and writes the casts at the border."""

    def __init__(self, model: onnx.ModelProto, precision: Precision) -> None:
        self._source = infer_shapes(model)
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
        for name in sorted(outputs & quantized):  # a raw head from a quantized convolution gets the low type too
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
        # ONNX allows bfloat16 convolutions from opset 22 on, but parsers take them at older opsets.
        strict = self._precision is not Precision.BF16
        return infer_shapes(typed, check_type=strict) if strict else typed

    def _add_low(self, node: onnx.NodeProto) -> None:
        node = copy.deepcopy(node)
        data = 1 if node.op_type == "Resize" else len(node.input)  # its scales are float32 at any type of its data
        node.input[:] = [*map(self._low_name, node.input[:data]), *node.input[data:]]
        self._low_tensors.update(node.output)
        self._nodes.append(node)

    def _add_full(self, node: onnx.NodeProto) -> None:
        node = copy.deepcopy(node)
        if node.op_type != "Shape":  # Shape takes any type
            node.input[:] = [self._full_name(name) for name in node.input]
        self._nodes.append(node)

    def _lower_output(self, name: str) -> None:
        """Casts an output of the graph; leaves it if another node reads it."""
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
        if not np.isfinite(values).all():
            raise SuperPointError(
                f"{constant.name} holds values that are not finite; check the checkpoint with superpoint info."
            )
        if self._precision is Precision.FP16 and np.abs(values).max(initial=0) > _FP16_MAX:
            raise SuperPointError(
                f"{constant.name} holds {np.abs(values).max():.3g}, beyond fp16's largest number {_FP16_MAX:g}; "
                "use bf16 (TensorRT 10 or newer) or fp32."
            )
        name = constant.name + self._suffix
        if self._precision is Precision.FP16:
            return numpy_helper.from_array(values.astype(np.float16), name)
        return helper.make_tensor(name, self._type, values.shape, bfloat16_bits(values).tobytes(), raw=True)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper 16 bits of finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _low_nodes(graph: onnx.GraphProto) -> set[int]:
    """Indices of the nodes that get the low type: convolutions, nodes between two of them, and tails (`_tails`).

    Nodes before the first convolution (an image's scaling) and after the last (softmax, norms, decode) are left out.
    So are quantized convolutions: their Q/DQ pairs set their type. What lies between them and another convolution, and
    belongs to none's kernel (the sum of two branches), gets the low type.
    """
    quantized = quantized_chain(graph)
    after: set[str] = set()  # tensors that only castable nodes lie between and a convolution above
    forward: set[int] = set()
    for index, node in enumerate(graph.node):
        reached = any(name in after for name in node.input)
        if node.output[0] in quantized:
            after.update(node.output)
            continue
        if node.op_type == "Conv" or (reached and node.op_type in _BETWEEN_CONVOLUTIONS):
            forward.add(index)
            after.update(node.output)
    before: set[str] = set()  # tensors that only castable nodes lie between and a convolution below
    low: set[int] = set()
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type == "Conv" or any(name in before for name in node.output):
            if index in forward:
                low.add(index)
                before.update(node.input)
            elif node.output[0] in quantized or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                before.update(node.input[:1])
    return low | set(_tails(graph, low))


def _tails(graph: onnx.GraphProto, low: Iterable[int]) -> Iterator[int]:
    """Indices of the nodes that follow a last convolution through their data input."""
    ends = {name for index in low for name in graph.node[index].output}
    for index, node in enumerate(graph.node):
        if index not in low and node.op_type in _AFTER_CONVOLUTION and node.input[0] in ends:
            ends.update(node.output)
            yield index


def quantized_chain(graph: onnx.GraphProto) -> set[str]:
    """Tensors from each quantized convolution on, up to the next Q, the next convolution or the decode."""
    pairs = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    chain: set[str] = set()
    for node in graph.node:
        if node.op_type == "Conv":
            belongs = node.input[0] in pairs and node.input[1] in pairs  # with one pair alone it computes in fp16
        else:
            belongs = node.op_type in _IN_A_KERNEL | _AFTER_CONVOLUTION and node.input[0] in chain
        if belongs:
            chain.update(node.output)
    return chain


def _float_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the tensors that shape inference knows to be float32."""
    values: list[Any] = [*graph.input, *graph.value_info, *graph.output]
    typed = {value.name for value in values if value.type.tensor_type.elem_type == FULL_TYPE}
    return typed | {name for name, constant in constants(graph).items() if constant.data_type == FULL_TYPE}
