"""A first look: a photograph and a warped, darker copy of it, matched, and held against the warp that is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from superpoint_trt import packaged
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.image import load_image
from superpoint_trt.core.types import Matrix
from superpoint_trt.match.images import ImageMatches, match_images
from superpoint_trt.prove import metrics
from superpoint_trt.run import draw
from superpoint_trt.run.extractor import SuperPoint

MAX_KEYPOINTS = 1000
CORRECT_PX = 3.0
WARP: Matrix = np.array([[0.84, -0.27, 92.0], [0.23, 0.80, 14.0], [2.2e-4, -1.5e-4, 1.0]])
"""Pixels of the photograph to pixels of its copy: a turn, a zoom and a tilt."""
EXPOSURE = 0.55


@dataclass(frozen=True)
class Demo:
    """What was found, and the pictures of it."""

    found: ImageMatches
    correct: float
    """Share of the matches that the known warp confirms to within `CORRECT_PX`."""
    corner_error_px: float
    """Mean distance of the photograph's corners under the estimated and the true homography."""
    pictures: tuple[Path, Path]
    """The photograph with its keypoints; both images with their matches."""


def demo(superpoint: SuperPoint, folder: PathLike) -> Demo:
    """Runs a model on the packaged photograph and its copy, and writes `keypoints.jpg` and `matches.jpg` to a folder.

    Raises:
        SuperPointError: the folder cannot be written.
    """
    import cv2

    photo = load_image(packaged.PHOTO)
    height, width = photo.shape[:2]
    turned = cv2.warpPerspective(photo, WARP, (width, height), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
    copy = np.round(turned * EXPOSURE).astype(np.uint8)
    first, second = (superpoint.extract(image).top(MAX_KEYPOINTS) for image in (photo, copy))
    found = match_images(first, second)
    there, back = found.places()
    distance = np.linalg.norm(metrics.warp(there, WARP) - back, axis=1)
    folder = Path(folder)
    pictures = (
        draw.save_picture(folder / "keypoints.jpg", draw.draw_keypoints(photo, first)),
        draw.save_picture(folder / "matches.jpg", draw.draw_matches(photo, copy, there, back, found.geometry.inliers)),
    )
    correct = float((distance <= CORRECT_PX).mean()) if len(distance) else 0.0
    return Demo(found, correct, metrics.homography_error_px(first, second, WARP, MAX_KEYPOINTS), pictures)
