"""Types and names that every part of the package uses: keypoints, model descriptions, options. Needs numpy only."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Callable

import numpy as np
from numpy.typing import NDArray

from superpoint_trt._version import __version__
from superpoint_trt.core.typed_json import JsonError, choice, flag, integer, parse, real, shown, text

if TYPE_CHECKING:
    import cv2

Float32 = NDArray[np.float32]
Matrix = NDArray[Any]
"""(3, 3) float64: a homography or a fundamental matrix."""

CELL_PX = 8
"""Pixels along one side of a detector cell in the published network: three 2x2 poolings."""

MOST_PX = 1024
"""The largest NMS radius or border that is accepted; a larger number is taken for a mistake."""

LONGEST_SIDE_PX = 1 << 16
"""The largest height or width that is accepted, of a model or an engine."""

LARGEST_BATCH = 1 << 16
"""The largest batch that is accepted, of a model or an engine."""

STRIDES_PX = (2, 64)
"""The smallest and the largest detector cell that is accepted."""

LARGEST_DESCRIPTOR_DIM = 4096
"""The longest descriptor that is accepted."""

TENSORRT_MAX_TOPK = 3840
"""The largest K that TensorRT's TopK layer takes."""

ENGINE_SUFFIXES = (".engine", ".trt", ".plan")
"""Endings of an engine's file name."""


class SuperPointError(Exception):
    """An error that the user can mend. The text says what was given, what was expected and what to do."""


class OutputType(str, enum.Enum):
    """Which outputs a model has; `OUTPUT_NAMES` names the tensors."""

    DENSE = "dense"
    KEYPOINTS = "keypoints"
    HEADS = "heads"


class Precision(str, enum.Enum):
    """The number type in which the convolutions are computed, on any device. The most exact comes first."""

    FP32 = "fp32"
    TF32 = "tf32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


def least_exact(precisions: Iterable[Precision]) -> Precision | None:
    """The least exact of some precisions; None if there is none."""
    order = list(Precision)
    return max(precisions, key=order.index, default=None)


class Sampling(str, enum.Enum):
    """How a keypoint's pixel maps to the descriptor grid. The checkpoint's training decides it."""

    HALF_PIXEL = "half-pixel"
    """(x + 0.5) / 8 - 0.5: pixel centres at integers, cell centres at 3.5, 11.5, ... (MIT v6 and this project)."""

    LEGACY = "legacy"
    """(x - 3.5) / (W - 4.5) * (W/8 - 1): SuperGlue, LightGlue and Hugging Face feed Magic Leap's weights this way."""


class Family(str, enum.Enum):
    """The known layouts of checkpoints."""

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
    """Keep this many keypoints, those with the highest scores; None keeps all."""
    subpixel: bool | None = None
    """Moves each keypoint to the center of the scores around it (`run.decode.refine`). None: as the model says
    (`ModelDescription.subpixel`); without a model, no."""

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
    """What a model file is. Stored as metadata in every .onnx and in the .json of every engine."""

    type: OutputType
    precision: Precision = Precision.FP32
    sampling: Sampling = Sampling.HALF_PIXEL
    family: Family | None = None
    """The checkpoint's layout; None: the model was made by another tool and does not say."""
    checkpoint_sha256: str | None = None
    descriptors_of: str | None = None
    """SHA-256 of the checkpoint whose descriptors the model's match through the map of its own checkpoint; None: the
    model has its own checkpoint's."""
    height_px: int | None = None
    """Input height; of a dynamic model, the height expected most often. None: unknown."""
    width_px: int | None = None
    """Input width, as `height_px`."""
    dynamic: bool = False
    """Whether height and width are free (multiples of the stride)."""
    max_batch_size: int = 1
    stride_px: int = CELL_PX
    descriptor_dim: int = 256
    opset: int | None = None
    nms_radius_px: int | None = None
    """NMS radius inside a `keypoints` model's graph; None for other types, also in the next three fields."""
    remove_borders_px: int | None = None
    threshold: float | None = None
    max_keypoints: int | None = None
    calibration: str | None = None
    """How a quantized model's ranges were found: "percentile 99.99, 144 images"."""
    kept_layers: str | None = None
    """Names of a quantized model's convolutions that are not quantized, separated by spaces."""
    fp16_with_int8_input: str | None = None
    """Names of the `kept_layers` that read an int8 tensor (from the last max-pool), separated by spaces."""
    first_convolution: str | None = None
    """How a quantized model's first convolution, which reads the image, runs: "fp16" or "parts"."""
    placement: str | None = None
    """Which runtimes a quantized model is for: "cpu" (onnxruntime, OpenVINO). None: TensorRT."""
    approximation: str | None = None
    """Where the model was asked to differ from its checkpoint: "BatchNorm folded: ..."."""
    subpixel: bool = False
    """Whether keypoints are sub-pixel by default; of a `keypoints` model, whether its graph makes them so."""
    superpoint_trt_version: str = __version__
    """Version that wrote the description; empty: another tool's model."""

    METADATA_PREFIX = "superpoint_trt."

    @property
    def features_sha256(self) -> str | None:
        """SHA-256 of the checkpoint that matchers know the descriptors by; None: unknown."""
        return self.descriptors_of or self.checkpoint_sha256

    def to_metadata(self) -> dict[str, str]:
        """The description as flat strings with keys `superpoint_trt.*`; fields that are None are left out."""
        return {
            self.METADATA_PREFIX + _METADATA_KEYS.get(key, key): value.value
            if isinstance(value, enum.Enum)
            else json.dumps(value)
            if not isinstance(value, str)
            else value
            for key, value in asdict(self).items()
            if value is not None
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object], source: object = "the model") -> ModelDescription | None:
        """Reads what `to_metadata` wrote; None if the metadata has none of this package's keys.

        Args:
            metadata: keys and texts. Keys that a later version added are ignored; missing ones have their default.
            source: the file, for the error.

        Raises:
            SuperPointError: a value is of another type than its field, or out of range.
        """
        prefix = cls.METADATA_PREFIX
        found = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
        if "type" not in found:
            return None
        keys = {_METADATA_KEYS.get(name, name): name for name in _READERS}
        try:
            return cls(**{keys[key]: _READERS[keys[key]](text(found[key], key), key) for key in found if key in keys})
        except JsonError as error:
            raise SuperPointError(
                f"the metadata of {source} cannot be read: {error}; export the model again."
            ) from error


