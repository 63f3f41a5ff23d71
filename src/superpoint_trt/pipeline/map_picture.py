"""A picture of a map: its points and cameras from above."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.run.draw import Picture

Float64 = NDArray[np.float64]

SIDE_PX = 1200
"""Longest side of the picture."""
MARGIN_PX = 60
OUTLIERS_PERCENT = 4
"""Share of the points on either side, along each axis, that may lie outside the picture."""
_CAMERA, _PATH, _INK = (214, 39, 40), (240, 170, 170), (40, 40, 40)
_SUBPIXEL_BITS = 4


@dataclass(frozen=True, eq=False)
class MapPoints:
    """Points and cameras of a map, in the map's own unit of length."""

    xyz: Float64
    """(P, 3)."""
    colors_rgb: NDArray[np.uint8]
    """(P, 3)."""
    centers: Float64
    """(C, 3): where the cameras are, by name."""
    rotations: Float64
    """(C, 3, 3): world to camera; a camera looks along its third axis, its second points down."""


def draw_map(points: MapPoints, side_px: int = SIDE_PX) -> Picture:
    """Draws a map from above: points in their colors, cameras as red triangles that open where they look.

    Above is where the tops of the pictures point, on average. A thin line joins the cameras by name.

    Args:
        points: at least one camera.
        side_px: longest side of the picture.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    import cv2

    axes = seen_from_above(points.rotations)
    flat_points, flat_cameras = points.xyz @ axes.T, points.centers @ axes.T
    shown = np.concatenate([_without_outliers(flat_points), flat_cameras])
    low, extent = shown.min(axis=0), np.maximum(np.ptp(shown, axis=0), 1e-9)
    scale = (side_px - 2 * MARGIN_PX) / extent.max()
    width, height = np.ceil(extent * scale).astype(int) + 2 * MARGIN_PX
    picture: Picture = np.full((height, width, 3), 255, np.uint8)

    def place(flat: Float64) -> NDArray[np.int64]:
        """Pixels in fixed point; the picture's y points down, the map's second axis up."""
        xy = (flat - low) * scale
        pixels = np.stack([xy[..., 0] + MARGIN_PX, height - MARGIN_PX - xy[..., 1]], axis=-1)
        fixed: NDArray[np.int64] = np.round(pixels.clip(-4 * side_px, 4 * side_px) * (1 << _SUBPIXEL_BITS)).astype(int)
        return fixed

    for center, color in zip(place(flat_points).tolist(), _darkened(points.colors_rgb).tolist()):
        cv2.circle(picture, center, 1 << _SUBPIXEL_BITS, color, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
    path = place(flat_cameras).astype(np.int32)
    cv2.polylines(picture, [path], False, _PATH, 1, cv2.LINE_AA, _SUBPIXEL_BITS)
    for triangle in place(_triangles(points.rotations, axes, flat_cameras, 14 / scale)).astype(np.int32):
        cv2.polylines(picture, [triangle], True, _CAMERA, 2, cv2.LINE_AA, _SUBPIXEL_BITS)
    text = f"{len(points.centers)} cameras, {len(points.xyz)} points, from above"
    cv2.putText(picture, text, (12, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.6, _INK, 1, cv2.LINE_AA)
    return picture


def seen_from_above(rotations: Float64) -> Float64:
    """The picture's axes, right and up, in the world.

    Up in the picture is where the cameras look on average, along the ground.

    Args:
        rotations: (C, 3, 3) world to camera.

    Returns:
        (2, 3), of unit length and orthogonal.
    """
    above = _unit(-rotations[:, 1].mean(axis=0))
    ahead = rotations[:, 2].mean(axis=0)
    ahead = ahead - above * (ahead @ above)
    if np.linalg.norm(ahead) < 0.1:  # the cameras look all around, or straight down
        ahead = rotations[0, 2] - above * (rotations[0, 2] @ above)
    if np.linalg.norm(ahead) < 1e-6:
        ahead = np.cross(above, rotations[0, 0])
    ahead = _unit(ahead)
    return np.stack([np.cross(ahead, above), ahead])


def _unit(vector: Float64) -> Float64:
    unit: Float64 = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return unit


def _triangles(rotations: Float64, axes: Float64, flat_centers: Float64, length: float) -> Float64:
    """(C, 3, 2): for each camera its center and two corners ahead, on the map's plane."""
    corners = np.array([[-0.6, 0.0, 1.0], [0.6, 0.0, 1.0]])
    ahead = np.einsum("ki,cij,aj->cka", corners, rotations, axes) * length
    triangles: Float64 = flat_centers[:, None] + np.concatenate([np.zeros_like(ahead[:, :1]), ahead], axis=1)
    return triangles


def _without_outliers(flat: Float64) -> Float64:
    if not len(flat):
        return flat
    low = np.percentile(flat, OUTLIERS_PERCENT, axis=0, method="lower")
    high = np.percentile(flat, 100 - OUTLIERS_PERCENT, axis=0, method="higher")
    kept: Float64 = flat[((flat >= low) & (flat <= high)).all(axis=1)]
    return kept


def _darkened(colors_rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colors that are seen on white."""
    return (colors_rgb * 0.75).astype(np.uint8)
