"""Checkpoint -> fp32 .onnx, written node by node rather than traced.

Twelve convolutions and two heads are a page of ONNX; written by hand they come out the same at every opset, under
stable names, in one file, without torch. Tests hold the result equal to `network.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt._version import __version__
from superpoint_trt.checkpoint.layouts import Checkpoint, Layer, NormPlacement, load
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, write_atomically
from superpoint_trt.core.types import (
    INPUT_NAME,
    OUTPUT_NAMES,
    DecodeOptions,
    ModelDescription,
    OutputType,
    Sampling,
    SuperPointError,
)

OLDEST_OPSET = 11
NEWEST_OPSET: int = onnx.defs.onnx_opset_version()
DEFAULT_OPSET = 17
"""The newest that TensorRT 8.6's parser takes."""

LARGEST_SIDE_PX = 32768
LARGEST_BATCH = 4096
MOST_KEYPOINTS = 1_000_000
NORM_EPS = 1e-12


@dataclass(frozen=True)
class ExportOptions:
    """What to write. Defaults are the guide's and the MIT reference's."""

    type: OutputType = OutputType.DENSE
    height_px: int = 480
    width_px: int = 640
    dynamic: bool = False
    """Free height, width and batch; height_px and width_px are then the size to expect most."""
    max_batch_size: int = 1
    """Above 1 the batch axis is free, up to this many images."""
    max_keypoints: int = 1024
    """N of a `keypoints` model."""
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    """NMS radius, border and threshold of a `keypoints` model."""
    opset: int = DEFAULT_OPSET
    shift_channels: tuple[str, ...] = ()
    """Layers ("conv1a", ...) whose BatchNorm after the ReLU goes into the next convolution, its shift through one more
    channel: exact, see `_fold_shift`. Worth it where that channel costs less than the normalisation."""
    fold_batchnorm: bool = False
    """BatchNorms after a ReLU go into the next convolutions, their shifts as biases: an approximation near the border
    of the input (`reach_of_padding_px`), where a convolution then reads the shift in place of the padding's zeros. One
    in front of a max-pool stays if a scale is not positive."""

    def validate(self, stride_px: int) -> None:
        """Refuses what no graph can be written for.

        Raises:
            SuperPointError: naming the first option out of range, and the range.
        """
        for name, side in (("height", self.height_px), ("width", self.width_px)):
            if not stride_px <= side <= LARGEST_SIDE_PX:
                raise SuperPointError(f"{name} is {side} px; expected {stride_px} to {LARGEST_SIDE_PX}.")
            if side % stride_px:
                below = side // stride_px * stride_px
                raise SuperPointError(
                    f"{name} {side} is not a multiple of {stride_px}; use {below} or {below + stride_px} "
                    "(images of any size fit either: they are padded, and keypoints come back in their own pixels)."
                )
        if not OLDEST_OPSET <= self.opset <= NEWEST_OPSET:
            raise SuperPointError(
                f"opset is {self.opset}; expected {OLDEST_OPSET} to {NEWEST_OPSET} "
                f"(the newest of onnx {onnx.__version__})."
            )
        if not 1 <= self.max_batch_size <= LARGEST_BATCH:
            raise SuperPointError(f"the largest batch is {self.max_batch_size} images; expected 1 to {LARGEST_BATCH}.")
        if not 1 <= self.max_keypoints <= MOST_KEYPOINTS:
            raise SuperPointError(f"the number of keypoints is {self.max_keypoints}; expected 1 to {MOST_KEYPOINTS}.")
        if self.fold_batchnorm and self.shift_channels:
            raise SuperPointError("fold_batchnorm and shift_channels are two ways to do the same; choose one.")
        if self.type is OutputType.KEYPOINTS:
            self._validate_decode()

    def _validate_decode(self) -> None:
        if self.max_keypoints > self.height_px * self.width_px and not self.dynamic:
            raise SuperPointError(
                f"{self.max_keypoints} keypoints were asked for, but {self.width_px}x{self.height_px} has only "
                f"{self.height_px * self.width_px} pixels; lower --max-keypoints."
            )
        if 2 * self.decode.remove_borders_px > min(self.height_px, self.width_px):
            raise SuperPointError(
                f"a border of {self.decode.remove_borders_px} px on each side leaves nothing of "
                f"{self.width_px}x{self.height_px}; lower --remove-borders."
            )


