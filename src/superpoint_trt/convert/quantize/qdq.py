"""Explicit quantisation: Q/DQ pairs written into an fp32 graph, for every runtime that reads them.

What comes out is float32 everywhere else, so onnxruntime runs it as it is. The builder types the rest (`precision.cast`
does it for other builders). Placement, and why:

- A pair in front of every quantised convolution, on its input (one scale) and on its weights (one scale for each output
  channel); none on outputs and biases. So convolution, ReLU and the next convolution's Q become one kernel.
- Behind a max-pool rather than in front: rounding is monotonic, so TensorRT moves the Q ahead and pools in int8.
- Behind a BatchNorm that could not be folded: there one rounding is needed, in front it would be two.
- Readers of one tensor (both heads) share one pair.
- Symmetric, zero points 0: zero padding stays exact, and TensorRT takes nothing else.
- `COARSE` leaves the convolutions behind the last pooling alone, as the command line does by default: at an eighth of
  the size they take little time, outputs in fp16 need no step from int8, and what they round stays in the result.
  Their input is rounded all the same if a pool gives it (`fp16_with_int8_input`): else TensorRT 8.6 pools in float32.
- The first convolution reads the image, whose 8 bits need more than int8's 7: in parts (`split_image`), or fp16.
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
    check_quantizable,
    constants,
    convolutions,
    load_onnx,
    model_description,
    node_name,
    note_metadata,
    set_initializers,
)
from superpoint_trt.convert.quantize.equalize import equalize
from superpoint_trt.convert.quantize.options import COARSE, FirstConvolution
from superpoint_trt.convert.quantize.ranges_file import Calibration, check_same_network, load_calibration, weight_digest
from superpoint_trt.core.files import PathLike, one_line, write_atomically
from superpoint_trt.core.types import Precision, SuperPointError


def quantize_file(
    model: PathLike,
    output: PathLike,
    ranges: PathLike,
    precision: Precision = Precision.INT8,
    keep: Sequence[str] = (),
    first: FirstConvolution | None = None,
) -> Path:
    """As `quantize`, from file to file.

    Args:
        model: fp32 SuperPoint .onnx.
        output: the .onnx; written beside and renamed.
        ranges: what `calibration.save` wrote.
        precision: INT8 or FP8.
        keep: name patterns of convolutions to leave alone.
        first: as `quantize`.

    Raises:
        SuperPointError: as `quantize`, or the ranges are of another network; nothing is written then.
    """
    source = load_onnx(model)
    found = load_calibration(ranges)
    check_same_network(found, model_description(source, model), model)
    return write_atomically(output, quantize(source, found, precision, keep, first).SerializeToString())


@dataclass(frozen=True)
class _Kind:
    """What a quantised type needs."""

    largest: float
    """The largest number it represents."""
    opset: int
    """First opset whose Q/DQ has the type, and scales for each channel."""


INT8_LARGEST = 127.0

KINDS: Mapping[Precision, _Kind] = {
    Precision.INT8: _Kind(INT8_LARGEST, 13),
    Precision.FP8: _Kind(448.0, 19),
}


def quantize(
    model: onnx.ModelProto,
    calibration: Calibration,
    precision: Precision = Precision.INT8,
    keep: Sequence[str] = (),
    first: FirstConvolution | None = None,
) -> onnx.ModelProto:
    """Writes Q/DQ pairs around convolutions.

    Args:
        model: fp32 graph; left as it is.
        calibration: a range for the input of each convolution that is to be quantised; int8 weights, if it has them.
        precision: INT8 or FP8 (E4M3, opset 19 or newer).
        keep: name patterns (`conv4*`) of convolutions to leave alone, inputs too; or `COARSE`, see `fp16_with_int8_input`.
        first: what becomes of the convolution that reads the image, if `keep` does not name it. None: PARTS of int8
            where the graph allows it, else FP16.

    Returns:
        A new fp32 graph with Q/DQ pairs; inputs and outputs as before. The metadata name precision, calibration and
        what was left alone. An older opset is raised to the first that has what is needed.

    Raises:
        SuperPointError: not fp32, a pattern without a match, nothing left to quantise, a range is missing, or the image
            cannot be split.
    """
    check_quantizable(model)
    if precision not in KINDS:
        raise SuperPointError(f"precision {precision.value} is not quantised; expected int8 or fp8.")
    if precision is not Precision.INT8:
        calibration = replace(calibration, weights={})
    kept = kept_layers(model, keep, precision, first)
    chosen = [name for name in convolutions(model) if name not in kept]
    if not chosen:
        raise SuperPointError(f"nothing is left to quantise: all convolutions are kept ({', '.join(kept)}).")
    front = set(first_convolutions(model)) - set(kept)
    done = _resolved(model, precision, first) if front else FirstConvolution.FP16
    if done is FirstConvolution.PARTS:
        model, calibration = split_image(model, calibration)
    quantized = with_opset(equalize(model, calibration.channels), KINDS[precision].opset)
    handed = fp16_with_int8_input(model, keep, kept) if precision is Precision.INT8 else []
    _Insertion(quantized, calibration, precision).run(chosen, handed)
    note_metadata(
        quantized,
        precision=precision.value,
        calibration=calibration.summary(),
        kept_layers=" ".join(kept),
        handed_over=" ".join(handed),
        first_convolution=done.value,
    )
    return onnx.shape_inference.infer_shapes(quantized)


def fp16_with_int8_input(model: onnx.ModelProto, keep: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Those left alone that read int8: `COARSE`, not named besides, behind the max-pool of a quantised convolution.

    Args:
        model: fp32 graph.
        keep: as `quantize` takes it.
        kept: what that comes to (`kept_layers`).
    """
    if COARSE not in keep:
        return []
    named = {name for pattern in keep for name in fnmatch.filter(kept, pattern)}
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
    """The BatchNorms that no convolution takes in (v6): each keeps those around it from passing int8 on."""
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
    """Those that read the image: no other convolution comes before them."""
    behind: set[str] = set()
    first = []
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[0] not in behind:
            first.append(node_name(node))
        if node.op_type == "Conv" or any(name in behind for name in node.input):
            behind.update(node.output)
    return first


