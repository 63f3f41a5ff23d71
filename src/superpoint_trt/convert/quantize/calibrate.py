"""Measures how large a network's activations get on real images: the ranges that int8 and fp8 scales are made of.

onnxruntime runs the fp32 graph on the CPU, one image at a time, with the same preprocessing as inference. A histogram
of the absolute values is kept for every convolution's input, and one of three methods reads a range off it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Union

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from superpoint_trt.convert.onnx_file import OnnxFile, OnnxSource, check_quantizable, convolutions, read_onnx
from superpoint_trt.convert.quantize.equalize import equalize, factors, scalable_tensors
from superpoint_trt.convert.quantize.histogram import Histogram, entropy_range, percentile_range
from superpoint_trt.convert.quantize.options import SYNTHETIC, CalibrationOptions, Method
from superpoint_trt.convert.quantize.ranges_file import Calibration
from superpoint_trt.core.files import (
    PathLike,
    named,
    names_below,
    one_line,
    read_bytes,
    sha256,
)
from superpoint_trt.core.image import Placement, find_images, load_image, place, synthetic_photograph, to_gray, to_input
from superpoint_trt.core.onnx_runtime import import_onnxruntime
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import INPUT_NAME, Float32, ModelDescription, SuperPointError

FEW_IMAGES = 32
"""With fewer, the ranges depend on which images they are; published practice is a few hundred."""

MOST_HELD_OUT = 16
"""Images that are kept for the proof."""

CHANNEL_IMAGES = 16
"""Images that channels are compared on. A factor is a balance, not a limit, so few are enough."""

LONGEST_SIDE_PX = 1024
"""Larger photographs are shrunk to this for a network of free size: they take longer and show the same ranges."""

_BLANK = 2.0 / 255.0
"""An image whose brightest and darkest pixel differ by no more than this shows nothing."""

_FATAL_ONLY = 4
"""onnxruntime's log level: its errors also come as exceptions."""

_T = TypeVar("_T")

CalibrationImage = Union[Path, tuple[str, NDArray[Any]]]
"""An image file; or a name and an array, (H, W) or (H, W, 3), as `SuperPoint.extract` takes it."""


# ----------------------------------------------------------------------------------------------------------- the images


@dataclass(frozen=True)
class ImageSet:
    """A folder's images in two parts: to measure ranges on, and to prove the result on."""

    calibration: list[Path]
    held_out: list[Path]
    """Up to 16 images that calibration does not see; empty if the folder has fewer than 10."""