_METADATA_KEYS = {"fp16_with_int8_input": "handed_over"}
"""Fields that have another name in metadata: published files keep their keys."""

_Reader = Callable[[str, str], Any]
"""A metadata value and its key -> the field's value; raises JsonError."""

_LONGEST_NUMBER = 64
"""Characters of a number in metadata."""


def _one_of(kind: type[enum.Enum]) -> _Reader:
    return lambda value, key: choice(value, key, kind)


def _parsed(value: str, key: str) -> object:
    try:
        return parse(value, _LONGEST_NUMBER)
    except JsonError:
        raise JsonError(f"{key} is {shown(value)}; expected a number, true or false") from None


def _whole(low: int, high: int) -> _Reader:
    return lambda value, key: integer(_parsed(value, key), key, low, high)


def _flag(value: str, key: str) -> bool:
    return flag(_parsed(value, key), key)


def _threshold(value: str, key: str) -> float:
    threshold = real(_parsed(value, key), key, 0.0, 1.0)
    if threshold == 1.0:
        raise JsonError(f"{key} is {shown(value)}; scores are probabilities: expected less than 1")
    return threshold


_READERS: Mapping[str, _Reader] = {
    "type": _one_of(OutputType),
    "precision": _one_of(Precision),
    "sampling": _one_of(Sampling),
    "family": _one_of(Family),
    "checkpoint_sha256": text,
    "descriptors_of": text,
    "height_px": _whole(1, LONGEST_SIDE_PX),
    "width_px": _whole(1, LONGEST_SIDE_PX),
    "dynamic": _flag,
    "max_batch_size": _whole(1, LARGEST_BATCH),
    "stride_px": _whole(*STRIDES_PX),
    "descriptor_dim": _whole(1, LARGEST_DESCRIPTOR_DIM),
    "opset": _whole(1, 100),
    "nms_radius_px": _whole(0, MOST_PX),
    "remove_borders_px": _whole(0, MOST_PX),
    "threshold": _threshold,
    "max_keypoints": _whole(1, 1 << 24),
    "calibration": text,
    "kept_layers": text,
    "fp16_with_int8_input": text,
    "first_convolution": text,
    "placement": text,
    "approximation": text,
    "subpixel": _flag,
    "superpoint_trt_version": text,
}
"""Field of `ModelDescription` -> how its metadata value is read."""


@dataclass(frozen=True)
class ShapeRange:
    """An engine's optimization profile: the input sizes it takes, each as (batch, height px, width px)."""

    min: tuple[int, int, int]
    """The smallest input."""
    opt: tuple[int, int, int]
    """The input size that TensorRT chooses its kernels for."""
    max: tuple[int, int, int]
    """The largest input."""

    def holds(self, shape: tuple[int, int, int]) -> bool:
        """Whether an input of (batch, height px, width px) may be run."""
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
    """(N, D) float32, or float16 if asked for; each row of unit length."""
    image_size: tuple[int, int]
    """(width, height) in pixels of the image the coordinates refer to."""

    def __len__(self) -> int:
        return len(self.xy)

    @property
    def keypoints(self) -> Float32:
        """The array `xy`, under its name in feature files."""
        return self.xy

    def rows(self, which: NDArray[Any] | slice) -> Keypoints:
        """A part of the keypoints, chosen by index, mask or slice."""
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

    def to_cv2(self) -> tuple[list[cv2.KeyPoint], Float32]:
        """The keypoints as OpenCV's detectors give them.

            points, descriptors = superpoint.extract("photo.jpg").to_cv2()
            matches = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(descriptors, other_descriptors)

        Returns:
            N `cv2.KeyPoint`s: `pt` is x, y in pixels of the image, `response` the score, `size` one detector cell
            (8 px), `angle` -1 and `octave` 0, because SuperPoint finds neither orientation nor scale. And the
            descriptors (N, D) float32, contiguous, in the same order; compare them by NORM_L2.
        """
        import cv2

        points = [
            cv2.KeyPoint(x=x, y=y, size=float(CELL_PX), angle=-1.0, response=score, octave=0, class_id=-1)
            for (x, y), score in zip(self.xy.tolist(), self.scores.tolist())
        ]
        return points, np.ascontiguousarray(self.descriptors, dtype=np.float32)
