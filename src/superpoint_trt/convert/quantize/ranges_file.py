"""What calibration finds: ranges and rounded weights, in memory and as two files beside the .onnx."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.convert.quantize.options import Method
from superpoint_trt.core.files import PathLike, check_writable, one_line, read_bytes, sha256, write_atomically
from superpoint_trt.core.typed_json import (
    JsonError,
    choice,
    integer,
    mapping,
    member,
    optional_text,
    parse,
    real,
    shown,
    text,
)
from superpoint_trt.core.types import ModelDescription, SuperPointError

FORMAT = 1
"""Version of the .json; a reader refuses any other."""

_MOST_CHARS = 1 << 24
"""Length of the .json that is accepted. Each image takes about 150 characters, so that is 100,000 images."""

_RANGES = (1e-30, float(np.finfo(np.float32).max))
"""The smallest and the largest range that is accepted: a 127th of it is still a float32 of full precision."""

_FACTORS = (1e-6, 1e6)
"""The smallest and the largest channel factor that is accepted; `equalize.factors` makes 1e-3 to 1."""

_PERCENTILES = (50.0, 100.0)


@dataclass(frozen=True)
class Calibration:
    """Ranges, and what they were measured on. It has no dates and no absolute paths: equal work gives equal bytes."""

    method: Method
    percentile: float | None
    """Share in percent of all values; None for the other methods."""
    size: str
    """The network's input size while measuring: "480x640" (HxW), or "any"."""
    checkpoint_sha256: str | None
    """The checkpoint the network was made from; None: another tool's model, which does not say."""
    images: dict[str, str]
    """Name of each image below its folder -> SHA-256 of the file, or of the pixels of a synthetic image."""
    ranges: dict[str, float]
    """Tensor name -> largest magnitude that the quantized tensor represents, in the graph's order."""
    channels: dict[str, list[float]] = field(default_factory=dict)
    """Tensor name -> factor of each channel (`equalize.factors`). The ranges are those of the scaled channels."""
    weights: dict[str, NDArray[np.int8]] = field(default_factory=dict, compare=False)
    """Name of a convolution's weights -> (O, I, K, K) int8, rounded with feedback (`gptq.round_weights`) after the
    channels were scaled. Weights that are missing here are rounded to the nearest step. They are written as
    .safetensors beside the ranges, which name that file by its SHA-256."""
    rounded_from: dict[str, str] = field(default_factory=dict, compare=False)
    """Name of rounded weights -> `weight_digest` of the float32 weights that they were made from."""
    approximation: str | None = None
    """The network's approximation, as in `ModelDescription`."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Warnings about the images: which could not be used, what makes the set doubtful. Not written."""

    def summary(self) -> str:
        """The method and the number of images, for metadata and people: "percentile 99.99, 144 images"."""
        method = self.method.value + (f" {self.percentile:g}" if self.percentile is not None else "")
        rounded = ", weights rounded with feedback" if self.weights else ""
        return f"{method}, {len(self.images)} image{'s' if len(self.images) != 1 else ''}{rounded}"

    def to_json(self) -> bytes:
        """The ranges file: one range or image a line, so that diff compares two files."""
        flat = {
            "format": FORMAT,
            "method": self.method.value,
            "percentile": self.percentile,
            "size": self.size,
            "checkpoint_sha256": self.checkpoint_sha256,
            "approximation": self.approximation,
            "ranges": self.ranges,
            "images": self.images,
            "channels": {name: " ".join(f"{value:g}" for value in values) for name, values in self.channels.items()},
            "weights_sha256": sha256(_weights_file(self.weights)) if self.weights else None,
            "rounded_from": self.rounded_from,
        }
        return (json.dumps(flat, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, path: PathLike) -> Calibration:
        """Reads what `to_json` wrote, and the rounded weights beside `path` if it names any.

        Raises:
            SuperPointError: the file is damaged or of a later format, a range is no positive number, or the rounded
                weights are missing.
        """
        try:
            return cls._from_flat(mapping(parse(data, _MOST_CHARS), "the file"), path)
        except JsonError as error:
            raise SuperPointError(
                f"{path} cannot be read as calibration ranges: {error}; make them again with "
                "--calibration-images FOLDER."
            ) from error

    @classmethod
    def _from_flat(cls, flat: Mapping[str, object], path: PathLike) -> Calibration:
        """The content of the .json, each value checked.

        Raises:
            JsonError: a value is missing, of another type, or out of range.
            SuperPointError: the rounded weights cannot be read.
        """
        integer(member(flat, "format"), "format", FORMAT, FORMAT)
        percentile = member(flat, "percentile")
        ranges = mapping(member(flat, "ranges"), "ranges")
        if not ranges:
            raise JsonError("ranges is empty")
        channels = mapping(flat.get("channels", {}), "channels")
        return cls(
            method=choice(member(flat, "method"), "method", Method),
            percentile=None if percentile is None else real(percentile, "percentile", *_PERCENTILES),
            size=text(member(flat, "size"), "size"),
            checkpoint_sha256=optional_text(member(flat, "checkpoint_sha256"), "checkpoint_sha256"),
            approximation=optional_text(flat.get("approximation"), "approximation"),
            images=_read_texts(member(flat, "images"), "images"),
            ranges={name: real(value, f"ranges[{shown(name)}]", *_RANGES) for name, value in ranges.items()},
            channels={name: _read_factors(value, f"channels[{shown(name)}]") for name, value in channels.items()},
            weights=_read_weights(path, optional_text(flat.get("weights_sha256"), "weights_sha256")),
            rounded_from=_read_texts(flat.get("rounded_from", {}), "rounded_from"),
        )


def _read_texts(value: object, key: str) -> dict[str, str]:
    return {name: text(one, f"{key}[{shown(name)}]") for name, one in mapping(value, key).items()}


def _read_factors(value: object, key: str) -> list[float]:
    """Channel factors: numbers in one text, separated by spaces."""
    try:
        factors = [float(word) for word in text(value, key).split()]
    except ValueError:
        raise JsonError(f"{key} is {shown(value)}; expected numbers separated by spaces") from None
    if not factors:
        raise JsonError(f"{key} is empty; expected a factor for each channel")
    return [real(factor, key, *_FACTORS) for factor in factors]


def ranges_path(model: PathLike) -> Path:
    """Path of a model's ranges: superpoint.onnx -> superpoint.calibration.json."""
    return Path(model).with_suffix(".calibration.json")


def save_calibration(calibration: Calibration, path: PathLike) -> Path:
    """Writes the ranges to `path`, and rounded weights to `rounded_weights_path(path)`.

    Raises:
        SuperPointError: a file cannot be written.
    """
    path = check_writable(path)
    if calibration.weights:
        write_atomically(rounded_weights_path(path), _weights_file(calibration.weights))
    return write_atomically(path, calibration.to_json())


def rounded_weights_path(ranges: PathLike) -> Path:
    """Path of rounded weights: superpoint.calibration.json -> superpoint.calibration.int8.safetensors."""
    return Path(ranges).with_suffix(".int8.safetensors")


def _weights_file(weights: Mapping[str, NDArray[np.int8]]) -> bytes:
    from safetensors.numpy import save as to_bytes

    return bytes(to_bytes({name: np.ascontiguousarray(values) for name, values in weights.items()}))


def _read_weights(ranges: PathLike, digest: str | None) -> dict[str, NDArray[np.int8]]:
    """The rounded weights that a ranges file names by their SHA-256; empty if it names none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    if digest is None:
        return {}
    path = rounded_weights_path(ranges)
    remedy = "copy both, or make them again with --calibration-images FOLDER."
    if not path.exists():
        raise SuperPointError(f"{path}, which {ranges} names, is not there: {remedy}")
    data = read_bytes(path, "rounded weights")
    if sha256(data) != digest:
        raise SuperPointError(f"{path} is not the file that {ranges} was written with: {remedy}")
    try:
        weights = dict(from_bytes(data))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise SuperPointError(f"{path} cannot be read as rounded weights ({one_line(error)}): {remedy}") from error
    for name, values in weights.items():
        if values.dtype != np.int8:
            raise SuperPointError(
                f"{path} cannot be read as rounded weights: {shown(name)} is {values.dtype}, expected int8: {remedy}"
            )
    return weights


def weight_digest(weight: NDArray[np.floating]) -> str:
    """SHA-256 of weights as float32 values, to tell networks apart."""
    return sha256(np.ascontiguousarray(weight, np.float32).tobytes())


def load_calibration(path: PathLike) -> Calibration:
    """Reads what `save_calibration` wrote.

    Raises:
        SuperPointError: a file is missing, damaged or of a later format.
    """
    return Calibration.from_json(read_bytes(path, "calibration"), path)


def check_same_network(calibration: Calibration, description: ModelDescription, path: PathLike) -> None:
    """Refuses ranges of another network.

    Args:
        calibration: the ranges.
        description: of the network they are to be used for.
        path: that network's file, for the error.

    Raises:
        SuperPointError: the two name different checkpoints, or different approximations.
    """
    theirs, ours = calibration.checkpoint_sha256, description.checkpoint_sha256
    if theirs and ours and theirs != ours:
        raise SuperPointError(
            f"the calibration is of checkpoint {theirs[:12]}, {path} of checkpoint {ours[:12]}: ranges belong to one "
            "network; calibrate this one with --calibration-images FOLDER."
        )
    if calibration.approximation != description.approximation:
        theirs, ours = (told or "no approximation" for told in (calibration.approximation, description.approximation))
        raise SuperPointError(
            f"the calibration is of a network with {theirs}, {path} with {ours}: ranges belong to one network; "
            "calibrate this one with --calibration-images FOLDER."
        )