def split_images(folder: PathLike, count: int) -> ImageSet:
    """Divides a folder's images: every tenth, 16 at most, is held out; of the rest at most `count` are used.

    Both parts are spread evenly over the sorted names, so the same folder always gives the same choice.

    Raises:
        SuperPointError: there is no such folder, or no image in it.
    """
    found = find_images(folder)
    held_out = spread_evenly(found, min(MOST_HELD_OUT, len(found) // 10))
    rest = [path for path in found if path not in set(held_out)]
    return ImageSet(spread_evenly(rest, count), held_out)


def spread_evenly(items: Sequence[_T], count: int) -> list[_T]:
    """At most `count` of the items, evenly spread over them."""
    if count >= len(items):
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def synthetic_images(count: int, size_hw: tuple[int, int]) -> list[CalibrationImage]:
    """Makes dead-leaves pictures, (H, W) uint8, all different; to try the workflow without photographs."""
    return [(f"{SYNTHETIC}-{seed}", synthetic_photograph(*size_hw, seed=seed)) for seed in range(count)]


def network_inputs(
    calibration_images: Sequence[CalibrationImage], description: ModelDescription
) -> Iterator[Float32 | None]:
    """Yields each image as the network reads it, (H, W) float32 in [0, 1]; None for an image that cannot be used."""
    for name, image in zip(_image_names(calibration_images), calibration_images):
        try:
            gray = _read_gray(image, name)[1]
            pixels = to_input(gray, _without_padding(_place(gray, description), description))
        except SuperPointError:
            yield None
        else:
            yield pixels


def _place(gray: Float32, description: ModelDescription) -> Placement:
    """Where inference puts an image in the network's input; shrunk to `LONGEST_SIDE_PX` if the size is free."""
    return place(gray.shape[:2], description, LONGEST_SIDE_PX if description.dynamic else None)


def _without_padding(placement: Placement, description: ModelDescription) -> Placement:
    """Pads to whole cells only. More padding repeats the last row and column, which takes time and shows nothing."""
    if not is_own(description):
        return placement
    stride = description.stride_px
    height, width = (-(-side // stride) * stride for side in (placement.placed_height_px, placement.placed_width_px))
    return replace(placement, input_height_px=height, input_width_px=width)


def is_own(description: ModelDescription) -> bool:
    """Whether this package wrote the graph: then its convolutions take images of any size."""
    return description.checkpoint_sha256 is not None


def _image_names(calibration_images: Sequence[CalibrationImage]) -> list[str]:
    """Each image's name in the ranges file: its path below the folder that all share, so no machine's own paths."""
    below = iter(names_below([image for image in calibration_images if isinstance(image, Path)]))
    return [next(below) if isinstance(image, Path) else image[0] for image in calibration_images]


def _read_gray(image: CalibrationImage, name: str) -> tuple[str, Float32]:
    """Reads one image: the SHA-256 of its file or array, and (H, W) float32 in [0, 1].

    Raises:
        SuperPointError: it cannot be read, or is blank.
    """
    if isinstance(image, tuple):
        digest = sha256(np.ascontiguousarray(image[1]).tobytes())
        gray = to_gray(image[1])
    else:
        digest = sha256(read_bytes(image, "image"))
        try:
            gray = to_gray(load_image(image))
        except SuperPointError as error:
            raise SuperPointError(named(error, image)) from error
    if np.ptp(gray) <= _BLANK:
        raise SuperPointError(f"{image if isinstance(image, Path) else name} is blank: one gray everywhere.")
    return digest, gray


# ---------------------------------------------------------------------------------------------------------- calibration


def calibrate(
    model: OnnxSource,
    calibration_images: Iterable[CalibrationImage],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measures the range of every convolution's input.

    Args:
        model: fp32 SuperPoint .onnx of any type.
        calibration_images: files, or arrays with names.
        options: method and percentile. `count` is not read here: all images are used.
        progress: called with (images done, in all). Images that channels are compared on count twice.

    Returns:
        The ranges. `notes` lists the images that could not be used and what makes the set doubtful.

    Raises:
        SuperPointError: the model is not fp32, no image can be used, or a tensor is 0 on all of them.
    """
    options = options or CalibrationOptions()
    given = list(calibration_images)
    if not given:
        raise SuperPointError("no calibration image was given; expected 100 or more photographs like those to come.")
    source = read_onnx(model)
    check_quantizable(source.model)
    description = source.description
    compared = spread_evenly(given, CHANNEL_IMAGES) if options.equalize else []
    steps = Steps(len(compared) + len(given), progress)
    channels = _channel_factors(source, compared, steps) if compared else {}
    activations = Activations(equalize(source.model, channels), source.path, any_size=is_own(description))
    histograms = {name: Histogram() for name in activations.names}
    used: dict[str, str] = {}
    sizes: list[Placement] = []
    notes: list[str] = []
    for name, image in zip(_image_names(given), given):
        try:
            digest, gray = _read_gray(image, name)
            placement = _place(gray, description)
            for tensor, values in activations(to_input(gray, _without_padding(placement, description))):
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


def _channel_factors(source: OnnxFile, compared: Sequence[CalibrationImage], steps: Steps) -> dict[str, list[float]]:
    """The factors that equalize channels, from each channel's largest magnitude on a few images."""
    wanted = scalable_tensors(source.model)
    activations = Activations(source.model, source.path, any_size=is_own(source.description))
    largest: dict[str, NDArray[np.floating]] = {}
    for image in network_inputs(compared, source.description):
        steps.advance()
        if image is None:
            continue
        try:
            tensors = dict(activations(image))
        except SuperPointError:  # the pass that measures ranges notes the image
            continue
        for tensor in wanted:
            peak = np.abs(tensors[tensor]).max(axis=(0, 2, 3))
            largest[tensor] = np.maximum(largest.get(tensor, peak), peak)
    return factors(source.model, largest) if largest else {}


def _doubts(sizes: Sequence[Placement]) -> Iterator[str]:
    """Yields what makes a set of images doubtful: too few, all shrunk, or all padded."""
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


def convolution_inputs(model: onnx.ModelProto) -> list[str]:
    """The tensors that convolutions read, each once, in the graph's order."""
    return list(dict.fromkeys(node.input[0] for node in convolutions(model).values()))


def _keep_what_makes(graph: onnx.GraphProto, tensors: Sequence[str]) -> None:
    """Removes the nodes that no listed tensor needs.

    The nodes that decode keypoints may have the size of a static model in them, and measuring runs images of others.
    """
    wanted = set(tensors)
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(_read_by(node))
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """Yields the tensors that a node reads, also those that only its branches or its loop's body read."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _read_by(inner)


class Activations:
    """Computes the tensors that a graph's convolutions read, in onnxruntime on the CPU.

    Args:
        model: float32 graph, with or without Q/DQ pairs; not changed.
        path: its file, for the error.
        any_size: frees the size of the input.

    Attributes:
        names: of the tensors, in the graph's order.

    Raises:
        SuperPointError: onnxruntime cannot load the graph.
    """

    def __init__(self, model: onnx.ModelProto, path: PathLike, any_size: bool) -> None:
        ort = import_onnxruntime()

        self.names = convolution_inputs(model)
        self._computed = [name for name in self.names if name != INPUT_NAME]
        cut = copy.deepcopy(model)
        _keep_what_makes(cut.graph, self._computed)
        del cut.graph.output[:]
        values = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._computed)
        cut.graph.output.extend(values)
        if any_size:
            for dim, name in zip(cut.graph.input[0].type.tensor_type.shape.dim[2:], ("height", "width")):
                dim.dim_param = name
            del cut.graph.value_info[:]
        settings = ort.SessionOptions()
        settings.log_severity_level = _FATAL_ONLY
        try:
            self._session = ort.InferenceSession(cut.SerializeToString(), settings, ["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise SuperPointError(f"{path} is not a model onnxruntime can load: {one_line(error)}.") from error

    def __call__(self, image: Float32) -> list[tuple[str, Float32]]:
        """Runs the graph.

        Args:
            image: (H, W) float32 in [0, 1].

        Returns:
            Name and values (1, C, h, w) of each tensor.

        Raises:
            SuperPointError: onnxruntime failed.
        """
        batch = image[None, None]
        try:
            values = dict(zip(self._computed, self._session.run(self._computed, {INPUT_NAME: batch})))
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise SuperPointError(
                f"onnxruntime failed on {image.shape[1]}x{image.shape[0]}: {one_line(error)}."
            ) from error
        return [(name, batch if name == INPUT_NAME else values[name]) for name in self.names]


def _range(name: str, histogram: Histogram, options: CalibrationOptions) -> float:
    """The range of one tensor, rounded to four digits.

    Raises:
        SuperPointError: the tensor is 0 on every image.
    """
    if histogram.largest == 0.0:
        raise SuperPointError(
            f"{name} is 0 on every calibration image, so it has no range; use photographs like those to come."
        )
    if options.method is Method.MAX:
        found = histogram.largest
    elif options.method is Method.ENTROPY:
        found = entropy_range(histogram)
    elif options.method is Method.PERCENTILE:
        found = percentile_range(histogram, options.percentile)
    else:
        raise SuperPointError(
            f"calibration method is {options.method}; expected one of {', '.join(method.value for method in Method)}."
        )
    # Far finer than a range is known, and the same on every processor.
    return float(f"{found:.4g}")
