"""A matcher's weights -> one .onnx, written node by node, in fp32 or with fp16 where it is safe.

No NonZero, no loops, no data-dependent shapes: a match is a row number or -1. In fp16, softmaxes, rotary positions,
layer norms, and the assignment with its similarities stay float32; sums over neighborhoods do not. On its float32 side
each cast touches a node that computes, never one that only moves numbers: TensorRT 8.6 would move the cast across it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from superpoint_trt._version import __version__
from superpoint_trt.checkpoint.matcher import NEIGHBORHOOD, NORM_EPS, Activation, MatcherWeights, load_matcher
from superpoint_trt.convert.graph_writer import GraphWriter
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, write_atomically
from superpoint_trt.core.matcher import INPUTS, MIN_SCORE, MOST_ROWS, OUTPUTS, MatcherDescription
from superpoint_trt.core.types import LARGEST_BATCH, Precision, SuperPointError

OPSET = 17
"""The oldest with LayerNormalization, the newest that TensorRT 8.6 takes."""

HIDDEN = -1e4
"""As in `checkpoint.matcher_network`; fp16 holds it too."""


@dataclass(frozen=True)
class MatcherExportOptions:
    """What graph to write."""

    max_keypoints: int = 0
    """N, fixed: a shorter set of points is filled up. 0: N is free, and the same for both images."""
    layers: int | None = None
    """How many of the layers; None: all. Fewer are faster."""
    descriptor_dim: int | None = None
    """D, of a matcher that takes several; None: its first."""
    batch: int = 1
    """Pairs of images in a call."""
    min_score: float = MIN_SCORE
    """Least probability of a match."""
    precision: Precision = Precision.FP32
    """fp32 or fp16."""
    half_softmax: bool = False
    """fp16: attention's softmax in fp16 too, for kernels that fuse it only so; the assignment's stays float32."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_keypoints <= MOST_ROWS:
            raise SuperPointError(
                f"the number of keypoints is {self.max_keypoints}; expected 1 to {MOST_ROWS}, or 0 for any number."
            )
        if not 1 <= self.batch <= LARGEST_BATCH:
            raise SuperPointError(f"a batch of {self.batch} pairs was asked for; expected 1 to {LARGEST_BATCH}.")
        if not 0 <= self.min_score < 1:
            raise SuperPointError(
                f"least score is {self.min_score:g}; expected 0 <= score < 1 ({MIN_SCORE:g} is usual)."
            )
        if self.precision not in (Precision.FP32, Precision.FP16):
            raise SuperPointError(f"precision {self.precision.value} is not for matchers; expected fp32 or fp16.")


def export_matcher(weights: PathLike, output: PathLike, options: MatcherExportOptions | None = None) -> Path:
    """Converts a matcher's weights to one .onnx file.

    Args:
        weights: safetensors of `python -m training.matcher`.
        output: the .onnx to write.
        options: N, layers, precision.

    Returns:
        The path written.

    Raises:
        SuperPointError: weights, options or output are unusable. Nothing is written then.
    """
    output = check_writable(output)
    if output.suffix.lower() != ".onnx":
        raise SuperPointError(f"output {output}: an exported matcher's name ends in .onnx.")
    check_distinct(output, weights)
    model = matcher_to_onnx(load_matcher(weights), options or MatcherExportOptions())
    return write_atomically(output, model.SerializeToString())


def matcher_to_onnx(weights: MatcherWeights, options: MatcherExportOptions) -> onnx.ModelProto:
    """Converts a matcher in memory.

    Raises:
        SuperPointError: the matcher has fewer layers, or takes no descriptors of that length.
    """
    if options.layers is not None:
        weights = weights.with_layers(options.layers)
    dims = weights.shape.descriptor_dims
    dim = options.descriptor_dim or dims[0]
    if dim not in dims:
        raise SuperPointError(
            f"descriptors of {dim} numbers were asked for; this matcher takes {' or '.join(map(str, dims))}."
        )
    graph = _Writer(weights, options, dim)
    graph.write()
    description = MatcherDescription(
        descriptor_dim=dim,
        rows=options.max_keypoints or None,
        batch=options.batch,
        layers=weights.shape.layers,
        min_score=options.min_score,
        precision=options.precision,
        features_sha256=weights.features.get(dim),
        weights_sha256=weights.sha256,
    )
    return graph.model(description)


