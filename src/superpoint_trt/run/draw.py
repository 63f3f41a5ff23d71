"""Pictures of keypoints and matches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, write_atomically
from superpoint_trt.core.image_file import opencv_quiet
from superpoint_trt.core.types import Float32, Keypoints, SuperPointError

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Color = Sequence[int]

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm")
_RIM = (0, 0, 0)
_SUBPIXEL_BITS = 4
"""Fraction bits of the coordinates given to OpenCV: keypoints of shrunk images lie between pixels."""


def draw_keypoints(image_rgb: NDArray[Any], keypoints: Keypoints) -> Picture:
    """Draws dark-rimmed circles on a copy of the image, from the weakest score (blue) to the strongest (yellow).

    Args:
        image_rgb: (H, W, 3) uint8.
        keypoints: in the image's pixels; the color shows the rank of the score.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    colors = ramp(len(keypoints))
    # From weak to strong, so that strong ones lie on top.
    return draw_points(image_rgb, [(keypoints.xy[i : i + 1], colors[i]) for i in reversed(range(len(keypoints)))])


def draw_points(image_rgb: NDArray[Any], layers: Iterable[tuple[Float32, Color]], scale: float = 1.0) -> Picture:
    """Draws dark-rimmed circles on a copy of the image, layer by layer.

    Args:
        image_rgb: (H, W, 3) uint8.
        layers: for each layer its points (N, 2) in the image's pixels and their RGB color.
        scale: size of the picture over the size of the image.

    Returns:
        (H * scale, W * scale, 3) uint8 RGB.
    """
    import cv2

    picture = _scaled(image_rgb, scale)
    one = 1 << _SUBPIXEL_BITS
    radius = max(3.0, max(picture.shape[:2]) / 240)
    line = max(1, round(radius / 3))
    for points, color in layers:
        for x, y in (points + 0.5) * scale - 0.5:
            center = (round(float(x) * one), round(float(y) * one))
            for tone, thickness in ((_RIM, line + 2), (_ints(color), line)):
                cv2.circle(picture, center, round(radius * one), tone, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    return picture


INLIER, OUTLIER = (46, 204, 64), (255, 65, 54)
_GAP_PX = 8


def draw_matches(
    first_rgb: NDArray[Any],
    second_rgb: NDArray[Any],
    first_xy: Float32,
    second_xy: Float32,
    inliers: NDArray[np.bool_],
) -> Picture:
    """Draws both images side by side and a line for each match: green inliers over fainter red outliers.

    Args:
        first_rgb: (H, W, 3) uint8.
        second_rgb: (H', W', 3) uint8, scaled to the first image's height.
        first_xy: (M, 2) matched points in the first image's pixels.
        second_xy: (M, 2) matched points in the second image's pixels.
        inliers: (M,) bool, which matches the geometry keeps.

    Returns:
        (H, W + gap + W' scaled, 3) uint8 RGB.
    """
    import cv2

    scale = first_rgb.shape[0] / second_rgb.shape[0]
    right = _scaled(second_rgb, scale)
    left_width = first_rgb.shape[1] + _GAP_PX
    picture: Picture = np.full((first_rgb.shape[0], left_width + right.shape[1], 3), 255, np.uint8)
    picture[:, : first_rgb.shape[1]] = first_rgb
    picture[:, left_width:] = right[: picture.shape[0]]
    places = (second_xy + 0.5) * scale - 0.5 + np.array([left_width, 0])
    for wanted, color, weight in ((~inliers, OUTLIER, 0.3), (inliers, INLIER, 0.5)):
        lines = picture.copy()  # blended in, so that lines do not hide the image
        for start, end in zip(_fixed(first_xy[wanted]), _fixed(places[wanted])):
            cv2.line(lines, start, end, color, 1, cv2.LINE_AA, _SUBPIXEL_BITS)
        picture = np.asarray(cv2.addWeighted(lines, weight, picture, 1 - weight, 0), dtype=np.uint8)
        for center in _fixed(first_xy[wanted]) + _fixed(places[wanted]):
            cv2.circle(picture, center, 2 << _SUBPIXEL_BITS, color, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
    return picture


def check_picture_name(path: PathLike) -> None:
    """Checks that a file name ends in an image format that can be written.

    Raises:
        SuperPointError: it does not; the text names usual endings.
    """
    import cv2

    suffix = Path(path).suffix.lower()
    # OpenCV 5 crashes on a name that is no text, so it is asked about the ending alone.
    if suffix not in PICTURE_SUFFIXES or not cv2.haveImageWriter(f"picture{suffix}"):
        raise SuperPointError(f"{path}: a picture's name ends in .jpg, .png, .webp, .tiff or .bmp.")


def save_picture(path: PathLike, picture: Picture) -> Path:
    """Writes a picture as an image file.

    Raises:
        SuperPointError: the name's ending is no image format, or the file cannot be written.
    """
    check_picture_name(path)
    return write_atomically(path, encode_picture(picture, Path(path).suffix))


def encode_picture(picture: Picture, suffix: str) -> bytes:
    """The bytes of an image file.

    Args:
        picture: (H, W, 3) RGB.
        suffix: ending of the file's name, which says the format: ".png".

    Raises:
        SuperPointError: that format cannot hold the picture.
    """
    import cv2

    with opencv_quiet():
        try:
            done, data = cv2.imencode(suffix, picture[..., ::-1])
        except cv2.error:
            done = False
    if not done:
        raise SuperPointError(f"a picture of {picture.shape[1]}x{picture.shape[0]} px cannot be written as {suffix}.")
    encoded: bytes = data.tobytes()
    return encoded


def _scaled(image_rgb: NDArray[Any], scale: float) -> Picture:
    import cv2

    if scale == 1.0:
        return np.array(image_rgb, dtype=np.uint8, order="C")
    size = (max(1, round(image_rgb.shape[1] * scale)), max(1, round(image_rgb.shape[0] * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(image_rgb), size, interpolation=method), dtype=np.uint8)


def ramp(count: int) -> NDArray[np.uint8]:
    """Colors (count, 3) RGB from bright to dark."""
    import cv2

    ranks = np.linspace(255, 0, max(count, 1)).astype(np.uint8)
    ramp: NDArray[np.uint8] = np.asarray(cv2.applyColorMap(ranks[:, None], cv2.COLORMAP_PARULA)[:, 0, ::-1])
    return ramp


def _ints(color: Color) -> tuple[int, ...]:
    return tuple(int(value) for value in color)


def _fixed(xy: NDArray[Any]) -> list[list[int]]:
    rounded: list[list[int]] = np.round(xy * (1 << _SUBPIXEL_BITS)).astype(int).tolist()
    return rounded
