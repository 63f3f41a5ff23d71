"""Uses the keypoints with OpenCV: cv2.KeyPoint, BFMatcher, findHomography.

    python examples/03_opencv.py [FIRST SECOND]

Without arguments it takes the packaged photograph and a copy of it that is turned by 20 degrees.
"""

from __future__ import annotations

import sys

import cv2
import numpy as np

from superpoint_trt import SuperPoint, packaged

TURN_DEG = 20.0


def main(paths: list[str]) -> None:
    """Prints how many matches agree with one homography."""
    if paths:
        first, second = (cv2.imread(path, cv2.IMREAD_GRAYSCALE) for path in paths)
    else:
        first = cv2.imread(str(packaged.PHOTO), cv2.IMREAD_GRAYSCALE)
        height, width = first.shape
        turn = cv2.getRotationMatrix2D((width / 2, height / 2), TURN_DEG, 1.0)
        second = cv2.warpAffine(first, turn, (width, height), borderMode=cv2.BORDER_REFLECT)

    with SuperPoint(max_keypoints=1000) as superpoint:
        # A color image from cv2.imread is BGR; SuperPoint takes RGB or gray: superpoint.extract(bgr[..., ::-1]).
        points0, descriptors0 = superpoint.extract(first).to_cv2()  # list of cv2.KeyPoint, (N, D) float32
        points1, descriptors1 = superpoint.extract(second).to_cv2()

    matches = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(descriptors0, descriptors1)
    source = np.float32([points0[match.queryIdx].pt for match in matches])
    target = np.float32([points1[match.trainIdx].pt for match in matches])
    homography, inliers = cv2.findHomography(source, target, cv2.USAC_MAGSAC, 3.0)
    print(f"{len(matches)} matches, {int(inliers.sum())} inliers of\n{np.round(homography, 3)}")

    picture = cv2.drawMatches(
        first, points0, second, points1, matches, None, matchesMask=inliers.ravel().tolist(), matchColor=(0, 255, 0)
    )
    cv2.imwrite("example_opencv.jpg", picture)
    print("wrote example_opencv.jpg")


if __name__ == "__main__":
    main(sys.argv[1:])
