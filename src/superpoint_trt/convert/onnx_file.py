"""An .onnx file in memory: reading it once, what it describes, its convolutions and their types, its constants."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.core.contract import recognize
from superpoint_trt.core.files import PathLike, one_line, read_bytes, sha256
from superpoint_trt.core.onnx_weights import refuse_weights_elsewhere
from superpoint_trt.core.types import OUTPUT_NAMES, Float32, ModelDescription, OutputType, Precision, SuperPointError

LOW_TYPES = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
"""Element types of the two 16-bit precisions."""

QUANTIZED_TYPES = {Precision.INT8: TensorProto.INT8, Precision.FP8: TensorProto.FLOAT8E4M3FN}
"""Element types of the two 8-bit precisions, as the zero points of Q/DQ pairs have them."""

FULL_TYPE = TensorProto.FLOAT


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """An .onnx file that was read and parsed once. Stages take it in place of the path."""

    path: Path
    model: onnx.ModelProto
    """The whole file. No stage changes it."""
    sha256: str
    """Of the file's bytes."""

    @property
    def description(self) -> ModelDescription:
        """What the model is (`model_description`).

        Raises:
            SuperPointError: it is no SuperPoint.
        """
        return model_description(self.model, self.path)


OnnxSource = Union[PathLike, OnnxFile]
"""A path, or what `read_onnx` made of it."""


def read_onnx(source: OnnxSource) -> OnnxFile:
    """Reads, parses and checks one .onnx file; hands an `OnnxFile` back as it is.

    Raises:
        SuperPointError: the file is missing, is no ONNX, is damaged or inconsistent, or keeps its weights in another
            file.
    """
    if isinstance(source, OnnxFile):
        return source
    data = read_bytes(source, "model")
    model = parse_onnx(data, source)
    check_graph(model, data, source)
    return OnnxFile(Path(source), model, sha256(data))


def check_graph(model: onnx.ModelProto, data: bytes, path: PathLike) -> None:
    """Refuses what ONNX does not allow, and what the stages here do not take: TensorRT's parser dies of some of it.

    Args:
        model: what `parse_onnx` made of `data`.
        data: the file's content.
        path: names the file in the error.

    Raises:
        SuperPointError: the graph is inconsistent, a name is not text, or weights lie in another file.
    """
    if not _all_text(model):
        raise SuperPointError(f"{path} has names that are not UTF-8 text; export the model again.")
    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute if a.HasField("t"))]
    refuse_weights_elsewhere(model, path)
    try:
        onnx.checker.check_model(data)
    except Exception as error:  # the checker's exceptions share no base
        raise SuperPointError(f"{path} is not a valid ONNX model: {one_line(error)}; export it again.") from error
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type not in TensorProto.DataType.values():
            raise SuperPointError(
                f"{path}: {value.name} has the unknown type {value.type.tensor_type.elem_type}; export the model again."
            )
    for tensor in tensors:
        try:
            numpy_helper.to_array(tensor)
        except Exception as error:  # of numpy, protobuf and onnx
            reason = one_line(error) or type(error).__name__
            raise SuperPointError(
                f"{path}: the tensor {tensor.name} cannot be read ({reason}); export it again."
            ) from error
    for node in model.graph.node:
        if node.op_type == "Constant" and len(node.attribute) != 1:
            raise SuperPointError(f"{path}: the constant {node_name(node)} has no value; export the model again.")
    known = constants(model.graph)
    for name, node in convolutions(model).items():
        weight = known.get(node.input[1])
        if weight is not None and (len(weight.dims) != 4 or 0 in weight.dims):
            raise SuperPointError(
                f"{path}: the convolution {name} has weights {list(weight.dims)}; expected 4 sizes, (O, I, K, K)."
            )