def export(
    weights: PathLike, output: PathLike, options: ExportOptions | None = None, sampling: Sampling | None = None
) -> Path:
    """Converts a checkpoint file to one .onnx file.

    Args:
        weights: checkpoint of any known layout (checkpoint.load).
        output: the .onnx; written beside and renamed.
        options: type, size, decode, opset.
        sampling: overrides the descriptor sampling that the checkpoint's family implies.

    Returns:
        The path written.

    Raises:
        SuperPointError: unusable checkpoint, options or output path; nothing is written then.
    """
    output = check_writable(output)
    if output.suffix.lower() != ".onnx":
        raise SuperPointError(f"output {output}: an exported model's name ends in .onnx.")
    check_distinct(output, weights)
    model = to_onnx(load(weights, sampling), options or ExportOptions())
    return write_atomically(output, model.SerializeToString())


def to_onnx(checkpoint: Checkpoint, options: ExportOptions) -> onnx.ModelProto:
    """The checked, shape-inferred graph of a checkpoint, with this package's metadata."""
    options.validate(checkpoint.stride_px)
    graph = _Graph(options.opset)
    logits, coarse = _network(graph, checkpoint, options)
    if options.type is OutputType.HEADS:
        graph.rename(logits, "logits")
        graph.rename(coarse, "coarse_descriptors")
    else:
        scores = _score_map(graph, logits, checkpoint.stride_px)
        if options.type is OutputType.DENSE:
            _unit_length(graph, coarse, axis=1, name="descriptors")
            graph.node("Squeeze", [scores], output="scores", axes=[1])
        else:
            descriptors = _unit_length(graph, coarse, axis=1, name="dense_descriptors")
            _keypoints(graph, scores, descriptors, checkpoint, options)
    return _model(graph, checkpoint, options)


# ------------------------------------------------------------------------------------------------------- the network


def _network(graph: _Graph, checkpoint: Checkpoint, options: ExportOptions) -> tuple[str, str]:
    """Backbone and both heads (DeTone et al. 2018, section 3) -> names of the raw head tensors."""
    layers = _fold(checkpoint)
    for name in options.shift_channels:
        if name not in _backbone(checkpoint):
            raise SuperPointError(
                f"shift_channels names {name!r}; expected some of {', '.join(_backbone(checkpoint))}."
            )
    if options.fold_batchnorm and checkpoint.norm is not NormPlacement.AFTER_RELU:
        has = "none" if checkpoint.norm is NormPlacement.NONE else "it before the ReLU, where it folds exactly"
        raise SuperPointError(
            f"folding BatchNorm is for checkpoints that have it after the ReLU (v6); this one has {has}: leave "
            "--fold-batchnorm out."
        )
    for name in _backbone(checkpoint):  # from front to back: each sees the channels that it was given
        if options.fold_batchnorm or name in options.shift_channels:
            _fold_shift(layers, name, checkpoint, exact=not options.fold_batchnorm)
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


