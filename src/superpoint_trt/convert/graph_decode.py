"""Writes the nodes that make score map, unit descriptors and keypoints of the raw heads.

`run/decode.py` does the same in numpy, `checkpoint/reference.py` in torch; tests compare all three.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper

from superpoint_trt.checkpoint.layouts import Checkpoint
from superpoint_trt.convert.export_options import ExportOptions
from superpoint_trt.convert.graph_writer import GraphWriter
from superpoint_trt.core.types import INPUT_NAME, DecodeOptions, Sampling

NORM_EPS = 1e-12

_REACH = 2
"""Scores up to this many px from a keypoint move it: `run.decode.SUBPIXEL_REACH_PX`."""


def write_score_map(graph: GraphWriter, logits: str, stride_px: int) -> str:
    """Softmax over the cell and the dustbin, the dustbin dropped, cells unfolded.

    The softmax runs over the last axis, because below opset 13 the operator flattens all axes from its own on. Cells
    are unfolded from there: with DepthToSpace, which wants channels first, onnxruntime on a CPU moves the softmax to
    the channels, where it takes 14 times as long.

    Returns:
        Name of the map (B, 1, H, W).
    """
    last = graph.node("Transpose", [logits], perm=[0, 2, 3, 1])
    probabilities = graph.node("Softmax", [last], output="cell_probabilities", axis=3)
    pixels = graph.slice(probabilities, axis=3, start=0, stop=stride_px**2)
    cells = graph.reshape(pixels, [0, 0, 0, stride_px, stride_px])
    in_reading_order = graph.node("Transpose", [cells], perm=[0, 1, 3, 2, 4])
    return graph.node("Reshape", [in_reading_order, graph.node("Shape", [INPUT_NAME])], output="score_map")


def write_unit_length(graph: GraphWriter, x: str, axis: int, name: str) -> str:
    """Divides by the L2 norm along an axis; `name` is the result's."""
    length = graph.reduce("ReduceL2", x, axis)
    floor = graph.constant("norm_eps", np.array(NORM_EPS, np.float32))
    return graph.node("Div", [x, graph.node("Max", [length, floor])], output=name)


def write_keypoints(
    graph: GraphWriter, score_map: str, descriptors: str, checkpoint: Checkpoint, options: ExportOptions
) -> None:
    """Writes NMS, border, top-k, threshold, sub-pixel places and descriptor sampling: a `keypoints` model's outputs.

    If a logit of an image is not finite, all its scores are NaN.

    Args:
        graph: to add to.
        score_map: name of (B, 1, H, W).
        descriptors: name of (B, D, H/8, W/8), of unit length along D.
        checkpoint: stride and sampling.
        options: sizes, decode, N.
    """
    shape = _GridShape.of(graph, score_map, descriptors, checkpoint.stride_px, options)
    survivors = _survivors(graph, score_map, shape, options.decode)
    best, pixel = _top_scores(graph, survivors, checkpoint, options)
    y = graph.node("Div", [pixel, shape.width])
    x = graph.node("Sub", [pixel, graph.node("Mul", [y, shape.width])])
    xy = graph.node("Concat", [graph.as_column(x), graph.as_column(y)], output="pixel_xy", axis=2)
    if options.decode.subpixel:
        xy = _refine(graph, score_map, x, y, xy, shape)

    found = graph.node("Greater", [best, graph.constant("threshold", np.array(options.decode.threshold, np.float32))])
    found_column = graph.unsqueeze(found, 2)
    sampled = _sample_descriptors(graph, xy, descriptors, checkpoint, shape, options)
    zero, minus_one = (graph.constant(f"{v}f", np.array(v, np.float32)) for v in (0, -1))
    graph.node("Where", [found_column, xy, minus_one], output="keypoints")
    total = _total(graph, score_map, checkpoint.stride_px)
    is_sound = graph.node("Greater", [total, minus_one])
    # The sum itself where it is NaN: without this a broken network would look like an image without keypoints.
    graph.node("Where", [is_sound, graph.node("Where", [found, best, zero]), total], output="scores")
    graph.node("Where", [found_column, sampled, zero], output="descriptors")
    counted = graph.node("Cast", [found], to=TensorProto.INT32)
    graph.reduce("ReduceSum", counted, 1, keepdims=0, output="num_keypoints")


def _total(graph: GraphWriter, score_map: str, stride_px: int) -> str:
    """The sum of one score of each cell, (B, 1): NaN if a logit is not finite, because the softmax spreads that."""
    corners = score_map
    for axis in (2, 3):
        corners = graph.slice(corners, axis, 0, 2**31 - 1, stride_px)
    return graph.reduce("ReduceSum", graph.reshape(corners, [0, -1]), 1)