def coarse_convolutions(model: onnx.ModelProto) -> list[str]:
    """Those behind the last pooling or stride, at the coarsest scale; none if all are at one scale."""
    halvings: dict[str, int] = {}
    before: dict[str, int] = {}
    for node in model.graph.node:
        above = max((halvings.get(name, 0) for name in node.input), default=0)
        if node.op_type == "Conv":
            before[node_name(node)] = above
        strides = next((a.ints for a in node.attribute if a.name == "strides"), [1])
        for name in node.output:
            halvings[name] = above + (max(strides) > 1)
    coarsest = max(before.values(), default=0)
    found = [name for name, above in before.items() if above == coarsest]
    return found if len(found) < len(before) else []


def _resolved(model: onnx.ModelProto, precision: Precision, first: FirstConvolution | None) -> FirstConvolution:
    """What becomes of the first convolution, as asked or by default.

    Raises:
        SuperPointError: parts were asked for, but the precision is not int8, or the image cannot be split.
    """
    if first is None:
        able = precision is Precision.INT8 and not _unsplittable(model)
        return FirstConvolution.PARTS if able else FirstConvolution.FP16
    if first is FirstConvolution.PARTS:
        why = "parts make an image fit for int8" if precision is not Precision.INT8 else _unsplittable(model)
        if why:
            raise SuperPointError(f"{why}; {precision.value} of this model needs --first-convolution fp16.")
    return first


def _unsplittable(model: onnx.ModelProto) -> str | None:
    """Why `split_image` cannot be, if so."""
    first = first_convolutions(model)
    node = convolutions(model)[first[0]] if first else None
    image = model.graph.input[0].name
    if node is None or len(first) != 1 or node.input[0] != image:
        read = node.input[0] if node is not None else "nothing"
        return f"the image cannot be split: {', '.join(first)} reads {read}, not {image}"
    weight = constants(model.graph).get(node.input[1])
    if weight is None or len(weight.dims) != 4 or weight.dims[1] != 1:
        return f"the image cannot be split: {first[0]} does not read one channel"
    return None


def kept_layers(
    model: onnx.ModelProto,
    patterns: Sequence[str],
    precision: Precision = Precision.INT8,
    first: FirstConvolution | None = None,
) -> list[str]:
    """Names of the convolutions left alone: those that a pattern or `COARSE` names, and the first if it stays fp16.

    Raises:
        SuperPointError: a pattern that names none, or `first` cannot be.
    """
    names = list(convolutions(model))
    kept = set(first_convolutions(model) if _resolved(model, precision, first) is FirstConvolution.FP16 else ())
    for pattern in patterns:
        if pattern == COARSE:
            kept.update(coarse_convolutions(model))
            continue
        found = fnmatch.filter(names, pattern)
        if not found:
            raise SuperPointError(f"no convolution is called {pattern!r}; there are: {', '.join(names)}.")
        kept.update(found)
    return [name for name in names if name in kept]