def _all_text(message: Message) -> bool:
    """Whether every text in a message is UTF-8: protobuf hands others over as bytes, or refuses to."""
    try:
        for field, value in message.ListFields():
            values = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
            if field.type == FieldDescriptor.TYPE_STRING and not all(isinstance(one, str) for one in values):
                return False
            if field.type == FieldDescriptor.TYPE_MESSAGE and not all(_all_text(one) for one in values):
                return False
    except UnicodeDecodeError:
        return False
    return True


def infer_shapes(model: onnx.ModelProto, check_type: bool = False) -> onnx.ModelProto:
    """A copy of a model with the types and shapes of all tensors that ONNX can tell.

    Args:
        model: any model.
        check_type: checks the types of the operators' inputs, too.

    Raises:
        SuperPointError: the types or shapes contradict each other.
    """
    try:
        return onnx.shape_inference.infer_shapes(model, check_type=check_type)
    except Exception as error:  # InferenceError, and the binding's own
        raise SuperPointError(
            f"the types or shapes in the .onnx contradict each other: {one_line(error)}; export it again."
        ) from error


def load_onnx(path: PathLike) -> onnx.ModelProto:
    """The model of one .onnx file; raises as `read_onnx` does."""
    return read_onnx(path).model


def parse_onnx(data: bytes, path: PathLike) -> onnx.ModelProto:
    """Parses a file's bytes.

    Args:
        data: the file's content.
        path: names the file in the error.

    Raises:
        SuperPointError: the bytes are no ONNX, or are damaged.
    """
    try:
        model = onnx.load_model_from_string(data)
    except (DecodeError, ValueError, TypeError) as error:
        raise SuperPointError(f"{path} is not an ONNX model, or is damaged: {one_line(error)}.") from error
    if not model.graph.node:
        raise SuperPointError(f"{path} is not an ONNX model: it has no graph.")
    return model


# ------------------------------------------------------------------------------------------------------ the description


def own_description(model: onnx.ModelProto, path: PathLike = "the model") -> ModelDescription | None:
    """What a model says of itself in its metadata; None if another tool made it.

    Args:
        model: any model.
        path: names the file in the error.

    Raises:
        SuperPointError: the metadata cannot be read.
    """
    return ModelDescription.from_metadata({entry.key: entry.value for entry in model.metadata_props}, path)