@dataclass(frozen=True)
class _GridShape:
    """Names of int64 scalars: constants in a static graph, read off the tensors in a dynamic one."""

    height: str
    width: str
    rows: str
    columns: str

    @classmethod
    def of(
        cls, graph: GraphWriter, score_map: str, descriptors: str, stride_px: int, options: ExportOptions
    ) -> _GridShape:
        if options.dynamic:
            return cls(*(graph.dim(tensor, axis) for tensor in (score_map, descriptors) for axis in (2, 3)))
        height, width = options.height_px, options.width_px
        sizes = {"height": height, "width": width, "rows": height // stride_px, "columns": width // stride_px}
        return cls(**{name: graph.constant(name, np.array(size, np.int64)) for name, size in sizes.items()})


def _survivors(graph: GraphWriter, scores: str, shape: _GridShape, decode: DecodeOptions) -> str:
    """The score map (B, 1, H, W) with 0 wherever suppression or border removes a pixel."""
    kept = [_suppress(graph, scores, decode.nms_radius_px)] if decode.nms_radius_px else []
    if decode.remove_borders_px:
        kept += [_inside(graph, shape.height, 2, decode), _inside(graph, shape.width, 3, decode)]
    if not kept:
        return scores
    mask = kept[0]
    for other in kept[1:]:
        mask = graph.node("And", [mask, other])
    return graph.node("Where", [mask, scores, graph.constant("0f", np.array(0, np.float32))], output="survivors")


def _inside(graph: GraphWriter, size: str, axis: int, decode: DecodeOptions) -> str:
    """Which rows (axis 2) or columns (3) lie inside the border: bool, (H, 1) or (W,)."""
    border = decode.remove_borders_px
    if size in graph.constants:  # a static graph: computed here
        index = np.arange(int(numpy_helper.to_array(graph.constants[size])))
        known = (index >= border) & (index < len(index) - border)
        return graph.constant(f"inside_{axis}", known[:, None] if axis == 2 else known)
    zero, one, first = (graph.constant(f"int_{v}", np.array(v, np.int64)) for v in (0, 1, border))
    places = graph.node("Range", [zero, size, one])
    after = graph.node("Less", [places, graph.node("Sub", [size, first])])
    before = graph.node("Greater", [places, graph.constant(f"int_{border - 1}", np.array(border - 1, np.int64))])
    inside = graph.node("And", [before, after])
    return graph.unsqueeze(inside, 1) if axis == 2 else inside


def _suppress(graph: GraphWriter, scores: str, radius_px: int) -> str:
    """Two suppression rounds, as `checkpoint.reference.suppress`; (B, 1, H, W) float32 -> bool, who survives."""

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


def _top_scores(graph: GraphWriter, scores: str, checkpoint: Checkpoint, options: ExportOptions) -> tuple[str, str]:
    """The N best scores of each map and their flat pixel indices, both (B, N): an exact top-k by knock-out.

    The map in reading order is cut into rows. Each row's N best go on to the next round, which has fewer rows. A pixel
    that is not among the N best of its row is not among the N best of the map. Rows stay in reading order and TopK
    breaks ties by the lower index, so equal scores come out in reading order, on plateaus too.
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
"""Most scores in a row. TensorRT sorts each row on one multiprocessor, all rows at once: 13 us up to this length. One
row of a whole 640x480 map takes 1.1 ms (TensorRT 8.6, H100)."""


def _rounds(stride_px: int, options: ExportOptions) -> tuple[list[int], int]:
    """Number of rows in each round of the knock-out, and how many scores to append so that the first rows are full."""
    n = options.max_keypoints
    if options.dynamic:  # H * W is a multiple of the cell's pixels; N more in each row, in case a small map has too few
        rounds = [rows for rows in (64, 16, 4, 1) if stride_px**2 % rows == 0]
        return rounds, rounds[0] * n
    length = options.height_px * options.width_px
    merged = max(2, _ROW // n)
    rounds = min((_rounds_to(last, merged, length, n) for last in (merged, 4)), key=len)
    return rounds, -length % rounds[0]


def _rounds_to(last: int, merged: int, length: int, n: int) -> list[int]:
    """Rounds that merge `merged` rows into one, in the last round `last`; no row has fewer than N scores."""
    rounds, rows = [1], last
    while length > rounds[0] * _ROW and length >= rows * n:
        rounds.insert(0, rows)
        rows *= merged
    return rounds


def _refine(graph: GraphWriter, scores: str, x: str, y: str, xy: str, shape: _GridShape) -> str:
    """Moves points to the center of the scores around them, as `run.decode.refine`; (B, N, 2) float32.

    The 25 scores around each point are gathered from the map with a margin of zeros: index (y + dy) * pitch + x + dx
    for dx and dy from 0 to 4. Sums of products are written out, because a MatMul may run in TF32.
    """
    margin = graph.constant("margin", np.array([0, 0, _REACH, _REACH] * 2, np.int64))
    flat = graph.reshape(graph.node("Pad", [scores, margin]), [0, -1])
    pitch = graph.node("Add", [shape.width, graph.constant(f"int_{2 * _REACH}", np.array(2 * _REACH, np.int64))])
    dy, dx = np.indices((2 * _REACH + 1, 2 * _REACH + 1)).reshape(2, -1)
    down, across = (graph.constant(f"window_{name}", step) for name, step in (("rows", dy), ("columns", dx)))
    window = graph.node("Add", [graph.node("Mul", [down, pitch]), across])
    corner = graph.node("Add", [graph.node("Mul", [y, pitch]), x])
    index = graph.node("Add", [graph.unsqueeze(corner, 2), window])
    gathered = graph.node("GatherElements", [flat, graph.reshape(index, [0, -1])], axis=1)
    around = graph.reshape(gathered, [0, -1, dx.size], output="scores_around")
    sums = []
    for name, offset in (("x", dx - _REACH), ("y", dy - _REACH)):
        weighted = graph.node("Mul", [around, graph.constant(f"offset_{name}", offset.astype(np.float32))])
        sums.append(graph.reduce("ReduceSum", weighted, 2))
    tiny = graph.constant("tiny", np.array(np.finfo(np.float32).tiny, np.float32))
    total = graph.node("Max", [graph.reduce("ReduceSum", around, 2), tiny])
    shift = graph.node("Div", [graph.node("Concat", sums, axis=2), total])
    return graph.node("Add", [xy, shift], output="subpixel_xy")


def _sample_descriptors(
    graph: GraphWriter, xy: str, descriptors: str, checkpoint: Checkpoint, shape: _GridShape, options: ExportOptions
) -> str:
    """Samples (B, D, H/8, W/8) at pixels (B, N, 2) the checkpoint's way -> (B, N, D) of unit length."""
    cells = graph.node("Concat", [graph.as_vector(shape.columns), graph.as_vector(shape.rows)], axis=0)
    cells = graph.node("Cast", [cells], output="cells_xy", to=TensorProto.FLOAT)
    position = _cell_position(graph, xy, cells, checkpoint)
    sample = _sample_by_grid if options.opset >= 16 else _sample_by_gather
    return write_unit_length(graph, sample(graph, position, descriptors, cells, shape), 2, "sampled_descriptors")


def _cell_position(graph: GraphWriter, xy: str, cells: str, checkpoint: Checkpoint) -> str:
    """Pixels (B, N, 2) -> positions in cells, as `run.decode.cell_position`, then clipped to the grid."""
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


def _sample_by_grid(graph: GraphWriter, position: str, descriptors: str, cells: str, shape: _GridShape) -> str:
    """Samples by GridSample (opset 16 and newer), whose grid runs from -1 to 1 across the cells' outer edges."""
    half, one = (graph.constant(f"{v:g}f", np.array(v, np.float32)) for v in (0.5, 1))
    unit = graph.node("Div", [graph.node("Add", [position, half]), cells])
    grid = graph.node("Sub", [graph.node("Add", [unit, unit]), one])
    mode = "linear" if graph.opset >= 20 else "bilinear"
    grid = graph.unsqueeze(grid, 1)
    sampled = graph.node("GridSample", [descriptors, grid], mode=mode, padding_mode="border", align_corners=0)
    return graph.node("Transpose", [graph.node("Squeeze", [sampled], axes=[2])], perm=[0, 2, 1])


def _sample_by_gather(graph: GraphWriter, position: str, descriptors: str, cells: str, shape: _GridShape) -> str:
    """Samples by four gathers, for opsets without GridSample."""
    one_f = graph.constant("1f", np.array(1, np.float32))
    one = graph.constant("one", np.array(1, np.int64))
    # One long table of cells: image b's cells start at row b * rows * columns.
    by_cell = graph.node("Transpose", [descriptors], perm=[0, 2, 3, 1])
    dim = graph.dim(descriptors, 1)
    minus_one = graph.constant("minus_one", np.array([-1], np.int64))
    table = graph.node("Reshape", [by_cell, graph.node("Concat", [minus_one, graph.as_vector(dim)], axis=0)])
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
