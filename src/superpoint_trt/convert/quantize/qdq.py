"""Explicit quantization: writes Q/DQ pairs into an fp32 graph, for every runtime that reads them.

Apart from the pairs the result is float32, so onnxruntime runs it as it is. The builder casts the other convolutions to
fp16 (`cast.cast` does it for other builders). Where the pairs lie, and why:

- Every quantized convolution has a pair on its input (one scale) and one on its weights (one scale for each output
  channel), none on output and bias. So convolution, ReLU and the next convolution's Q become one kernel.
- The pair lies behind a max-pool, not in front: rounding is monotonic, so TensorRT moves the Q ahead and pools in int8.
- It lies behind a BatchNorm that could not be folded: in front of it, two roundings would be needed.
- Convolutions that read the same tensor (both heads) share one pair.
- Scales are symmetric, with zero points 0: zero padding stays exact, and TensorRT takes nothing else.
- `COARSE` keeps the convolutions behind the last change of scale in fp16 (the last pooling, stride, or upsampling); the
  command line does so by default. They take little of the time, their fp16 outputs need no conversion, and what they
  round would stay in the result. In the VGG they are all at an eighth of the size, in a network with a branch at a
  sixteenth the heads. If they read a max-pool, its output is still int8 (`fp16_with_int8_input`): else TensorRT 8.6
  pools in float32.
- The first convolution reads the image, whose 255 steps are more than int8's 127: the image is split into several int8
  channels (`split_image`), or the convolution stays in fp16. If several convolutions read the image, they share the
  channels.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from superpoint_trt.convert.onnx_file import (
    QUANTIZED_TYPES,
    OnnxSource,
    check_quantizable,
    constants,
    convolutions,
    infer_shapes,
    node_name,
    read_onnx,
    set_initializers,
    set_metadata,
)
from superpoint_trt.convert.quantize.equalize import equalize
from superpoint_trt.convert.quantize.options import COARSE, FirstConvolution, QuantizeOptions
from superpoint_trt.convert.quantize.ranges_file import Calibration, check_same_network, load_calibration, weight_digest
from superpoint_trt.core.files import PathLike, one_line, write_atomically
from superpoint_trt.core.types import Precision, SuperPointError


def quantize_file(
    model: OnnxSource,
    output: PathLike,
    ranges: PathLike,
    options: QuantizeOptions | None = None,
) -> Path:
    """Quantizes a file (`quantize`).

    Args:
        model: fp32 SuperPoint .onnx.
        output: the .onnx to write.
        ranges: the file that `save_calibration` wrote.
        options: precision, and which convolutions stay in fp16.

    Returns:
        The path written.

    Raises:
        SuperPointError: the ranges are of another network, or `quantize` fails. Nothing is written then.
    """
    source = read_onnx(model)
    description = source.description
    calibration = load_calibration(ranges)
    check_same_network(calibration, description, source.path)
    return write_atomically(output, quantize(source.model, calibration, options).SerializeToString())


@dataclass(frozen=True)
class _QuantizedType:
    """An 8-bit type."""

    largest: float
    """The largest number it represents."""
    opset: int
    """The first opset whose Q/DQ has the type, with a scale for each channel."""


INT8_LARGEST = 127.0

_TYPES: Mapping[Precision, _QuantizedType] = {
    Precision.INT8: _QuantizedType(INT8_LARGEST, 13),
    Precision.FP8: _QuantizedType(448.0, 19),
}


def quantize(
    model: onnx.ModelProto,
    calibration: Calibration,
    options: QuantizeOptions | None = None,
) -> onnx.ModelProto:
    """Writes Q/DQ pairs around convolutions.

    Args:
        model: fp32 graph; not changed.
        calibration: a range for the input of each convolution to quantize; and int8 weights, if it has them.
        options: precision, and which convolutions stay in fp16. None: int8, all convolutions.

    Returns:
        A new fp32 graph with Q/DQ pairs; inputs and outputs as before. The metadata name precision, calibration and the
        convolutions that are not quantized. An opset older than the type needs is raised.

    Raises:
        SuperPointError: the graph is not fp32, a pattern names no convolution, no convolution is left to quantize, a
            range is missing, or the image cannot be split.
    """
    options = options or QuantizeOptions()
    precision = options.precision
    check_quantizable(model)
    if precision not in _TYPES:
        raise SuperPointError(f"precision {precision.value} is not quantized; expected int8 or fp8.")
    if precision is not Precision.INT8:
        calibration = replace(calibration, weights={})
    kept = kept_layers(model, options)
    chosen = [name for name in convolutions(model) if name not in kept]
    if not chosen:
        raise SuperPointError(f"nothing is left to quantise: all convolutions are kept ({', '.join(kept)}).")
    quantized_first = [name for name in first_convolutions(model) if name not in kept]
    first = _first_convolution(model, options) if quantized_first else FirstConvolution.FP16
    if first is FirstConvolution.PARTS:
        model, calibration = split_image(model, calibration, quantized_first)
    quantized = with_opset(equalize(model, calibration.channels), _TYPES[precision].opset)
    int8_input_only = fp16_with_int8_input(model, options, kept) if precision is Precision.INT8 else []
    _PairWriter(quantized, calibration, precision).run(chosen, int8_input_only)
    set_metadata(
        quantized,
        precision=precision.value,
        calibration=calibration.summary(),
        kept_layers=" ".join(kept),
        handed_over=" ".join(int8_input_only),
        first_convolution=first.value,
    )
    return infer_shapes(quantized)


def fp16_with_int8_input(model: onnx.ModelProto, options: QuantizeOptions, kept: Sequence[str]) -> list[str]:
    """The fp16 convolutions that still read an int8 max-pool.

    A convolution that `COARSE` keeps is one of them if a quantized convolution lies before the pool. A convolution that
    a name pattern keeps is not: its input stays as it is, too.

    Args:
        model: fp32 graph.
        options: as `quantize` takes them.
        kept: `kept_layers` of both.
    """
    if COARSE not in options.keep_fp16:
        return []
    named = {name for pattern in options.keep_fp16 for name in fnmatch.filter(kept, pattern)}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for name, node in convolutions(model).items():
        if name not in kept or name in named:
            continue
        maker, pooled = makers.get(node.input[0]), False
        while maker is not None and maker.op_type in ("Relu", "MaxPool"):
            pooled |= maker.op_type == "MaxPool"
            maker = makers.get(maker.input[0])
        if pooled and maker is not None and maker.op_type == "Conv" and node_name(maker) not in kept:
            found.append(name)
    return found


def normalizations_after_relu(model: onnx.ModelProto) -> list[str]:
    """Names of the BatchNorms that follow a ReLU (v6): no kernel takes them in, so int8 ends at each."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        while maker is not None and maker.op_type == "MaxPool":
            maker = makers.get(maker.input[0])
        if maker is not None and maker.op_type == "Relu":
            found.append(node_name(node))
    return found


