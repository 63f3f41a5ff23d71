"""EXIF orientations: turns stored pixels upright, and upright coordinates back to stored pixels (TIFF 6.0, tag 274)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32

UPRIGHT = 1
ORIENTATIONS = range(1, 9)

_SWAPS_SIDES = frozenset((5, 6, 7, 8))
_MIRRORS_X = frozenset((2, 3, 7, 8))
"""Orientations whose stored x falls while the upright coordinate on that axis rises."""
_MIRRORS_Y = frozenset((3, 4, 6, 7))


def turn_upright(stored: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turns the pixels (H, W) or (H, W, C) of a file upright; contiguous if they are turned."""
    if orientation == UPRIGHT:
        return stored
    turned = stored[::-1] if orientation in _MIRRORS_Y else stored
    turned = turned[:, ::-1] if orientation in _MIRRORS_X else turned
    return np.ascontiguousarray(turned.swapaxes(0, 1) if orientation in _SWAPS_SIDES else turned)


def stored_size(upright: tuple[int, int], orientation: int) -> tuple[int, int]:
    """The (width, height) of a file's pixels, of the upright image's (width, height)."""
    width, height = upright
    return (height, width) if orientation in _SWAPS_SIDES else (width, height)


def to_stored(xy: Float32, orientation: int, stored_wh: tuple[int, int]) -> Float32:
    """Maps points from upright pixels to those of the file as stored.

    Args:
        xy: (N, 2) float32, x then y in px of the upright image, pixel centres at integers.
        orientation: EXIF's, 1 to 8.
        stored_wh: (width, height) of the file's pixels.

    Returns:
        (N, 2) float32 in px of the file as stored.
    """
    if orientation == UPRIGHT:
        return xy
    x, y = (xy[:, 1], xy[:, 0]) if orientation in _SWAPS_SIDES else (xy[:, 0], xy[:, 1])
    width, height = stored_wh
    x = np.float32(width - 1) - x if orientation in _MIRRORS_X else x
    y = np.float32(height - 1) - y if orientation in _MIRRORS_Y else y
    return np.stack([x, y], axis=1)