def model_description(model: onnx.ModelProto, path: PathLike) -> ModelDescription:
    """What a model is: by its own metadata, or, if another tool made it, by the names and shapes of its tensors.

    Args:
        model: any SuperPoint.
        path: names the file in the error.

    Raises:
        SuperPointError: the model is no SuperPoint, or its metadata cannot be read or contradict its tensors.
    """
    inputs, outputs = (
        {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
        for values in (_inputs(model.graph), model.graph.output)
    )
    remedy = "make one with superpoint export"
    return recognize(Path(path), own_description(model, path), inputs, outputs, remedy)


def _inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The graph's inputs. Before opset 9 every constant is listed there, too."""
    constant_names = {constant.name for constant in graph.initializer}
    return [value for value in graph.input if value.name not in constant_names]


def set_metadata(model: onnx.ModelProto, **values: str) -> None:
    """Sets entries of this package's metadata in place, by the field names of `ModelDescription`."""
    known = {entry.key: entry.value for entry in model.metadata_props}
    changed = {ModelDescription.METADATA_PREFIX + key: value for key, value in values.items()}
    del model.metadata_props[:]
    helper.set_model_props(model, {**known, **changed})


# ------------------------------------------------------------------------------------------- convolutions and constants


def node_name(node: onnx.NodeProto) -> str:
    """A node's name, or its first output's if the tool that made it gave it none."""
    return str(node.name or node.output[0])


def convolutions(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The convolutions by name, in the graph's order."""
    return {node_name(node): node for node in model.graph.node if node.op_type == "Conv"}


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and the tensors of Constant nodes, by name."""
    found = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensor = copy.deepcopy(node.attribute[0].t)
            tensor.name = node.output[0]
            found[tensor.name] = tensor
    return found


def set_initializers(graph: onnx.GraphProto, values: Mapping[str, Float32]) -> None:
    """Gives initializers and Constant nodes new values, in place.

    Args:
        graph: to change.
        values: name of the constant -> its new value.
    """
    for constant in graph.initializer:
        if constant.name in values:
            constant.CopyFrom(numpy_helper.from_array(values[constant.name], constant.name))
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in values:
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(values[node.output[0]], node.output[0]))


# ------------------------------------------------------------------------------------------------------------ precision


def quantized_type(model: onnx.ModelProto) -> Precision | None:
    """INT8 or FP8 if a convolution reads through a Q/DQ pair of that type; None if none does."""
    # The zero point has the pair's type. Without one, what is dequantized has it, if that is a constant.
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
    """The precision a graph's convolutions are written in.

    Returns:
        INT8 or FP8 if any convolution has a Q/DQ pair, even if others have none. Else the type of the weights; None if
        there are no convolutions, their types differ, or the type is unknown.
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
    known: dict[int, Precision] = {FULL_TYPE: Precision.FP32}
    known.update({low: precision for precision, low in LOW_TYPES.items()})
    return known.get(types.pop()) if len(types) == 1 else None


def has_low_type(model: onnx.ModelProto) -> bool:
    """Whether a constant of the graph is fp16 or bf16: the graph was cast already."""
    return any(constant.data_type in LOW_TYPES.values() for constant in constants(model.graph).values())


def check_quantizable(model: onnx.ModelProto) -> None:
    """Refuses what is no plain fp32 network.

    Raises:
        SuperPointError: the convolutions are quantized, of a 16-bit type, or have no fp32 weights.
    """
    if quantized_type(model):
        raise SuperPointError("the .onnx is already quantized; use the fp32 .onnx it was made from.")
    found = convolution_type(model)
    if found is not Precision.FP32:
        what = f"its convolutions are {found.value}" if found else "no convolution with plain fp32 weights was found"
        raise SuperPointError(f"quantizing needs an fp32 .onnx, but {what}; export it with fp32.")


# ------------------------------------------------------------------------------------------------------------ raw heads


def raw_heads(source: OnnxFile) -> onnx.ModelProto:
    """A model of any type, cut back to its two raw heads: the network as the `heads` type has it.

    Args:
        source: a SuperPoint whose last convolutions are the two heads.

    Returns:
        A new model with the outputs `logits` and `coarse_descriptors`.

    Raises:
        SuperPointError: the graph does not end in two convolutions, one of them of 65 channels (stride 8 px).
    """
    cut = copy.deepcopy(source.model)
    ends = _last_convolutions(cut.graph)
    known = constants(cut.graph)
    channels = {node_name(node): known[node.input[1]].dims[0] for node in ends if node.input[1] in known}
    cells = source.description.stride_px**2 + 1
    if len(channels) != 2 or list(channels.values()).count(cells) != 1:
        raise SuperPointError(
            f"{source.path} ends in convolutions of {channels} channels; expected {cells} and descriptors."
        )
    names = OUTPUT_NAMES[OutputType.HEADS]
    del cut.graph.output[:]
    for node in ends:
        name = names[0] if channels[node_name(node)] == cells else names[1]
        if node.output[0] != name:
            cut.graph.node.append(helper.make_node("Identity", [node.output[0]], [name], name=name))
        shape = ["b", channels[node_name(node)], "h", "w"]
        cut.graph.output.append(helper.make_tensor_value_info(name, FULL_TYPE, shape))
    set_metadata(cut, type=OutputType.HEADS.value)
    return cut


def _last_convolutions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The convolutions whose results reach no other convolution."""
    leads_on: set[str] = set()  # tensors that lead to a convolution
    last = []
    for node in reversed(graph.node):
        if node.op_type == "Conv" and node.output[0] not in leads_on:
            last.append(node)
        if node.op_type == "Conv" or any(name in leads_on for name in node.output):
            leads_on.update(node.input)
    return last
