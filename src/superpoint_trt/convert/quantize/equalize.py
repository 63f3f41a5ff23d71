"""Channels of one tensor brought to like ranges, so that one int8 scale fits them all.

A quantised tensor has one scale, so a channel that stays small next to a large one is left with few of the 127 steps.
ReLU, max-pool and zero padding commute with a positive factor, so a channel may be multiplied by one where it is made
and divided by it where it is read: the network computes the same. The factor balances the channel's range against that
of the weights that read it (Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction", section 4.1, with measured ranges as in Xiao et al. 2023, "SmoothQuant", equation 4 at 1/2).
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
"""Of the largest: channels below are as good as dead and get no larger factor for it."""


@dataclass(frozen=True)
class _Site:
    """A tensor whose channels can be scaled: the node that makes it, and the convolutions that read it."""

    maker: onnx.NodeProto
    readers: list[onnx.NodeProto]


def sites(model: onnx.ModelProto) -> list[str]:
    """The tensors whose channels can be scaled."""
    return list(_sites(model))


def factors(model: onnx.ModelProto, ranges: Mapping[str, NDArray[np.floating]]) -> dict[str, list[float]]:
    """The factor of each channel.

    Args:
        model: fp32 graph.
        ranges: tensor name -> (C,) largest magnitude of each channel, for all of `sites`.

    Returns:
        Tensor name -> C factors, of three digits, the largest 1.
    """
    known = constants(model.graph)
    found = {}
    for name, site in _sites(model).items():
        weights = [_channel_weights(numpy_helper.to_array(known[reader.input[1]])) for reader in site.readers]
        read = np.max(weights, axis=0)
        made = ranges[name]
        balance = np.sqrt(np.maximum(read, _SMALLEST * read.max()) / np.maximum(made, _SMALLEST * made.max()))
        found[name] = [float(f"{value:.3g}") for value in balance / balance.max()]
    return found


def equalize(model: onnx.ModelProto, by_tensor: Mapping[str, list[float]]) -> onnx.ModelProto:
    """The same network with channels scaled where they are made, and back where they are read.

    Args:
        model: fp32 graph; left as it is.
        by_tensor: of `factors`.

    Raises:
        SuperPointError: a tensor that cannot be scaled, or another number of channels.
    """
    scaled = copy.deepcopy(model)
    known = {name: numpy_helper.to_array(value) for name, value in constants(scaled.graph).items()}
    places = _sites(scaled)
    changed: dict[str, Float32] = {}
    for name, values in by_tensor.items():
        factor: Float32 = np.array(values, np.float32)
        if name not in places:
            raise SuperPointError(f"the channels of {name} cannot be scaled in this graph: calibrate this model anew.")
        maker, readers = places[name].maker, places[name].readers
        # Convolution and BatchNormalization: weight or scale, and bias.
        for tensor in maker.input[1:3]:
            _scale(tensor, factor, 0, known, changed)
        for reader in readers:
            _scale(reader.input[1], np.float32(1) / factor, 1, known, changed)
    set_initializers(scaled.graph, changed)
    return scaled


def _scale(
    name: str, factor: Float32, axis: int, known: Mapping[str, NDArray[np.float32]], changed: dict[str, Float32]
) -> None:
    values = changed.get(name, known[name])
    if values.shape[axis] != len(factor):
        raise SuperPointError(
            f"{name} has {values.shape[axis]} channels, the calibration {len(factor)}: calibrate this model anew."
        )
    shape = [1] * values.ndim
    shape[axis] = len(factor)
    changed[name] = np.asarray(values * factor.reshape(shape), np.float32)


def _sites(model: onnx.ModelProto) -> dict[str, _Site]:
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {value.name: [onnx.NodeProto()] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    inputs = dict.fromkeys(node.input[0] for node in convolutions(model).values())
    known = constants(graph)
    traced = {name: _site(name, makers, readers) for name in inputs}
    return {
        name: site
        for name, site in traced.items()
        if site and all(weight in known for node in (site.maker, *site.readers) for weight in node.input[1:2])
    }


def _site(name: str, makers: Mapping[str, onnx.NodeProto], readers: Mapping[str, list[onnx.NodeProto]]) -> _Site | None:
    """Walks back over what commutes with a factor; None if anything but convolutions reads along the way.

    Nor if one has groups: its weights hold a part of the channels only.
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
    return _Site(node, convolving)


def _has_groups(convolution: onnx.NodeProto) -> bool:
    return any(attribute.name == "group" and attribute.i != 1 for attribute in convolution.attribute)


def _channel_weights(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """(O, C, h, w) -> (C,) largest magnitude that reads each channel, as a share of its row's largest."""
    magnitude = np.abs(weight)
    rows = magnitude.max(axis=(1, 2, 3), keepdims=True)
    share: NDArray[np.float32] = (magnitude / np.where(rows > 0, rows, 1)).max(axis=(0, 2, 3))
    return share
