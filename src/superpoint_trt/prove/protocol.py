"""What `evaluate` measures, and how: sizes, counts and thresholds of the evaluation protocol."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.image_file import SMALLEST_SIDE_PX
from superpoint_trt.core.types import Matrix, SuperPointError
from superpoint_trt.match.geometry import Estimator

LARGEST_SIDE_PX = 8192
MOST_ORDERS = 1000


class Resize(str, enum.Enum):
    """How images come to one size before extraction."""

    CROP = "crop"
    """Cover the size with proportions kept, and cut out the middle: the rule of the MIT reference."""
    FIT = "fit"
    """Shrink to fit into the size, proportions kept."""
    NONE = "none"
    """Keep the image as it is."""


@dataclass(frozen=True)
class Protocol:
    """Sizes, counts and thresholds. The defaults are those of the table that rpautrat/SuperPoint publishes.

    Sources: its magic-point_repeatability.yaml and superpoint_hpatches.yaml for sizes, NMS and threshold, its
    evaluations/ for the rest.
    """

    resize: Resize = Resize.CROP
    detector_size_hw: tuple[int, int] = (240, 320)
    """(height, width) in px for repeatability and localization error."""
    detector_nms_radius_px: int = 4
    detector_keypoints: int = 300
    repeatability_px: float = 3.0
    descriptor_size_hw: tuple[int, int] = (480, 640)
    """(height, width) in px for everything that matches descriptors."""
    descriptor_nms_radius_px: int = 8
    descriptor_keypoints: int = 1000
    matching_px: float = 3.0
    """For matching score and NN mAP."""
    threshold: float = 0.001
    """Detection threshold."""
    subpixel: bool | None = None
    """Keypoints between pixels, or on whole ones; None: the model's own default."""
    homography_px: tuple[int, ...] = (1, 3, 5)
    mma_px: tuple[int, ...] = tuple(range(1, 11))
    estimator: Estimator = Estimator.RANSAC
    ransac_px: float = 3.0
    ransac_orders: int = 1
    """Each homography is estimated from so many orders of the matches, and its correctness averaged: less luck."""

    def __post_init__(self) -> None:
        for side in (*self.detector_size_hw, *self.descriptor_size_hw):
            if not SMALLEST_SIDE_PX <= side <= LARGEST_SIDE_PX:
                raise SuperPointError(
                    f"a size to evaluate at has a side of {side} px; expected {SMALLEST_SIDE_PX} to {LARGEST_SIDE_PX}."
                )
        if not 1 <= self.ransac_orders <= MOST_ORDERS:
            raise SuperPointError(
                f"{self.ransac_orders} orders of the matches were asked for; expected 1 to {MOST_ORDERS}."
            )
        for name, value in (("matching distance", self.matching_px), ("inlier distance", self.ransac_px)):
            if not 0 < value < np.inf:
                raise SuperPointError(f"{name} is {value} px; expected more than 0.")

    def to_json(self) -> dict[str, Any]:
        """The protocol as plain data."""
        return asdict(self)


def resize_to_protocol(image: NDArray[Any], size_hw: tuple[int, int], rule: Resize) -> tuple[NDArray[Any], Matrix]:
    """Brings an image to the protocol's size.

    Args:
        image: (H, W) or (H, W, 3), of any type that OpenCV resizes.
        size_hw: (height, width) in px.
        rule: how.

    Returns:
        The resized image (H', W', ...) of the same type, and the (3, 3) map from pixels of the image to pixels of the
        resized one, pixel centers at integers.

    Raises:
        SuperPointError: the image is so thin that nothing would be left of it.
    """
    import cv2

    height, width = image.shape[:2]
    if rule is Resize.NONE:
        return image, np.eye(3)
    ratios = size_hw[0] / height, size_hw[1] / width
    scale = max(ratios) if rule is Resize.CROP else min(1.0, *ratios)
    new_h, new_w = round(height * scale), round(width * scale)
    if min(new_h, new_w) < SMALLEST_SIDE_PX:
        least = f"{SMALLEST_SIDE_PX}x{SMALLEST_SIDE_PX}"
        raise SuperPointError(f"{width}x{height} px shrink to {new_w}x{new_h}; the smallest usable is {least}.")
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized: NDArray[Any] = cv2.resize(image, (new_w, new_h), interpolation=method)
    sx, sy = new_w / width, new_h / height
    to_view = np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])
    if rule is Resize.CROP:
        top, left = (new_h - size_hw[0]) // 2, (new_w - size_hw[1]) // 2
        resized = resized[top : top + size_hw[0], left : left + size_hw[1]]
        to_view = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]]) @ to_view
    return np.ascontiguousarray(resized), to_view
