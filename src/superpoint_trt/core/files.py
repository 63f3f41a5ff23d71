"""Reads and writes files. An error is one clear line, and a failed write leaves the old file as it was."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import SuperPointError

PathLike = Union[str, "os.PathLike[str]"]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()
"""Read once at import: reading it means changing it for a moment, which other threads would notice."""


def read_bytes(path: PathLike, what: str) -> bytes:
    """Reads a whole regular file that must not be empty.

    A FIFO without a writer would be waited for, and /dev/zero would never end, so both are refused.

    Args:
        path: the file.
        what: what it should be, for the error ("image", "checkpoint", ...).

    Raises:
        SuperPointError: missing, a folder, no regular file, too large, unreadable or empty.
    """
    path = Path(path)
    try:
        data = _read_regular(path, what)
    except FileNotFoundError:
        raise SuperPointError(f"{what} {path} does not exist (looked in {Path.cwd()}).") from None
    except IsADirectoryError:
        raise SuperPointError(f"{what} {path} is a folder; expected a file.") from None
    except (OSError, ValueError) as error:
        raise _unreadable(path, what, error) from error
    if not data:
        raise SuperPointError(f"{what} {path} is empty (0 bytes); fetch or make it again.")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a file; of a FIFO, does not wait for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no such flag


def is_regular_file(path: PathLike, what: str) -> bool:
    """Whether a path is a regular file: False for a folder, or for nothing.

    Args:
        path: the path.
        what: what it should be, for the error.

    Raises:
        SuperPointError: it is something else, a FIFO or a device, or it cannot be looked at.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(path, what, error) from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _not_regular(path, what)
    return stat.S_ISREG(mode)


def _unreadable(path: PathLike, what: str, error: OSError | ValueError) -> SuperPointError:
    if isinstance(error, OSError):
        return SuperPointError(f"{what} {path} cannot be read: {error.strerror}.")
    # A NUL in the name, or a surrogate that stands for no byte.
    return SuperPointError(f"{what} {str(path)!r} cannot be read: that is no file name.")


def _not_regular(path: PathLike, what: str) -> SuperPointError:
    return SuperPointError(f"{what} {path} is no regular file; expected a file on a disk.")


_MOST_BYTES = (1 << 31) - 1
"""OpenCV, protobuf and numpy's .npz headers count bytes in 31 bits."""
_MOST_TEXT_BYTES = 1 << 24
_MOST_BYTES_OF = {"calibration": _MOST_TEXT_BYTES, "engine metadata": _MOST_TEXT_BYTES, "homography": _MOST_TEXT_BYTES}


