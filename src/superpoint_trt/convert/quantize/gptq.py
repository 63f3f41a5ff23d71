"""int8 weights rounded so that their errors cancel, instead of each to its nearest step.

After GPTQ (Frantar et al. 2023, "GPTQ: Accurate post-training quantization for generative pre-trained transformers",
section 3): the weights of an output channel are rounded one after the other, and what each loses is made up for by
those still to come, as far as what the convolution reads allows: inputs that go together can stand in for each other.
That needs the second moments of the inputs, measured here on some of the images of calibration. Nothing about the graph
changes but the integers in it, so nothing changes in speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from superpoint_trt.convert.onnx_file import check_quantizable, constants, load_onnx, model_description
from superpoint_trt.convert.quantize.calibrate import Activations, CalibrationImage, network_inputs, spread_evenly
from superpoint_trt.convert.quantize.qdq import INT8_LARGEST, quantize
from superpoint_trt.convert.quantize.ranges_file import Calibration, check_same_network, weight_digest
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import Float32, SuperPointError

IMAGES = 24
"""Moments are means over many places, so few images are enough."""
POSITIONS = 1500
"""Of each image and tensor: 36,000 in all, for at most 1152 weights a channel."""
DAMPING = 0.01
"""Of the mean second moment, added to each: what the samples do not show must not be leant on."""


def round_weights(
    model: PathLike, calibration: Calibration, given: Sequence[CalibrationImage], progress: Progress | None = None
) -> Calibration:
    """Rounds every weight that int8 would round, with error feedback.

    Args:
        model: fp32 SuperPoint .onnx of any type.
        calibration: its ranges.
        given: images as `calibration.calibrate` takes them; `IMAGES` of them are used.
        progress: called with (images and layers done, in all).

    Returns:
        The calibration with `weights`, which `quantize` takes in place of the nearest steps.

    Raises:
        SuperPointError: no fp32 model, ranges of another one, or no usable image.
    """
    source = load_onnx(model)
    check_quantizable(source)
    description = model_description(source, model)
    check_same_network(calibration, description, model)
    graph = quantize(source, replace(calibration, weights={}))
    layers = _layers(graph)
    few = spread_evenly(given, min(IMAGES, len(given)))
    steps = Steps(len(few) + len(layers), progress)
    activations = Activations(graph, model, description.checkpoint_sha256 is not None)
    moments = {layer.reads: np.zeros((layer.size, layer.size)) for layer in layers}
    used = 0
    for number, image in enumerate(network_inputs(few, description)):
        steps.advance()
        if image is None:
            continue
        try:
            values = dict(activations(image))
        except SuperPointError:  # `calibrate` has said so
            continue
        used += 1
        for (tensor, kernel), sums in moments.items():
            patches = _patches(values[tensor][0], kernel, np.random.default_rng(number))
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
class _Layer:
    """A convolution whose weights are in int8."""

    name: str
    """Of its weights' tensor."""
    weight: Float32
    """(O, I, K, K)."""
    steps: Float32
    """(O,): what one step of int8 is worth."""
    tensor: str
    """What it reads."""

    @property
    def size(self) -> int:
        """Weights of an output channel."""
        return int(np.prod(self.weight.shape[1:]))

    @property
    def reads(self) -> tuple[str, int]:
        """Tensor, and the side of the kernel: what moments depend on."""
        return self.tensor, self.weight.shape[2]


def _layers(graph: onnx.ModelProto) -> list[_Layer]:
    """The quantised convolutions of a Q/DQ graph whose reads `_patches` gathers: others stay at the nearest step."""
    made_by = {node.output[0]: node for node in graph.graph.node}
    known = constants(graph.graph)
    found = []
    for node in graph.graph.node:
        dequantize = made_by.get(node.input[1]) if node.op_type == "Conv" else None
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or not _plain(node):
            continue
        name = made_by[dequantize.input[0]].input[0]
        weight, steps = (numpy_helper.to_array(known[key]) for key in (name, dequantize.input[1]))
        if weight.ndim == 4 and weight.shape[2] == weight.shape[3] and weight.shape[2] % 2:
            found.append(_Layer(name, weight, steps, node.input[0]))
    return found


def _plain(convolution: onnx.NodeProto) -> bool:
    """Neither groups nor gaps."""
    return all(
        set(attribute.ints or [attribute.i]) == {1}
        for attribute in convolution.attribute
        if attribute.name in ("group", "dilations")
    )


def _patches(values: Float32, kernel: int, rng: np.random.Generator) -> Float32:
    """(C, H, W) -> (POSITIONS, C * kernel^2): what the convolution reads at random places, zeros past the edge."""
    edge = kernel // 2
    padded = np.pad(values, ((0, 0), (edge, edge), (edge, edge)))
    y, x = (rng.integers(0, side, POSITIONS) for side in values.shape[1:])
    shifted = [padded[:, y + dy, x + dx] for dy in range(kernel) for dx in range(kernel)]
    patches: Float32 = np.stack(shifted, axis=1).reshape(-1, POSITIONS).T
    return patches


def _feed_back(layer: _Layer, moments: NDArray[np.float64]) -> NDArray[np.int8]:
    """(O, I, K, K): steps of int8, each channel's weights rounded in order (GPTQ, algorithm 1, in one block)."""
    damped = moments + np.eye(layer.size) * DAMPING * np.mean(np.diag(moments))
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T
    left = layer.weight.reshape(len(layer.weight), -1) / layer.steps[:, None].astype(np.float64)
    whole = np.empty(left.shape, np.int8)
    for index in range(layer.size):
        whole[:, index] = np.clip(np.rint(left[:, index]), -INT8_LARGEST, INT8_LARGEST)
        lost = (left[:, index] - whole[:, index]) / factor[index, index]
        left[:, index + 1 :] -= lost[:, None] * factor[index, index + 1 :]
    return whole.reshape(layer.weight.shape)
