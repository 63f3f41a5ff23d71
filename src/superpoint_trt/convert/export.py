"""Checkpoint -> fp32 .onnx, written node by node rather than traced.

Twelve convolutions and two heads are a page of ONNX. Written by hand they are the same at every opset, have stable
names, lie in one file and need no torch. Tests compare the result with `checkpoint/reference.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from superpoint_trt._version import __version__
from superpoint_trt.checkpoint.layouts import Checkpoint, lifted, load
from superpoint_trt.checkpoint.topology import DESCRIPTORS, IMAGE, LOGITS, Convolution
from superpoint_trt.convert.export_options import ExportOptions
from superpoint_trt.convert.fold import (
    FoldedLayer,
    folded_layers,
    reach_of_padding_px,
)
from superpoint_trt.convert.graph_decode import write_keypoints, write_score_map, write_unit_length
from superpoint_trt.convert.graph_writer import GraphWriter
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, file_sha256, write_atomically
from superpoint_trt.core.networks import weights_path
from superpoint_trt.core.types import (
    INPUT_NAME,
    OUTPUT_NAMES,
    ModelDescription,
    OutputType,
    Sampling,
    SuperPointError,
)

__all__ = ["ExportOptions", "export", "exported_description", "to_onnx"]


def export(
    weights: PathLike, output: PathLike, options: ExportOptions | None = None, sampling: Sampling | None = None
) -> Path:
    """Converts a checkpoint file to one .onnx file.

    Args:
        weights: checkpoint of any known layout (`checkpoint.layouts.load`).
        output: the .onnx to write.
        options: type, size, decode, opset.
        sampling: overrides the descriptor sampling that the checkpoint's family implies.

    Returns:
        The path written.

    Raises:
        SuperPointError: the checkpoint, an option or the output path is unusable. Nothing is written then.
    """
    output = check_writable(output)
    if output.suffix.lower() != ".onnx":
        raise SuperPointError(f"output {output}: an exported model's name ends in .onnx.")
    check_distinct(output, weights)
    model = to_onnx(load(weights, sampling), options or ExportOptions(), source=str(weights))
    return write_atomically(output, model.SerializeToString())


def to_onnx(checkpoint: Checkpoint, options: ExportOptions, source: str = "the checkpoint") -> onnx.ModelProto:
    """Converts a checkpoint in memory.

    Args:
        checkpoint: what to convert.
        options: type, size, decode, opset, descriptors.
        source: names the checkpoint in an error.

    Returns:
        The checked, shape-inferred model with this package's metadata.

    Raises:
        SuperPointError: an option is out of range, or the checkpoint has no BatchNorm to fold, or no map to the
            descriptors, as asked.
    """
    options.validate(checkpoint.stride_px)
    if options.descriptors_of is not None:
        checkpoint = lifted(checkpoint, file_sha256(weights_path(options.descriptors_of)), source)
    if options.decode.subpixel is None:
        options = replace(options, decode=replace(options.decode, subpixel=checkpoint.subpixel))
    graph = GraphWriter(options.opset)
    logits, coarse = (_compact if checkpoint.topology else _vgg)(graph, checkpoint, options)
    if options.type is OutputType.HEADS:
        graph.rename(logits, "logits")
        graph.rename(coarse, "coarse_descriptors")
    else:
        scores = write_score_map(graph, logits, checkpoint.stride_px)
        if options.type is OutputType.DENSE:
            write_unit_length(graph, coarse, axis=1, name="descriptors")
            graph.node("Squeeze", [scores], output="scores", axes=[1])
        else:
            descriptors = write_unit_length(graph, coarse, axis=1, name="dense_descriptors")
            write_keypoints(graph, scores, descriptors, checkpoint, options)
    return _model(graph, checkpoint, options)


# ------------------------------------------------------------------------------------------------------- the network


def _vgg(graph: GraphWriter, checkpoint: Checkpoint, options: ExportOptions) -> tuple[str, str]:
    """Writes backbone and both heads (DeTone et al. 2018, section 3); returns the names of the two raw heads."""
    layers = folded_layers(checkpoint, options)
    x = INPUT_NAME
    for stage in range(1, checkpoint.stages + 1):
        pool = stage < checkpoint.stages
        x = _block(graph, x, f"conv{stage}a", layers)
        x = _block(graph, x, f"conv{stage}b", layers, pool=pool)
    heads = []
    for head in ("convP", "convD"):
        hidden = _block(graph, x, f"{head}a", layers)
        heads.append(_convolution(graph, hidden, f"{head}b", layers[f"{head}b"]))
    return heads[0], heads[1]


def _compact(graph: GraphWriter, checkpoint: Checkpoint, options: ExportOptions) -> tuple[str, str]:
    """Writes the convolutions of a topology; returns the names of the two raw heads."""
    layers = folded_layers(checkpoint, options)
    made = {IMAGE: INPUT_NAME}
    for layer in checkpoint.topology:
        x = graph.concat([made[name] for name in layer.inputs], f"{layer.name}.inputs")
        x = _convolution(graph, x, layer.name, layers[layer.name], layer.stride)
        if layer.relu:
            x = graph.node("Relu", [x], output=f"{layer.name}.relu")
        if layer.added_to:
            x = graph.repeat_2x2(x, made[layer.added_to], f"{layer.name}.repeated")
            x = graph.node("Add", [made[layer.added_to], x], output=f"{layer.name}.sum")
        made[layer.name] = x
    return made[LOGITS], made[DESCRIPTORS]


def _block(graph: GraphWriter, x: str, name: str, layers: dict[str, FoldedLayer], pool: bool = False) -> str:
    """Writes convolution, ReLU, the BatchNorm that could not be folded, and the stage's max-pool."""
    layer = layers[name]
    x = graph.node("Relu", [_convolution(graph, x, name, layer)], output=f"{name}.relu")
    # A rising affine map commutes with the maximum: BatchNorm may follow the pool and run on a quarter of the pixels.
    pool_first = pool and layer.scale is not None and bool((layer.scale > 0).all())
    if pool_first:
        x = _max_pool(graph, x, name)
    if layer.scale is not None and layer.shift is not None:
        x = _affine(graph, x, name, layer.scale, layer.shift)
    return _max_pool(graph, x, name) if pool and not pool_first else x


