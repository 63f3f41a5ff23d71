"""Reads images, prepares them for a network, and maps keypoints back to the caller's pixels.

Inference, calibration and evaluation all use these functions, so that their preprocessing is the same.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, is_regular_file, one_line
from superpoint_trt.core.image_file import (
    LARGE_PX,
    SMALLEST_SIDE_PX,
    LoadedImage,
    ReadOptions,
    check_sides,
    read_image_file,
)
from superpoint_trt.core.types import Float32, ModelDescription, SuperPointError

ImageLike = Union[PathLike, NDArray[Any], LoadedImage]
"""A path; an array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA, of uint8, uint16, bool, or float in [0, 1]; or
what `read_image_file` returned."""

RGB_TO_GRAY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Luma of ITU-R BT.601, as in the reference and in OpenCV."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")

_BLAS_PIXELS = 320
"""A multiple of 64, so that vectors of pixels begin where they do in a whole row, and each pixel gets the same bits."""

_FULL_SCALE = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0, np.dtype(bool): 1.0}


def find_images(folder: PathLike, limit: int | None = None) -> list[Path]:
    """The image files below a folder, sorted by path. For the path of a file: that file.

    Raises:
        SuperPointError: no such path, or no image below it.
    """
    folder = Path(folder)
    if is_regular_file(folder, "image"):
        return [folder]
    if not folder.is_dir():
        raise SuperPointError(f"images {folder} do not exist; expected a folder of images or one image.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise SuperPointError(f"{folder} holds no image; names should end in {', '.join(IMAGE_SUFFIXES)}.")
    return found[:limit]


def load_image(path: PathLike, options: ReadOptions | None = None) -> NDArray[Any]:
    """Reads an image file upright (EXIF orientation applied): (H, W) or (H, W, 3) RGB, in the file's own depth.

    Args:
        path: the file.
        options: which files are read: up to how many pixels, and whether damaged ones.

    Raises:
        SuperPointError: not a file, not an image, too large, or damaged.
    """
    return read_image_file(path, options).pixels


def to_picture(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Turns any accepted array into (H, W, 3) uint8 RGB to draw on.

    Raises:
        SuperPointError: shape, dtype, range or size is not an image's.
    """
    full_scale = check_image(np.asarray(image))
    color = image[..., None] if image.ndim == 2 else image[..., :3]
    scaled = color if image.dtype == np.uint8 else np.round(color.astype(np.float32) * (255.0 / full_scale))
    picture: NDArray[np.uint8] = np.broadcast_to(scaled.astype(np.uint8), (*image.shape[:2], 3)).copy()
    return picture


def to_gray(image: NDArray[Any]) -> Float32:
    """Turns any accepted array into (H, W) float32 in [0, 1].

    Raises:
        SuperPointError: shape, dtype, range or size is not an image's.
    """
    image = np.asarray(image)
    full_scale = check_image(image)
    if image.ndim == 3 and image.shape[2] > 1:
        gray = _luma(image[..., :3])  # alpha is ignored: transparent pixels have colors, too
    else:
        gray = image.reshape(image.shape[:2]).astype(np.float32)
    if full_scale != 1.0:
        gray /= np.float32(full_scale)
    return gray


