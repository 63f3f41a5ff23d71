"""How large a network's activations get on real images: the ranges that int8 and fp8 scales are made of.

onnxruntime runs the fp32 graph on the CPU, one image at a time, through the same preprocessing as inference. Of every
convolution's input a histogram of the absolute values is kept; three methods read one range off it.
"""

from __future__ import annotations

import copy
import enum
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, Union

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from superpoint_trt.convert.cast import convolution_type, convolutions, described, load_onnx, quantized_type
from superpoint_trt.convert.quantize.equalize import equalize, factors, sites
from superpoint_trt.core import image as images
from superpoint_trt.core.files import (
    PathLike,
    check_writable,
    named,
    names_below,
    one_line,
    read_bytes,
    sha256,
    write_atomically,
)
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import INPUT_NAME, Float32, ModelDescription, Precision, SuperPointError

FORMAT = 1
SYNTHETIC = "synthetic"
"""In place of a folder: pictures made here, for those who ask by name. Real photographs give real ranges."""

FEW_IMAGES = 32
"""Below, the ranges depend on which images they are; published practice is a few hundred."""
MOST_IMAGES = 10_000
MOST_HELD_OUT = 16
CHANNEL_IMAGES = 16
"""On so many the channels are compared; the factors are a balance, not a limit, so few are enough."""
LONGEST_SIDE_PX = 1024
"""A network of free size measures on no more: larger photographs take longer and show the same ranges."""
BINS = 4096
LEVELS = 128
"""Magnitudes that int8 has for either sign, 0 included."""
_BLANK = 2.0 / 255.0
"""An image whose brightest and darkest pixel differ by no more than this holds nothing."""
_CHUNK = 1 << 20
_T = TypeVar("_T")


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


@dataclass(frozen=True)
class Calibration:
    """Ranges, and what they were measured on. No dates and no absolute paths: equal work gives equal bytes."""

    method: Method
    percentile: float | None
    """None: not that method."""
    size: str
    """Of the network's input while measuring: "480x640" (HxW), or "any"."""
    checkpoint_sha256: str | None
    """Of the network; None: another tool's model, which does not say."""
    images: dict[str, str]
    """Name of each image below its folder -> SHA-256 of the file, or of the pixels of a synthetic one."""
    ranges: dict[str, float]
    """Tensor name -> largest magnitude to represent, in the graph's order."""
    channels: dict[str, list[float]] = field(default_factory=dict)
    """Tensor name -> factor of each channel (`equalise.factors`), which the ranges are measured with."""
    weights: dict[str, NDArray[np.int8]] = field(default_factory=dict, compare=False)
    """Name of a convolution's weights -> (O, I, K, K) steps of int8 (`rounding.round_weights`), after equalisation;
    others are rounded to the nearest. Written as .safetensors beside the ranges, which name it by its SHA-256."""
    rounded_from: dict[str, str] = field(default_factory=dict, compare=False)
    """Name of each of `weights` -> `weight_digest` of the float32 weights that it was made from."""
    approximation: str | None = None
    """Of the network, as `ModelDescription` has it."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know of the images; not written."""

    def summary(self) -> str:
        """For metadata and people: "percentile 99.99, 144 images"."""
        method = self.method.value + (f" {self.percentile:g}" if self.percentile is not None else "")
        rounded = ", weights rounded with feedback" if self.weights else ""
        return f"{method}, {len(self.images)} image{'s' if len(self.images) != 1 else ''}{rounded}"

    def to_json(self) -> bytes:
        """As it lies beside the .onnx: one range or image a line, so that two compare with diff."""
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
        """Reads what `to_json` wrote, and the weights that it names beside `path`.

        Raises:
            SuperPointError: damaged, of a later format, with a range that is no positive number, or weights are named
                that are not there.
        """
        try:
            flat = json.loads(data)
            if flat["format"] != FORMAT:
                raise ValueError(f"format {flat['format']}, expected {FORMAT}")
            ranges = {str(name): float(value) for name, value in flat["ranges"].items()}
            bad = [name for name, value in ranges.items() if not 0 < value < np.inf]
            if bad or not ranges:
                raise ValueError(f"the range of {bad[0]} is {ranges[bad[0]]}" if bad else "no ranges")
            return cls(
                method=Method(flat["method"]),
                percentile=flat["percentile"],
                size=str(flat["size"]),
                checkpoint_sha256=flat["checkpoint_sha256"],
                approximation=flat.get("approximation"),
                images={str(name): str(value) for name, value in flat["images"].items()},
                ranges=ranges,
                channels={str(name): [float(f) for f in text.split()] for name, text in flat["channels"].items()},
                weights=_read_weights(path, flat.get("weights_sha256")),
                rounded_from={str(name): str(value) for name, value in flat.get("rounded_from", {}).items()},
            )
        except SuperPointError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SuperPointError(
                f"{path} cannot be read as calibration ranges ({one_line(error)}); make them again with "
                "--calibration-images FOLDER."
            ) from error


