"""Finds out why a converted model finds other points: each known conversion fault is tested by its own signature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Keypoints, Matrix, Sampling
from superpoint_trt.run import decode

FEWEST_POINTS = 16
"""With fewer points a signature could be chance."""

SMALLEST_SCORE_FAULT = 2e-3
"""As a part of the mean score: a smaller difference may be rounding."""

MUCH_BETTER = 0.2
"""Another reading of the reference is believed if it leaves at most this part of the error."""

SETTLED_PX = 0.2
"""Sub-pixel points this near to a whole pixel, in x and in y, count as found there."""

LARGEST_FP16 = 65504

MOST_ROUNDED = 0.5
"""More points than this at places of rounded indices are no chance. Rounded scores hide some of them."""

NOT_FINITE = "not-finite"
"""The name of the one finding that needs no signature."""


@dataclass(frozen=True)
class Finding:
    """A fault by name, and how it shows."""

    name: str
    """descriptor-sampling, border, dustbin, cell-order, fp16-indices, coordinates or not-finite."""
    detail: str

    def to_json(self) -> dict[str, str]:
        """The finding as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Evidence:
    """What model and reference make of one image, in pixels of the network's input."""

    found: Keypoints
    """The model's keypoints."""
    scores: Float32
    """(H, W): the reference's score map, before suppression."""
    descriptors: Float32
    """(D, H/8, W/8): the reference's descriptors, unit length."""
    sampling: Sampling
    """The checkpoint's."""
    border_px: int
    """How many pixels on each side should have no keypoints."""
    subpixel: bool
    """Whether keypoints lie between pixels."""
    in_graph: bool
    """Whether the model decodes in its graph."""
    raw_xy: Float32 | None
    """(N, 2): the points of a `keypoints` model as its graph returns them, without padding rows; else None."""

    @property
    def stride_px(self) -> int:
        """Pixels along one side of a cell."""
        return int(self.scores.shape[0] // self.descriptors.shape[1])


def findings(evidence: Evidence) -> list[Finding]:
    """Lists all faults whose signature one image shows."""
    raw = evidence.raw_xy if evidence.raw_xy is not None else evidence.found.xy
    height, width = evidence.scores.shape
    inside = np.asarray((np.isfinite(raw) & (raw >= 0) & (raw < np.array([width, height]))).all(axis=1))
    found = [*_coordinates(inside), *_fp16_indices(evidence, raw[inside])]
    if not found:  # points at rounded indices may lie in the border, which is not a fault of its own
        found += _border(evidence, raw[inside])
    if len(evidence.found) >= FEWEST_POINTS and inside.all():
        found += [*_scores(evidence), *_sampling(evidence)]
    return found


def _on_whole_pixels(xy: Float32) -> NDArray[np.bool_]:
    """Which sub-pixel points hardly moved, so that the nearest pixel is the one they were found at."""
    return np.asarray((np.abs(xy - np.rint(xy)) < SETTLED_PX).all(axis=1))


def _coordinates(inside: NDArray[np.bool_]) -> Iterator[Finding]:
    if not inside.all():
        yield Finding("coordinates", f"{int((~inside).sum())} keypoints lie outside the image or are not finite")


def _fp16_indices(evidence: Evidence, raw: Float32) -> Iterator[Finding]:
    """Above 2048 float16 holds only every 2nd, above 4096 every 4th integer, ..., above 65504 none."""
    if evidence.subpixel:
        yield from _fp16_subpixel(evidence)
        return
    width = evidence.scores.shape[1]
    flat = raw[:, 1].astype(np.int64) * width + raw[:, 0].astype(np.int64)
    coarse = flat[flat > 4096]
    with np.errstate(over="ignore"):
        representable = coarse.astype(np.float16).astype(np.float64) == coarse
    if evidence.in_graph and len(coarse) >= FEWEST_POINTS and representable.all():
        yield Finding("fp16-indices", "every flat pixel index is a float16 number: indices went through half precision")


def _fp16_subpixel(evidence: Evidence) -> Iterator[Finding]:
    """Tests whether sub-pixel points lie where their rounded indices would put them.

    Scores are not rounded, so the reference's map tells the pixel that each point was found at: the one of that score.
    """
    height, width = evidence.scores.shape
    order = np.argsort(evidence.scores, axis=None)
    ranked, wanted = evidence.scores.ravel()[order], evidence.found.scores
    above = np.clip(np.searchsorted(ranked, wanted), 1, order.size - 1)
    flat = order[above - (wanted - ranked[above - 1] < ranked[above] - wanted)]
    rounded = np.minimum(flat, LARGEST_FP16).astype(np.float16).astype(np.int64)
    moved = (rounded != flat) & (rounded < height * width)
    if not evidence.in_graph or moved.sum() < FEWEST_POINTS:
        return
    places = decode.refine(np.stack([rounded[moved] % width, rounded[moved] // width], axis=1), evidence.scores)
    fits = np.linalg.norm(places - evidence.found.xy[moved], axis=1) < 0.1
    if fits.mean() > MOST_ROUNDED:
        yield Finding("fp16-indices", "keypoints lie at rounded flat pixel indices: they went through half precision")


def _border(evidence: Evidence, raw: Float32) -> Iterator[Finding]:
    height, width = evidence.scores.shape
    border = evidence.border_px
    slack = decode.SUBPIXEL_REACH_PX if evidence.subpixel else 0
    far = np.array([width, height]) - border
    outside = ((raw < border - slack) | (raw >= far + slack)).any(axis=1)
    if border and outside.any():
        yield Finding(
            "border", f"{int(outside.sum())} keypoints lie within {border} px of an edge, which is not removed"
        )


def _scores(evidence: Evidence) -> Iterator[Finding]:
    """Tests whether the scores fit a wrong reading of the reference's score map better than the right one."""
    stride = evidence.stride_px
    found = evidence.found.rows(_on_whole_pixels(evidence.found.xy)) if evidence.subpixel else evidence.found
    if len(found) < FEWEST_POINTS:
        return
    x, y = np.rint(found.xy).astype(np.int64).T
    read = evidence.scores[y, x]
    height, width = evidence.scores.shape
    cells = evidence.scores.reshape(height // stride, stride, width // stride, stride).sum(axis=(1, 3))
    turned = evidence.scores[y // stride * stride + x % stride, x // stride * stride + y % stride]
    readings = {
        "dustbin": (read / cells[y // stride, x // stride], "scores are normalized without the dustbin"),
        "cell-order": (turned, "rows and columns inside a cell are exchanged"),
    }
    direct = _typical_error(found.scores, read)
    for name, (reading, detail) in readings.items():
        error = _typical_error(found.scores, reading)
        if direct > SMALLEST_SCORE_FAULT * read.mean() and error < MUCH_BETTER * direct:
            yield Finding(name, f"{detail}: typical score error {error:.2g} that way, {direct:.2g} the right way")


def _typical_error(a: Float32, b: Float32) -> float:
    """Root mean square, because a fault may show at a few points only."""
    return float(np.sqrt(np.square(a - b).mean()))


def _sampling(evidence: Evidence) -> Iterator[Finding]:
    """Tests whether the descriptors fit another place better than the right one."""
    stride = evidence.stride_px
    xy = evidence.found.xy

    def misfit(shift_px: tuple[float, float], sampling: Sampling) -> float:
        moved = xy + np.array(shift_px, np.float32)
        sampled = decode.sample_descriptors(moved, evidence.descriptors, stride, sampling)
        return 1.0 - float(np.median((sampled * evidence.found.descriptors).sum(axis=1)))

    right = misfit((0.0, 0.0), evidence.sampling)
    if right < 1e-4:
        return
    other = next(sampling for sampling in Sampling if sampling is not evidence.sampling)
    steps = (-stride / 2, -0.5, 0.0, 0.5, stride / 2)
    places = {
        f"shifted by ({dx:g}, {dy:g}) px": misfit((dx, dy), evidence.sampling)
        for dx in steps
        for dy in steps
        if (dx, dy) != (0.0, 0.0)
    }
    places[f"sampled the {other.value} way"] = misfit((0.0, 0.0), other)
    place, error = min(places.items(), key=lambda item: item[1])
    if error < MUCH_BETTER * right:
        yield Finding(
            "descriptor-sampling", f"descriptors are {place}: misfit {error:.2g} there, {right:.2g} at the right place"
        )


def warped_copy(gray: Float32) -> tuple[Float32, Matrix]:
    """Warps an image by a fixed homography: a turn of 8 degrees about the center, a scale of 0.9, a slight tilt.

    Args:
        gray: (H, W) float32 in [0, 1].

    Returns:
        The warped image (H, W) float32 in [0, 1], and the (3, 3) homography from the image to it.
    """
    import cv2

    height, width = gray.shape
    angle, scale = np.deg2rad(8.0), 0.9
    center = np.array([[1, 0, -(width - 1) / 2], [0, 1, -(height - 1) / 2], [0, 0, 1]])
    turn = np.array(
        [
            [scale * np.cos(angle), -scale * np.sin(angle), 0],
            [scale * np.sin(angle), scale * np.cos(angle), 0],
            [0.1 / width, 0.05 / height, 1],
        ]
    )
    homography: Matrix = np.linalg.inv(center) @ turn @ center
    warped = cv2.warpPerspective(
        gray, homography, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
    )
    # Interpolation may leave [0, 1] by a rounding error.
    return np.clip(warped, 0, 1, dtype=np.float32), homography
