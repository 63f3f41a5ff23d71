"""The vocabulary that every room shares: keypoints, model descriptions, names and units. numpy only."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt._version import __version__

Float32 = NDArray[np.float32]
Matrix = NDArray[Any]
"""(3, 3) float64: a homography or a fundamental matrix."""

CELL_PX = 8
"""Pixels along one side of a detector cell in the published network: three 2x2 poolings."""

MOST_PX = 1024
"""Of an NMS radius or a border: beyond it a number is a slip."""

TENSORRT_MAX_TOPK = 3840
"""The largest K that TensorRT's TopK layer takes."""

ENGINE_SUFFIXES = (".engine", ".trt", ".plan")
"""What an engine's file name ends in."""


class SuperPointError(Exception):
    """Something the user can mend: the text says what was got, what was expected and what to do."""


class OutputType(str, enum.Enum):
    """What a model hands out; the tensors are named in `OUTPUT_NAMES`."""

    DENSE = "dense"
    KEYPOINTS = "keypoints"
    HEADS = "heads"


class Precision(str, enum.Enum):
    """The arithmetic of the convolutions, whatever the device."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


class Sampling(str, enum.Enum):
    """How a keypoint's pixel maps to the descriptor grid. It belongs to the checkpoint: training fixed it."""

    HALF_PIXEL = "half-pixel"
    """(x + 0.5) / 8 - 0.5: pixel centres at integers, cell centres at 3.5, 11.5, ... (MIT v6 and this project)."""

    LEGACY = "legacy"
    """(x - 3.5) / (W - 4.5) * (W/8 - 1): SuperGlue, LightGlue and Hugging Face feed Magic Leap's weights this way."""


class Family(str, enum.Enum):
    """The layouts in which checkpoints come."""

    V6 = "v6"
    """`backbone.0.0.conv.weight`, ...: the MIT PyTorch model of rpautrat/SuperPoint, BatchNorm after ReLU."""

    MAGICLEAP = "magicleap"
    """`conv1a.weight`, ...: Magic Leap's original, no BatchNorm."""

    HUGGINGFACE = "huggingface"
    """`encoder.conv_blocks.0.conv_a.weight`, ...: the same network in the transformers library."""

    SUPERPOINT_TRT = "superpoint-trt"
    """This project's own safetensors: canonical layer names, everything else in its metadata."""


INPUT_NAME = "image"
OUTPUT_NAMES: Mapping[OutputType, tuple[str, ...]] = {
    OutputType.DENSE: ("scores", "descriptors"),
    OutputType.KEYPOINTS: ("keypoints", "scores", "descriptors", "num_keypoints"),
    OutputType.HEADS: ("logits", "coarse_descriptors"),
}


@dataclass(frozen=True)
class DecodeOptions:
    """How scores become keypoints. The defaults are the MIT PyTorch reference's."""

    nms_radius_px: int = 4
    """Half side of the square in which only the highest score survives; 0 keeps every pixel."""
    remove_borders_px: int = 4
    """Pixels along each of the four sides that yield no keypoints."""
    threshold: float = 0.005
    """Scores must be strictly greater."""
    max_keypoints: int | None = None
    """Keep the highest scores; None keeps all."""

    def __post_init__(self) -> None:
        for name, value in (("NMS radius", self.nms_radius_px), ("border", self.remove_borders_px)):
            if not 0 <= value <= MOST_PX:
                raise SuperPointError(f"{name} is {value} px; expected 0 to {MOST_PX} (the reference uses 4).")
        if not 0.0 <= self.threshold < 1.0:
            raise SuperPointError(f"threshold is {self.threshold}; scores are probabilities: expected 0 <= t < 1.")
        if self.max_keypoints is not None and self.max_keypoints < 1:
            raise SuperPointError(f"the number of keypoints to keep is {self.max_keypoints}; expected 1 or more.")


