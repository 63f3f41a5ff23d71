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
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.core.contract import recognize
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, one_line, read_bytes, write_atomically
from superpoint_trt.core.types import OUTPUT_NAMES, ModelDescription, OutputType, Precision, SuperPointError

LOW_TYPES = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
"""What this stage can write; fp32 and tf32 are the fp32 graph itself."""

QUANTIZED_TYPES = {Precision.INT8: TensorProto.INT8, Precision.FP8: TensorProto.FLOAT8E4M3FN}
"""What `quantize` writes, by the type of its Q/DQ's zero points."""

_FULL_TYPE = TensorProto.FLOAT
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


def load_onnx(path: PathLike) -> onnx.ModelProto:
    """Reads and checks one .onnx file.

    Raises:
        SuperPointError: no ONNX, damaged, or with its weights in another file.
    """
    model = parse_onnx(read_bytes(path, "model"), path)
    outside = [w.name for w in model.graph.initializer if w.data_location == TensorProto.EXTERNAL]
    if outside:
        raise SuperPointError(
            f"{path} keeps its weights ({outside[0]}, ...) in another file; make it one file: "
            "onnx.save(onnx.load(path), path)."
        )
    return model


def parse_onnx(data: bytes, path: PathLike) -> onnx.ModelProto:
    """A file's bytes as a model.

    Raises:
        SuperPointError: no ONNX, or damaged.
    """
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError, TypeError) as error:
        raise SuperPointError(f"{path} is not an ONNX model, or is damaged: {one_line(error)}.") from error
    if not model.graph.node:
        raise SuperPointError(f"{path} is not an ONNX model: it has no graph.")
    return model


def described(model: onnx.ModelProto, path: PathLike) -> ModelDescription:
    """What a model is: its own metadata, or what its names and shapes say.

    Raises:
        SuperPointError: no SuperPoint.
    """
    own = ModelDescription.from_metadata({entry.key: entry.value for entry in model.metadata_props})
    takes, gives = (
        {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
        for values in (model.graph.input, model.graph.output)
    )
    return own or recognize(Path(path), None, takes, gives, remedy="make one with superpoint export")


def name_of(node: onnx.NodeProto) -> str:
    """A node's name, or its output's where another tool gave it none."""
    return str(node.name or node.output[0])


def convolutions(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The convolutions by name, in the graph's order."""
    return {name_of(node): node for node in model.graph.node if node.op_type == "Conv"}


def quantized_type(model: onnx.ModelProto) -> Precision | None:
    """INT8 or FP8 if a convolution reads through a Q/DQ pair of that type; None if none does."""
    # What has the pair's type: the zero point, or without one what is dequantised, if that is a constant.
    typed_by = {
        node.output[0]: node.input[2] if len(node.input) > 2 else node.input[0]
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
    }
    types = constants(model.graph)
    read = {
        types[typed_by[name]].data_type
        for node in convolutions(model).values()
        for name in node.input
        if typed_by.get(name) in types
    }
    return next((precision for precision, element in QUANTIZED_TYPES.items() if element in read), None)


def convolution_type(model: onnx.ModelProto) -> Precision | None:
    """The precision a graph's convolutions are written in; None if there are none, they differ, or it is unknown.

    A graph with Q/DQ pairs is of their type, whatever convolutions it leaves alone.
    """
    quantized = quantized_type(model)
    if quantized:
        return quantized
    known_constants = constants(model.graph)
    types = {
        known_constants[node.input[1]].data_type
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1] in known_constants
    }
    known: dict[int, Precision] = {_FULL_TYPE: Precision.FP32}
    known.update({low: precision for precision, low in LOW_TYPES.items()})
    return known.get(types.pop()) if len(types) == 1 else None


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


def raw_heads(model: onnx.ModelProto, path: PathLike) -> onnx.ModelProto:
    """A model of any type cut back to its two raw heads: the same network as `heads`.

    Args:
        model: whose last convolutions are the heads; left as it is.
        path: for the error.

    Raises:
        SuperPointError: it has not exactly two last convolutions, one of 65 channels (stride 8).
    """
    description = described(model, path)
    cut = copy.deepcopy(model)
    ends = _last_convolutions(cut.graph)
    known = constants(cut.graph)
    channels = {name_of(node): known[node.input[1]].dims[0] for node in ends if node.input[1] in known}
    cells = description.stride_px**2 + 1
    if len(channels) != 2 or list(channels.values()).count(cells) != 1:
        raise SuperPointError(f"{path} ends in convolutions of {channels} channels; expected {cells} and descriptors.")
    names = OUTPUT_NAMES[OutputType.HEADS]
    del cut.graph.output[:]
    for node in ends:
        name = names[0] if channels[name_of(node)] == cells else names[1]
        if node.output[0] != name:
            cut.graph.node.append(helper.make_node("Identity", [node.output[0]], [name], name=name))
        cut.graph.output.append(
            helper.make_tensor_value_info(name, _FULL_TYPE, ["b", channels[name_of(node)], "h", "w"])
        )
    note_metadata(cut, type=OutputType.HEADS.value)
    return cut


def _last_convolutions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Convolutions that no other reads, by whatever way."""
    leads: set[str] = set()  # tensors that lead to a convolution
    last = []
    for node in reversed(graph.node):
        if node.op_type == "Conv" and node.output[0] not in leads:
            last.append(node)
        if node.op_type == "Conv" or any(name in leads for name in node.output):
            leads.update(node.input)
    return last


def has_low_type(model: onnx.ModelProto) -> bool:
    """Whether a graph is typed already: one of its constants is fp16 or bf16."""
    return any(constant.data_type in LOW_TYPES.values() for constant in constants(model.graph).values())


def note_metadata(model: onnx.ModelProto, **values: str) -> None:
    """Sets entries of this package's metadata in place."""
    props = {entry.key: entry.value for entry in model.metadata_props}
    ours = {ModelDescription.METADATA_PREFIX + key: value for key, value in values.items()}
    del model.metadata_props[:]
    helper.set_model_props(model, {**props, **ours})


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
        return self._cast(name, _FULL_TYPE, ".fp32") if name in self._low_tensors else name

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


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and the tensors of Constant nodes, by name."""
    found = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = copy.deepcopy(node.attribute[0].t)
            tensor.name = node.output[0]
            found[tensor.name] = tensor
    return found


def _float_tensors(graph: onnx.GraphProto) -> set[str]:
    """Names of the float32 tensors, as far as shape inference knows their types."""
    values: list[Any] = [*graph.input, *graph.value_info, *graph.output]
    typed = {value.name for value in values if value.type.tensor_type.elem_type == _FULL_TYPE}
    return typed | {name for name, constant in constants(graph).items() if constant.data_type == _FULL_TYPE}