def _convolution(graph: GraphWriter, x: str, name: str, layer: FoldedLayer, stride: int = 1) -> str:
    kernel = layer.weight.shape[2]
    where: dict[str, Any] = {"kernel_shape": [kernel] * 2, "pads": [Convolution.padding(kernel, stride)] * 4}
    if stride > 1:
        where["strides"] = [stride] * 2
    weights = [
        graph.constant(f"{name}.weight", layer.weight.astype(np.float32)),
        graph.constant(f"{name}.bias", layer.bias.astype(np.float32)),
    ]
    return graph.node("Conv", [x, *weights], output=name, **where)


def _affine(graph: GraphWriter, x: str, name: str, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> str:
    """Writes x * scale + shift as one BatchNormalization node, which runtimes run in one pass."""
    parameters = {
        "scale": scale,
        "shift": shift,
        "mean": np.zeros_like(scale),
        "var": np.ones_like(scale),
    }
    inputs = [graph.constant(f"{name}.bn.{key}", value.astype(np.float32)) for key, value in parameters.items()]
    return graph.node("BatchNormalization", [x, *inputs], output=f"{name}.bn", epsilon=0.0)


def _max_pool(graph: GraphWriter, x: str, name: str) -> str:
    return graph.node("MaxPool", [x], output=f"{name}.pool", kernel_shape=[2, 2], strides=[2, 2])


# -------------------------------------------------------------------------------------------------- the file's frame


def _model(graph: GraphWriter, checkpoint: Checkpoint, options: ExportOptions) -> onnx.ModelProto:
    batch = "batch" if options.dynamic or options.max_batch_size > 1 else 1
    height, width = ("height", "width") if options.dynamic else (options.height_px, options.width_px)
    image = helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, [batch, 1, height, width])
    opset = helper.make_opsetid("", options.opset)
    used = {name for node in graph.nodes for name in node.input}
    body = helper.make_graph(
        graph.nodes,
        f"superpoint_{options.type.value}",
        [image],
        _outputs(checkpoint, options, batch),
        initializer=[constant for name, constant in graph.constants.items() if name in used],
    )
    model = helper.make_model(
        body,
        opset_imports=[opset],
        ir_version=helper.find_min_ir_version_for([opset]),
        producer_name="superpoint-trt",
        producer_version=__version__,
    )
    helper.set_model_props(model, exported_description(checkpoint, options).to_metadata())
    model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    onnx.checker.check_model(model, full_check=True)
    return model


def _outputs(checkpoint: Checkpoint, options: ExportOptions, batch: Any) -> list[onnx.ValueInfoProto]:
    stride, n, dim = checkpoint.stride_px, options.max_keypoints, checkpoint.descriptor_dim
    height, width, rows, columns = (
        ("height", "width", f"height/{stride}", f"width/{stride}")
        if options.dynamic
        else (options.height_px, options.width_px, options.height_px // stride, options.width_px // stride)
    )
    shapes: dict[OutputType, Sequence[Sequence[Any]]] = {
        OutputType.DENSE: ([batch, height, width], [batch, dim, rows, columns]),
        OutputType.HEADS: ([batch, stride**2 + 1, rows, columns], [batch, dim, rows, columns]),
        OutputType.KEYPOINTS: ([batch, n, 2], [batch, n], [batch, n, dim], [batch]),
    }
    return [
        helper.make_tensor_value_info(
            name, TensorProto.INT32 if name == "num_keypoints" else TensorProto.FLOAT, list(shape)
        )
        for name, shape in zip(OUTPUT_NAMES[options.type], shapes[options.type])
    ]


def exported_description(checkpoint: Checkpoint, options: ExportOptions) -> ModelDescription:
    """The description that `to_onnx` writes into the model's metadata."""
    # After a change here raise _FORMAT in convert/default_model.py: users' caches hold models described as before.
    decodes = options.type is OutputType.KEYPOINTS
    return ModelDescription(
        type=options.type,
        sampling=checkpoint.sampling,
        family=checkpoint.family,
        checkpoint_sha256=checkpoint.sha256,
        descriptors_of=checkpoint.descriptors_of,
        height_px=options.height_px,
        width_px=options.width_px,
        dynamic=options.dynamic,
        max_batch_size=options.max_batch_size,
        stride_px=checkpoint.stride_px,
        descriptor_dim=checkpoint.descriptor_dim,
        opset=options.opset,
        nms_radius_px=options.decode.nms_radius_px if decodes else None,
        remove_borders_px=options.decode.remove_borders_px if decodes else None,
        threshold=options.decode.threshold if decodes else None,
        max_keypoints=options.max_keypoints if decodes else None,
        subpixel=bool(options.decode.subpixel),
        approximation=f"BatchNorm folded: differs within {reach_of_padding_px(checkpoint)} px of the input's border"
        if options.fold_batchnorm
        else None,
    )