def _luma(rgb: NDArray[Any]) -> Float32:
    """Colors (H, W, 3) to gray (H, W); of a large image some rows at a time, for colors as float32 take much memory."""
    height, width = rgb.shape[:2]
    rows = max(1, LARGE_PX // width)
    gray = np.empty((height, width), np.float32)
    for top in range(0, height, rows):
        _weigh(_as_float(rgb[top : top + rows]), gray[top : top + rows])
    return gray


def _weigh(rgb: Float32, gray: Float32) -> None:
    """Weighs colors (H, W, 3) into gray (H, W), each row in pieces.

    numpy calls BLAS for each piece. For more than 476 pixels OpenBLAS takes memory from a pool, with three locks that
    all threads share, so that threads which load images wait for each other. For more than 3072 pixels it shares the
    piece among threads of its own.
    """
    height, width = gray.shape
    rest = width % _BLAS_PIXELS
    rest += _BLAS_PIXELS * (rest == 1)  # BLAS would add up a single pixel in another order
    whole = width - rest
    if whole:
        pieces = (height, -1, _BLAS_PIXELS)
        np.matmul(rgb[:, :whole].reshape(*pieces, 3), RGB_TO_GRAY, out=gray[:, :whole].reshape(pieces))
    if rest:
        np.matmul(rgb[:, whole:], RGB_TO_GRAY, out=gray[:, whole:])


def _as_float(rgb: NDArray[Any]) -> Float32:
    """Colors (H, W, 3) as float32."""
    if rgb.strides[2] < 0 and rgb.dtype in (np.uint8, np.uint16):
        import cv2

        # As `read_image_file` returns them. OpenCV puts them in order in a thirtieth of numpy's time.
        rgb = cv2.cvtColor(rgb[..., ::-1], cv2.COLOR_BGR2RGB)
    return rgb.astype(np.float32)


def check_image(image: NDArray[Any]) -> float:
    """Checks that an array is an image.

    Returns:
        The value of white: 255, 65535 or 1.

    Raises:
        SuperPointError: shape, dtype, range or size is not an image's.
    """
    check_shape(image)
    return _full_scale(image)


def check_shape(image: NDArray[Any]) -> None:
    """Checks that an array has the shape and size of an image.

    Raises:
        SuperPointError: it does not.
    """
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise SuperPointError(f"image has shape {image.shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).")
    check_sides("image", image.shape[1], image.shape[0])


def _full_scale(image: NDArray[Any]) -> float:
    if image.dtype in _FULL_SCALE:
        return _FULL_SCALE[image.dtype]
    if not np.issubdtype(image.dtype, np.floating):
        raise SuperPointError(f"image is {image.dtype}; expected uint8, uint16, bool, or float in [0, 1].")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0.0 and high <= 1.0):  # also catches NaN
        raise SuperPointError(
            f"float image runs from {low:g} to {high:g}; expected [0, 1]: divide by its full scale, or pass uint8."
        )
    return 1.0


@dataclass(frozen=True)
class Placement:
    """Where an image lies in a network's input: shrunk if it must be, at the top left, padded right and below."""

    image_width_px: int
    image_height_px: int
    placed_width_px: int
    placed_height_px: int
    input_width_px: int
    input_height_px: int

    @cached_property
    def image_wh(self) -> tuple[int, int]:
        """(width, height) in px of the caller's image."""
        return self.image_width_px, self.image_height_px

    @cached_property
    def placed_wh(self) -> tuple[int, int]:
        """(width, height) in px of the image inside the input, without padding."""
        return self.placed_width_px, self.placed_height_px

    @cached_property
    def resized(self) -> bool:
        """Whether the image was shrunk to fit."""
        return self.placed_wh != self.image_wh

    def to_image(self, xy: Float32) -> Float32:
        """Maps points (N, 2) from pixels of the network's input to pixels of the caller's image.

        Pixel centres are at integers, so a resize by s maps k to (k + 0.5) s - 0.5.
        """
        if not self.resized:
            return xy
        scale = np.array(
            [self.image_width_px / self.placed_width_px, self.image_height_px / self.placed_height_px], np.float32
        )
        half = np.float32(0.5)
        scaled: Float32 = (xy + half) * scale - half
        return scaled


class PreparedImage(NamedTuple):
    """An image on its way into a network's input."""

    pixels: NDArray[Any]
    """(H, W) uint8, or float32 in [0, 1]: the whole input, or only the image, still to be padded."""
    placement: Placement