def first_convolutions(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions that read the image: no other convolution comes before them."""
    behind: set[str] = set()
    first = []
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[0] not in behind:
            first.append(node_name(node))
        if node.op_type == "Conv" or any(name in behind for name in node.input):
            behind.update(node.output)
    return first


def coarse_convolutions(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions behind the last change of scale: a pooling, stride or upsampling.

    None if all have one scale.
    """
    changes: dict[str, int] = {}
    before: dict[str, int] = {}
    for node in model.graph.node:
        above = max((changes.get(name, 0) for name in node.input), default=0)
        if node.op_type == "Conv":
            before[node_name(node)] = above
        strides = next((a.ints for a in node.attribute if a.name == "strides"), [1])
        for name in node.output:
            changes[name] = above + (max(strides) > 1 or node.op_type in ("Resize", "Upsample"))
    most = max(before.values(), default=0)
    found = [name for name, above in before.items() if above == most]
    return found if len(found) < len(before) else []


def _first_convolution(model: onnx.ModelProto, options: QuantizeOptions) -> FirstConvolution:
    """How the convolutions that read the image run, as the options say or by default.

    Raises:
        SuperPointError: the options ask for parts, but the precision is not int8, or the image cannot be split.
    """
    precision, first = options.precision, options.first_convolution
    if first is None:
        splits = precision is Precision.INT8 and not _why_unsplittable(model)
        return FirstConvolution.PARTS if splits else FirstConvolution.FP16
    if first is FirstConvolution.PARTS:
        why = "parts make an image fit for int8" if precision is not Precision.INT8 else _why_unsplittable(model)
        if why:
            raise SuperPointError(f"{why}; {precision.value} of this model needs --first-convolution fp16.")
    return first


def _why_unsplittable(model: onnx.ModelProto) -> str | None:
    """Why `split_image` cannot rewrite this graph; None if it can."""
    image, known, named = model.graph.input[0].name, constants(model.graph), convolutions(model)
    first = first_convolutions(model)
    for name in first:
        node = named[name]
        if node.input[0] != image:
            return f"the image cannot be split: {name} reads {node.input[0]}, not {image}"
        weight = known.get(node.input[1])
        if weight is None or len(weight.dims) != 4 or weight.dims[1] != 1:
            return f"the image cannot be split: {name} does not read one channel"
    return None if first else "the image cannot be split: no convolution reads it"


def kept_layers(
    model: onnx.ModelProto,
    options: QuantizeOptions | None = None,
) -> list[str]:
    """Names of the convolutions that are not quantized: those that `keep_fp16` names, and the first if it stays fp16.

    Args:
        model: fp32 graph.
        options: as `quantize` takes them.

    Raises:
        SuperPointError: a pattern names no convolution, or the first convolution cannot run as the options ask.
    """
    options = options or QuantizeOptions()
    names = list(convolutions(model))
    first_stays = _first_convolution(model, options) is FirstConvolution.FP16
    kept = set(first_convolutions(model) if first_stays else ())
    for pattern in options.keep_fp16:
        if pattern == COARSE:
            kept.update(coarse_convolutions(model))
            continue
        found = fnmatch.filter(names, pattern)
        if not found:
            raise SuperPointError(f"no convolution is called {pattern!r}; there are: {', '.join(names)}.")
        kept.update(found)
    return [name for name in names if name in kept]


def with_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """A copy of at least that opset, raised by ONNX's own converter if the model is older.

    Raises:
        SuperPointError: the converter fails.
    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    if opset >= least:
        return copy.deepcopy(model)
    from onnx import version_converter

    try:
        raised = version_converter.convert_version(model, least)
    except Exception as error:  # the converter's exceptions share no base
        raise SuperPointError(
            f"the .onnx has opset {opset} and cannot be raised to {least} ({one_line(error)}); export it with --opset "
            f"{max(least, 17)}."
        ) from error
    raised.ir_version = max(raised.ir_version, helper.find_min_ir_version_for(list(raised.opset_import)))
    set_metadata(raised, opset=str(least))
    return raised


PARTS = "image.parts"
"""Name of the tensor that `split_image` makes."""
IMAGE_PARTS = 4
"""Channels an image is split into. More keep more points and take more time (docs/int8.md); an even number keeps 8-bit
images exact."""


def split_image(
    model: onnx.ModelProto, calibration: Calibration, names: Sequence[str]
) -> tuple[onnx.ModelProto, Calibration]:
    """Splits the image into P channels, each fit for int8, whose sum is the image.

    int8 has 127 steps from 0 to 1. An 8-bit image has 255, and an image that was colour or was shrunk has more. Each of
    the P channels is a P-th of the image in steps of 1 / (127.5 P). Each is rounded at another place, a P-th of a step
    apart, so the sum has steps that are P times finer. 8-bit images are exact, except that white (255) loses one step.
    The convolutions get their weights once for each channel, and they too are rounded at P places, so their mean has
    steps P times finer than int8's.

    Args:
        model: fp32 graph whose first convolutions read the image itself; not changed.
        calibration: the model's.
        names: the convolutions that read the channels in place of the image.

    Returns:
        The rewritten graph, and the calibration with the range of the channels.

    Raises:
        SuperPointError: a node lies between the image and a first convolution, or one reads more than one channel.
    """
    why = _why_unsplittable(model)
    if why:
        raise SuperPointError(f"{why}.")
    split = copy.deepcopy(model)
    graph = split.graph
    image, known, named = graph.input[0].name, constants(graph), convolutions(split)
    step = 1 / (127.5 * IMAGE_PARTS)
    places = (np.arange(IMAGE_PARTS, dtype=np.float32) - (IMAGE_PARTS - 1) / 2) / IMAGE_PARTS
    new = {
        f"{PARTS}.share": np.array(1 / IMAGE_PARTS, np.float32),
        f"{PARTS}.places": (places * step).astype(np.float32).reshape(1, IMAGE_PARTS, 1, 1),
    }
    for node in map(named.__getitem__, names):
        weight = numpy_helper.to_array(known[node.input[1]])
        parts = f"{node.input[1]}.parts"
        new[parts] = np.concatenate([_rounded_at(weight, place) for place in places], axis=1)
        node.input[0], node.input[1] = PARTS, parts
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in new.items())
    steps = [
        helper.make_node("Mul", [image, f"{PARTS}.share"], [f"{PARTS}.scaled"], name=f"{PARTS}.scaled"),
        helper.make_node("Add", [f"{PARTS}.scaled", f"{PARTS}.places"], [PARTS], name=PARTS),
    ]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*steps, *graph.node)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    read = {name for node in graph.node for name in node.input}
    for index, constant in reversed(list(enumerate(graph.initializer))):
        if f"{constant.name}.parts" in new and constant.name not in read:
            del graph.initializer[index]
    ranges = {PARTS: 127 * step, **calibration.ranges}
    return infer_shapes(split), replace(calibration, ranges=ranges)


def _rounded_at(weight: NDArray[np.float32], place: np.float32) -> NDArray[np.float32]:
    """Weights shifted by a share of an int8 step, so that they round at another place; no channel's range grows."""
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    shift = largest * np.float32(place / _TYPES[Precision.INT8].largest)
    clipped: NDArray[np.float32] = np.clip(weight + shift, -largest, largest)
    return clipped


class _PairWriter:
    """Writes Q/DQ pairs into one graph, in place."""

    def __init__(self, model: onnx.ModelProto, calibration: Calibration, precision: Precision) -> None:
        self._graph = model.graph
        self._ranges, self._weights = calibration.ranges, calibration.weights
        self._rounded_from = calibration.rounded_from
        self._element = QUANTIZED_TYPES[precision]
        self._largest = np.float32(_TYPES[precision].largest)
        self._constants = constants(model.graph)
        self._nodes: list[onnx.NodeProto] = []
        self._pairs: dict[str, str] = {}

    def run(self, quantized: Sequence[str], int8_input_only: Sequence[str]) -> None:
        """Puts pairs on inputs and weights of some convolutions, and on the inputs alone of others, by name."""
        for node in list(self._graph.node):
            name = node_name(node) if node.op_type == "Conv" else None
            if name in quantized or name in int8_input_only:
                node = copy.deepcopy(node)
                node.input[0] = self._pair(node.input[0], np.float32(self._range(node)))
            if name in quantized:
                node.input[1] = self._pair(node.input[1], self._weight_range(node.input[1]))
            self._nodes.append(node)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._nodes]
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _range(self, node: onnx.NodeProto) -> float:
        """The calibrated range of a convolution's input."""
        if node.input[0] not in self._ranges:
            raise SuperPointError(
                f"the calibration has no range for {node.input[0]}, the input of {node_name(node)}; it knows "
                f"{', '.join(self._ranges)}: calibrate this model with --calibration-images FOLDER."
            )
        return self._ranges[node.input[0]]

    def _weight_range(self, name: str) -> NDArray[np.float32]:
        """The range of each output channel's weights (O,); replaces the weights if the calibration rounded them."""
        weight = numpy_helper.to_array(self._constants[name])
        largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
        largest = np.where(largest > 0, largest, 1).astype(np.float32)  # a channel of zeros takes any scale
        steps = self._weights.get(name)
        if steps is not None:
            if self._rounded_from.get(name) != weight_digest(weight):
                raise SuperPointError(
                    f"the calibration rounded other weights than this model's {name}: calibrate this model with "
                    "--calibration-images FOLDER."
                )
            if steps.shape != weight.shape:
                raise SuperPointError(
                    f"the calibration's rounded weights of {name} are {steps.shape}, the model's {weight.shape}: "
                    "calibrate this model with --calibration-images FOLDER."
                )
            values = steps * (largest / self._largest).reshape(-1, 1, 1, 1)
            set_initializers(self._graph, {name: values.astype(np.float32)})
        return largest

    def _pair(self, name: str, largest: NDArray[np.float32] | np.float32) -> str:
        """Adds Q and DQ behind a tensor, once; returns the name of the dequantized tensor."""
        if name not in self._pairs:
            scale = np.asarray(largest / self._largest, np.float32)
            zeros = helper.make_tensor(f"{name}.q.zero", self._element, scale.shape, bytes(scale.size), raw=True)
            self._graph.initializer.extend([numpy_helper.from_array(scale, f"{name}.q.scale"), zeros])
            axis: dict[str, Any] = {"axis": 0} if scale.ndim else {}
            steps = ((name, f"{name}.q", "QuantizeLinear"), (f"{name}.q", f"{name}.dq", "DequantizeLinear"))
            for source, target, op in steps:
                inputs = [source, f"{name}.q.scale", f"{name}.q.zero"]
                self._nodes.append(helper.make_node(op, inputs, [target], name=target, **axis))
            self._pairs[name] = f"{name}.dq"
        return self._pairs[name]
