"""An .onnx file in memory: reading it, what it describes, its convolutions and their types, its constants."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.core.contract import describe
from superpoint_trt.core.files import PathLike, one_line, read_bytes
from superpoint_trt.core.types import OUTPUT_NAMES, Float32, ModelDescription, OutputType, Precision, SuperPointError

LOW_TYPES = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
"""What this stage can write; fp32 and tf32 are the fp32 graph itself."""

QUANTIZED_TYPES = {Precision.INT8: TensorProto.INT8, Precision.FP8: TensorProto.FLOAT8E4M3FN}
"""What `quantize` writes, by the type of its Q/DQ's zero points."""

FULL_TYPE = TensorProto.FLOAT


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


def model_description(model: onnx.ModelProto, path: PathLike) -> ModelDescription:
    """What a model is: its own metadata, or what its names and shapes say.

    Raises:
        SuperPointError: no SuperPoint.
    """
    takes, gives = (
        {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
        for values in (model.graph.input, model.graph.output)
    )
    return own_description(model) or describe(Path(path), None, takes, gives, remedy="make one with superpoint export")


def own_description(model: onnx.ModelProto) -> ModelDescription | None:
    """What a model says of itself in its metadata; None if another tool made it."""
    return ModelDescription.from_metadata({entry.key: entry.value for entry in model.metadata_props})


def node_name(node: onnx.NodeProto) -> str:
    """A node's name, or its output's where another tool gave it none."""
    return str(node.name or node.output[0])


def convolutions(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The convolutions by name, in the graph's order."""
    return {node_name(node): node for node in model.graph.node if node.op_type == "Conv"}


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
    known: dict[int, Precision] = {FULL_TYPE: Precision.FP32}
    known.update({low: precision for precision, low in LOW_TYPES.items()})
    return known.get(types.pop()) if len(types) == 1 else None


def raw_heads(model: onnx.ModelProto, path: PathLike) -> onnx.ModelProto:
    """A model of any type cut back to its two raw heads: the same network as `heads`.

    Args:
        model: whose last convolutions are the heads; left as it is.
        path: for the error.

    Raises:
        SuperPointError: it has not exactly two last convolutions, one of 65 channels (stride 8).
    """
    description = model_description(model, path)
    cut = copy.deepcopy(model)
    ends = _last_convolutions(cut.graph)
    known = constants(cut.graph)
    channels = {node_name(node): known[node.input[1]].dims[0] for node in ends if node.input[1] in known}
    cells = description.stride_px**2 + 1
    if len(channels) != 2 or list(channels.values()).count(cells) != 1:
        raise SuperPointError(f"{path} ends in convolutions of {channels} channels; expected {cells} and descriptors.")
    names = OUTPUT_NAMES[OutputType.HEADS]
    del cut.graph.output[:]
    for node in ends:
        name = names[0] if channels[node_name(node)] == cells else names[1]
        if node.output[0] != name:
            cut.graph.node.append(helper.make_node("Identity", [node.output[0]], [name], name=name))
        cut.graph.output.append(
            helper.make_tensor_value_info(name, FULL_TYPE, ["b", channels[node_name(node)], "h", "w"])
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


def constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Initializers, and the tensors of Constant nodes, by name."""
    found = {constant.name: constant for constant in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = copy.deepcopy(node.attribute[0].t)
            tensor.name = node.output[0]
            found[tensor.name] = tensor
    return found


def check_quantizable(model: onnx.ModelProto) -> None:
    """Refuses what is no plain fp32 network.

    Raises:
        SuperPointError: saying what it is.
    """
    if quantized_type(model):
        raise SuperPointError("the .onnx is already quantised; use the fp32 .onnx it was made from.")
    found = convolution_type(model)
    if found is not Precision.FP32:
        what = f"its convolutions are {found.value}" if found else "no convolution with plain fp32 weights was found"
        raise SuperPointError(f"quantising needs an fp32 .onnx, but {what}; export it with fp32.")


def set_initializers(graph: onnx.GraphProto, values: Mapping[str, Float32]) -> None:
    """Puts new values into initializers and Constant nodes."""
    for constant in graph.initializer:
        if constant.name in values:
            constant.CopyFrom(numpy_helper.from_array(values[constant.name], constant.name))
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in values:
            node.attribute[0].t.CopyFrom(numpy_helper.from_array(values[node.output[0]], node.output[0]))
