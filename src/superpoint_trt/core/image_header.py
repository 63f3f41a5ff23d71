"""Reads the size of an image from the first bytes of its file, so that it is known before anything is decoded."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Callable

from superpoint_trt.core.orientation import ORIENTATIONS, UPRIGHT
from superpoint_trt.core.types import SuperPointError

JPEG, PNG, TIFF, WEBP = "JPEG", "PNG", "TIFF", "WebP"
_EOI, _SOS, _APP1 = 0xD9, 0xDA, 0xE1
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""SOF0 to SOF15 of ITU-T T.81, without tables (DHT, JPG, DAC) that lie between them."""
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
"""A marker with a length: not TEM, RST0 to RST7 or SOI, nor the FF 00 of data."""
_MOST_PARTS = 1 << 20
"""A file of more segments or chunks was made to take time."""

_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_ORIENTATION = 256, 257, 274
_TIFF_VALUES = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Types of integers in a TIFF (BYTE, SHORT, LONG, LONG8), as struct names them."""


@dataclass(frozen=True)
class ImageHeader:
    """What an image file says of its picture."""

    kind: str
    """Name of the format."""
    width_px: int
    """As stored: before an EXIF orientation is applied."""
    height_px: int
    orientation: int = UPRIGHT
    """EXIF's, 1 to 8: how the stored pixels are to be turned (JPEG, PNG, TIFF, WebP)."""

    @property
    def is_turned(self) -> bool:
        """Whether the picture is stored otherwise than upright."""
        return self.orientation != UPRIGHT


def read_header(data: bytes) -> ImageHeader | None:
    """Reads what an image file says of its picture.

    Returns:
        None if the format is unknown, or not read here in all its variants: then the decoder decides.

    Raises:
        SuperPointError: the header is damaged, or a part of the file claims to be longer than the file.
    """
    found = next((entry for entry in _FORMATS if re.match(entry[0], data, re.DOTALL)), None)
    if found is None:
        return None
    _, kind, read_size = found
    try:
        size = read_size(data)
        return ImageHeader(kind, *size, orientation=_orientation(kind, data))
    except (struct.error, IndexError, ValueError, StopIteration):
        if kind in (JPEG, PNG):
            raise SuperPointError(f"its {kind} header cannot be read") from None
        return None


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    _check_png_chunks(data)
    return width, height