def _read_regular(path: Path, what: str) -> bytes:
    """Reads a file in four calls of the system: each may wait for Python's lock, where threads read many files at once.

    Raises:
        SuperPointError: no regular file, or too large.
        OSError: it cannot be read.
    """
    file = _open_without_waiting(str(path), os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        status = os.fstat(file)
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError
        if not stat.S_ISREG(status.st_mode):
            raise _not_regular(path, what)
        most = _MOST_BYTES_OF.get(what, _MOST_BYTES)
        if status.st_size > most:
            raise SuperPointError(f"{what} {path} has {status.st_size} bytes; at most {most} are read.")
        data = os.read(file, status.st_size)
        while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
            data += more
        return data
    finally:
        os.close(file)


def cache_folder() -> Path:
    """The folder for files that this package can make again: $SUPERPOINT_CACHE, or the user's cache folder.

    Raises:
        SuperPointError: it cannot be made, or the user has no home folder.
    """
    chosen = os.environ.get("SUPERPOINT_CACHE")
    return make_folder(chosen or _user_cache() / "superpoint-trt")


def _user_cache() -> Path:
    named_by_system = os.environ.get("LOCALAPPDATA") or os.environ.get("XDG_CACHE_HOME")
    if named_by_system:
        return Path(named_by_system)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # in a container that runs as a number without a name
        user = f"user {os.getuid()}" if hasattr(os, "getuid") else "this user"
        raise SuperPointError(f"no home folder for {user}; set SUPERPOINT_CACHE to a folder.") from None


def make_folder(path: PathLike) -> Path:
    """Makes a folder to write to, if it is missing.

    Raises:
        SuperPointError: it cannot be made, or is a file.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SuperPointError(f"the folder {path} cannot be made: {error.strerror}; name another.") from error
    return path


def check_writable(path: PathLike) -> Path:
    """Checks an output path, so that long work does not end in a file that cannot be written.

    Raises:
        SuperPointError: the folder is missing or not writable, or the path is a folder itself.
    """
    path = Path(path)
    try:
        path.exists()
        folder = path.resolve().parent
    except OSError as error:
        raise SuperPointError(f"output {str(path)[:80]}... cannot be used: {error.strerror}.") from error
    if not folder.is_dir():
        raise SuperPointError(f"output folder {folder} does not exist; create it: mkdir -p '{folder}'.")
    if path.is_dir():
        raise SuperPointError(f"output {path} is a folder; expected a file name.")
    if path.exists() and not path.is_file():
        raise SuperPointError(f"output {path} is no regular file; expected a file name.")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise SuperPointError(f"output {path} is not writable; choose another place or mend its permissions.")
    return path


def check_distinct(output: PathLike, *others: PathLike | None) -> None:
    """Checks that an output is none of the files being read, nor another output.

    Raises:
        SuperPointError: naming the file.
    """
    for other in others:
        if other is not None and Path(output).resolve() == Path(other).resolve():
            raise SuperPointError(f"output {output} would overwrite {other}; choose another name.")


def write_atomically(path: PathLike, data: bytes) -> Path:
    """Writes a temporary file next to `path` and renames it: a reader sees the old file or the new one, never a part.

    Raises:
        SuperPointError: the file cannot be written; a file that was there is unchanged.
    """
    path = check_writable(path)
    target = path.resolve()  # of a link, the file that it points to is replaced
    # The name is known before there is such a file, so that an interrupt at any moment leaves none behind.
    temporary = target.with_name(f".{target.name}.{os.urandom(8).hex()}")
    try:
        with open(temporary, "xb", opener=_open_private) as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        # A temporary file is private (0600). The result gets the old file's permissions, or those of any new file.
        temporary.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_UMASK)
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise SuperPointError(f"{path} cannot be written: {error.strerror}.") from error
        raise
    return path


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def write_npz(path: PathLike, arrays: Mapping[str, NDArray[Any]]) -> Path:
    """Writes arrays as an .npz file, as `write_atomically` does.

    Raises:
        SuperPointError: the file cannot be written; a file that was there is unchanged.
    """
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type, unused-ignore]
    return write_atomically(path, buffer.getvalue())


def named(error: BaseException, path: PathLike) -> str:
    """An error's message, with the file's name if the message lacks it."""
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def names_below(paths: Sequence[PathLike]) -> list[str]:
    """Each file's path below the folder that all share, with slashes: names that are equal on every machine."""
    if not paths:
        return []
    above = os.path.commonpath([Path(os.path.abspath(path)).parent for path in paths])
    return [Path(os.path.relpath(path, above)).as_posix() for path in paths]


def one_line(error: BaseException, most: int = 200) -> str:
    """Another library's message on one line, cut to `most` characters."""
    return " ".join(str(error).split())[:most].rstrip(".")


def sha256(data: bytes) -> str:
    """SHA-256 of a file's content, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: PathLike) -> str:
    """SHA-256 of a file of any size, read piece by piece.

    Raises:
        SuperPointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except OSError as error:
        raise SuperPointError(f"{path} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


_PIECE_BYTES = 1 << 20


def git_blob_id(data: bytes) -> str:
    """The id git gives a file with this content: SHA-1 over 'blob SIZE NUL' and the bytes (git-hash-object)."""
    header = f"blob {len(data)}\0".encode()
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest()
