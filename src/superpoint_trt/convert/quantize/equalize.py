"""Scales the channels of a tensor to similar ranges, so that one int8 scale fits them all.

A quantized tensor has one scale, so a channel that is small next to a large one gets few of the 127 steps. ReLU,
max-pool and zero padding commute with a positive factor. So a channel can be multiplied by a factor where it is made
and divided by it where it is read, and the network computes the same. The factor is the square root of w / r, where r
is the channel's range and w the range of the weights that read it (Nagel et al. 2019, "Data-free quantization through
weight equalization and bias correction", section 4.1; with measured ranges as in Xiao et al. 2023, "SmoothQuant",
equation 4 at 1/2).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from superpoint_trt.convert.onnx_file import constants, convolutions, set_initializers
from superpoint_trt.core.types import Float32, SuperPointError

_SMALLEST = 1e-3
"""Smallest range that counts, as a share of the tensor's largest. A channel below it is as good as dead; it gets the
factor of this share."""


@dataclass(frozen=True)
class _Scalable:
    """The nodes around a tensor whose channels can be scaled: the one that makes it, the convolutions that read it."""

    maker: onnx.NodeProto
    readers: list[onnx.NodeProto]


def scalable_tensors(model: onnx.ModelProto) -> list[str]:
    """Names of the tensors whose channels can be scaled."""
    return list(_scalable(model))


def factors(model: onnx.ModelProto, ranges: Mapping[str, NDArray[np.floating]]) -> dict[str, list[float]]:
    """Balances each channel's range against the range of the weights that read it.

    Args:
        model: fp32 graph.
        ranges: tensor name -> (C,) largest magnitude of each channel, for every one of `scalable_tensors`.

    Returns:
        Tensor name -> C factors, each rounded to three digits, the largest 1.
    """
    known = constants(model.graph)
    found = {}
    for name, nodes in _scalable(model).items():
        weights = [_channel_weights(numpy_helper.to_array(known[reader.input[1]])) for reader in nodes.readers]
        read = np.max(weights, axis=0)
        made = ranges[name]
        balance = np.sqrt(np.maximum(read, _SMALLEST * read.max()) / np.maximum(made, _SMALLEST * made.max()))
        found[name] = [float(f"{value:.3g}") for value in balance / balance.max()]
    return found


def equalize(model: onnx.ModelProto, by_tensor: Mapping[str, list[float]]) -> onnx.ModelProto:
    """Scales channels where they are made, and back where they are read.

    Args:
        model: fp32 graph; not changed.
        by_tensor: what `factors` returned.

    Returns:
        A new model that computes the same.

    Raises:
        SuperPointError: a tensor cannot be scaled, or has another number of channels.
    """
    scaled = copy.deepcopy(model)
    known = {name: numpy_helper.to_array(value) for name, value in constants(scaled.graph).items()}
    scalable = _scalable(scaled)
    changed: dict[str, Float32] = {}
    for name, values in by_tensor.items():
        factor: Float32 = np.array(values, np.float32)
        if name not in scalable:
            raise SuperPointError(f"the channels of {name} cannot be scaled in this graph: calibrate this model anew.")
        maker, readers = scalable[name].maker, scalable[name].readers
        # Inputs 1 and 2: weight and bias of a convolution, scale and bias of a BatchNormalization.
        for tensor in maker.input[1:3]:
            _scale(tensor, factor, 0, known, changed)
        for reader in readers:
            _scale(reader.input[1], np.float32(1) / factor, 1, known, changed)
    set_initializers(scaled.graph, changed)
    return scaled


def _scale(
    name: str, factor: Float32, axis: int, known: Mapping[str, NDArray[np.float32]], changed: dict[str, Float32]
) -> None:
    """Multiplies one constant along `axis` by the factors, and notes the result in `changed`."""
    values = changed.get(name, known[name])
    if values.shape[axis] != len(factor):
        raise SuperPointError(
            f"{name} has {values.shape[axis]} channels, the calibration {len(factor)}: calibrate this model anew."
        )
    shape = [1] * values.ndim
    shape[axis] = len(factor)
    changed[name] = np.asarray(values * factor.reshape(shape), np.float32)


def _scalable(model: onnx.ModelProto) -> dict[str, _Scalable]:
    """The nodes around each tensor that can be scaled, by the tensor's name."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {value.name: [onnx.NodeProto()] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    inputs = dict.fromkeys(node.input[0] for node in convolutions(model).values())
    known = constants(graph)
    traced = {name: _trace(name, makers, readers) for name in inputs}
    return {
        name: nodes
        for name, nodes in traced.items()
        if nodes and all(weight in known for node in (nodes.maker, *nodes.readers) for weight in node.input[1:2])
    }


def _trace(
    name: str, makers: Mapping[str, onnx.NodeProto], readers: Mapping[str, list[onnx.NodeProto]]
) -> _Scalable | None:
    """Walks from a tensor back over ReLU and max-pool to the node that makes its channels.

    Returns:
        None if another node than a convolution reads a tensor on the way, or if a convolution has groups: its weights
        hold only a part of the channels.
    """
    convolving = readers[name]
    if not all(node.op_type == "Conv" and node.input[0] == name and not _has_groups(node) for node in convolving):
        return None
    node = makers.get(name)
    while node is not None and node.op_type in ("Relu", "MaxPool"):
        source = node.input[0]
        if len(readers[source]) != 1:
            return None
        node = makers.get(source)
    if node is None or node.op_type not in ("Conv", "BatchNormalization") or len(node.input) < 3:
        return None
    return _Scalable(node, convolving)


def _has_groups(convolution: onnx.NodeProto) -> bool:
    return any(attribute.name == "group" and attribute.i != 1 for attribute in convolution.attribute)


def _channel_weights(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(O, C, h, w) -> (C,): the largest weight that reads each channel, as a share of its output channel's largest."""
    magnitude = np.abs(weight)
    rows = magnitude.max(axis=(1, 2, 3), keepdims=True)
    share: NDArray[np.float32] = (magnitude / np.where(rows > 0, rows, 1)).max(axis=(0, 2, 3))
    return share
