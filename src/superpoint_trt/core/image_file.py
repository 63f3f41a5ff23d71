"""Reads image files: their size before their pixels, large ones at a smaller scale, damaged ones only if asked to."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, read_bytes
from superpoint_trt.core.image_header import JPEG, TIFF, ImageHeader, read_header
from superpoint_trt.core.native_stderr import collect_stderr
from superpoint_trt.core.orientation import UPRIGHT, stored_size, turn_upright
from superpoint_trt.core.types import CELL_PX, SuperPointError

MOST_PIXELS = 1 << 28
"""A camera's picture has at most 2^27; as gray float32 this takes 1 GiB."""
_MOST_PIXELS_OF_OPENCV = 1 << 30

SMALLEST_SIDE_PX = CELL_PX
"""One cell. A smaller image has nothing to detect."""

LARGE_PX = 1 << 24
"""Images with more pixels are shrunk in two steps. The others are never decoded at a smaller scale."""

_NATIVE_LINE = re.compile(
    # jerror.h of libjpeg-turbo has these warnings; they stand on stderr without a name in front.
    r"libpng (warning|error): |Corrupt JPEG data|Premature end of JPEG file|Inconsistent progression sequence"
    r"|Invalid SOS parameters|Unknown Adobe color transform|Warning: unknown JFIF revision|Application transferred too"
)
_DAMAGE = re.compile(r"libpng error: |Corrupt JPEG data(?!: bad ICC)|Premature end|Inconsistent progression")
"""Of those lines, the ones that say that pixels may be wrong."""


@dataclass(frozen=True)
class ReadOptions:
    """Which image files are read."""

    max_pixels: int = MOST_PIXELS
    """Larger images are refused before they are decoded."""
    allow_damaged: bool = False
    """Read what a decoder can still read of a damaged file."""

    def check(self) -> None:
        """Checks the range of the numbers.

        Raises:
            SuperPointError: out of range.
        """
        if not 1 <= self.max_pixels <= _MOST_PIXELS_OF_OPENCV:
            raise SuperPointError(
                f"max_pixels is {self.max_pixels}; expected 1 to {_MOST_PIXELS_OF_OPENCV}, OpenCV's own limit."
            )


@dataclass(frozen=True)
class LoadedImage:
    """The pixels of an image, of a large file perhaps at a smaller scale."""

    pixels: NDArray[Any]
    """(H, W) or (H, W, 3) RGB, in the file's own depth."""
    full_hw: tuple[int, int]
    """Height and width of the image in px, at full scale."""
    reduction: int = 1
    """Each pixel stands for reduction x reduction pixels of the image, from its top left corner on."""
    orientation: int = UPRIGHT
    """EXIF's, 1 to 8: how the file's own pixels were turned to make `pixels` (`core.orientation`)."""


def read_image_file(path: PathLike, options: ReadOptions | None = None, side_px: int | None = None) -> LoadedImage:
    """Reads an image file upright (EXIF orientation applied).

    Color is kept: libpng and libjpeg turn color into gray in different ways, `to_gray` in one.

    Args:
        path: the file.
        options: which files are read.
        side_px: the image will be shrunk, so that its longer side has at most this many pixels. A JPEG of more than
            `LARGE_PX` is then decoded at a smaller scale, at least twice as large as needed.

    Raises:
        SuperPointError: not a file, not an image, too small, too large, or damaged.
    """
    options = options or ReadOptions()
    options.check()
    data = read_bytes(path, "image")
    try:
        header = read_header(data)
    except SuperPointError as error:
        raise SuperPointError(f"{path} is not an image that can be read: {error}.") from None
    if header:
        _check_pixels(path, header.width_px, header.height_px, options)
    reduction = _reduction(header, side_px)
    orientation = header.orientation if header else UPRIGHT
    image = _decode(path, data, reduction, options)
    if header and header.kind != TIFF:  # OpenCV turns a TIFF whatever it is told
        image = turn_upright(image, orientation)
    height, width = image.shape[:2]
    if header is None:
        _check_pixels(path, width, height, options)
    full_hw = (header.height_px, header.width_px) if header and reduction > 1 else (height, width)
    check_sides(str(path), full_hw[1], full_hw[0])
    return LoadedImage(image if image.ndim == 2 else image[..., ::-1], full_hw, reduction, orientation)