def _check_png_chunks(data: bytes) -> None:
    """Refuses a chunk that ends behind the file: libpng would take memory for what it claims, 1 GB of 621 bytes.

    Raises:
        SuperPointError: naming the chunk.
    """
    at = 8
    for _ in range(_MOST_PARTS):
        if at + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, at)
        if at + 8 + length > len(data):
            name = kind.decode("ascii", "backslashreplace")
            raise SuperPointError(f"its {name} chunk claims {length} bytes, more than the file still has")
        if kind == b"IEND":
            return
        at += 12 + length
    raise SuperPointError(f"it has more than {_MOST_PARTS} chunks")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The segments in front of the pixels: marker, and where the content begins and ends."""
    at = 2
    for _ in range(_MOST_PARTS):
        found = _MARKER.search(data, at)  # libjpeg, too, skips what lies between segments
        if not found or found[1][0] in (_EOI, _SOS):
            return
        start = found.end()
        (length,) = struct.unpack_from(">H", data, start)
        yield found[1][0], start + 2, start + length
        at = start + max(2, length)
    raise SuperPointError(f"it has more than {_MOST_PARTS} segments")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    start = next(start for marker, start, _ in _jpeg_segments(data) if marker in _FRAME_MARKERS)
    height, width = struct.unpack_from(">HH", data, start + 1)
    return width, height


def _orientation(kind: str, data: bytes) -> int:
    """The EXIF orientation; upright if none is given, or none that can be read."""
    find_exif = _EXIF_OF.get(kind)
    try:
        exif = find_exif(data) if find_exif else None
        found = _tiff_tags(exif).get(_TIFF_ORIENTATION, UPRIGHT) if exif else UPRIGHT
    except (struct.error, ValueError):
        return UPRIGHT
    return found if found in ORIENTATIONS else UPRIGHT


def _jpeg_exif(data: bytes) -> bytes | None:
    for marker, start, end in _jpeg_segments(data):
        if marker == _APP1 and data[start : start + 6] == b"Exif\0\0":
            return data[start + 6 : end]
    return None


def _png_exif(data: bytes) -> bytes | None:
    """The eXIf chunk; `_check_png_chunks` has walked through the file before."""
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"eXIf", b"IEND"):
            return data[at + 8 : at + 8 + length] if kind == b"eXIf" else None
        at += 12 + length
    return None


def _webp_exif(data: bytes) -> bytes | None:
    """The EXIF chunk of a RIFF file; chunks have even lengths."""
    at = 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            exif = data[at + 8 : at + 8 + length]
            return exif[6:] if exif[:6] == b"Exif\0\0" else exif  # some writers repeat the JPEG marker
        at += 8 + length + length % 2
    return None


def _tiff_tags(data: bytes) -> dict[int, int]:
    """The integers of the first directory of a TIFF (6.0) or BigTIFF, those of one value each."""
    order = {b"II": "<", b"MM": ">"}[data[:2]] if data[:2] in (b"II", b"MM") else ""
    if not order:
        raise ValueError("no TIFF")
    is_big = struct.unpack_from(order + "H", data, 2)[0] == 43
    (first,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    count_format, entry_format, entry_size, value_at = ("Q", "HHQ", 20, 12) if is_big else ("H", "HHI", 12, 8)
    (count,) = struct.unpack_from(order + count_format, data, first)
    at = first + struct.calcsize(count_format)
    tags = {}
    for entry in range(at, min(at + count * entry_size, len(data) - entry_size + 1), entry_size):
        tag, kind, values = struct.unpack_from(order + entry_format, data, entry)
        if values == 1 and kind in _TIFF_VALUES:
            (tags[tag],) = struct.unpack_from(order + _TIFF_VALUES[kind], data, entry + value_at)
    return tags


def _tiff_size(data: bytes) -> tuple[int, int]:
    tags = _tiff_tags(data)
    if _TIFF_WIDTH not in tags or _TIFF_HEIGHT not in tags:
        raise ValueError("no size")
    return tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]


def _bmp_size(data: bytes) -> tuple[int, int]:
    is_old = struct.unpack_from("<I", data, 14)[0] == 12  # OS/2
    width, height = struct.unpack_from("<HH" if is_old else "<ii", data, 18)
    return abs(width), abs(height)  # a negative height means that the first row is the top one


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _pnm_size(data: bytes) -> tuple[int, int]:
    """P1 to P6, PF and Pf: two numbers behind the magic, with comments between."""
    found = re.match(rb"P.(?:\s|#[^\n]*\n)+(\d{1,10})(?:\s|#[^\n]*\n)+(\d{1,10})", data[:65536])
    if not found:
        raise ValueError("no size")
    return int(found[1]), int(found[2])


def _pam_size(data: bytes) -> tuple[int, int]:
    start = data[:65536]
    width, height = (re.search(rb"\n\s*" + name + rb"\s+(\d{1,10})", start) for name in (b"WIDTH", b"HEIGHT"))
    if not width or not height:
        raise ValueError("no size")
    return int(width[1]), int(height[1])


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _hdr_size(data: bytes) -> tuple[int, int]:
    found = re.search(rb"\n[-+]Y +(\d{1,10}) +[-+]X +(\d{1,10})", data[:65536])
    if not found:
        raise ValueError("no size")
    return int(found[2]), int(found[1])


def _sun_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 4)
    return width, height


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of an ISO base media file (ISO 14496-12) or JPEG 2000 file: kind, and where the content lies."""
    while at + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, at)
        start = at + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, start)
            start += 8
        stop = end if length == 0 else min(end, at + length)
        if stop < start:
            return
        yield kind, start, stop
        at = stop


def _jp2_size(data: bytes) -> tuple[int, int]:
    header = next((start, end) for kind, start, end in _boxes(data, 0, len(data)) if kind == b"jp2h")
    start = next(start for kind, start, _ in _boxes(data, *header) if kind == b"ihdr")
    height, width = struct.unpack_from(">II", data, start)
    return width, height


def _j2k_size(data: bytes) -> tuple[int, int]:
    right, bottom, left, top = struct.unpack_from(">IIII", data, 8)
    return right - left, bottom - top


def _avif_size(data: bytes) -> tuple[int, int]:
    """The largest of the sizes ("ispe") that the file lists: a picture in tiles lists those of the tiles, too."""
    start, end = next((start, end) for kind, start, end in _boxes(data, 0, len(data)) if kind == b"meta")
    sizes = [struct.unpack_from(">II", data, start + at.end() + 4) for at in re.finditer(b"ispe", data[start:end])]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return width, height


_FORMATS = (
    (rb"\x89PNG\r\n\x1a\n", PNG, _png_size),
    (rb"\xff\xd8\xff", JPEG, _jpeg_size),
    (rb"II[*+]\0|MM\0[*+]", TIFF, _tiff_size),
    (rb"BM", "BMP", _bmp_size),
    (rb"RIFF....WEBP", WEBP, _webp_size),
    (rb"P[1-6Ff]\s", "PNM", _pnm_size),
    (rb"P7\s", "PAM", _pam_size),
    (rb"GIF8", "GIF", _gif_size),
    (rb"#\?RGBE|#\?RADIANCE", "HDR", _hdr_size),
    (rb"\x59\xa6\x6a\x95", "Sun raster", _sun_size),
    (rb"\0\0\0\x0cjP  ", "JPEG 2000", _jp2_size),
    (rb"\xff\x4f\xff\x51", "JPEG 2000", _j2k_size),
    (rb"....ftyp", "AVIF", _avif_size),
)
"""How a file begins, the format's name, and who reads width and height in px."""

_EXIF_OF: Mapping[str, Callable[[bytes], bytes | None]] = {
    JPEG: _jpeg_exif,
    PNG: _png_exif,
    WEBP: _webp_exif,
    TIFF: lambda data: data,
}
"""Format -> finds the part of a file that is laid out as TIFF tags."""
