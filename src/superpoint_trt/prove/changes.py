"""Makes the second picture of a pair from the first: turned, shrunk or blurred, with the homography between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Matrix

MOST_OFF_DEG, SMALLEST_OFF_ZOOM = 3.0, 0.96
"""No change is exact: each picture has up to so many degrees, and a zoom down to this, of its own."""

SIDES_OF_PX = 32
"""Both sides of a picture are a multiple: runtimes prepare for each size, and so there are fewer."""


@dataclass(frozen=True)
class Change:
    """What becomes of the second picture. Lengths are in its own pixels."""

    turn_deg: float = 0.0
    """Clockwise as one sees the picture."""
    zoom: float = 1.0
    """Size of things in the second picture over their size in the first."""
    defocus_px: float = 0.0
    """Radius of the disc that a point becomes."""
    motion_px: float = 0.0
    """Length of the line that a point becomes."""


@dataclass(frozen=True)
class ChangedPicture:
    """The second picture of a pair."""

    gray: Float32
    """(H, W) float32 in [0, 1], in steps of 1/255; mean gray around the photograph."""
    homography: Matrix
    """(3, 3): pixels of the first picture to pixels of this one."""


@dataclass(frozen=True)
class _Offsets:
    """By how much the changes of one photograph miss what was asked for."""

    turn_deg: float
    zoom: float
    shift_px: tuple[float, float]
    motion_rad: float
    """Direction of the motion."""

    @classmethod
    def of(cls, seed: int) -> _Offsets:
        random = np.random.default_rng(seed)
        turn, zoom = random.uniform(-MOST_OFF_DEG, MOST_OFF_DEG), random.uniform(SMALLEST_OFF_ZOOM, 1.0)
        x, y = random.uniform(0, 1, 2)
        return cls(float(turn), float(zoom), (float(x), float(y)), float(random.uniform(0, math.pi)))


def changed(gray: Float32, change: Change, seed: int) -> ChangedPicture:
    """Makes the second picture of a pair. The whole first one is seen in it.

    Args:
        gray: the first picture, (H, W) float32 in [0, 1].
        change: what becomes of it.
        seed: decides the few degrees and percent, the fraction of a pixel and the direction of motion. Changes of one
            seed have the same, so that the points of a curve differ in nothing else.
    """
    import cv2

    offsets = _Offsets.of(seed)
    zoom = change.zoom * offsets.zoom
    matrix, size_wh = _similarity(gray.shape[1::-1], change.turn_deg + offsets.turn_deg, zoom, offsets.shift_px)
    picture: NDArray[Any] = cv2.warpPerspective(
        _averaged(gray, zoom), matrix, size_wh, flags=cv2.INTER_CUBIC, borderValue=float(gray.mean())
    )
    if change.defocus_px:
        picture = _convolved(picture, disc(change.defocus_px))
    if change.motion_px:
        picture = _convolved(picture, line(change.motion_px, offsets.motion_rad))
    return ChangedPicture(rounded(picture), matrix)


def rounded(gray: NDArray[Any]) -> Float32:
    """A picture as a camera gives it: values in [0, 1] in steps of 1/255."""
    steps: Float32 = (np.round(np.clip(gray, 0, 1) * 255) / 255).astype(np.float32)
    return steps


def _similarity(
    size_wh: tuple[int, ...], turn_deg: float, zoom: float, shift_px: tuple[float, float]
) -> tuple[Matrix, tuple[int, int]]:
    """The map (3, 3) of a picture onto one that holds all of it, and that one's (width, height)."""
    angle = math.radians(turn_deg)
    linear = zoom * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    width, height = size_wh
    edges = np.array([[0, 0], [width, 0], [width, height], [0, height]]) - 0.5  # pixel centers are at integers
    turned = edges @ linear.T
    offset = np.array(shift_px) - 0.5 - turned.min(axis=0)
    sides = np.ceil((turned.max(axis=0) + offset + 0.5) / SIDES_OF_PX).astype(int) * SIDES_OF_PX
    return np.vstack([np.column_stack([linear, offset]), [0, 0, 1]]), (int(sides[0]), int(sides[1]))


def _averaged(gray: Float32, zoom: float) -> NDArray[Any]:
    """What will be shrunk is blurred first, as a lens and a sensor do; otherwise fine detail would flicker (aliasing).

    A pixel is taken for a Gaussian of 0.5 px, before and after.
    """
    import cv2

    sigma = 0.5 * math.sqrt(max(1 / zoom**2 - 1, 0.0))
    if sigma < 0.2:  # less than a hundredth of a neighbor
        return gray
    averaged: NDArray[Any] = cv2.GaussianBlur(gray, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    return averaged


# ---------------------------------------------------------------------------------------------------------------- blur


def disc(radius_px: float) -> NDArray[np.float64]:
    """What a lens out of focus makes of a point: an even disc (K, K) of sum 1, its rim one pixel soft."""
    x, y = _grid(radius_px)
    return _of_sum_1(np.clip(radius_px + 0.5 - np.hypot(x, y), 0, 1))


def line(length_px: float, direction_rad: float) -> NDArray[np.float64]:
    """What a moving camera makes of a point: an even line (K, K) of sum 1, one pixel wide."""
    x, y = _grid(length_px / 2)
    along = x * math.cos(direction_rad) + y * math.sin(direction_rad)
    across = y * math.cos(direction_rad) - x * math.sin(direction_rad)
    return _of_sum_1(np.clip(length_px / 2 + 0.5 - abs(along), 0, 1) * np.clip(1 - abs(across), 0, 1))


def _grid(reach_px: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """X and y of the pixels of a kernel."""
    reach = math.ceil(reach_px)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    return x, y


def _of_sum_1(kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    even: NDArray[np.float64] = kernel / kernel.sum()
    return even


def _convolved(gray: NDArray[Any], kernel: NDArray[np.float64]) -> NDArray[Any]:
    import cv2

    convolved: NDArray[Any] = cv2.filter2D(gray, -1, kernel, borderType=cv2.BORDER_REPLICATE)
    return convolved