@dataclass(frozen=True)
class ModelDescription:
    """What a model file is. Travels inside every .onnx as metadata and beside every engine as JSON."""

    type: OutputType
    precision: Precision = Precision.FP32
    sampling: Sampling = Sampling.HALF_PIXEL
    family: Family | None = None
    """None: made by another tool, which did not say."""
    checkpoint_sha256: str | None = None
    height_px: int | None = None
    """Input height; for a dynamic model the one it is expected to see most. None: unknown."""
    width_px: int | None = None
    dynamic: bool = False
    """Height and width are free (multiples of the stride)."""
    max_batch_size: int = 1
    stride_px: int = CELL_PX
    descriptor_dim: int = 256
    opset: int | None = None
    nms_radius_px: int | None = None
    """With the next three: what a `keypoints` model does inside its graph; None for other types."""
    remove_borders_px: int | None = None
    threshold: float | None = None
    max_keypoints: int | None = None
    calibration: str | None = None
    """Of a quantised model: how its ranges were found, "percentile 99.99, 144 images"."""
    kept_layers: str | None = None
    """With it: the convolutions that are not quantised, by name, separated by spaces."""
    handed_over: str | None = None
    """Of these, those whose input is int8 all the same (`quantize.handed_over`)."""
    first_convolution: str | None = None
    """With it: how the convolution that reads the image runs, "fp16" or "parts"."""
    approximation: str | None = None
    """What was asked for that the checkpoint does not say, "BatchNorm folded: ..."."""
    superpoint_trt_version: str = __version__

    METADATA_PREFIX = "superpoint_trt."

    def to_metadata(self) -> dict[str, str]:
        """The description as flat strings, every key prefixed with `superpoint_trt.`; None is left out."""
        return {
            self.METADATA_PREFIX + key: value.value
            if isinstance(value, enum.Enum)
            else json.dumps(value)
            if not isinstance(value, str)
            else value
            for key, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelDescription | None:
        """Reads what `to_metadata` wrote; None if these are not this package's keys.

        Raises:
            SuperPointError: the keys are ours but a value is not.
        """
        prefix = cls.METADATA_PREFIX
        found = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
        if "type" not in found:
            return None
        known = {field.name: field for field in fields(cls)}
        try:
            # Keys of a later version of this package are passed over: they are additions by contract.
            return cls(**{key: _parse(key, value) for key, value in found.items() if key in known})
        except (ValueError, TypeError) as error:
            raise SuperPointError(f"the model's metadata cannot be read ({error}); export the model again.") from error


_ENUM_FIELDS: Mapping[str, type[enum.Enum]] = {
    "type": OutputType,
    "precision": Precision,
    "sampling": Sampling,
    "family": Family,
}
_COUNTS = ("height_px", "width_px", "max_batch_size", "stride_px", "descriptor_dim", "opset", "max_keypoints")
_TEXT_FIELDS = (
    "checkpoint_sha256",
    "superpoint_trt_version",
    "calibration",
    "kept_layers",
    "handed_over",
    "first_convolution",
    "approximation",
)


def _parse(key: str, value: str) -> Any:
    if key in _ENUM_FIELDS:
        return _ENUM_FIELDS[key](value)
    if key in _TEXT_FIELDS:
        return value
    number = json.loads(value)
    if not isinstance(number, (bool, int, float)) or number < (1 if key in _COUNTS else 0):
        raise ValueError(f"{key} is {value}")
    return number


@dataclass(frozen=True)
class ShapeRange:
    """An engine's optimisation profile: the inputs it takes, each as (batch, height px, width px)."""

    min: tuple[int, int, int]
    opt: tuple[int, int, int]
    """What the kernels are chosen for."""
    max: tuple[int, int, int]

    def holds(self, shape: tuple[int, int, int]) -> bool:
        """Whether an input of that shape may be run."""
        return all(low <= size <= high for low, size, high in zip(self.min, shape, self.max))

    def __str__(self) -> str:
        (b0, h0, w0), (b1, h1, w1) = self.min, self.max
        sides = f"{w1}x{h1} px" if (h0, w0) == (h1, w1) else f"{w0}x{h0} to {w1}x{h1} px"
        return f"{sides}, batch {b0}" + (f" to {b1}" if b1 != b0 else "")


@dataclass(frozen=True, eq=False)
class Keypoints:
    """The keypoints of one image, by falling score (equal scores: top to bottom, then left to right)."""

    xy: Float32
    """(N, 2) float32: x then y in pixels of the caller's image, pixel centres at integers."""
    scores: Float32
    """(N,) float32: detection probability in (0, 1]."""
    descriptors: Float32
    """(N, D) float32, each row of unit length."""
    image_size: tuple[int, int]
    """(width, height) in pixels of the image the coordinates refer to."""

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def keypoints(self) -> Float32:
        """The same array as `xy`, under the name that feature files give it."""
        return self.xy

    def rows(self, which: NDArray[Any] | slice) -> Keypoints:
        """Some of the keypoints, by index, mask or slice."""
        return replace(self, xy=self.xy[which], scores=self.scores[which], descriptors=self.descriptors[which])

    def top(self, count: int) -> Keypoints:
        """The `count` keypoints with the highest scores."""
        return self.rows(slice(0, max(count, 0)))

    def above(self, threshold: float) -> Keypoints:
        """The keypoints with a score strictly greater than `threshold`."""
        return self.rows(self.scores > threshold)

    def to_dict(self) -> dict[str, NDArray[Any]]:
        """Arrays under the names of feature files: keypoints, scores, descriptors (N, D), image_size (w, h)."""
        return {
            "keypoints": self.xy,
            "scores": self.scores,
            "descriptors": self.descriptors,
            "image_size": np.asarray(self.image_size, dtype=np.int64),
        }
