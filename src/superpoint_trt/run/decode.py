"""Score map or raw heads -> keypoints, in numpy. Tests hold the graphs and the CUDA kernels against these functions.

They do what the MIT PyTorch reference (rpautrat/SuperPoint) does, faster: scores below the threshold are set to zero
before the suppression. This changes no keypoint, because a score only suppresses lower ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.checkpoint.descriptor_map import DescriptorMap
from superpoint_trt.core.types import DecodeOptions, Float32, Sampling, SuperPointError

SUBPIXEL_REACH_PX = 2
"""Scores up to this far from a keypoint move it: 5x5 pixels."""

NORM_EPS = 1e-12
"""A descriptor shorter than this is divided by this, not by its length: torch.nn.functional.normalize's default."""


def scores_from_logits(logits: NDArray[Any]) -> Float32:
    """Softmax over each cell's pixels and its dustbin, which is then dropped (DeTone et al. 2018, section 3.2).

    Args:
        logits: (B, S*S + 1, H/S, W/S), any float type; computed in float32.

    Returns:
        (B, H, W) float32.
    """
    logits = logits.astype(np.float32, copy=False)
    with np.errstate(invalid="ignore"):  # infinity - infinity: the scores are NaN, as they should be
        cells = logits - logits.max(axis=1, keepdims=True)
        np.exp(cells, out=cells)
        cells = cells[:, :-1] / cells.sum(axis=1, keepdims=True)
    batch, pixels, rows, columns = cells.shape
    stride = round(pixels**0.5)
    cells = cells.reshape(batch, stride, stride, rows, columns).transpose(0, 3, 1, 4, 2)
    scores: Float32 = cells.reshape(batch, rows * stride, columns * stride)
    return scores


