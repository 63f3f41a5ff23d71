"""Feature files: the keypoints of one image as .npz. And what a file of matches holds."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, one_line, read_bytes, write_npz
from superpoint_trt.core.types import Float32, Keypoints, SuperPointError


def check_npz(path: PathLike) -> None:
    """Checks that a file name ends in .npz.

    Raises:
        SuperPointError: it does not.
    """
    if Path(path).suffix.lower() != ".npz":
        raise SuperPointError(f"{path}: a feature file's name ends in .npz.")


def save_features(path: PathLike, keypoints: Keypoints) -> Path:
    """Writes keypoints (N, 2), scores (N,), descriptors (N, D) and image_size (w, h) as .npz.

    Raises:
        SuperPointError: the file cannot be written; a file that was there is unchanged.
    """
    return write_npz(path, keypoints.to_dict())


_ARRAYS = ("keypoints", "scores", "descriptors", "image_size")
_MOST_UNPACKED_BYTES = 1 << 29
"""500,000 keypoints with 256 numbers each. Zeros pack a thousandfold, so a small file may promise much more."""
_LONGEST_HEADER = 1 << 14


def load_features(path: PathLike) -> Keypoints:
    """Reads what `save_features` wrote. Shapes and types are checked before the arrays are unpacked.

    Raises:
        SuperPointError: the file is missing, or no feature file.
    """
    data = read_bytes(path, "feature file")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_headers([_read_header(archive, name) for name in _ARRAYS])
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            width, height = (int(side) for side in arrays["image_size"])
            xy, scores, descriptors = (_finite(name, arrays[name]) for name in _ARRAYS[:3])
            return Keypoints(xy, scores, descriptors, (width, height))
    except Exception as error:  # a damaged zip raises whatever its reader stumbles over
        expected = "keypoints, scores, descriptors and image_size"
        raise SuperPointError(
            f"{path} is not a feature file: expected an .npz with {expected} ({one_line(error)})."
        ) from error


@dataclass(frozen=True)
class MatchesFile:
    """What a file of `match.images.save_matches` holds."""

    image_sizes: tuple[tuple[int, int], tuple[int, int]]
    """(width, height) in pixels of both images."""
    keypoints: tuple[int, int]
    """How many keypoints each image has."""
    matches: int
    inliers: int
    geometry: str
    """"homography" or "fundamental"."""
    found: bool
    """Whether there is a geometry."""
    supported: bool
    """Whether the matches support it: more inliers than chance gives."""


def is_matches_file(path: PathLike) -> bool:
    """Whether a file has the arrays of two images rather than of one.

    Raises:
        SuperPointError: the file is missing.
    """
    data = read_bytes(path, "feature file")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return "matches.npy" in archive.namelist()
    except Exception:  # a damaged zip raises whatever its reader stumbles over; reading the features says what is wrong
        return False


_MATCH_ARRAYS = ("image_size0", "image_size1", "inliers", "geometry", "geometry_type", "geometry_supported")
_GEOMETRIES = ("homography", "fundamental")
"""The values of `match.geometry.Model`, which this folder does not import."""


def read_matches_file(path: PathLike) -> MatchesFile:
    """Reads what a file of matches holds. Shapes and types are checked before arrays are unpacked.

    Raises:
        SuperPointError: the file is missing, or no file of matches.
    """
    data = read_bytes(path, "file of matches")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            rows = [_read_header(archive, name) for name in ("keypoints0", "keypoints1", "matches")]
            _check_match_headers(rows, [_read_header(archive, name) for name in _MATCH_ARRAYS])
            first, second, matches = (header.shape[0] for header in rows)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            geometry = str(arrays["geometry_type"])
            if geometry not in _GEOMETRIES:
                raise ValueError(f"geometry_type is none of {', '.join(_GEOMETRIES)}")
            (w0, h0), (w1, h1) = ((int(side) for side in arrays[name]) for name in _MATCH_ARRAYS[:2])
            return MatchesFile(
                image_sizes=((w0, h0), (w1, h1)),
                keypoints=(first, second),
                matches=matches,
                inliers=int(arrays["inliers"].sum()),
                geometry=geometry,
                found=bool(arrays["geometry"].any()),
                supported=bool(arrays["geometry_supported"]),
            )
    except Exception as error:  # a damaged zip raises whatever its reader stumbles over
        raise SuperPointError(
            f"{path} is not a file of matches: expected an .npz of superpoint match --save ({one_line(error)})."
        ) from error


def _check_match_headers(rows: Sequence[_Header], headers: Sequence[_Header]) -> None:
    """Checks the arrays of a file of matches.

    Args:
        rows: the keypoints of both images, and the matches; their numbers of rows are told, they are not unpacked.
        headers: the arrays of `_MATCH_ARRAYS`.

    Raises:
        ValueError: saying what is wrong.
    """
    for header in rows:
        if len(header.shape) != 2 or header.shape[1] != 2 or header.shape[0] < 0:
            raise ValueError(f"{header.name} has shape {header.shape}")
    shapes = ((2,), (2,), (rows[2].shape[0],), (3, 3), (), ())
    for header, kinds, shape in zip(headers, ("iu", "iu", "b", "f", "U", "b"), shapes):
        if header.shape != shape or header.dtype.kind not in kinds:
            raise ValueError(f"{header.name} is {header.dtype} {header.shape}")
    unpacked = sum(header.nbytes for header in headers)
    if unpacked > _MOST_UNPACKED_BYTES:
        raise ValueError(f"it unpacks to {unpacked} bytes; at most {_MOST_UNPACKED_BYTES} are read")


@dataclass(frozen=True)
class _Header:
    """What an array inside an .npz says of itself."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _read_header(archive: zipfile.ZipFile, name: str) -> _Header:
    """Reads the header of one array.

    Raises:
        ValueError, KeyError: there is none, or it is damaged.
    """
    with archive.open(f"{name}.npy") as member:
        start = io.BytesIO(member.read(_LONGEST_HEADER))
    version = np.lib.format.read_magic(start)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(start)
    return _Header(name, shape, dtype)


def _check_headers(headers: Sequence[_Header]) -> None:
    """Checks that the arrays are those of one image's keypoints.

    Raises:
        ValueError: saying what is wrong.
    """
    for header in headers:
        if header.dtype.kind not in "fiu":
            raise ValueError(f"{header.name} holds {header.dtype}, not numbers")
    xy, scores, descriptors, size = (header.shape for header in headers)
    same_count = len(xy) == len(descriptors) == 2 and len(scores) == 1 and xy[0] == scores[0] == descriptors[0]
    if not same_count or xy[1] != 2 or size != (2,):
        raise ValueError(f"shapes {xy}, {scores}, {descriptors}, {size}")
    unpacked = sum(header.nbytes for header in headers)
    if unpacked > _MOST_UNPACKED_BYTES:
        raise ValueError(f"it unpacks to {unpacked} bytes; at most {_MOST_UNPACKED_BYTES} are read")


def _finite(name: str, array: NDArray[Any]) -> Float32:
    """An array as float32.

    Raises:
        ValueError: a value is not finite there.
    """
    with np.errstate(all="ignore"):  # the overflow is reported below
        values = np.asarray(array, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not finite, or beyond float32")
    return values
