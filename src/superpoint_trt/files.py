"""Reading and writing files so that an error is one clear line and nothing on disk is ever lost."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Union

from superpoint_trt.spec import SuperPointError

PathLike = Union[str, "os.PathLike[str]"]


def read_bytes(path: PathLike, what: str) -> bytes:
    """The whole file, never empty.

    Args:
        path: the file.
        what: what it should be, for the error ("image", "checkpoint", ...).

    Raises:
        SuperPointError: missing, a folder, unreadable or empty.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SuperPointError(f"{what} {path} does not exist (looked in {Path.cwd()}).") from None
    except IsADirectoryError:
        raise SuperPointError(f"{what} {path} is a folder; expected a file.") from None
    except OSError as error:
        raise SuperPointError(f"{what} {path} cannot be read: {error.strerror}.") from error
    if not data:
        raise SuperPointError(f"{what} {path} is empty (0 bytes); fetch or make it again.")
    return data


def check_writable(path: PathLike) -> Path:
    """Refuses an output path before the work that would fill it, rather than after.

    Raises:
        SuperPointError: the folder is missing or not writable, or the path is a folder itself.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise SuperPointError(f"output folder {folder} does not exist; create it: mkdir -p '{folder}'.")
    if path.is_dir():
        raise SuperPointError(f"output {path} is a folder; expected a file name.")
    if not os.access(folder, os.W_OK):
        raise SuperPointError(f"output folder {folder} is not writable; choose another or mend its permissions.")
    return path


def write_atomically(path: PathLike, data: bytes) -> Path:
    """Writes beside `path`, then renames: a reader sees the old file or the new one, never half of one.

    Raises:
        SuperPointError: the file cannot be written; what was there before is untouched.
    """
    path = check_writable(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
            beside = Path(handle.name)
            try:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            except BaseException:
                beside.unlink()
                raise
        # A temporary file is private (0600); the result gets what an ordinary new file would get.
        beside.chmod(0o666 & ~_umask())
        beside.replace(path)
    except OSError as error:
        raise SuperPointError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def sha256(data: bytes) -> str:
    """SHA-256 of a file's content, as `sha256sum` prints it."""
    return hashlib.sha256(data).hexdigest()


def git_blob_id(data: bytes) -> str:
    """The id git gives a file with this content: SHA-1 over 'blob SIZE NUL' and the bytes (git-hash-object)."""
    header = f"blob {len(data)}\0".encode()
    return hashlib.sha1(header + data, usedforsecurity=False).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