def normalize(descriptors: NDArray[Any], axis: int) -> Float32:
    """Scales vectors to unit length along `axis`; float32. What is not finite becomes NaN, without a warning."""
    descriptors = descriptors.astype(np.float32, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        length = _length(descriptors, axis)
        if np.isinf(length).any():  # squares overflow from about 1e19 on
            largest = np.abs(descriptors).max(axis=axis, keepdims=True)
            descriptors = descriptors / np.where(np.isinf(length), largest, np.float32(1))
            length = _length(descriptors, axis)
        unit: Float32 = descriptors / np.maximum(length, np.float32(NORM_EPS))
    return unit


def lift_descriptors(descriptors: NDArray[Any], descriptor_map: DescriptorMap) -> Float32:
    """Makes a small network's descriptors comparable with the full network's.

        to_full = load_descriptor_map("small")
        lifted = lift_descriptors(received, to_full)

    Args:
        descriptors: (N, D) of any float type and length.
        descriptor_map: of the network that found them, `checkpoint.layouts.load_descriptor_map`.

    Returns:
        (N, T) float32, unit length.

    Raises:
        SuperPointError: the descriptors are not of the length that the map takes.
    """
    wanted = descriptor_map.matrix.shape[1]
    if descriptors.ndim != 2 or descriptors.shape[1] != wanted:
        raise SuperPointError(f"descriptors are {descriptors.shape}; the map takes (N, {wanted}) of its own network.")
    return normalize(descriptors.astype(np.float32, copy=False) @ descriptor_map.matrix.T, axis=1)


def _length(vectors: Float32, axis: int) -> Float32:
    length: Float32 = np.sqrt(np.square(vectors).sum(axis=axis, keepdims=True, dtype=np.float32))
    return length


def suppress(scores: Float32, radius_px: int) -> NDArray[np.bool_]:
    """Non-maximum suppression in two rounds; pixels of equal score within reach of each other all survive.

    Args:
        scores: (H, W) float32, none negative.
        radius_px: half side of the square window.

    Returns:
        (H, W) bool: the survivors. A score of 0 survives where no higher one is near.
    """
    survive: NDArray[np.bool_] = scores == _window_max(scores, radius_px)
    for _ in range(2):
        is_far = ~_window_max(survive.view(np.uint8), radius_px).view(np.bool_)
        rest = _masked(scores, is_far)
        survive |= (rest == _window_max(rest, radius_px)) & is_far
    return survive


def _masked(scores: Float32, mask: NDArray[np.bool_]) -> Float32:
    """The scores where the mask holds, 0 elsewhere. OpenCV takes a fifth of np.where's time."""
    import cv2  # here, because the package's own import costs numpy alone

    masked: Any = cv2.copyTo(scores, mask.view(np.uint8))
    return np.asarray(masked)


def _window_max(values: NDArray[Any], radius_px: int) -> NDArray[Any]:
    """Maximum over the window of (2 r + 1)^2 pixels around each pixel, cut off at the edges; uint8 or float32."""
    import cv2

    # OpenCV walks over a window's rows, then over its columns. No window needs to be larger than the image.
    height, width = (2 * min(radius_px, side - 1) + 1 for side in values.shape)
    return np.asarray(cv2.dilate(values, np.ones((height, width), np.uint8)))


def select(scores: Float32, options: DecodeOptions) -> tuple[Float32, Float32]:
    """Finds the keypoints of one score map.

    Args:
        scores: (H, W) float32, before suppression, without padding.
        options: radius, border, threshold, number.

    Returns:
        Points (N, 2) float32, x then y, and scores (N,), by falling score; equal scores in reading order. Sub-pixel
        points are the same ones, in the same order, moved by `refine`.
    """
    height, width = scores.shape
    border = options.remove_borders_px
    above = scores > options.threshold
    candidates = _masked(scores, above)
    kept = suppress(candidates, options.nms_radius_px) & above
    # As in the reference, the border is cut off after the suppression: its points still suppress their neighbors.
    within = (slice(border, height - border), slice(border, width - border))
    inside = np.zeros_like(kept)
    inside[within] = kept[within]
    pixels = np.flatnonzero(inside)
    found = candidates.take(pixels)
    order = np.argsort(-found, kind="stable")[: options.max_keypoints]
    y, x = np.divmod(pixels[order], width)
    xy = np.stack([x, y], axis=1)
    return refine(xy, scores) if options.subpixel else xy.astype(np.float32), found[order]


def inside_border(xy: Float32, placed_wh: tuple[int, int], options: DecodeOptions) -> NDArray[np.bool_]:
    """Which points (N, 2) of a graph, which decodes padding too, lie in the image and not in its right or lower border.

    A sub-pixel point lies where its nearest pixel lies.
    """
    far = np.array(placed_wh, np.float32) - options.remove_borders_px - (0.5 if options.subpixel else 0)
    return np.asarray((xy < far).all(axis=1))


def refine(xy: NDArray[np.int64], scores: Float32) -> Float32:
    """Moves points to the center of the scores around them: p + sum(s_i o_i) / sum(s_i) over 5x5 pixels.

    s_i are scores before suppression, o_i offsets from p in px. Pixels outside the image count 0. It is the soft-argmax
    of SuperPoint's successors (Zhao et al. 2023, arXiv 2304.03608) with the scores themselves as weights. A point
    beside a score that is no number stays where it is: nothing can be sampled at a place that is no number. Only a
    caller's own score map can have such scores: of a model they are an error before its outputs are decoded
    (`core.contract.check_finite`).

    Args:
        xy: (N, 2) whole pixels.
        scores: (H, W) float32, before suppression, without padding.

    Returns:
        (N, 2) float32.
    """
    reach, side = SUBPIXEL_REACH_PX, 2 * SUBPIXEL_REACH_PX + 1
    padded = np.pad(scores, reach)
    x, y = xy.T
    steps = np.arange(side)[:, None]
    rows, columns = ((steps + y) * padded.shape[1])[:, None], steps + x
    around = padded.take(rows + columns)  # (5, 5, N): y, x, point
    by_column, by_row = around.sum(axis=0), around.sum(axis=1)
    offsets = np.arange(-reach, reach + 1, dtype=np.float32)[:, None]
    # No matrix product: for one this small, BLAS would wake threads.
    moments = np.stack([(by_column * offsets).sum(axis=0), (by_row * offsets).sum(axis=0)], axis=1)
    total = np.maximum(by_row.sum(axis=0), np.finfo(np.float32).tiny)
    shifts = np.nan_to_num(moments / total[:, None])
    refined: Float32 = (xy + shifts).astype(np.float32)
    return refined


def sample_descriptors(xy: Float32, descriptors: Float32, stride_px: int, sampling: Sampling) -> Float32:
    """Interpolates descriptors bilinearly at keypoints and scales them to unit length again.

    Outside the outermost cell centers the nearest cell continues. At unit length this equals the zero padding of
    torch's grid_sample, which scales the remaining cells by one factor.

    Args:
        xy: (N, 2) pixels of the network's input.
        descriptors: (D, H/S, W/S) of unit length along D.
        stride_px: S, pixels along a cell.
        sampling: the checkpoint's convention.

    Returns:
        (N, D) float32, unit length.
    """
    import cv2

    dim, rows, columns = descriptors.shape
    cells = np.array([columns, rows], dtype=np.float32)
    position = np.clip(cell_position(xy, cells, stride_px, sampling), 0, cells - 1)
    corner = np.minimum(position.astype(np.int64), np.maximum(cells.astype(np.int64) - 2, 0))
    (fx, fy), (x0, y0) = (position - corner).T[..., None].astype(np.float32), corner.T
    x1, y1 = np.minimum(x0 + 1, columns - 1), np.minimum(y0 + 1, rows - 1)
    table = cv2.transpose(descriptors.reshape(dim, -1))  # a row for each cell
    sampled = np.zeros((len(xy), dim), np.float32)
    for row, down in ((y0, 1 - fy), (y1, fy)):
        for column, across in ((x0, 1 - fx), (x1, fx)):
            cell = table.take(row * columns + column, axis=0)
            cell *= down * across  # in place: fresh memory costs more than the arithmetic
            sampled += cell
    return normalize(sampled, axis=1)


def cell_position(xy: Float32, cells: Float32, stride_px: int, sampling: Sampling) -> Float32:
    """Maps pixels (N, 2) to positions on the descriptor grid (N, 2), which are 0 at the first cell's center.

    HALF_PIXEL is the true geometry of the network's cells. LEGACY is what SuperGlue's and LightGlue's
    `sample_descriptors` compute with align_corners=True: exact at the first cell, 3.5 px short at the last.
    """
    stride, half = np.float32(stride_px), np.float32(0.5)
    position: Float32
    if sampling is Sampling.HALF_PIXEL:
        position = (xy + half) / stride - half
    else:
        position = (xy - stride / 2 + half) / (cells * stride - stride / 2 - half) * (cells - 1)
    return position