@dataclass(frozen=True)
class _Mask:
    """What hides rows that fill up; "" is the one that is not used."""

    columns: str = ""
    """(4 B, heads, N, 1): the further number of queries, then that of keys."""
    own: str = ""
    """(2 B, 1, 1, N), to add to similarities with points of the own image."""
    other: str = ""
    """The same, of the other image."""


class _Writer(GraphWriter):
    """The matcher's graph; both images are one batch, the first ones before the second.

    Each point is a row of the state (2 B N, W): a linear map is one product with a constant, which runtimes prepare.
    """

    def __init__(self, weights: MatcherWeights, options: MatcherExportOptions, dim: int) -> None:
        super().__init__(OPSET)
        self._arrays, self._shape, self._options, self._dim = weights.arrays, weights.shape, options, dim
        self._half = options.precision is Precision.FP16
        self._images = 2 * options.batch
        self._in_keys = not self._half

    def write(self) -> None:
        xy, scores, count, size = (
            self.node("Concat", [f"{name}0", f"{name}1"], f"both_{name}", axis=0)
            for name in INPUTS
            if name != "descriptors"
        )
        descriptors = self.node("Concat", [self._low(f"descriptors{image}") for image in (0, 1)], axis=0)
        rows = self._row_numbers(scores)
        real = self.node("Less", [rows, self.unsqueeze(count, 1)], "real")
        hidden = self.node("Where", [real, self._float(0.0), self._float(HIDDEN)], "hidden")
        mask = self._mask(hidden)
        angle = self._angles(xy, size)
        confidence = self.unsqueeze(self._low(self.node("Sqrt", [self.node("Relu", [scores])])), 2)
        points = self.reshape(self.node("Concat", [descriptors, confidence], axis=2), [-1, self._dim + 1])
        state = self._linear(points, f"project.{self._dim}")
        for layer in range(self._shape.layers):
            state = self._layer(state, f"layers.{layer}", angle, mask)
        near = [self._neighborhoods(f"keypoints{i}", f"count{i}", f"image_size{i}") for i in (0, 1)]
        self._assign(state, f"layers.{self._shape.layers - 1}.head", real, self._flags(hidden), rows, near)

    # ------------------------------------------------------------------------------------------------------- numbers

    def _float(self, value: float) -> str:
        return self.constant(f"float_{value:g}".replace("-", "m"), np.array(value, np.float32))

    def _low(self, x: str) -> str:
        return self.node("Cast", [x], to=TensorProto.FLOAT16) if self._half else x

    def _full(self, x: str) -> str:
        return self.node("Cast", [x], to=TensorProto.FLOAT) if self._half else x

    def _linear(
        self, x: str, name: str, scale: NDArray[np.float64] | float = 1.0, dtype: type[np.floating[Any]] | None = None
    ) -> str:
        """Writes x W^T + b, in the layers' type if no other is given; `scale` multiplies each output."""
        dtype = dtype or (np.float16 if self._half else np.float32)
        weight = self._arrays[f"{name}.weight"].astype(np.float64) * np.reshape(scale, (-1, 1))
        bias = self._arrays[f"{name}.bias"].astype(np.float64) * scale
        product = self.node("MatMul", [x, self.constant(f"{name}.weight", weight.T.astype(dtype))])
        return self.node("Add", [product, self.constant(f"{name}.bias", bias.astype(dtype))], name)

    def _row_numbers(self, scores: str) -> str:
        """(N,) int32: 0, 1, ..."""
        if self._options.max_keypoints:
            return self.constant("rows", np.arange(self._options.max_keypoints, dtype=np.int32))
        zero, one = (self.constant(f"index_{value}", np.array(value, np.int64)) for value in (0, 1))
        return self.node("Cast", [self.node("Range", [zero, self.dim(scores, 1), one])], to=TensorProto.INT32)

    # ------------------------------------------------------------------------------------------------------- network

    def _angles(self, xy: str, size: str) -> tuple[str, str]:
        """Cosine and sine of queries, then of keys (4 B, 1, N, d / 2): `MatcherNet._angles`."""
        half = self._float(0.5)
        middle = self.node("Mul", [self.node("Sub", [size, self._float(1.0)]), half])
        longer = self.unsqueeze(self.node("Mul", [self.reduce("ReduceMax", size, 1), half]), 1)
        unit = self.node("Div", [self.node("Sub", [xy, self.unsqueeze(middle, 1)]), longer])
        frequencies = self.constant("positions.weight", self._arrays["positions.weight"].T.astype(np.float32))
        angle = self.unsqueeze(self.node("MatMul", [unit, frequencies]), 1)
        angle = self.node("Concat", [angle, angle], axis=0)
        return self.node("Cos", [angle], "cos"), self.node("Sin", [angle], "sin")

    def _mask(self, hidden: str) -> _Mask:
        """What hides rows that fill up from the attention.

        In fp32 a further number of queries (1) and keys (0, or `HIDDEN`), so that their products are masked: adding
        masks to N x N similarities takes a CPU ten times as long. In fp16 such masks: GPUs are slow on odd sizes.
        """
        if self._in_keys:
            heads = self.constant("per_head", np.array([1, self._shape.heads, 1, 1], np.int64))
            dtype = TensorProto.FLOAT16 if self._half else TensorProto.FLOAT
            flags = self.node("Concat", self._flags(self._low(hidden), dtype), axis=0)
            return _Mask(columns=self.node("Expand", [self.unsqueeze(flags, 1), heads], "columns"))
        hidden = self._low(hidden) if self._options.half_softmax else hidden
        own = self.unsqueeze(self.unsqueeze(hidden, 1), 1)
        return _Mask(own=own, other=self._swap(own))

    def _flags(self, hidden: str, dtype: int = TensorProto.FLOAT) -> list[str]:
        """(2 B, N, 1) each: 1 for every row; and 0 for a real row, `HIDDEN` for one that fills up."""
        column = self.unsqueeze(hidden, 2)
        one = helper.make_tensor("value", dtype, [1], [1.0])
        return [self.node("ConstantOfShape", [self.node("Shape", [column])], value=one), column]

    def _neighborhoods(self, xy: str, count: str, size: str) -> str:
        """(B, N, N): `matcher_network.neighborhoods`."""
        points = self.node("Max", [self.node("Cast", [count], to=TensorProto.FLOAT), self._float(1.0)])
        pixels = self.reduce("ReduceProd", size, 1, keepdims=0)
        area = self.node("Div", [points, self.node("Mul", [pixels, self._float(-2 * NEIGHBORHOOD**2)])])
        # x and y one after the other: onnxruntime is slow on a last axis of 2 (7 of 114 ms for 512 points on one core).
        squares = []
        for part in self._divide(xy, [1, 1], axis=2):
            apart = self.node("Sub", [part, self.node("Transpose", [part], perm=[0, 2, 1])])
            squares.append(self.node("Mul", [apart, apart]))
        apart = self.node("Add", squares)
        near = self.node("Exp", [self.node("Mul", [apart, self.unsqueeze(self.unsqueeze(area, 1), 2)])])
        elsewhere = self.node("Cast", [self.node("Greater", [apart, self._float(0.0)])], to=TensorProto.FLOAT)
        return self._low(self.node("Mul", [near, elsewhere]))

    def _layer(self, state: str, name: str, angle: tuple[str, str], mask: _Mask) -> str:
        width, head = self._shape.width, self._shape.head_width
        # The attention's 1 / sqrt(d) lies in the weights: on the queries here, on both sides of the cross-attention.
        scale = np.repeat([head**-0.5, 1.0, 1.0], width)
        read = self._split(self._linear(state, f"{name}.self.read", scale), 3)
        turned, value = self._divide(read, [2 * self._images, self._images], axis=0)
        asked, offered = self._pair(self._turn(turned, angle, mask.columns))
        state = self._update(state, self._attend(asked, offered, value, mask.own), f"{name}.self")
        scale = np.repeat([head**-0.25, 1.0], width)
        point, value = self._pair(self._split(self._linear(state, f"{name}.cross.read", scale), 2))
        asked, offered = point, point
        if mask.columns:
            asked, offered = (self.node("Concat", [point, column], axis=3) for column in self._pair(mask.columns))
        message = self._attend(asked, self._swap(offered), self._swap(value), mask.other)
        return self._update(state, message, f"{name}.cross")

    def _split(self, read: str, parts: int) -> str:
        """(2 B N, parts W) -> (parts 2 B, heads, N, d)."""
        heads, each = self._shape.heads, self._shape.head_width
        shaped = self.reshape(read, [self._images, -1, parts, heads, each])
        return self.reshape(
            self.node("Transpose", [shaped], perm=[2, 0, 3, 1, 4]), [parts * self._images, heads, -1, each]
        )

    def _pair(self, x: str) -> list[str]:
        """The two parts of (4 B, ...)."""
        return self._divide(x, [self._images] * 2, axis=0)

    def _turn(self, x: str, angle: tuple[str, str], columns: str) -> str:
        """Rotary positions, and the further number behind them."""
        cos, sin = angle
        half = self._shape.head_width // 2
        a, b = (self._full(part) for part in self._divide(x, [half, half], axis=3))
        turned = [
            self._low(self.node(op, [self.node("Mul", [p, cos]), self.node("Mul", [q, sin])]))
            for op, p, q in (("Sub", a, b), ("Add", b, a))
        ]
        return self.node("Concat", [*turned, *([columns] if columns else [])], axis=3)

    def _attend(self, asked: str, offered: str, value: str, mask: str) -> str:
        alike = self.node("MatMul", [asked, self.node("Transpose", [offered], perm=[0, 1, 3, 2])])
        if not self._options.half_softmax:
            alike = self._full(alike)
        if mask:
            alike = self.node("Add", [alike, mask])
        shares = self.node("Softmax", [alike], axis=-1)
        if not self._options.half_softmax:
            shares = self._low(shares)
        message = self.node("Transpose", [self.node("MatMul", [shares, value])], perm=[0, 2, 1, 3])
        return self.reshape(message, [-1, self._shape.width])

    def _update(self, state: str, message: str, name: str) -> str:
        hidden = self._linear(self.node("Concat", [state, message], axis=1), f"{name}.hidden")
        scale, shift = (self.constant(f"{name}.norm.{key}", self._arrays[f"{name}.norm.{key}"]) for key in _NORM)
        normed = self.node("LayerNormalization", [self._full(hidden), scale, shift], axis=-1, epsilon=NORM_EPS)
        if self._shape.activation is Activation.GELU:
            active = self._low(self._gelu(normed))
        else:
            active = self.node("Relu", [self._low(normed)])
        written = self._linear(active, f"{name}.write")
        return self.node("Add", [state, written], f"{name}.state")

    def _gelu(self, x: str) -> str:
        """Adds x (1 + erf(x / sqrt 2)) / 2, which runtimes fuse."""
        erf = self.node("Erf", [self.node("Div", [x, self._float(math.sqrt(2))])])
        product = self.node("Mul", [x, self.node("Add", [erf, self._float(1.0)])])
        return self.node("Mul", [product, self._float(0.5)])

    def _assign(self, state: str, name: str, real: str, flags: list[str], rows: str, near: list[str]) -> None:
        """`matcher_network.Head` and `matcher_network.matches` of the last layer."""
        state = self._full(state)
        scaled = self._linear(state, f"{name}.project", self._shape.width**-0.25, np.float32)
        scaled = self.reshape(scaled, [self._images, -1, self._shape.width])
        parts = (self._halves(x) for x in (scaled, *flags))
        (first, second), (one0, one1), (mask0, mask1) = parts
        first = self.node("Concat", [first, one0, mask0], axis=2)
        second = self.node("Concat", [second, mask1, one1], axis=2)
        alike = self.node("MatMul", [first, self.node("Transpose", [second], perm=[0, 2, 1])])
        weights = [self.constant(f"{name}.support_{i}", w) for i, w in enumerate(self._arrays[f"{name}.support"])]
        chosen = self._low(self._dual_softmax(alike))
        around = self._full(self.node("MatMul", [self.node("MatMul", [near[0], chosen]), near[1]]))
        support = self.node("Log", [self.node("Add", [around, self._float(1.0)])], "support")
        alike = self.node("Add", [alike, self.node("Mul", [support, weights[0]])], "similarity")
        pairs = self._dual_softmax(alike)
        supported = self.node("Mul", [self.node("Mul", [pairs, support]), weights[1]])
        # onnxruntime sums up columns slowly (0.56 ms for 512 points on one core; as a product 0.02).
        columns = self.node("MatMul", [self.node("Transpose", [one0], perm=[0, 2, 1]), supported])
        rows_sum = self.reduce("ReduceSum", supported, 2, keepdims=0)
        gained = self.node("Concat", [rows_sum, self.node("Squeeze", [columns], axes=[1])], axis=0)
        logit = self.reshape(self._linear(state, f"{name}.matchable", dtype=np.float32), [self._images, -1])
        logit = self.node("Where", [real, self.node("Add", [logit, gained]), self._float(HIDDEN)])
        chance0, chance1 = self._halves(self.node("Sigmoid", [logit], "matchable"))
        matchable = self.node("Mul", [self.unsqueeze(chance0, 2), self.unsqueeze(chance1, 1)])
        probability = self.node("Mul", [pairs, matchable], "probability")
        best, there = self._largest(probability, 2)
        _, back = self._largest(probability, 1)
        # TensorRT sorts out one number faster by TopK than by ArgMax, and finds nothing by NonZero without waiting.
        again = self.node("GatherElements", [back, there], axis=1)
        mutual = self.node("Equal", [again, rows])
        sure = self.node("Greater", [best, self._float(self._options.min_score)])
        good = self.node("And", [mutual, sure])
        self.node("Where", [good, there, self.constant("none", np.array(-1, np.int32))], OUTPUTS[0])
        self.node("Where", [good, best, self._float(0.0)], OUTPUTS[1])

    def _dual_softmax(self, alike: str) -> str:
        return self.node("Mul", [self.node("Softmax", [alike], axis=axis) for axis in (2, 1)])

    def _largest(self, x: str, axis: int) -> tuple[str, str]:
        """The largest value along an axis of (B, N, N), and its row as int32: (B, N) each."""
        value, index = f"largest_{axis}", f"largest_{axis}_index"
        one = self.constant("k_1", np.array([1], np.int64))
        self.nodes.append(helper.make_node("TopK", [x, one], [value, index], name=value, axis=axis, largest=1))
        row = self.node("Cast", [self.node("Squeeze", [index], axes=[axis])], to=TensorProto.INT32)
        return self.node("Squeeze", [value], axes=[axis]), row

    def _divide(self, x: str, sizes: list[int], axis: int) -> list[str]:
        names = [f"split_{len(self.nodes)}_{index}" for index in range(len(sizes))]
        parts = self.constant("sizes_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))
        self.nodes.append(helper.make_node("Split", [x, parts], names, name=names[0], axis=axis))
        return names

    def _halves(self, x: str) -> list[str]:
        """The first images' rows, and the second ones'."""
        return self._divide(x, [self._options.batch] * 2, axis=0)

    def _swap(self, x: str) -> str:
        """The second images' rows before the first ones'."""
        order = self.constant("swapped", np.roll(np.arange(self._images), self._options.batch))
        return self.node("Gather", [x, order], axis=0)

    # --------------------------------------------------------------------------------------------------------- frame

    def model(self, description: MatcherDescription) -> onnx.ModelProto:
        """The checked model."""
        batch: Any = self._options.batch
        rows: Any = self._options.max_keypoints or "points"
        sizes = {"keypoints": [rows, 2], "keypoint_scores": [rows], "descriptors": [rows, self._dim]}
        sizes.update(count=[], image_size=[2])
        inputs = [
            helper.make_tensor_value_info(
                f"{name}{image}", TensorProto.INT32 if name == "count" else TensorProto.FLOAT, [batch, *sizes[name]]
            )
            for image in (0, 1)
            for name in INPUTS
        ]
        outputs = [
            helper.make_tensor_value_info(name, kind, [batch, rows])
            for name, kind in zip(OUTPUTS, (TensorProto.INT32, TensorProto.FLOAT))
        ]
        used = {name for node in self.nodes for name in node.input}
        constants = [constant for name, constant in self.constants.items() if name in used]
        body = helper.make_graph(self.nodes, "superpoint_matcher", inputs, outputs, initializer=constants)
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(
            body,
            opset_imports=[opset],
            ir_version=helper.find_min_ir_version_for([opset]),
            producer_name="superpoint-trt",
            producer_version=__version__,
        )
        helper.set_model_props(model, description.to_metadata())
        model = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model, full_check=True)
        return model


_NORM = ("weight", "bias")
