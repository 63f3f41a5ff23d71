"""The size of an image from its first bytes, in every format that OpenCV reads."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, features

from superpoint_trt.core.image_file import opencv_quiet
from superpoint_trt.core.image_header import read_header
from superpoint_trt.core.types import SuperPointError

WIDTH, HEIGHT = 40, 24
COLOR = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
FLOAT = COLOR.astype(np.float32) / 255

OPENCV = {
    # Ending -> the picture, and options of the encoder.
    ".png": (COLOR, []),
    ".jpg": (COLOR, []),
    ".jpeg": (COLOR[..., 0], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    ".tiff": (COLOR, []),
    ".bmp": (COLOR, []),
    ".webp": (COLOR, []),
    ".ppm": (COLOR, []),
    ".pgm": (COLOR[..., 0], [cv2.IMWRITE_PXM_BINARY, 0]),
    ".pbm": (COLOR[..., 0], []),
    ".pam": (COLOR, []),
    ".pfm": (FLOAT, []),
    ".hdr": (FLOAT, []),
    ".ras": (COLOR, []),
    ".gif": (COLOR, []),
    ".jp2": (COLOR, []),
    ".avif": (COLOR, []),
}


@pytest.mark.parametrize("suffix", OPENCV)
def test_the_size_of_what_opencv_writes(suffix):
    pixels, options = OPENCV[suffix]
    try:
        with opencv_quiet():
            written, data = cv2.imencode(suffix, pixels, options)
    except cv2.error:
        written = False
    if not written:
        pytest.skip(f"this OpenCV writes no {suffix}")
    header = read_header(data.tobytes())
    assert header is not None and (header.width_px, header.height_px) == (WIDTH, HEIGHT)
    assert not header.is_turned


PILLOW = {
    "lossless webp": ("WEBP", {"lossless": True}),
    "webp with a profile": ("WEBP", {"icc_profile": b"x" * 9}),
    "tiff in strips": ("TIFF", {"compression": "tiff_lzw"}),
    "big tiff": ("TIFF", {"big_tiff": True}),
    "gif": ("GIF", {}),
    "jpeg with comments": ("JPEG", {"comment": b"\xff\xc0\x00\x11\x08\x00\x01\x00\x01" * 9}),
    "interlaced png": ("PNG", {"icc_profile": b"x" * 99, "dpi": (300, 300)}),
}


@pytest.mark.parametrize("name", PILLOW)
def test_the_size_of_what_pillow_writes(name):
    kind, options = PILLOW[name]
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("no WebP in Pillow")
    buffer = io.BytesIO()
    Image.fromarray(COLOR).save(buffer, kind, **options)
    header = read_header(buffer.getvalue())
    assert header is not None and (header.width_px, header.height_px) == (WIDTH, HEIGHT)


def test_comments_of_a_pgm_are_skipped():
    header = read_header(b"P5\n# 7 9\n# 1 1\n40 # wide\n24\n255\n")
    assert header is not None and (header.width_px, header.height_px) == (WIDTH, HEIGHT)


def test_a_big_endian_tiff():
    entries = struct.pack(">HHIHH", 256, 3, 1, WIDTH, 0) + struct.pack(">HHII", 257, 4, 1, HEIGHT)
    header = read_header(b"MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4))
    assert header is not None and (header.width_px, header.height_px) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_that_is_to_be_turned(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    Image.fromarray(COLOR).save(buffer, "JPEG", exif=exif)
    header = read_header(buffer.getvalue())
    assert header is not None and header.is_turned == (orientation != 1)
    assert (header.width_px, header.height_px) == (WIDTH, HEIGHT)


def test_another_format_is_left_to_the_decoder():
    assert read_header(b"nothing that is known") is None
    assert read_header(b"BM") is None


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks]
    packed = [struct.pack(">I", len(data)) + kind + data + bytes(4) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_a_chunk_that_ends_behind_the_file_is_refused():
    """For what a chunk claims libpng takes memory: 1 GB for a file of 621 bytes."""
    data = png((b"PLTE", bytes(30)))
    with pytest.raises(SuperPointError, match="PLTE chunk claims 1000000000 bytes"):
        read_header(data[:-42] + struct.pack(">I", 10**9) + b"PLTE" + bytes(30))


def test_what_stands_behind_the_last_chunk_is_ignored():
    assert read_header(png((b"IDAT", zlib.compress(b"")), (b"IEND", b"")) + b"\xff" * 99) is not None


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0", b"\xff\xd8\xff\xe0\x00\x10JFIF", b"\xff\xd8\xff\xd9"])
def test_a_damaged_header_is_an_error(data):
    with pytest.raises(SuperPointError, match="header cannot be read"):
        read_header(data)