def place(image_hw: tuple[int, int], model: ModelDescription, max_side_px: int | None = None) -> Placement:
    """Decides how an image goes into a model's input.

    A dynamic model gets the image in its own size, padded to whole cells. A static model does, too, if the image fits;
    else the image is shrunk to fit, proportions kept. No image is enlarged.

    Args:
        image_hw: height and width of the image in pixels.
        model: the model.
        max_side_px: shrink first, so that the longer side has at most this many pixels.
    """
    height, width = image_hw
    limit = 1.0 if max_side_px is None else min(1.0, max_side_px / max(height, width))
    if model.dynamic or model.height_px is None or model.width_px is None:
        placed_h, placed_w = _shrink(height, limit), _shrink(width, limit)
        # A keypoints model cuts this many rows and columns off each side, so the input must have them.
        least = 2 * (model.remove_borders_px or 0)
        input_h, input_w = (_whole_cells(max(side, least), model.stride_px) for side in (placed_h, placed_w))
    else:
        input_h, input_w = model.height_px, model.width_px
        scale = min(limit, input_h / height, input_w / width)
        placed_h, placed_w = min(_shrink(height, scale), input_h), min(_shrink(width, scale), input_w)
    return Placement(width, height, placed_w, placed_h, input_w, input_h)


def to_input(gray: Float32, placement: Placement) -> NDArray[Any]:
    """The network's input (H, W): the image, shrunk if it must be, and padded by repeating its last row and column."""
    return pad(shrink(gray, placement), placement)


def shrink(gray: Float32, placement: Placement) -> NDArray[Any]:
    """The image (H, W) in the size that it has in the input. `to_input` is `shrink`, then `pad`."""
    if not placement.resized:
        return gray
    import cv2

    size = (placement.placed_width_px, placement.placed_height_px)
    placed: NDArray[Any] = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    return placed


def needed_side_px(model: ModelDescription, max_side_px: int | None = None) -> int | None:
    """The longest side that any image has in a model's input; None: images keep their size."""
    sides = [] if max_side_px is None else [max_side_px]
    if not model.dynamic and model.height_px is not None and model.width_px is not None:
        sides.append(max(model.height_px, model.width_px))
    return min(sides, default=None)


def placed_gray(image: LoadedImage, placement: Placement) -> NDArray[Any]:
    """The gray image (H, W), float32 in [0, 1], in the size that it has in the input.

    A large image is shrunk in two steps, so that it is never float32 in full size.

    Raises:
        SuperPointError: shape, dtype, range or size is not an image's.
    """
    if image.reduction > 1:
        return _shrink_reduced(to_gray(image.pixels), image, placement)
    return shrink(to_gray(_shrink_integers(image.pixels, placement)), placement)


def _shrink_reduced(gray: Float32, image: LoadedImage, placement: Placement) -> NDArray[Any]:
    """Shrinks an image that was decoded at a smaller scale.

    Its last row and column may stand for pixels outside the image, so the scale is that of the whole image.
    """
    import cv2

    height, width = image.full_hw
    scale_x = placement.placed_width_px * image.reduction / width
    scale_y = placement.placed_height_px * image.reduction / height
    placed: NDArray[Any] = cv2.resize(gray, None, fx=scale_x, fy=scale_y, interpolation=cv2.INTER_AREA)
    return placed[: placement.placed_height_px, : placement.placed_width_px]


def _shrink_integers(pixels: NDArray[Any], placement: Placement) -> NDArray[Any]:
    """Shrinks a large image of integers to twice the size that it will have in the input; others stay as they are."""
    height, width = pixels.shape[:2]
    size = (min(width, 2 * placement.placed_width_px), min(height, 2 * placement.placed_height_px))
    if pixels.dtype not in (np.uint8, np.uint16) or width * height <= LARGE_PX or size == (width, height):
        return pixels
    import cv2

    # OpenCV would copy an image whose colors lie in reverse, as `read_image_file` returns it.
    is_reversed = pixels.ndim == 3 and pixels.strides[2] < 0
    source = pixels[..., ::-1] if is_reversed else pixels
    smaller: NDArray[Any] = cv2.resize(
        source, [max(side, SMALLEST_SIDE_PX) for side in size], None, 0, 0, cv2.INTER_AREA
    )
    if smaller.ndim < pixels.ndim:  # OpenCV drops an axis of length 1
        smaller = smaller[..., None]
    return smaller[..., ::-1] if is_reversed else smaller