def upright_size(path: PathLike) -> tuple[int, int] | None:
    """(width, height) in px of an image file, EXIF orientation applied. Its pixels are not decoded.

    Returns:
        None if the file cannot be read, or its header does not tell.
    """
    try:
        header = read_header(read_bytes(path, "image"))
    except SuperPointError:
        return None
    return stored_size((header.width_px, header.height_px), header.orientation) if header else None


def check_sides(name: str, width: int, height: int) -> None:
    """Refuses images of less than a cell, by name.

    Raises:
        SuperPointError: a side is below `SMALLEST_SIDE_PX`.
    """
    if min(height, width) < SMALLEST_SIDE_PX:
        least = f"{SMALLEST_SIDE_PX}x{SMALLEST_SIDE_PX}"
        raise SuperPointError(f"{name} is {width}x{height} px; the smallest usable is {least}, one cell.")


def _check_pixels(path: PathLike, width: int, height: int, options: ReadOptions) -> None:
    if width * height > options.max_pixels:
        raise SuperPointError(
            f"{path} is {width}x{height} px, more than {options.max_pixels} pixels; shrink it, or allow "
            f"{width * height} with --max-pixels (of infer, match and bench; max_pixels in Python)."
        )


def _reduction(header: ImageHeader | None, side_px: int | None) -> int:
    """The scale at which libjpeg decodes a large JPEG: 1, or one of 2, 4 or 8 pixels to one."""
    if header is None or header.kind != JPEG or side_px is None or header.width_px * header.height_px <= LARGE_PX:
        return 1
    if header.is_turned:  # where the last pixel is not whole, turning would move it to the other side
        return 1
    longer = max(header.width_px, header.height_px)
    return next((scale for scale in (8, 4, 2) if longer >= 2 * scale * side_px), 1)


def _decode(path: PathLike, data: bytes, reduction: int, options: ReadOptions) -> NDArray[Any]:
    """The pixels, (H, W) or (H, W, 3) with blue first; as stored, but for TIFF.

    Raises:
        SuperPointError: not an image, or damaged.
    """
    import cv2

    # Which files OpenCV turns depends on its version. The turn is made here, so that its way back is known.
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
    if reduction > 1:
        flags |= {2: 16, 4: 32, 8: 64}[reduction]  # IMREAD_REDUCED_GRAYSCALE_n without GRAYSCALE: color is kept
    encoded = np.frombuffer(data, dtype=np.uint8)

    def decode() -> NDArray[Any] | None:
        with opencv_quiet():
            return cv2.imdecode(encoded, flags)

    try:
        image, lines = collect_stderr(decode, lambda line: _NATIVE_LINE.match(line) is not None)
    except cv2.error as error:
        raise SuperPointError(f"{path} cannot be decoded as an image: {error.err}.") from error
    except OSError as error:  # no file descriptor was left to read the decoder's warnings
        raise SuperPointError(f"{path} cannot be decoded: {error.strerror}.") from error
    damage = next((line for line in lines if _DAMAGE.match(line)), None)
    if image is None and damage:
        raise SuperPointError(f"{path} is damaged and cannot be decoded as an image ({damage}).")
    if image is None:
        raise SuperPointError(f"{path} is not an image that OpenCV reads (PNG, JPEG, TIFF, PPM, WebP, BMP, ...).")
    if damage and not options.allow_damaged:
        raise SuperPointError(f"{path} is damaged ({damage}); --allow-damaged reads it anyway.")
    return image


@contextmanager
def opencv_on_one_thread() -> Iterator[None]:
    """Keeps OpenCV from sharing an image among threads of its own, in the whole process.

    For who reads one image on each CPU: waking those threads costs up to 1.2 CPU ms an image.
    """
    import cv2

    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


_log_lock = threading.Lock()
_log_silencers = 0
_log_level = 0


@contextmanager
def opencv_quiet() -> Iterator[None]:
    """Keeps OpenCV's log off the terminal while any thread is inside. Errors are reported once, as exceptions."""
    import cv2

    global _log_silencers, _log_level
    log = getattr(getattr(cv2, "utils", None), "logging", None)
    if log is None:
        yield
        return
    with _log_lock:
        if _log_silencers == 0:
            _log_level = log.setLogLevel(log.LOG_LEVEL_SILENT)
        _log_silencers += 1
    try:
        yield
    finally:
        with _log_lock:
            _log_silencers -= 1
            if _log_silencers == 0:
                log.setLogLevel(_log_level)