def beside(model: PathLike) -> Path:
    """Where a model's ranges lie: superpoint.onnx -> superpoint.calibration.json."""
    return Path(model).with_suffix(".calibration.json")


def save(calibration: Calibration, path: PathLike) -> Path:
    """Writes the ranges, and rounded weights beside them; each beside, then renamed."""
    path = check_writable(path)
    if calibration.weights:
        write_atomically(weights_path(path), _weights_file(calibration.weights))
    return write_atomically(path, calibration.to_json())


def weights_path(ranges: PathLike) -> Path:
    """Where rounded weights lie: superpoint.calibration.json -> superpoint.calibration.int8.safetensors."""
    return Path(ranges).with_suffix(".int8.safetensors")


def _weights_file(weights: Mapping[str, NDArray[np.int8]]) -> bytes:
    from safetensors.numpy import save as to_bytes

    return bytes(to_bytes({name: np.ascontiguousarray(values) for name, values in weights.items()}))


def _read_weights(ranges: PathLike, digest: str | None) -> dict[str, NDArray[np.int8]]:
    """Those that a ranges file names; none if it names none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    if digest is None:
        return {}
    path = weights_path(ranges)
    remedy = "copy both, or make them again with --calibration-images FOLDER."
    if not path.exists():
        raise SuperPointError(f"{path}, which {ranges} names, is not there: {remedy}")
    data = read_bytes(path, "rounded weights")
    if sha256(data) != digest:
        raise SuperPointError(f"{path} is not the file that {ranges} was written with: {remedy}")
    try:
        return dict(from_bytes(data))
    except SafetensorError as error:
        raise SuperPointError(f"{path} cannot be read as rounded weights ({one_line(error)}): {remedy}") from error


def weight_digest(weight: NDArray[np.floating]) -> str:
    """Tells weights apart: SHA-256 of their float32 values."""
    return sha256(np.ascontiguousarray(weight, np.float32).tobytes())


def load(path: PathLike) -> Calibration:
    """Reads ranges.

    Raises:
        SuperPointError: missing, damaged or of a later format.
    """
    return Calibration.from_json(read_bytes(path, "calibration"), path)


# ----------------------------------------------------------------------------------------------------------- the images


@dataclass(frozen=True)
class ImageSet:
    """A folder's images in two parts: to measure ranges on, and to prove the result on."""

    calibration: list[Path]
    held_out: list[Path]
    """Up to 16 that calibration does not see; empty if there are too few to spare any."""