def pad(placed: NDArray[Any], placement: Placement) -> NDArray[Any]:
    """Pads to the input's size by repeating the last row and column."""
    below = placement.input_height_px - placement.placed_height_px
    right = placement.input_width_px - placement.placed_width_px
    if not (below or right):
        return np.ascontiguousarray(placed)
    return np.pad(placed, ((0, below), (0, right)), mode="edge")


def pad_into(network_input: NDArray[Any], placed: NDArray[Any], placement: Placement) -> None:
    """As `pad`, into an existing array (input height, input width)."""
    if placed.shape == network_input.shape:
        np.copyto(network_input, placed)
        return
    height, width = placement.placed_height_px, placement.placed_width_px
    network_input[:height, :width] = placed
    network_input[:height, width:] = placed[:, -1:]
    network_input[height:] = network_input[height - 1]


def parse_size(text: str) -> tuple[int, int]:
    """Reads a height and a width in px: "480x640" is (480, 640).

    Raises:
        SuperPointError: the text is not two positive numbers.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip().lower())
    if not match:
        raise SuperPointError(f"size is {text!r}; expected HEIGHTxWIDTH in px, 480x640 say.")
    return int(match[1]), int(match[2])


def as_array(image: ImageLike) -> NDArray[Any]:
    """The pixels of a path or of an array-like (numpy, PIL).

    Raises:
        SuperPointError: the path is no image, or the object is no array.
    """
    if type(image) is np.ndarray:
        return image
    if isinstance(image, (str, os.PathLike)):
        return load_image(image)
    try:
        if getattr(image, "mode", None) in ("P", "CMYK", "PA", "YCbCr", "LAB", "HSV", "1"):
            pil_image: Any = image  # in a mode that is neither gray, RGB nor RGBA
            return np.asarray(pil_image.convert("RGB"))
        return np.asarray(image)
    except MemoryError:
        raise
    except Exception as error:  # the caller's object may raise anything
        raise SuperPointError(
            f"image is a {type(image).__name__} that makes no array ({type(error).__name__}: {one_line(error)}); "
            "expected a path or an array."
        ) from error


def as_loaded(image: ImageLike, options: ReadOptions, side_px: int | None) -> LoadedImage:
    """An image's pixels and its size.

    Args:
        image: a path, an array-like, or an image that is loaded already.
        options: which files are read.
        side_px: the longest side that is needed (`read_image_file`).

    Raises:
        SuperPointError: the path is no image, or the object is no array.
    """
    if isinstance(image, LoadedImage):
        return image
    if isinstance(image, (str, os.PathLike)):
        return read_image_file(image, options, side_px)
    pixels = as_array(image)
    return LoadedImage(pixels, pixels.shape[:2])


def synthetic_photograph(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """Makes a dead-leaves picture (Lee et al. 2001): overlapping discs and boxes of all sizes, softened.

    Args:
        height: in px.
        width: in px.
        seed: the same seed gives the same picture.

    Returns:
        (height, width) uint8 with as many corners as a photograph.
    """
    import cv2

    rng = np.random.default_rng(seed)
    picture = np.full((height, width), 127, np.uint8)
    for radius in np.sort(rng.pareto(1.5, 600) * 6 + 4)[::-1]:
        x, y = int(rng.integers(width)), int(rng.integers(height))
        r, tone = int(min(radius, max(height, width) / 3)), int(rng.integers(256))
        if rng.random() < 0.5:
            cv2.circle(picture, (x, y), r, tone, -1)
        else:
            box = cv2.boxPoints(((x, y), (2 * r, r), float(rng.uniform(0, 180)))).astype(np.int32)
            cv2.fillConvexPoly(picture, box, tone)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.8), dtype=np.uint8)


def _shrink(side: int, scale: float) -> int:
    return side if scale == 1.0 else max(1, round(side * scale))


def _whole_cells(side: int, stride_px: int) -> int:
    return math.ceil(side / stride_px) * stride_px
