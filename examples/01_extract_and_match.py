"""Finds keypoints in two images, matches them, and draws the matches.

    python examples/01_extract_and_match.py [FIRST SECOND]

Without arguments it takes the packaged photograph and a copy of it that is turned by 20 degrees.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np

from superpoint_trt import MatchOptions, SuperPoint, match_images, packaged
from superpoint_trt.core.image import load_image
from superpoint_trt.run.draw import draw_matches, save_picture

OUTPUT = "example_matches.jpg"


def main(paths: list[str]) -> None:
    """Prints what was found, and writes the picture."""
    if paths:
        first, second = (load_image(path) for path in paths)  # (H, W, 3) RGB uint8
    else:
        first = load_image(packaged.PHOTO)
        height, width = first.shape[:2]
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), 20, 1.0)
        second = cv2.warpAffine(first, turn, (width, height), borderValue=(255, 255, 255))

    with SuperPoint(max_keypoints=1000) as superpoint:  # the default network, full, with onnxruntime
        print(superpoint)
        a, b = superpoint.extract_batch([first, second])
    print(f"{len(a)} and {len(b)} keypoints; the best lies at x, y = {np.round(a.xy[0], 1)}, score {a.scores[0]:.3f}")

    found = match_images(a, b, MatchOptions(max_ratio=0.95))
    matrix, inliers = found.geometry.matrix, found.geometry.inliers
    print(f"{len(found.matches)} matches, {inliers.sum()} of them agree with one homography:\n{np.round(matrix, 3)}")

    picture = draw_matches(first, second, *found.places(), inliers, found.distances_px(), found.caption("packaged"))
    print(f"wrote {save_picture(OUTPUT, picture)}")


if __name__ == "__main__":
    main(sys.argv[1:])