def split(folder: PathLike, count: int) -> ImageSet:
    """Chooses images evenly over a folder's sorted names: the same folder, the same choice.

    Every tenth is held out, 16 at most; of the rest, at most `count` are to calibrate on.

    Raises:
        SuperPointError: no folder, or no image in it.
    """
    found = images.find_images(folder)
    held_out = evenly(found, min(MOST_HELD_OUT, len(found) // 10))
    rest = [path for path in found if path not in set(held_out)]
    return ImageSet(evenly(rest, count), held_out)


def evenly(items: Sequence[_T], count: int) -> list[_T]:
    """So many of them, spread evenly."""
    if count >= len(items):
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def synthetic_images(count: int, size_hw: tuple[int, int]) -> list[tuple[str, NDArray[np.uint8]]]:
    """Dead-leaves pictures, each its own; for trying the machinery without photographs."""
    return [(f"{SYNTHETIC}-{seed}", images.synthetic_photograph(*size_hw, seed=seed)) for seed in range(count)]


# ---------------------------------------------------------------------------------------------------------- calibration

Given = Union[Path, tuple[str, NDArray[Any]]]


def calibrate(
    model: PathLike,
    given: Iterable[Given],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measures the range of every convolution's input.

    Args:
        model: fp32 SuperPoint .onnx of any type.
        given: image files; or (name, array) as `SuperPoint.extract` takes arrays.
        options: method.
        progress: called with (images done, in all); those that channels are compared on count twice.

    Returns:
        The ranges. `notes` says which images could not be used, and what makes the set doubtful.

    Raises:
        SuperPointError: no usable model, no usable image, or images that leave a tensor at zero.
    """
    options = options or CalibrationOptions()
    given = list(given)
    if not given:
        raise SuperPointError("no calibration image was given; expected 100 or more photographs like those to come.")
    source = load_onnx(model)
    check_quantizable(source)
    description = described(source, model)
    compared = evenly(given, CHANNEL_IMAGES) if options.equalize else []
    steps = Steps(len(compared) + len(given), progress)
    channels = _channels(source, compared, description, model, steps) if compared else {}
    activations = Activations(equalize(source, channels), model, _own(description))
    histograms = {name: Histogram() for name in activations.names}
    used: dict[str, str] = {}
    sizes: list[images.Placement] = []
    notes: list[str] = []
    for name, one in zip(_names(given), given):
        try:
            digest, gray = _read(one, name)
            placement = _place(gray, description)
            for tensor, values in activations(images.to_input(gray, _cropped(placement, description))):
                histograms[tensor].add(values)
            used[name] = digest
            sizes.append(placement)
        except SuperPointError as error:
            notes.append(f"left out: {error}")
        steps.advance()
    if not used:
        raise SuperPointError(f"none of the {len(given)} calibration images can be used; {notes[0]}")
    return Calibration(
        method=options.method,
        percentile=options.percentile if options.method is Method.PERCENTILE else None,
        size="any" if description.dynamic else f"{description.height_px}x{description.width_px}",
        checkpoint_sha256=description.checkpoint_sha256,
        approximation=description.approximation,
        images=used,
        ranges={name: _range(name, histogram, options) for name, histogram in histograms.items()},
        channels=channels,
        notes=(*notes, *_doubts(sizes)),
    )


def _place(gray: Float32, description: ModelDescription) -> images.Placement:
    """As inference places an image; bounded where the network would take any size."""
    return images.place(gray.shape[:2], description, LONGEST_SIDE_PX if description.dynamic else None)


def _cropped(placement: images.Placement, description: ModelDescription) -> images.Placement:
    """Padded to whole cells only: the rest would be the last row and column over and over, at the price of pixels."""
    if not _own(description):
        return placement
    stride = description.stride_px
    height, width = (-(-side // stride) * stride for side in (placement.placed_height_px, placement.placed_width_px))
    return replace(placement, input_height_px=height, input_width_px=width)


def _own(description: ModelDescription) -> bool:
    """Whether this package wrote the graph, so that nothing in front of a last convolution depends on the size."""
    return description.checkpoint_sha256 is not None


def network_inputs(given: Sequence[Given], description: ModelDescription) -> Iterable[Float32 | None]:
    """(H, W) of each image as the network reads it; None of one that cannot be used, which `calibrate` says."""
    for name, one in zip(_names(given), given):
        try:
            gray = _read(one, name)[1]
            image = images.to_input(gray, _cropped(_place(gray, description), description))
        except SuperPointError:
            yield None
        else:
            yield image


def _channels(
    source: onnx.ModelProto, few: Sequence[Given], description: ModelDescription, path: PathLike, steps: Steps
) -> dict[str, list[float]]:
    """Factors that equalise channels, from their largest magnitudes on a few of the images."""
    wanted = sites(source)
    activations = Activations(source, path, _own(description))
    largest: dict[str, NDArray[np.floating]] = {}
    for image in network_inputs(few, description):
        steps.advance()
        if image is None:
            continue
        try:
            tensors = dict(activations(image))
        except SuperPointError:  # the second pass over the images says so
            continue
        for tensor in wanted:
            peak = np.abs(tensors[tensor]).max(axis=(0, 2, 3))
            largest[tensor] = np.maximum(largest.get(tensor, peak), peak)
    return factors(source, largest) if largest else {}


def _names(given: Sequence[Given]) -> list[str]:
    """What each image is called in the ranges file: below the folder that all share, so no machine's own paths."""
    below = iter(names_below([one for one in given if isinstance(one, Path)]))
    return [next(below) if isinstance(one, Path) else one[0] for one in given]


def _read(one: Given, name: str) -> tuple[str, Float32]:
    """SHA-256 and pixels of one image that is worth measuring."""
    if isinstance(one, tuple):
        digest = sha256(np.ascontiguousarray(one[1]).tobytes())
        gray = images.to_gray(one[1])
    else:
        digest = sha256(read_bytes(one, "image"))
        try:
            gray = images.to_gray(images.load_image(one))
        except SuperPointError as error:
            raise SuperPointError(named(error, one)) from error
    if np.ptp(gray) <= _BLANK:
        raise SuperPointError(f"{one if isinstance(one, Path) else name} is blank: one gray everywhere.")
    return digest, gray


def _doubts(sizes: Sequence[images.Placement]) -> Iterable[str]:
    """What makes a set of images doubtful."""
    if len(sizes) < FEW_IMAGES:
        yield (
            f"only {len(sizes)} image{'s' if len(sizes) != 1 else ''}: what they do not show will be clipped; use 100 "
            "or more photographs like those to come"
        )
    shrunk = sum(1 for p in sizes if p.resized)
    padded = sum(1 for p in sizes if (p.placed_width_px, p.placed_height_px) != (p.input_width_px, p.input_height_px))
    p = sizes[0]
    if shrunk == len(sizes):
        yield f"every image is larger than the network's {p.input_width_px}x{p.input_height_px} px and was shrunk"
    elif padded == len(sizes):
        yield (
            f"no image fills the network's input (the first is {p.placed_width_px}x{p.placed_height_px} of "
            f"{p.input_width_px}x{p.input_height_px} px); only what they show was measured, without the padding"
        )


def check_quantizable(model: onnx.ModelProto) -> None:
    """Refuses what is no plain fp32 network.

    Raises:
        SuperPointError: saying what it is.
    """
    if quantized_type(model):
        raise SuperPointError("the .onnx is already quantised; use the fp32 .onnx it was made from.")
    found = convolution_type(model)
    if found is not Precision.FP32:
        what = f"its convolutions are {found.value}" if found else "no convolution with plain fp32 weights was found"
        raise SuperPointError(f"quantising needs an fp32 .onnx, but {what}; export it with fp32.")


def convolution_inputs(model: onnx.ModelProto) -> list[str]:
    """The tensors that convolutions read, each once, in the graph's order."""
    return list(dict.fromkeys(node.input[0] for node in convolutions(model).values()))


class Activations:
    """A float32 graph, Q/DQ pairs or not, in onnxruntime, cut down to what computes the convolutions' inputs."""

    def __init__(self, source: onnx.ModelProto, path: PathLike, any_size: bool) -> None:
        import onnxruntime as ort

        self.names = convolution_inputs(source)
        inner = [name for name in self.names if name != INPUT_NAME]
        cut = copy.deepcopy(source)
        del cut.graph.output[:]
        cut.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inner)
        if any_size:
            for dim, name in zip(cut.graph.input[0].type.tensor_type.shape.dim[2:], ("height", "width")):
                dim.dim_param = name
            del cut.graph.value_info[:]
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        try:
            self._session = ort.InferenceSession(cut.SerializeToString(), settings, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise SuperPointError(f"{path} is not a model onnxruntime can load: {one_line(error)}.") from error
        self._inner = inner

    def __call__(self, image: Float32) -> Iterable[tuple[str, Float32]]:
        """(H, W) -> name and values of each tensor."""
        batch = image[None, None]
        try:
            values = dict(zip(self._inner, self._session.run(self._inner, {INPUT_NAME: batch})))
        except Exception as error:  # as above
            raise SuperPointError(
                f"onnxruntime failed on {image.shape[1]}x{image.shape[0]}: {one_line(error)}."
            ) from error
        return [(name, batch if name == INPUT_NAME else values[name]) for name in self.names]


# ----------------------------------------------------------------------------------------------------------- histograms


class Histogram:
    """Counts of magnitudes in equal bins from 0 up, in one pass and bounded memory.

    The upper end is a power of two and doubles when a value lies beyond it, two bins becoming one; so the counts do not
    depend on the order of the values.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        """Of values that are not 0."""
        self.zeros = 0
        self.end = 0.0
        """Upper end of the last bin."""
        self.largest = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Counts every value.

        Raises:
            SuperPointError: a value is not finite.
        """
        flat = values.reshape(-1)
        for start in range(0, flat.size, _CHUNK):  # temporaries stay in the cache
            self._add(np.abs(flat[start : start + _CHUNK]))

    def _add(self, magnitudes: NDArray[np.floating]) -> None:
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise SuperPointError("the network's own values are not finite on this image.")
        if largest == 0.0:
            self.zeros += magnitudes.size
            return
        self._reach(largest)
        bins = np.minimum((magnitudes * np.float32(BINS / self.end)).astype(np.int32), BINS - 1)
        found = np.bincount(bins, minlength=BINS)
        zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
        found[0] -= zeros
        self.zeros += zeros
        self.counts += found

    def _reach(self, largest: float) -> None:
        self.largest = max(self.largest, largest)
        if not self.end:
            self.end = float(2.0 ** np.ceil(np.log2(largest)))
        while self.end < largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.end *= 2

    @property
    def bin_width(self) -> float:
        """Of each bin."""
        return self.end / BINS


def _range(name: str, histogram: Histogram, options: CalibrationOptions) -> float:
    if histogram.largest == 0.0:
        raise SuperPointError(
            f"{name} is 0 on every calibration image, so it has no range; use photographs like those to come."
        )
    if options.method is Method.MAX:
        found = histogram.largest
    elif options.method is Method.ENTROPY:
        found = entropy_range(histogram)
    else:
        found = percentile_range(histogram, options.percentile)
    # Four digits are far below what a range is known to, and the same on every processor.
    return float(f"{found:.4g}")


def percentile_range(histogram: Histogram, percentile: float) -> float:
    """The smallest bin edge that the share of all values, zeros included, lies below."""
    total = histogram.zeros + int(histogram.counts.sum())
    below = histogram.zeros + np.cumsum(histogram.counts)
    bins = int(np.searchsorted(below, total * percentile / 100.0)) + 1
    return min(bins * histogram.bin_width, histogram.largest)


def entropy_range(histogram: Histogram) -> float:
    """The range whose 128 levels lose least of the distribution (Migacz, "8-bit inference with TensorRT", GTC 2017).

    For each candidate the clipped distribution P has everything beyond the range in its last bin; Q is what 128 levels
    make of it, each level's mass spread over its occupied bins. The candidate with the smallest Kullback-Leibler
    divergence of P from Q wins. Exact zeros are left out: every symmetric quantiser keeps them.
    """
    counts = histogram.counts.astype(np.float64)
    used = int(np.flatnonzero(counts)[-1]) + 1
    coarse = max(1, used // 2048)  # as many candidates as TensorRT's 2048 bins give, at least
    candidates = sorted({*range(LEVELS, used + 1, coarse), used})
    divergences = [_divergence(counts, bins) for bins in candidates if bins >= min(LEVELS, used)]
    best = candidates[int(np.argmin(divergences))]
    return float(min(best * histogram.bin_width, histogram.largest))


def _divergence(counts: NDArray[np.float64], bins: int) -> float:
    kept = counts[:bins]
    clipped = kept.copy()
    clipped[-1] += counts[bins:].sum()
    level = np.arange(bins) * LEVELS // bins
    occupied = kept > 0
    mass = np.bincount(level, weights=kept, minlength=LEVELS)
    places = np.bincount(level, weights=occupied, minlength=LEVELS)
    spread = np.where(occupied, (mass / np.maximum(places, 1))[level], 0.0)
    there = clipped > 0
    if not spread[there].all():  # mass where the levels have none: infinitely far
        return float("inf")
    p, q = clipped[there] / clipped.sum(), spread[there] / spread.sum()
    return float((p * np.log(p / q)).sum())


def check_same_network(calibration: Calibration, description: ModelDescription | None, path: PathLike) -> None:
    """Refuses ranges of another network.

    Raises:
        SuperPointError: both name a checkpoint, and not the same, or not with the same approximation.
    """
    theirs, ours = calibration.checkpoint_sha256, description.checkpoint_sha256 if description else None
    if theirs and ours and theirs != ours:
        raise SuperPointError(
            f"the calibration is of checkpoint {theirs[:12]}, {path} of checkpoint {ours[:12]}: ranges belong to one "
            "network; calibrate this one with --calibration-images FOLDER."
        )
    if description and calibration.approximation != description.approximation:
        theirs, ours = (told or "no approximation" for told in (calibration.approximation, description.approximation))
        raise SuperPointError(
            f"the calibration is of a network with {theirs}, {path} with {ours}: ranges belong to one network; "
            "calibrate this one with --calibration-images FOLDER."
        )
