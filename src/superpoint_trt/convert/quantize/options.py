"""What calibration and quantization can be told."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from superpoint_trt.core.types import SuperPointError

MOST_IMAGES = 10_000

SYNTHETIC = "synthetic"
"""In place of a folder: pictures made here, for those who ask by name. Real photographs give real ranges."""

COARSE = "coarse"
"""In place of a name pattern: the convolutions at the coarsest scale (`coarse_convolutions`)."""


class FirstConvolution(str, enum.Enum):
    """What becomes of the convolution that reads the image."""

    FP16 = "fp16"
    """Left alone."""
    PARTS = "parts"
    """int8, its image as the sum of several (`split_image`)."""
    WHOLE = "whole"
    """As the others: an image's 255 steps in 127, or in fp8. To be measured, not to be used."""


class Method(str, enum.Enum):
    """How a range is read off a histogram."""

    MAX = "max"
    """The largest magnitude seen."""
    ENTROPY = "entropy"
    """The range whose 128 levels keep the distribution best, by Kullback-Leibler divergence (Migacz 2017)."""
    PERCENTILE = "percentile"
    """The magnitude that a share of all values stays below."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to measure, and how."""

    method: Method = Method.PERCENTILE
    count: int = 200
    """At most so many images, evenly over the folder."""
    percentile: float = 99.99
    """Of all values, zeros included; for `Method.PERCENTILE`."""
    equalize: bool = True
    """Bring the channels of each tensor to like ranges first, which changes no result (`equalize`)."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_IMAGES:
            raise SuperPointError(f"the number of calibration images is {self.count}; expected 1 to {MOST_IMAGES}.")
        if not 50.0 <= self.percentile <= 100.0:
            raise SuperPointError(f"the percentile is {self.percentile:g}; expected 50 to 100, 99.99 say.")
