"""The command demo: matches a photograph with a warped, darker copy of it, and compares with the known warp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from superpoint_trt import packaged
from superpoint_trt.cli.match import print_geometry
from superpoint_trt.cli.options import MODEL, RuntimeArgs
from superpoint_trt.cli.terminal import open_model, print_row
from superpoint_trt.core.files import PathLike, make_folder
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
"""How bright the copy is."""


@click.command()
@MODEL
@click.option("--output", default="demo", show_default=True, help="Folder for the two pictures.")
@RuntimeArgs.declare("runtime")
def demo(model: str, output: str, runtime: RuntimeArgs) -> None:
    """Match a photograph with a warped copy of it; offline, nothing needed."""
    with open_model(model, runtime) as superpoint:
        print_demo(match_with_warped_copy(superpoint, make_folder(output)))


def print_demo(demo: Demo) -> None:
    """Prints what was found and how much of it is right."""
    found = demo.found
    print_row("keypoints", f"{len(found.first)} in the photograph, {len(found.second)} in its warped, darker copy")
    print_geometry(found)
    print_row("correct", f"{demo.correct:.1%} of the matches within {CORRECT_PX:g} px of where the true warp puts them")
    print_row("homography", f"its corners are off by {demo.corner_error_px:.2f} px")
    for picture in demo.pictures:
        print_row("look at", picture)


@dataclass(frozen=True)
class Demo:
    """What was found, and the pictures of it."""

    found: ImageMatches
    correct: float
    """Share of the matches within `CORRECT_PX` of their true place."""
    corner_error_px: float
    """Mean distance of the photograph's corners under the estimated and the true homography."""
    pictures: tuple[Path, Path]
    """The photograph with its keypoints; both images with their matches."""


def match_with_warped_copy(superpoint: SuperPoint, folder: PathLike) -> Demo:
    """Matches the packaged photograph with its copy, and writes `keypoints.jpg` and `matches.jpg` to a folder.

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
