"""The options of calibration and quantization. numpy and onnx free, so that the command line can read the defaults."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from superpoint_trt.core.types import Precision, SuperPointError

MOST_IMAGES = 10_000

SYNTHETIC = "synthetic"
"""In place of a folder of photographs: pictures that this package makes. For trials only; photographs give other
ranges."""

COARSE = "coarse"
"""In place of a name pattern: the convolutions behind the last change of scale (pooling, stride or upsampling)."""


class Method(str, enum.Enum):
    """How a range is read off a histogram of magnitudes."""

    MAX = "max"
    """The largest magnitude seen."""
    ENTROPY = "entropy"
    """The range whose 128 levels keep the distribution best, by Kullback-Leibler divergence (Migacz 2017)."""
    PERCENTILE = "percentile"
    """The magnitude that a given share of all values stays below."""


class Rounding(str, enum.Enum):
    """How int8 weights are rounded."""

    FEEDBACK = "feedback"
    """One after the other, so that errors cancel on the calibration images (`gptq.round_weights`)."""
    NEAREST = "nearest"
    """Each to its nearest step."""


class FirstConvolution(str, enum.Enum):
    """How the convolution that reads the image runs."""

    FP16 = "fp16"
    """Not quantized."""
    PARTS = "parts"
    """int8, the image split into 4 int8 channels; exact for 8-bit images except for the value 255
    (`qdq.split_image`)."""
    WHOLE = "whole"
    """Quantized as the others: an image's 255 steps in 127, or in fp8. For measurements only."""


@dataclass(frozen=True)
class CalibrationOptions:
    """Which images to measure on, and how a range is read off."""

    method: Method = Method.PERCENTILE
    count: int = 200
    """Most images, spread evenly over the folder."""
    percentile: float = 99.99
    """Share in percent of all values, zeros included; for `Method.PERCENTILE`."""
    equalize: bool = True
    """Scales the channels of each tensor to similar ranges first, which changes no result (`equalize`)."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_IMAGES:
            raise SuperPointError(f"the number of calibration images is {self.count}; expected 1 to {MOST_IMAGES}.")
        if not 50.0 <= self.percentile <= 100.0:
            raise SuperPointError(f"the percentile is {self.percentile:g}; expected 50 to 100, 99.99 say.")


@dataclass(frozen=True)
class QuantizeOptions:
    """Which convolutions are quantized, and to what."""

    precision: Precision = Precision.INT8
    """INT8, or FP8 (E4M3, opset 19 or newer)."""
    keep_fp16: tuple[str, ...] = ()
    """Name patterns (`conv4*`) of convolutions that are not quantized; or `COARSE`."""
    first_convolution: FirstConvolution | None = None
    """How the convolution that reads the image runs, if `keep_fp16` does not name it. None: PARTS for int8 where the
    graph allows it, else FP16."""
