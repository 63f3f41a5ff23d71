"""What only TensorRT 8.6 needs: types as layer constraints, and sliding maxima in a form that it fuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.convert.cast import quantized_chain, to_precision
from superpoint_trt.convert.onnx_file import QUANTIZED_TYPES, convolution_type, own_description
from superpoint_trt.core.matcher import METADATA_KEY
from superpoint_trt.core.types import OutputType, Precision


def constrain_types(trt: Any, network: Any, model: onnx.ModelProto) -> None:
    """Sets each layer's precision. TensorRT 10 and newer read it off the graph; 8.6 needs it as layer constraints.

    Without constraints, TensorRT 8.6 may also run softmax, norms and coordinates in fp16. It gets a quantized graph in
    fp32, because a cast between convolution and Q/DQ pair would keep the two from becoming one kernel. Layers that the
    pairs touch get no constraint. Neither do a matcher's layers that only move fp16 numbers: where its products become
    one region, TensorRT 8.6 moves casts across them, and then refuses a type that was set ("Mismatched type").

    Args:
        trt: TensorRT's module.
        network: the parsed network; changed in place.
        model: the graph that it was parsed from.
    """
    quantized = convolution_type(model) in QUANTIZED_TYPES
    free = quantized_chain(model.graph) if quantized else set()
    low = _fp16_tensors(to_precision(model, Precision.FP16) if quantized else model)
    matcher = any(entry.key == METADATA_KEY for entry in model.metadata_props)
    named = {name for node in model.graph.node for name in node.output}
    kinds = trt.LayerType
    moving = (kinds.SHUFFLE, kinds.SLICE, kinds.CONCATENATION, kinds.GATHER) if matcher else ()
    untouched = (kinds.CONSTANT, kinds.SHAPE, kinds.CAST, kinds.QUANTIZE, kinds.DEQUANTIZE)
    floats = (trt.float32, trt.float16)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        # A comparison has no float output, and must not be made in fp16 either.
        if layer.type in untouched or not any(tensor and tensor.dtype in floats for tensor in (*inputs, *outputs)):
            continue
        in_fp16 = any(output.name in low for output in outputs)
        if matcher:
            # The parser's own layers, which have names of their own, stay in the type that they were parsed with.
            in_fp16 |= any(output.name not in named and output.dtype == trt.float16 for output in outputs)
            if in_fp16 and layer.type in moving:
                continue
        # ReLU and pool in front of a Q may become part of its kernel, so they get no constraint either.
        if any(output.name in free for output in outputs) or (
            quantized and in_fp16 and layer.type != kinds.CONVOLUTION
        ):
            continue
        dtype = trt.float16 if in_fp16 else trt.float32
        layer.precision = dtype
        for i, output in enumerate(outputs):
            if output.dtype in floats:
                layer.set_output_type(i, dtype)
    if quantized:
        for index in range(network.num_outputs):
            output = network.get_output(index)
            if output.name in low:
                output.dtype = trt.float16


def _fp16_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors that are fp16."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.value_info, *graph.output]
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT16}


_MOST_SHIFT_PX = 8
"""Largest NMS radius that `shift_windows` rewrites. A larger one would need too many copies."""


def shift_windows(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrites the sliding maxima of a `keypoints` graph as maxima of shifted copies, which TensorRT 8.6 fuses.

    Suppression at radius 4 and 640x480 takes 48 us in this form and 62 us with pools (H100). Newer versions fuse pools
    themselves. TensorRT-RTX takes seconds to compile this form, and with free sizes does not come to an end.

    Args:
        model: not changed.

    Returns:
        A new model; or `model` itself if another tool made it, its size is free, or it does not decode.
    """
    own = own_description(model)
    if own is None or own.type is not OutputType.KEYPOINTS or own.dynamic:
        return model
    shifted = onnx.ModelProto()
    shifted.CopyFrom(model)
    nodes = list(shifted.graph.node)
    readers = {name: node for node in nodes for name in node.input}
    del shifted.graph.node[:]
    replaced: set[str] = set()
    for node in nodes:
        below = readers.get(node.output[0])
        if _slides(node, 3) and below is not None and _slides(below, 2):
            shifted.graph.node.extend(_shifts(node, below.output[0], shifted.graph))
            replaced.update(below.output)
        elif node.output[0] not in replaced:
            shifted.graph.node.append(node)
    return shifted


def _slides(node: onnx.NodeProto, axis: int) -> bool:
    """Whether a node is the suppression's maximum along one axis (2 or 3)."""
    sizes = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    kernel = sizes.get("kernel_shape", [])
    across = [kernel[i] for i in (0, 1) if i != axis - 2] if len(kernel) == 2 else []
    return (
        node.op_type == "MaxPool"
        and across == [1]
        and max(kernel) <= 2 * _MOST_SHIFT_PX + 1
        and not sizes.get("strides")
    )


def _shifts(pool: onnx.NodeProto, output: str, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes in place of a pool: along columns, then rows, the largest of 2 r + 1 copies, padded with zeros.

    Zeros change no maximum, because no score is negative.
    """
    reach = next(max(attribute.ints) for attribute in pool.attribute if attribute.name == "kernel_shape") - 1
    known = {constant.name for constant in graph.initializer}

    def integers(*values: int) -> str:
        name = "shift_" + "_".join(str(value).replace("-", "m") for value in values)
        if name not in known:
            known.add(name)
            graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    x = f"{output}.padded"
    nodes = [helper.make_node("Pad", [pool.input[0], integers(*[0, 0, reach // 2, reach // 2] * 2)], [x], name=x)]
    for axis, largest in ((3, f"{output}.rows"), (2, output)):
        copies = [f"{largest}.{k}" for k in range(reach + 1)]
        for k, copy in enumerate(copies):
            end = k - reach if k < reach else 2**31 - 1
            nodes.append(helper.make_node("Slice", [x, *map(integers, (k, end, axis))], [copy], name=copy))
        nodes.append(helper.make_node("Max", copies, [largest], name=largest))
        x = largest
    return nodes
