"""Pictures of keypoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.files import PathLike, write_atomically
from superpoint_trt.spec import Keypoints, SuperPointError

_RIM = (0, 0, 0)
_SUBPIXEL_BITS = 4
"""cv2.circle takes fixed-point coordinates: keypoints of shrunk images lie between pixels."""


def draw_keypoints(image_rgb: NDArray[Any], keypoints: Keypoints) -> NDArray[np.uint8]:
    """Dark-rimmed circles on a copy of the image, from the weakest score (blue) to the strongest (yellow), by rank.

    Args:
        image_rgb: (H, W, 3) uint8.
        keypoints: in its pixels.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    import cv2

    picture: NDArray[np.uint8] = np.array(image_rgb, dtype=np.uint8, order="C")
    ranks = np.linspace(255, 0, max(len(keypoints), 1)).astype(np.uint8)
    colours = cv2.applyColorMap(ranks[:, None], cv2.COLORMAP_PARULA)[:, 0, ::-1]
    one = 1 << _SUBPIXEL_BITS
    radius = max(3.0, max(picture.shape[:2]) / 240)
    line = max(1, round(radius / 3))
    # The strongest are drawn last, on top.
    for (x, y), colour in zip(keypoints.xy[::-1], colours[::-1]):
        centre = (round(float(x) * one), round(float(y) * one))
        tone = tuple(int(value) for value in colour)
        for color, thickness in ((_RIM, line + 2), (tone, line)):
            cv2.circle(picture, centre, round(radius * one), color, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    return picture


def check_picture_name(path: PathLike) -> None:
    """Refuses a file name whose ending is no image format that can be written.

    Raises:
        SuperPointError: naming usual endings.
    """
    import cv2

    if not Path(path).suffix or not cv2.haveImageWriter(str(path)):
        raise SuperPointError(f"{path}: a picture's name ends in .jpg, .png, .webp, .tiff or .bmp.")


def save_picture(path: PathLike, image_rgb: NDArray[np.uint8]) -> Path:
    """Writes an (H, W, 3) RGB picture; beside, then renamed."""
    import cv2

    check_picture_name(path)
    done, data = cv2.imencode(Path(path).suffix, image_rgb[..., ::-1])
    if not done:
        raise SuperPointError(f"{path} cannot be encoded by OpenCV; try .png.")
    return write_atomically(path, data.tobytes())
