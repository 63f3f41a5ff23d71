"""Entries one behind another in a plain file: how a shard is kept until it is merged into the one .h5.

The file holds, for each entry, `keypoints` (N, 2) float32, `scores` (N,) float32 and `descriptors` (D, N), in C order
and in the little-endian order of bytes, as the .h5 will have them. Behind the last entry lie the list of entries as
JSON, its length in bytes, and eight letters that tell such files. What is where follows from the list.
"""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import check_writable, one_line
from superpoint_trt.core.typed_json import JsonError, integer, parse, real, text
from superpoint_trt.core.types import Keypoints, SuperPointError
from superpoint_trt.pipeline.contexts import WritesWhole

_END = struct.Struct("<Q8s")
_MAGIC = b"sptrtpk1"
_MOST = 1 << 40

Arrays = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]
"""Keypoints (N, 2), scores (N,) and descriptors (D, N) as they are stored, in C order."""


@dataclass(frozen=True)
class Entry:
    """What there is to know of an entry besides its arrays."""

    name: str
    count: int
    """Keypoints."""
    dim: int
    """Numbers of a descriptor."""
    image_size: tuple[int, int]
    """(width, height) in px of the image file as stored."""
    uncertainty: float
    """Standard deviation of the keypoints in px, on hloc's scale."""

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of keypoints, scores and descriptors."""
        return (self.count, 2), (self.count,), (self.dim, self.count)

    def sizes(self, dtype: np.dtype[Any]) -> tuple[int, int, int]:
        """Bytes of keypoints, scores and descriptors of a type."""
        return 8 * self.count, 4 * self.count, dtype.itemsize * self.dim * self.count

    def to_json(self) -> list[object]:
        """As a row of numbers and text."""
        return [self.name, self.count, self.dim, *self.image_size, self.uncertainty]

    @classmethod
    def from_json(cls, row: object) -> Entry:
        """Reads what `to_json` made.

        Raises:
            JsonError: it is something else.
        """
        if not isinstance(row, list) or len(row) != 6:
            raise JsonError("an entry is no list of 6 values")
        count, dim, width, height = (integer(value, "an entry", 0, _MOST) for value in row[1:5])
        return cls(text(row[0], "an entry"), count, dim, (width, height), real(row[5], "uncertainty", 0, 1e9))


def stored_arrays(keypoints: Keypoints, dtype: np.dtype[Any]) -> Arrays:
    """The arrays of an image's keypoints."""
    little = dtype.newbyteorder("<")
    return (
        np.ascontiguousarray(keypoints.xy, dtype="<f4"),
        np.ascontiguousarray(keypoints.scores, dtype="<f4"),
        np.ascontiguousarray(np.asarray(keypoints.descriptors).T, dtype=little),
    )


def check_name(name: str) -> None:
    """Checks that a text can be the name of an entry.

    Raises:
        SuperPointError: it is empty, absolute, or has parts such as "..".
    """
    parts = name.split("/")
    try:
        name.encode()
        is_text = "\0" not in name
    except UnicodeEncodeError:  # bytes of a file name that are no UTF-8
        is_text = False
    if not is_text:
        raise SuperPointError(f"{name!r} cannot name an image in a feature file: it is no UTF-8 text; rename the file.")
    if any(part in ("", ".", "..") for part in parts):
        raise SuperPointError(
            f"{name!r} cannot name an image in a feature file; expected a path below a folder: a/b.jpg."
        )


class PackedWriter(WritesWhole):
    """Writes entries one behind another. A context manager.

    Args:
        path: the file, which appears when the context ends without an error.
        dtype: of the descriptors.

    Raises:
        SuperPointError: the place cannot be written to.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._entries: list[Entry] = []
        self._path, self._dtype = check_writable(path), dtype
        self._beside = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
        try:
            self._file = open(self._beside, "xb", buffering=0)  # noqa: SIM115  (closed by `close` and `abandon`)
        except OSError as error:
            raise self._unwritable(error) from error

    def write(self, name: str, keypoints: Keypoints, image_size: tuple[int, int], uncertainty: float) -> None:
        """Writes the entry of one image, as `FeatureWriter.write` does.

        Raises:
            SuperPointError: the name cannot be one, or it cannot be written (a full disk).
        """
        check_name(name)
        arrays = stored_arrays(keypoints, self._dtype)
        try:
            for array in arrays:
                write_whole(self._file, array)
        except OSError as error:
            raise self._unwritable(error) from error
        self._entries.append(Entry(name, len(arrays[1]), len(arrays[2]), image_size, uncertainty))

    def close(self) -> None:
        """Completes the file and gives it its name.

        Raises:
            SuperPointError: it cannot be written.
        """
        listed = json.dumps([entry.to_json() for entry in self._entries]).encode()
        try:
            write_whole(self._file, np.frombuffer(listed + _END.pack(len(listed), _MAGIC), np.uint8))
            os.fsync(self._file.fileno())
            self._file.close()
            self._beside.replace(self._path)
        except OSError as error:
            self.abandon()
            raise self._unwritable(error) from error
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Ends without a file."""
        self._file.close()
        with suppress(OSError):
            self._beside.unlink()

    def _unwritable(self, error: OSError) -> SuperPointError:
        return SuperPointError(f"{self._path} cannot be written: {error.strerror}.")


def write_whole(file: Any, array: NDArray[Any]) -> None:
    """Writes an array in C order to a file without a buffer, which may take a part at a time."""
    rest = array.reshape(-1).view(np.uint8).data
    while len(rest):
        rest = rest[file.write(rest) or 0 :]


def _listed(path: Path) -> tuple[list[Entry], int]:
    """Reads what a packed file holds: its entries, and the bytes of their arrays, which come first.

    Raises:
        SuperPointError: it cannot be read, or is no such file.
    """
    try:
        with open(path, "rb") as file:
            at = file.seek(0, os.SEEK_END) - _END.size
            file.seek(max(0, at))
            length, magic = _END.unpack(file.read(_END.size))
            if magic != _MAGIC or length > at:
                raise JsonError("it has no list of entries at its end")
            file.seek(at - length)
            rows = parse(file.read(length), _MOST)
        if not isinstance(rows, list):
            raise JsonError("its entries are no list")
        return [Entry.from_json(row) for row in rows], at - length
    except OSError as error:
        raise SuperPointError(f"{path} cannot be read: {error.strerror}.") from error
    except (JsonError, struct.error) as error:
        raise SuperPointError(f"{path} is no packed file of entries: {one_line(error)}.") from error


def read_entries(path: Path, dtype: np.dtype[Any]) -> list[Entry]:
    """Reads what a packed file holds. The arrays of its entries lie one behind another, from its first byte on.

    Args:
        path: the file.
        dtype: of the descriptors.

    Raises:
        SuperPointError: the file cannot be read, or its arrays are not those of its entries.
    """
    entries, nbytes = _listed(path)
    if nbytes != sum(sum(entry.sizes(dtype)) for entry in entries):
        raise SuperPointError(
            f"{path} has {nbytes} bytes of arrays, and not those of its {len(entries)} entries; its descriptors may "
            "have another type."
        )
    return entries
