"""Rounds int8 weights so that their errors cancel, instead of each to its nearest step.

The method is GPTQ (Frantar et al. 2023, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", section 3). The weights of an output channel are rounded one after the other, and the weights still to
come make up for what each loses. That works as far as the convolution's inputs are correlated, so it needs their second
moments, measured here on some of the calibration images. Only the integers in the graph change, so its speed does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from superpoint_trt.convert.onnx_file import OnnxSource, check_quantizable, constants, read_onnx
from superpoint_trt.convert.quantize.calibrate import (
    Activations,
    CalibrationImage,
    is_own,
    network_inputs,
    spread_evenly,
)
from superpoint_trt.convert.quantize.qdq import INT8_LARGEST, quantize
from superpoint_trt.convert.quantize.ranges_file import Calibration, check_same_network, weight_digest
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import Float32, SuperPointError

IMAGES = 24
"""Images to measure moments on. Moments are means over many places, so few images are enough."""
POSITIONS = 1500
"""Random places measured in each image and tensor: 36,000 in all, for at most 1152 weights a channel."""
DAMPING = 0.01
"""Share of the mean second moment that is added to each, so that rounding does not rely on chance correlations."""


def round_weights(
    model: OnnxSource,
    calibration: Calibration,
    calibration_images: Sequence[CalibrationImage],
    progress: Progress | None = None,
) -> Calibration:
    """Rounds the int8 weights of every convolution, with error feedback.

    Args:
        model: fp32 SuperPoint .onnx of any type.
        calibration: its ranges.
        calibration_images: as `calibrate` takes them; `IMAGES` of them are used.
        progress: called with (images and layers done, in all).

    Returns:
        The calibration with `weights`, which `quantize` takes in place of the nearest steps.

    Raises:
        SuperPointError: the model is not fp32, the ranges are of another network, or no image can be used.
    """
    source = read_onnx(model)
    check_quantizable(source.model)
    description = source.description
    check_same_network(calibration, description, source.path)
    graph = quantize(source.model, replace(calibration, weights={}))
    layers = _layers(graph)
    few = spread_evenly(calibration_images, min(IMAGES, len(calibration_images)))
    steps = Steps(len(few) + len(layers), progress)
    activations = Activations(graph, source.path, any_size=is_own(description))
    moments = {layer.reads: np.zeros((layer.size, layer.size)) for layer in layers}
    used = 0
    for number, image in enumerate(network_inputs(few, description)):
        steps.advance()
        if image is None:
            continue
        try:
            values = dict(activations(image))
        except SuperPointError:  # `calibrate` has warned of it
            continue
        used += 1
        for (tensor, window), sums in moments.items():
            patches = _patches(values[tensor][0], window, np.random.default_rng(number))
            sums += patches.T @ patches
    if not used:
        raise SuperPointError(f"none of {len(few)} images can be used to round the weights on.")
    rounded = {}
    for layer in layers:
        rounded[layer.name] = _feed_back(layer, moments[layer.reads])
        steps.advance()
    made_from = {layer.name: weight_digest(layer.weight) for layer in layers}
    return replace(calibration, weights=rounded, rounded_from=made_from)


@dataclass(frozen=True)
class _Window:
    """Which values a convolution reads for each value it gives."""

    side: int
    """Of the square kernel."""
    stride: int = 1
    padding: int = 0
    """Zeros on each of the four sides."""


@dataclass(frozen=True)
class _Layer:
    """A convolution whose weights are in int8."""

    name: str
    """Name of the weights' tensor."""
    weight: Float32
    """(O, I, K, K)."""
    steps: Float32
    """(O,): the size of one int8 step in each output channel."""
    tensor: str
    """Name of the tensor that the convolution reads."""
    window: _Window

    @property
    def size(self) -> int:
        """Number of weights of an output channel."""
        return int(np.prod(self.weight.shape[1:]))

    @property
    def reads(self) -> tuple[str, _Window]:
        """The tensor and the window: convolutions that share both share their moments."""
        return self.tensor, self.window


def _layers(graph: onnx.ModelProto) -> list[_Layer]:
    """The quantized convolutions with square windows, which `_patches` can read; not the others."""
    made_by = {node.output[0]: node for node in graph.graph.node}
    known = constants(graph.graph)
    found = []
    for node in graph.graph.node:
        dequantize = made_by.get(node.input[1]) if node.op_type == "Conv" else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or not _is_plain(node):
            continue
        name = made_by[dequantize.input[0]].input[0]
        weight, steps = (numpy_helper.to_array(known[key]) for key in (name, dequantize.input[1]))
        window = _window(node, weight)
        if window is not None:
            found.append(_Layer(name, weight, steps, node.input[0], window))
    return found


def _window(convolution: onnx.NodeProto, weight: Float32) -> _Window | None:
    """What a convolution reads; None if kernel, stride or padding are not the same along both axes."""
    said = {attribute.name: attribute for attribute in convolution.attribute}
    strides = set(said["strides"].ints) if "strides" in said else {1}
    pads = set(said["pads"].ints) if "pads" in said else {0}
    side = weight.shape[2]
    if "auto_pad" in said and said["auto_pad"].s.startswith(b"SAME"):
        pads = {side // 2} if side % 2 and strides == {1} else set()
    if weight.ndim != 4 or side != weight.shape[3] or len(strides) != 1 or len(pads) != 1:
        return None
    return _Window(side, strides.pop(), pads.pop())


def _is_plain(convolution: onnx.NodeProto) -> bool:
    """Whether a convolution has neither groups nor dilation."""
    return all(
        set(attribute.ints or [attribute.i]) == {1}
        for attribute in convolution.attribute
        if attribute.name in ("group", "dilations")
    )


def _patches(values: Float32, window: _Window, rng: np.random.Generator) -> Float32:
    """The inputs of a convolution at random places: (C, H, W) -> (POSITIONS, C * side^2), zeros past the edge."""
    edge, side, stride = window.padding, window.side, window.stride
    padded = np.pad(values, ((0, 0), (edge, edge), (edge, edge)))
    counts = ((length - side) // stride + 1 for length in padded.shape[1:])
    y, x = (rng.integers(0, count, POSITIONS) * stride for count in counts)
    shifted = [padded[:, y + dy, x + dx] for dy in range(side) for dx in range(side)]
    patches: Float32 = np.stack(shifted, axis=1).reshape(-1, POSITIONS).T
    return patches


def _feed_back(layer: _Layer, moments: NDArray[np.float64]) -> NDArray[np.int8]:
    """Rounds a layer's weights in order (GPTQ, algorithm 1, in one block).

    Args:
        layer: with n weights an output channel.
        moments: (n, n) sums of products of the inputs.

    Returns:
        (O, I, K, K) int8 steps.
    """
    damped = moments + np.eye(layer.size) * DAMPING * np.mean(np.diag(moments))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = layer.weight.reshape(len(layer.weight), -1) / layer.steps[:, None].astype(np.float64)
    whole = np.empty(left.shape, np.int8)
    for index in range(layer.size):
        whole[:, index] = np.clip(np.rint(left[:, index]), -INT8_LARGEST, INT8_LARGEST)
        lost = (left[:, index] - whole[:, index]) / factor[index, index]
        left[:, index + 1 :] -= lost[:, None] * factor[index, index + 1 :]
    return whole.reshape(layer.weight.shape)
