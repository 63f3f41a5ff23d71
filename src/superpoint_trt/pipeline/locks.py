"""Locks between processes, also of several machines on one file system. A lock ends with the process that holds it."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from superpoint_trt.core.files import make_folder
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.contexts import Closes

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RangeLock(Closes):
    """Locks ranges of numbers, as byte ranges of a file (POSIX record locks). A context manager.

    The file may be opened once in a process only: closing it anywhere frees all of the process's locks on it.

    Attributes:
        works: whether the file system has locks. Where it has none, `take` grants everything.

    Raises:
        SuperPointError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.works, self._path = True, path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise SuperPointError(f"{path} cannot be written: {error.strerror}.") from error

    def take(self, first: int, count: int) -> bool:
        """Locks `count` numbers from `first` on, without waiting.

        Returns:
            Whether they are this process's; False: another has one of them.

        Raises:
            SuperPointError: the file system fails.
        """
        try:
            _lock(self._descriptor, first, count)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            if error.errno not in _NO_LOCKS:
                raise SuperPointError(f"{self._path} cannot be locked: {error.strerror}.") from error
            self.works = False
        return True

    @property
    def is_there(self) -> bool:
        """Whether the file is still what its name stands for; a process that ends may remove it."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Frees all locks."""
        os.close(self._descriptor)


@contextmanager
def only_one(folder: Path, name: str) -> Iterator[None]:
    """Makes a folder to work in, and keeps other processes from it as long as the context is open.

    Args:
        folder: goes in the end if it was made here and is empty.
        name: of a file in it for the lock, which goes in the end.

    Raises:
        SuperPointError: another process works in the folder, or it cannot be made.
    """
    was_there = folder.is_dir()
    path = make_folder(folder) / name
    try:
        with RangeLock(path) as lock:
            if not lock.take(0, 1) or not lock.is_there:
                raise SuperPointError(f"another process works on {folder} (its lock is {path}); wait for its end.")
            try:
                yield
            finally:
                with suppress(OSError):  # Windows keeps open files
                    path.unlink()
    finally:
        if not was_there:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


if sys.platform == "win32":

    def _lock(descriptor: int, first: int, count: int) -> None:
        import msvcrt

        os.lseek(descriptor, first, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, count)

else:

    def _lock(descriptor: int, first: int, count: int) -> None:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, first)
