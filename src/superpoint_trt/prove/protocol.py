"""What `evaluate` measures, and how: sizes, counts and thresholds of the evaluation protocol."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from superpoint_trt.core.image import SMALLEST_SIDE_PX
from superpoint_trt.core.types import SuperPointError
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
