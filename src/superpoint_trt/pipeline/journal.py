"""Adds to a large file so that a kill at any moment leaves the old content or the new one.

HDF5 changes blocks in the middle of a file when a group is added. A kill between two of these changes would damage the
file, and a copy of 50 GB for ten more images would take minutes. So new content goes behind the end, where no reader
looks, and changed blocks are kept in memory. `commit` writes them to a journal beside the file, then into the file, and
removes the journal. A journal that a kill has left behind is finished by `recover`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

from superpoint_trt.core.files import write_atomically

_BLOCK_BYTES = 4096
_COPIED_BYTES = 1 << 22
"""Bytes that `copy_in` reads at a time."""
_HEADER = struct.Struct("<8s32sQQ")
"""Magic, SHA-256 of what follows, length of the file's first part, length of the file."""
_MAGIC = b"sptrtjn1"
_ENTRY = struct.Struct("<Q")
"""Where a block begins. The block follows, `_BLOCK_BYTES` long."""


class Piece(NamedTuple):
    """Bytes that are copied from another file."""

    place: int
    """Where they will begin."""
    nbytes: int


class JournaledFile(io.RawIOBase):
    """A file whose first part stays as it is until `commit`. What lies behind it is written at once.

    HDF5 writes through this class also where nothing is to be kept: if HDF5 itself meets a full disk, it cannot close
    its file, and crashes when the process ends. Here the first error is noted, and what is written after it is dropped.

    Args:
        path: the file.
        kept: length in bytes of the first part.

    Attributes:
        error: why something could not be written; None: everything was.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path, kept: int) -> None:
        self._path = path
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  (closed by `close`)
        self._kept = kept
        self._at = 0
        self.error: OSError | None = None
        self._changed: dict[int, bytearray] = {}
        """Number of a block of the first part -> its new content."""

    def readable(self) -> bool:
        """True."""
        return True

    def writable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to a place; returns it."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: os.fstat(self._file.fileno()).st_size}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        """The place in bytes."""
        return self._at

    def truncate(self, size: int | None = None) -> int:
        """Sets the length; the first part cannot be shortened."""
        size = max(self._at if size is None else size, self._kept)
        self._try(lambda: self._file.truncate(size))
        return size

    def _try(self, change: Callable[[], object]) -> None:
        """Makes a change, unless one has failed before."""
        if self.error is None:
            try:
                change()
            except OSError as error:
                self.error = error

    def readinto(self, buffer: object) -> int:
        """Reads as the file will be after `commit`."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        self._file.seek(self._at)
        count = 0
        while count < len(view):
            read = self._file.readinto(view[count:])
            if not read:
                break
            count += read
        for number in self._blocks(self._at, self._at + count):
            if number in self._changed:
                self._overlap(view, self._at, number, to_view=True)
        self._at += count
        return count

    def write(self, data: object) -> int:
        """Writes behind the first part at once; what is for the first part is kept in memory."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        start, end = self._at, self._at + len(view)
        for number in self._blocks(start, min(end, self._kept)):
            if number not in self._changed:
                self._changed[number] = self._read_block(number)
            self._overlap(view, start, number, to_view=False)
        behind = max(start, self._kept)
        if behind < end:
            self._try(lambda: _write_at(self._file, behind, view[behind - start :]))
        self._at = end
        return len(view)

    def copy_in(self, source: Path, pieces: Sequence[Piece]) -> None:
        """Copies a file, piece by piece from its start, to places behind the first part, through a handle of its own.

        It may run in another thread, while this one writes to other places.

        Raises:
            OSError: the source cannot be read, or is shorter. That this file cannot be written is kept in `error`.
        """
        assert all(piece.place >= self._kept for piece in pieces), "the first part stays as it is"
        buffer = memoryview(bytearray(max((piece.nbytes for piece in pieces), default=0)))
        with (
            io.BufferedReader(io.FileIO(source), _COPIED_BYTES) as read,
            open(self._path, "r+b", buffering=0) as target,
        ):
            for piece in pieces:
                content = buffer[: piece.nbytes]
                if read.readinto(content) < piece.nbytes:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                self._try(partial(_write_at, target, piece.place, content))

    def _blocks(self, start: int, end: int) -> range:
        end = min(end, self._kept)
        return range(start // _BLOCK_BYTES, -(-end // _BLOCK_BYTES)) if start < end else range(0)

    def _read_block(self, number: int) -> bytearray:
        block = bytearray(min(_BLOCK_BYTES, self._kept - number * _BLOCK_BYTES))
        self._file.seek(number * _BLOCK_BYTES)
        self._file.readinto(block)
        return block

    def _overlap(self, view: memoryview, start: int, number: int, to_view: bool) -> None:
        """Copies what a block and a view that begins at `start` have in common."""
        block, at = self._changed[number], number * _BLOCK_BYTES
        low, high = max(start, at), min(start + len(view), at + len(block))
        inside, outside = slice(low - at, high - at), slice(low - start, high - start)
        if to_view:
            view[outside] = block[inside]
        else:
            block[inside] = view[outside]

    def commit(self) -> None:
        """Makes the changes of the first part; after it the file has its new content, whatever happens.

        Raises:
            SuperPointError, OSError: something could not be written.
        """
        if self.error is not None:
            raise self.error
        os.fsync(self._file.fileno())
        if not self._changed:
            return
        body = b"".join(
            _ENTRY.pack(number * _BLOCK_BYTES) + bytes(block).ljust(_BLOCK_BYTES, b"\0")
            for number, block in sorted(self._changed.items())
        )
        length = os.fstat(self._file.fileno()).st_size
        header = _HEADER.pack(_MAGIC, hashlib.sha256(body).digest(), self._kept, length)
        write_atomically(_journal_of(self._path), header + body)
        recover(self._path)
        self._changed.clear()

    def close(self) -> None:
        """Closes the file; without `commit` it keeps its old content."""
        if not self._file.closed:
            self._file.close()
        super().close()


def _write_at(file: io.FileIO, place: int, rest: memoryview) -> None:
    file.seek(place)
    while len(rest):
        rest = rest[file.write(rest) or 0 :]


def _journal_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal")


def recover(path: Path) -> None:
    """Finishes the changes that a journal beside a file holds, if there is one.

    A journal that is cut short, or whose file has been replaced by one of another length, is removed.

    Raises:
        OSError: the file cannot be written.
    """
    journal = _journal_of(path)
    try:
        data = journal.read_bytes()
    except FileNotFoundError:
        return
    magic, digest, kept, length = _HEADER.unpack_from(data.ljust(_HEADER.size, b"\0"))
    body = data[_HEADER.size :]
    belongs = path.is_file() and path.stat().st_size == length
    if belongs and magic == _MAGIC and hashlib.sha256(body).digest() == digest:
        with open(path, "r+b", buffering=0) as file:
            for at in range(0, len(body), _ENTRY.size + _BLOCK_BYTES):
                (place,) = _ENTRY.unpack_from(body, at)
                start = at + _ENTRY.size
                file.seek(place)
                file.write(body[start : start + min(_BLOCK_BYTES, kept - place)])
            os.fsync(file.fileno())
    with suppress(FileNotFoundError):
        journal.unlink()