def with_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """A copy of at least that opset, raised by ONNX's own converter if it is older.

    Raises:
        SuperPointError: the converter cannot.
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
    note_metadata(raised, opset=str(least))
    return raised


PARTS = "image.parts"
"""The tensor that `split_image` makes."""
IMAGE_PARTS = 4
"""More keep more points and take more time (docs/int8.md); an even number, so that 8-bit images are exact."""


def split_image(model: onnx.ModelProto, calibration: Calibration) -> tuple[onnx.ModelProto, Calibration]:
    """The same network, its first convolution reading the image as the sum of parts, each fit for int8.

    int8 has 127 steps from 0 to 1, an image 255, and one that was colour or was shrunk has more. Each of P parts is a
    P-th of the image in steps of 1 / (127.5 P), and each is rounded at another place, a P-th of a step apart: so their
    sum has the same fine steps. 8-bit images are exact (only white, 255, loses one step); convolved with one weight
    their sum is the image. The weights are rounded at other places likewise, so that on average they have
    P times int8's steps; as the parts differ by no more than one of theirs, that holds.

    Args:
        model: fp32 graph whose first convolution reads the image itself; left as it is.
        calibration: of that model.

    Returns:
        The rewritten graph, and the calibration with the range of the parts.

    Raises:
        SuperPointError: something lies between the image and the first convolution.
    """
    why = _unsplittable(model)
    if why:
        raise SuperPointError(f"{why}.")
    split = copy.deepcopy(model)
    graph = split.graph
    first = next(node for node in graph.node if node.op_type == "Conv")
    image, single = graph.input[0].name, first.input[1]
    weight = numpy_helper.to_array(constants(graph)[single])
    step = 1 / (127.5 * IMAGE_PARTS)
    places = (np.arange(IMAGE_PARTS, dtype=np.float32) - (IMAGE_PARTS - 1) / 2) / IMAGE_PARTS
    new = {
        f"{PARTS}.share": np.array(1 / IMAGE_PARTS, np.float32),
        f"{PARTS}.places": (places * step).astype(np.float32).reshape(1, IMAGE_PARTS, 1, 1),
        f"{single}.parts": np.concatenate([_rounded_at(weight, place) for place in places], axis=1),
    }
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in new.items())
    steps = [
        helper.make_node("Mul", [image, f"{PARTS}.share"], [f"{PARTS}.scaled"], name=f"{PARTS}.scaled"),
        helper.make_node("Add", [f"{PARTS}.scaled", f"{PARTS}.places"], [PARTS], name=PARTS),
    ]
    first.input[0], first.input[1] = PARTS, f"{single}.parts"
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in (*steps, *graph.node)]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    for index, constant in enumerate(graph.initializer):
        if constant.name == single and not any(single in node.input for node in graph.node):
            del graph.initializer[index]
            break
    ranges = {PARTS: 127 * step, **calibration.ranges}
    return onnx.shape_inference.infer_shapes(split), replace(calibration, ranges=ranges)


def _rounded_at(weight: NDArray[np.float32], place: np.float32) -> NDArray[np.float32]:
    """Weights that share of a step of int8 larger; no channel's largest magnitude grows."""
    largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
    shift = largest * np.float32(place / KINDS[Precision.INT8].largest)
    clipped: NDArray[np.float32] = np.clip(weight + shift, -largest, largest)
    return clipped


class _Insertion:
    """One graph being rewritten in place."""

    def __init__(self, model: onnx.ModelProto, calibration: Calibration, precision: Precision) -> None:
        self._graph = model.graph
        self._ranges, self._weights = calibration.ranges, calibration.weights
        self._rounded_from = calibration.rounded_from
        self._element = QUANTIZED_TYPES[precision]
        self._largest = np.float32(KINDS[precision].largest)
        self._constants = constants(model.graph)
        self._nodes: list[onnx.NodeProto] = []
        self._pairs: dict[str, str] = {}

    def run(self, chosen: Sequence[str], handed: Sequence[str]) -> None:
        """Quantises the convolutions that are `chosen`, and the inputs alone of those `handed` over to."""
        for node in list(self._graph.node):
            name = node_name(node) if node.op_type == "Conv" else None
            if name in chosen or name in handed:
                node = copy.deepcopy(node)
                node.input[0] = self._pair(node.input[0], np.float32(self._range(node)))
            if name in chosen:
                node.input[1] = self._pair(node.input[1], self._round(node.input[1]))
            self._nodes.append(node)
        nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in self._nodes]
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _range(self, node: onnx.NodeProto) -> float:
        if node.input[0] not in self._ranges:
            raise SuperPointError(
                f"the calibration has no range for {node.input[0]}, the input of {node_name(node)}; it knows "
                f"{', '.join(self._ranges)}: calibrate this model with --calibration-images FOLDER."
            )
        return self._ranges[node.input[0]]

    def _round(self, name: str) -> NDArray[np.float32]:
        """The range of each output channel's weights; puts those that the calibration rounded in their place."""
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
            values = steps * (largest / self._largest).reshape(-1, 1, 1, 1)
            set_initializers(self._graph, {name: values.astype(np.float32)})
        return largest

    def _pair(self, name: str, largest: NDArray[np.float32] | np.float32) -> str:
        """Adds Q and DQ behind a tensor, once; returns the name of what DQ gives."""
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
