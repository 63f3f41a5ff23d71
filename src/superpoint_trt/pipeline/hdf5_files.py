"""HDF5 files that are whole at every moment: a new one appears when it is finished, and one that grows does so at once.

Both are written through `JournaledFile`, so that a full disk is one line.
"""

from __future__ import annotations

import os
import re
import struct
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from superpoint_trt.core.files import check_writable, one_line
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.journal import JournaledFile, recover

DESCRIPTION = "superpoint_trt"
"""Attribute of the root."""
_FORMATS = ("v108", "v108")
"""The format of HDF5 1.8, which every reader knows; groups of the older format slow down above 15,000 entries."""


def import_h5py() -> ModuleType:
    """The module h5py.

    Raises:
        SuperPointError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise SuperPointError(f"feature files in HDF5 need h5py: {install_hint('bulk')}.") from error
    module: ModuleType = h5py
    return module


def open_hdf5(path: Path, what: str = "feature file") -> Any:
    """Opens an .h5 for reading.

    Args:
        path: the file.
        what: what it should be, for the error.

    Raises:
        SuperPointError: it is missing, no HDF5, or h5py is missing.
    """
    h5py = import_h5py()
    if not path.is_file():
        raise SuperPointError(f"{what} {path} does not exist (looked in {Path.cwd()}).")
    try:
        recover(path)
        return h5py.File(path, "r")
    except OSError as error:
        raise SuperPointError(f"{path} cannot be read as HDF5: {one_line(error)}; make it again.") from error


def description_of(file: Any) -> str | None:
    """The text that `Hdf5Target.describe` has kept in an open h5py.File."""
    text = file.attrs.get(DESCRIPTION)
    return text if isinstance(text, str) else None


def open_target(path: Path, append: bool, scratch: Path | None = None) -> Hdf5Target:
    """An .h5 to be written.

    Args:
        path: its name.
        append: keep what a file that is there has, and add to it.
        scratch: a folder of the same file system, in which a new file grows; None: the one that it will lie in.

    Raises:
        SuperPointError: it cannot be written, the file to be kept is no HDF5, or h5py is missing.
    """
    return GrowingHdf5(path) if append and path.exists() else NewHdf5(path, scratch)


class Hdf5Target:
    """An .h5 that is written.

    Args:
        path: its name, for messages.
        place: the file that is written to.
        kept: length in bytes of the part of it that readers see until the end.

    Raises:
        SuperPointError: it cannot be written, or is no HDF5.

    Attributes:
        file: the open h5py.File.
        disk: where it is written to.
    """

    def __init__(self, path: Path, place: Path, kept: int) -> None:
        h5py, self._path = import_h5py(), path
        with Reported(path):
            self.disk = JournaledFile(place, kept)
            self.file = h5py.File(self.disk, "r+" if kept else "w", libver=_FORMATS)

    def describe(self, text: str) -> None:
        """Keeps a text in the file."""
        with self.reported():
            self.file.attrs[DESCRIPTION] = text

    def reported(self) -> Reported:
        """A context that turns errors of writing into one line."""
        return Reported(self._path, self.disk)

    def finish(self) -> None:
        """Completes the file; from then on readers see it."""
        try:
            with self.reported():
                self.file.close()
                self.disk.commit()
                self.disk.close()
                self._take_place()
        except BaseException:
            self.abandon()
            raise

    def _take_place(self) -> None:
        """Gives a file that was written beside its place its name."""

    def abandon(self) -> None:
        """Ends without a change that readers see."""
        with suppress(Exception):
            self.file.close()
        self.disk.close()


class NewHdf5(Hdf5Target):
    """An .h5 that grows beside its place, and is renamed in the end."""

    def __init__(self, path: Path, scratch: Path | None = None) -> None:
        self._place = check_writable(path).resolve()
        self._beside = (scratch or self._place.parent) / f".{self._place.name}.{os.urandom(8).hex()}"
        with Reported(path):
            self._beside.touch(exist_ok=False)
        super().__init__(path, self._beside, 0)

    def _take_place(self) -> None:
        recover(self._place)  # so that no journal of the old file is taken for one of the new
        self._beside.replace(self._place)

    def abandon(self) -> None:
        """Ends without a change that readers see."""
        super().abandon()
        with suppress(OSError):
            self._beside.unlink()


class GrowingHdf5(Hdf5Target):
    """An .h5 to which something is added; a journal makes the change whole."""

    def __init__(self, path: Path) -> None:
        place = check_writable(path).resolve()
        with open_hdf5(place):  # finishes what a killed process began, and checks that this is HDF5
            pass
        super().__init__(path, place, _used_bytes(place))


class Reported:
    """Turns errors of writing into one line.

    Args:
        path: the file, for the message.
        disk: where h5py writes, whose own error counts.
    """

    def __init__(self, path: Path, disk: JournaledFile | None = None) -> None:
        self._path, self._disk = path, disk

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        met = self._disk.error if self._disk is not None and self._disk.error is not None else error
        if isinstance(met, (OSError, RuntimeError, ValueError, KeyError)):
            raise SuperPointError(f"{self._path} cannot be written: {_why(met)}.") from met


def _why(error: BaseException) -> str:
    """The operating system's words if it is the reason; else HDF5's."""
    told = re.search(r"errno = (\d+)", str(error))  # somewhere in HDF5's text, with the file's name and the time
    number = getattr(error, "errno", None) or (int(told[1]) if told else 0)
    return os.strerror(number) if number else one_line(error)


def _used_bytes(path: Path) -> int:
    """Where a file ends as its superblock has it (HDF5 file format, versions 2 and 3); behind it lies nothing of use.

    A process that was killed while it added something leaves such bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(_SUPERBLOCK.size)
    if len(start) < _SUPERBLOCK.size:
        return size
    magic, version, offset_bytes, _, end = _SUPERBLOCK.unpack(start)
    return min(size, end) if magic == _HDF5_MAGIC and version in (2, 3) and offset_bytes == 8 else size


_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = struct.Struct("<8sBB18sQ")
"""Magic, version, bytes of an offset; lengths, flags and two addresses; end of the file."""