@dataclass(frozen=True)
class _FoldedLayer:
    """A convolution and what is left of its BatchNorm after folding: y = relu(conv(x)) * scale + shift."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    scale: NDArray[np.float64] | None = None
    shift: NDArray[np.float64] | None = None


def _fold(checkpoint: Checkpoint) -> dict[str, _FoldedLayer]:
    """Folds every BatchNorm that folds exactly, in float64.

    Exact are: BatchNorm straight after a convolution (both output layers; every layer when it precedes the ReLU),
    and BatchNorm in front of a 1x1 convolution, which sees no padding (both heads' hidden layers). BatchNorm between
    a ReLU and a 3x3 convolution stays: its shift does not reach the zeros of the padding.
    """
    folded = {}
    for name, layer in checkpoint.layers.items():
        after_relu = checkpoint.norm is NormPlacement.AFTER_RELU and name not in ("convPb", "convDb")
        folded[name] = _fold_before(layer, keep=after_relu)
    for head in ("convP", "convD"):
        hidden, out = folded[f"{head}a"], folded[f"{head}b"]
        if hidden.scale is not None and hidden.shift is not None:
            folded[f"{head}a"] = _FoldedLayer(hidden.weight, hidden.bias)
            bias = out.bias + np.einsum("oikl,i->o", out.weight, hidden.shift)
            folded[f"{head}b"] = _FoldedLayer(out.weight * hidden.scale[None, :, None, None], bias)
    return folded


def _backbone(checkpoint: Checkpoint) -> list[str]:
    return [f"conv{stage}{half}" for stage in range(1, checkpoint.stages + 1) for half in "ab"]


def _fold_shift(layers: dict[str, _FoldedLayer], name: str, checkpoint: Checkpoint, exact: bool) -> None:
    """Moves a layer's BatchNorm into the 3x3 convolutions that follow.

    The scale goes into their weights. The shift would meet zeros at the border, where a bias does not. Exact: it enters
    by one more channel, 1 wherever there is an image (no weights, bias 1) and 0 in the padding, as the shift itself.
    If not: it becomes a bias, as if the padding were the shift. In front of a max-pool only a rising map commutes:
    there a layer with a scale up to 0 keeps its BatchNorm.
    """
    layer, order = layers[name], _backbone(checkpoint)
    pooled = name.endswith("b") and name != order[-1]
    if layer.scale is None or layer.shift is None or (pooled and not (layer.scale > 0).all()):
        return
    layers[name] = _FoldedLayer(layer.weight, layer.bias)
    if exact:
        silent = np.zeros_like(layer.weight[:1])
        layers[name] = _FoldedLayer(np.concatenate([layer.weight, silent]), np.append(layer.bias, 1.0))
    following = ["convPa", "convDa"] if name == order[-1] else [order[order.index(name) + 1]]
    for other in following:
        its = layers[other]
        constant = np.einsum("oikl,i->okl", its.weight, layer.shift)[:, None]
        weight = its.weight * layer.scale[None, :, None, None]
        if exact:
            layers[other] = replace(its, weight=np.concatenate([weight, constant], axis=1))
        else:
            layers[other] = replace(its, weight=weight, bias=its.bias + constant.sum(axis=(1, 2, 3)))


def reach_of_padding_px(checkpoint: Checkpoint) -> int:
    """How far from the border of the input, in px, what the padding holds can be felt in scores and descriptors.

    A descriptor is sampled from cells up to half a cell further out than its point. Suppression may hand a difference
    in the scores on, by five radii at most.
    """
    reach = -1  # the first convolution pads the image, with the same zeros in any case
    for stage in range(1, checkpoint.stages + 1):
        reach += 2
        if stage < checkpoint.stages:
            reach = -(-reach // 2)
    return (reach + 1) * checkpoint.stride_px + checkpoint.stride_px // 2


def _fold_before(layer: Layer, keep: bool) -> _FoldedLayer:
    """Folds the layer's own BatchNorm into its convolution, or keeps it beside as scale and shift."""
    weight, bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
    if layer.norm is None:
        return _FoldedLayer(weight, bias)
    scale, shift = layer.norm.scale_and_shift()
    if keep:
        return _FoldedLayer(weight, bias, scale, shift)
    return _FoldedLayer(weight * scale[:, None, None, None], bias * scale + shift)


def _block(graph: _Graph, x: str, name: str, layers: dict[str, _FoldedLayer], pool: bool = False) -> str:
    """Convolution, ReLU, what is left of BatchNorm, and the stage's max-pool."""
    layer = layers[name]
    x = graph.node("Relu", [_convolution(graph, x, name, layer)], output=f"{name}.relu")
    # A rising affine map commutes with the maximum, so BatchNorm may follow the pool, on a quarter of the pixels.
    pool_first = pool and layer.scale is not None and bool((layer.scale > 0).all())
    if pool_first:
        x = _max_pool(graph, x, name)
    if layer.scale is not None and layer.shift is not None:
        x = _affine(graph, x, name, layer.scale, layer.shift)
    return _max_pool(graph, x, name) if pool and not pool_first else x


def _convolution(graph: _Graph, x: str, name: str, layer: _FoldedLayer) -> str:
    kernel = layer.weight.shape[2]
    weights = [
        graph.constant(f"{name}.weight", layer.weight.astype(np.float32)),
        graph.constant(f"{name}.bias", layer.bias.astype(np.float32)),
    ]
    return graph.node("Conv", [x, *weights], output=name, kernel_shape=[kernel, kernel], pads=[kernel // 2] * 4)


def _affine(graph: _Graph, x: str, name: str, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> str:
    """Writes x * scale + shift as one BatchNormalization node, which runtimes run in one pass."""
    parameters = {
        "scale": scale,
        "shift": shift,
        "mean": np.zeros_like(scale),
        "var": np.ones_like(scale),
    }
    inputs = [graph.constant(f"{name}.bn.{key}", value.astype(np.float32)) for key, value in parameters.items()]
    return graph.node("BatchNormalization", [x, *inputs], output=f"{name}.bn", epsilon=0.0)


def _max_pool(graph: _Graph, x: str, name: str) -> str:
    return graph.node("MaxPool", [x], output=f"{name}.pool", kernel_shape=[2, 2], strides=[2, 2])


# ------------------------------------------------------------------------------------------------------ dense outputs


def _score_map(graph: _Graph, logits: str, stride_px: int) -> str:
    """Softmax with the dustbin, dustbin dropped, cells unfolded -> (B, 1, H, W).

    The softmax runs over the last axis: below opset 13 the operator flattens everything behind its axis.
    """
    last = graph.node("Transpose", [logits], perm=[0, 2, 3, 1])
    probabilities = graph.node("Softmax", [last], output="cell_probabilities", axis=3)
    pixels = graph.slice(probabilities, axis=3, start=0, stop=stride_px**2)
    channels = graph.node("Transpose", [pixels], perm=[0, 3, 1, 2])
    return graph.node("DepthToSpace", [channels], output="score_map", blocksize=stride_px)


def _unit_length(graph: _Graph, x: str, axis: int, name: str) -> str:
    length = graph.reduce("ReduceL2", x, axis)
    floor = graph.constant("norm_eps", np.array(NORM_EPS, np.float32))
    return graph.node("Div", [x, graph.node("Max", [length, floor])], output=name)


# -------------------------------------------------------------------------------------------------- in-graph decoding


def _keypoints(graph: _Graph, score_map: str, descriptors: str, checkpoint: Checkpoint, options: ExportOptions) -> None:
    """NMS, border, top-k, threshold and descriptor sampling; padded to N (design: the graph contract)."""
    shape = _GridShape.of(graph, score_map, descriptors, checkpoint.stride_px, options)
    survivors = _survivors(graph, score_map, shape, options.decode)
    best, pixel = _top_scores(graph, survivors, checkpoint, options)
    y = graph.node("Div", [pixel, shape.width])
    x = graph.node("Sub", [pixel, graph.node("Mul", [y, shape.width])])
    xy = graph.node("Concat", [graph.as_column(x), graph.as_column(y)], output="pixel_xy", axis=2)

    found = graph.node("Greater", [best, graph.constant("threshold", np.array(options.decode.threshold, np.float32))])
    found_column = graph.unsqueeze(found, 2)
    sampled = _sample_descriptors(graph, xy, descriptors, checkpoint, shape, options)
    zero, minus_one = (graph.constant(f"{v}f", np.array(v, np.float32)) for v in (0, -1))
    graph.node("Where", [found_column, xy, minus_one], output="keypoints")
    graph.node("Where", [found, best, zero], output="scores")
    graph.node("Where", [found_column, sampled, zero], output="descriptors")
    counted = graph.node("Cast", [found], to=TensorProto.INT32)
    graph.reduce("ReduceSum", counted, 1, keepdims=0, output="num_keypoints")


@dataclass(frozen=True)
class _GridShape:
    """Names of int64 scalars: known numbers in a static graph, read off the tensors in a dynamic one."""

    height: str
    width: str
    rows: str
    columns: str

    @classmethod
    def of(cls, graph: _Graph, score_map: str, descriptors: str, stride_px: int, options: ExportOptions) -> _GridShape:
        if options.dynamic:
            return cls(*(graph.dim(tensor, axis) for tensor in (score_map, descriptors) for axis in (2, 3)))
        height, width = options.height_px, options.width_px
        sizes = {"height": height, "width": width, "rows": height // stride_px, "columns": width // stride_px}
        return cls(**{name: graph.constant(name, np.array(size, np.int64)) for name, size in sizes.items()})


def _survivors(graph: _Graph, scores: str, shape: _GridShape, decode: DecodeOptions) -> str:
    """(B, 1, H, W) -> same: what suppression and border leave keeps its score, the rest is 0."""
    kept = [_suppress(graph, scores, decode.nms_radius_px)] if decode.nms_radius_px else []
    if decode.remove_borders_px:
        kept += [_inside(graph, shape.height, 2, decode), _inside(graph, shape.width, 3, decode)]
    if not kept:
        return scores
    mask = kept[0]
    for other in kept[1:]:
        mask = graph.node("And", [mask, other])
    return graph.node("Where", [mask, scores, graph.constant("0f", np.array(0, np.float32))], output="survivors")


def _inside(graph: _Graph, size: str, axis: int, decode: DecodeOptions) -> str:
    """Which rows (axis 2) or columns (3) lie inside the border: bool, (H, 1) or (W,)."""
    border = decode.remove_borders_px
    if size in graph.constants:  # static: known already
        index = np.arange(int(numpy_helper.to_array(graph.constants[size])))
        known = (index >= border) & (index < len(index) - border)
        return graph.constant(f"inside_{axis}", known[:, None] if axis == 2 else known)
    zero, one, first = (graph.constant(f"int_{v}", np.array(v, np.int64)) for v in (0, 1, border))
    places = graph.node("Range", [zero, size, one])
    after = graph.node("Less", [places, graph.node("Sub", [size, first])])
    before = graph.node("Greater", [places, graph.constant(f"int_{border - 1}", np.array(border - 1, np.int64))])
    inside = graph.node("And", [before, after])
    return graph.unsqueeze(inside, 1) if axis == 2 else inside


def _suppress(graph: _Graph, scores: str, radius_px: int) -> str:
    """Two suppression rounds, as `network.suppress`; (B, 1, H, W) float32 -> bool, who survives."""

    def window_max(x: str) -> str:
        # Rows, then columns: 2 (2 r + 1) comparisons a pixel instead of (2 r + 1)^2.
        width = 2 * radius_px + 1
        rows = graph.node("MaxPool", [x], kernel_shape=[1, width], pads=[0, radius_px, 0, radius_px])
        return graph.node("MaxPool", [rows], kernel_shape=[width, 1], pads=[radius_px, 0, radius_px, 0])

    zero = graph.constant("0f", np.array(0, np.float32))
    kept = graph.node("Equal", [scores, window_max(scores)])
    for _ in range(2):
        near_kept = graph.node("Greater", [window_max(graph.node("Cast", [kept], to=TensorProto.FLOAT)), zero])
        rest = graph.node("Where", [near_kept, zero, scores])
        fresh = graph.node("Equal", [rest, window_max(rest)])
        kept = graph.node("Or", [kept, graph.node("And", [fresh, graph.node("Not", [near_kept])])])
    return kept


def _top_scores(graph: _Graph, scores: str, checkpoint: Checkpoint, options: ExportOptions) -> tuple[str, str]:
    """The N best scores of each map and their flat pixel indices, both (B, N): an exact top-k by knock-out.

    The map in reading order is cut into rows; each row's N best go on to the next round, where the rows left are fewer.
    A pixel that is not among the N best of its row is not among the N best. Rows stay in reading order and TopK breaks
    ties by the lower index, so equal scores come out in reading order, on plateaus too.
    """
    n = options.max_keypoints
    rounds, missing = _rounds(checkpoint.stride_px, options)
    values = graph.reshape(scores, [0, -1])
    if missing:
        values = graph.node("Pad", [values, graph.constant("row_pads", np.array([0, 0, 0, missing], np.int64))])
    split = graph.reshape(values, [0, rounds[0], -1])
    values, index = graph.top_k(split, n)
    row = graph.constant("row", np.arange(rounds[0], dtype=np.int64)[:, None])
    index = graph.node("Add", [index, graph.node("Mul", [row, graph.dim(split, 2)])])
    for rows in rounds[1:]:
        values, place = graph.top_k(graph.reshape(values, [0, rows, -1]), n)
        index = graph.node("GatherElements", [graph.reshape(index, [0, rows, -1]), place], axis=2)
    return graph.reshape(values, [0, n]), graph.reshape(index, [0, n], output="pixel_index")


_ROW = 3072
"""Scores a row may have: TensorRT sorts each row on one multiprocessor, all rows at once, in 13 us up to here; one row
of a whole 640x480 map takes 1.1 ms (TensorRT 8.6, H100)."""


def _rounds(stride_px: int, options: ExportOptions) -> tuple[list[int], int]:
    """Number of rows in each round of the knock-out, and how many scores to append to fill the first round's rows."""
    n = options.max_keypoints
    if options.dynamic:  # the size is a multiple of the cell's; N more in each row, lest a small map have too few
        rounds = [rows for rows in (64, 16, 4, 1) if stride_px**2 % rows == 0]
        return rounds, rounds[0] * n
    length = options.height_px * options.width_px
    merged = max(2, _ROW // n)
    rounds = min((_rounds_to(last, merged, length, n) for last in (merged, 4)), key=len)
    return rounds, -length % rounds[0]


def _rounds_to(last: int, merged: int, length: int, n: int) -> list[int]:
    """Rounds that end with `last` rows becoming one, `merged` rows before; no row is to have fewer than N scores."""
    rounds, rows = [1], last
    while length > rounds[0] * _ROW and length >= rows * n:
        rounds.insert(0, rows)
        rows *= merged
    return rounds


def _sample_descriptors(
    graph: _Graph, xy: str, descriptors: str, checkpoint: Checkpoint, shape: _GridShape, options: ExportOptions
) -> str:
    """(B, N, 2) pixels and (B, D, H/8, W/8) -> (B, N, D) of unit length, by the checkpoint's sampling."""
    cells = graph.node("Concat", [graph.as_scalar1(shape.columns), graph.as_scalar1(shape.rows)], axis=0)
    cells = graph.node("Cast", [cells], output="cells_xy", to=TensorProto.FLOAT)
    position = _cell_position(graph, xy, cells, checkpoint)
    sample = _sample_by_grid if options.opset >= 16 else _sample_by_gather
    return _unit_length(graph, sample(graph, position, descriptors, cells, shape), 2, "sampled_descriptors")


def _cell_position(graph: _Graph, xy: str, cells: str, checkpoint: Checkpoint) -> str:
    """As `decode.cell_position`, then held inside the grid: outside, the nearest cells continue."""
    stride, half = checkpoint.stride_px, checkpoint.stride_px / 2

    def number(value: float) -> str:
        return graph.constant(f"{value:g}f", np.array(value, np.float32))

    last = graph.node("Sub", [cells, number(1)])
    if checkpoint.sampling is Sampling.HALF_PIXEL:
        scaled = graph.node("Div", [graph.node("Add", [xy, number(0.5)]), number(stride)])
        position = graph.node("Sub", [scaled, number(0.5)])
    else:
        span = graph.node("Sub", [graph.node("Mul", [cells, number(stride)]), number(half + 0.5)])
        ratio = graph.node("Div", [graph.node("Sub", [xy, number(half - 0.5)]), span])
        position = graph.node("Mul", [ratio, last])
    position = graph.node("Max", [position, number(0)])
    return graph.node("Min", [position, last], output="cell_xy")


def _sample_by_grid(graph: _Graph, position: str, descriptors: str, cells: str, shape: _GridShape) -> str:
    """GridSample (opset 16 and newer), whose grid runs from -1 to 1 across the cells' outer edges."""
    half, one = (graph.constant(f"{v:g}f", np.array(v, np.float32)) for v in (0.5, 1))
    unit = graph.node("Div", [graph.node("Add", [position, half]), cells])
    grid = graph.node("Sub", [graph.node("Add", [unit, unit]), one])
    mode = "linear" if graph.opset >= 20 else "bilinear"
    grid = graph.unsqueeze(grid, 1)
    sampled = graph.node("GridSample", [descriptors, grid], mode=mode, padding_mode="border", align_corners=0)
    return graph.node("Transpose", [graph.node("Squeeze", [sampled], axes=[2])], perm=[0, 2, 1])


def _sample_by_gather(graph: _Graph, position: str, descriptors: str, cells: str, shape: _GridShape) -> str:
    """Bilinear interpolation by four gathers, for opsets without GridSample."""
    one_f = graph.constant("1f", np.array(1, np.float32))
    one = graph.constant("one", np.array(1, np.int64))
    # Rows of one long table: image b's cells start at b * rows * columns.
    by_cell = graph.node("Transpose", [descriptors], perm=[0, 2, 3, 1])
    dim = graph.dim(descriptors, 1)
    minus_one = graph.constant("minus_one", np.array([-1], np.int64))
    table = graph.node("Reshape", [by_cell, graph.node("Concat", [minus_one, graph.as_scalar1(dim)], axis=0)])
    batch = graph.dim(descriptors, 0)
    zero = graph.constant("zero", np.array(0, np.int64))
    images = graph.unsqueeze(graph.node("Range", [zero, batch, one]), 1)
    first_row = graph.node("Mul", [images, graph.node("Mul", [shape.rows, shape.columns])])

    corner = graph.node("Floor", [position])
    fraction = graph.node("Sub", [position, corner])
    whole = graph.node("Cast", [corner], to=TensorProto.INT64)

    def axis(index: int, count: str) -> tuple[str, str, str, str]:
        low = graph.node("Squeeze", [graph.slice(whole, 2, index, index + 1)], axes=[2])
        # Min on int64 needs opset 12, so the upper neighbour steps by 1 only where there is one.
        more = graph.node("Less", [low, graph.node("Sub", [count, one])])
        high = graph.node("Add", [low, graph.node("Cast", [more], to=TensorProto.INT64)])
        weight = graph.slice(fraction, 2, index, index + 1)
        return low, high, graph.node("Sub", [one_f, weight]), weight

    x0, x1, left, right = axis(0, shape.columns)
    y0, y1, top, bottom = axis(1, shape.rows)

    def row(y: str) -> str:
        start = graph.node("Add", [first_row, graph.node("Mul", [y, shape.columns])])
        at = [graph.node("Gather", [table, graph.node("Add", [start, x])], axis=0) for x in (x0, x1)]
        return graph.node("Add", [graph.node("Mul", [at[0], left]), graph.node("Mul", [at[1], right])])

    upper, lower = graph.node("Mul", [row(y0), top]), graph.node("Mul", [row(y1), bottom])
    return graph.node("Add", [upper, lower])


# -------------------------------------------------------------------------------------------------- the file's frame


def _model(graph: _Graph, checkpoint: Checkpoint, options: ExportOptions) -> onnx.ModelProto:
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
    helper.set_model_props(model, describe(checkpoint, options).to_metadata())
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


def describe(checkpoint: Checkpoint, options: ExportOptions) -> ModelDescription:
    """What the file that `to_onnx` makes says of itself."""
    decodes = options.type is OutputType.KEYPOINTS
    return ModelDescription(
        type=options.type,
        sampling=checkpoint.sampling,
        family=checkpoint.family,
        checkpoint_sha256=checkpoint.sha256,
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
        approximation=f"BatchNorm folded: differs within {reach_of_padding_px(checkpoint)} px of the input's border"
        if options.fold_batchnorm
        else None,
    )


class _Graph:
    """Collects nodes and constants; knows where the opsets differ, so that nothing else has to."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def node(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Adds a node with one output, named after itself, and returns that name."""
        if op == "Squeeze" and self.opset >= 13:
            inputs = [*inputs, self._axes(attributes.pop("axes"))]
        output = output or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def rename(self, old: str, new: str) -> None:
        """Gives a tensor another name, wherever it appears."""
        for node in self.nodes:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    def unsqueeze(self, x: str, axis: int) -> str:
        if self.opset >= 13:
            return self.node("Unsqueeze", [x, self._axes([axis])])
        return self.node("Unsqueeze", [x], axes=[axis])

    def reduce(self, op: str, x: str, axis: int, keepdims: int = 1, output: str | None = None) -> str:
        takes_input = self.opset >= (13 if op == "ReduceSum" else 18)
        if takes_input:
            return self.node(op, [x, self._axes([axis])], output=output, keepdims=keepdims)
        return self.node(op, [x], output=output, axes=[axis], keepdims=keepdims)

    def slice(self, x: str, axis: int, start: int, stop: int) -> str:
        bounds = [self._axes([value]) for value in (start, stop, axis)]
        return self.node("Slice", [x, *bounds])

    def reshape(self, x: str, shape: Sequence[int], output: str | None = None) -> str:
        name = "shape_" + "_".join(re.sub("-", "m", str(size)) for size in shape)
        return self.node("Reshape", [x, self.constant(name, np.array(shape, np.int64))], output=output)

    def top_k(self, x: str, k: int) -> tuple[str, str]:
        """The k largest along the last axis, sorted: values and int64 indices."""
        values, indices = f"topk_{len(self.nodes)}", f"topk_{len(self.nodes)}_index"
        count = self.constant(f"k_{k}", np.array([k], np.int64))
        self.nodes.append(
            helper.make_node("TopK", [x, count], [values, indices], name=values, axis=-1, largest=1, sorted=1)
        )
        return values, indices

    def dim(self, x: str, axis: int) -> str:
        """One dimension of a tensor, an int64 scalar."""
        index = self.constant(f"dim_{axis}", np.array(axis, np.int64))
        return self.node("Gather", [self.node("Shape", [x]), index], axis=0)

    def as_scalar1(self, scalar: str) -> str:
        """A scalar as a tensor of one element."""
        return self.reshape(scalar, [1])

    def as_column(self, x: str) -> str:
        """(B, N) int64 -> (B, N, 1) float32."""
        return self.unsqueeze(self.node("Cast", [x], to=TensorProto.FLOAT), 2)

    def _axes(self, values: Sequence[int]) -> str:
        name = "ints_" + "_".join(re.sub("-", "m", str(value)) for value in values)
        return self.constant(name, np.array(values, np.int64))
