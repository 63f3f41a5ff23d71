"""How large a network's activations get on real images: the ranges that int8 and fp8 scales are made of.

onnxruntime runs the fp32 graph on the CPU, one image at a time, through the same preprocessing as inference. Of every
convolution's input a histogram of the absolute values is kept; three methods read one range off it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, Union

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from superpoint_trt.convert.onnx_file import check_quantizable, convolutions, load_onnx, model_description
from superpoint_trt.convert.quantize.equalize import equalize, factors, sites
from superpoint_trt.convert.quantize.histogram import Histogram, entropy_range, percentile_range
from superpoint_trt.convert.quantize.options import SYNTHETIC, CalibrationOptions, Method
from superpoint_trt.convert.quantize.ranges_file import Calibration
from superpoint_trt.core import image as images
from superpoint_trt.core.files import (
    PathLike,
    named,
    names_below,
    one_line,
    read_bytes,
    sha256,
)
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import INPUT_NAME, Float32, ModelDescription, SuperPointError

FEW_IMAGES = 32
"""Below, the ranges depend on which images they are; published practice is a few hundred."""
MOST_HELD_OUT = 16
CHANNEL_IMAGES = 16
"""On so many the channels are compared; the factors are a balance, not a limit, so few are enough."""
LONGEST_SIDE_PX = 1024
"""A network of free size measures on no more: larger photographs take longer and show the same ranges."""
_BLANK = 2.0 / 255.0
"""An image whose brightest and darkest pixel differ by no more than this holds nothing."""
_T = TypeVar("_T")


# ----------------------------------------------------------------------------------------------------------- the images


@dataclass(frozen=True)
class ImageSet:
    """A folder's images in two parts: to measure ranges on, and to prove the result on."""

    calibration: list[Path]
    held_out: list[Path]
    """Up to 16 that calibration does not see; empty if there are too few to spare any."""


def split_images(folder: PathLike, count: int) -> ImageSet:
    """Chooses images evenly over a folder's sorted names: the same folder, the same choice.

    Every tenth is held out, 16 at most; of the rest, at most `count` are to calibrate on.

    Raises:
        SuperPointError: no folder, or no image in it.
    """
    found = images.find_images(folder)
    held_out = spread_evenly(found, min(MOST_HELD_OUT, len(found) // 10))
    rest = [path for path in found if path not in set(held_out)]
    return ImageSet(spread_evenly(rest, count), held_out)


def spread_evenly(items: Sequence[_T], count: int) -> list[_T]:
    """So many of them, spread evenly."""
    if count >= len(items):
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def synthetic_images(count: int, size_hw: tuple[int, int]) -> list[tuple[str, NDArray[np.uint8]]]:
    """Dead-leaves pictures, each its own; for trying the machinery without photographs."""
    return [(f"{SYNTHETIC}-{seed}", images.synthetic_photograph(*size_hw, seed=seed)) for seed in range(count)]


# ---------------------------------------------------------------------------------------------------------- calibration

CalibrationImage = Union[Path, tuple[str, NDArray[Any]]]


def calibrate(
    model: PathLike,
    given: Iterable[CalibrationImage],
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
    description = model_description(source, model)
    compared = spread_evenly(given, CHANNEL_IMAGES) if options.equalize else []
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


def network_inputs(given: Sequence[CalibrationImage], description: ModelDescription) -> Iterable[Float32 | None]:
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
    source: onnx.ModelProto,
    few: Sequence[CalibrationImage],
    description: ModelDescription,
    path: PathLike,
    steps: Steps,
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


def _names(given: Sequence[CalibrationImage]) -> list[str]:
    """What each image is called in the ranges file: below the folder that all share, so no machine's own paths."""
    below = iter(names_below([one for one in given if isinstance(one, Path)]))
    return [next(below) if isinstance(one, Path) else one[0] for one in given]


def _read(one: CalibrationImage, name: str) -> tuple[str, Float32]:
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
