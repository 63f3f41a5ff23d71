"""Reads what native libraries write to stderr while they work: libjpeg and libpng have no other way to warn.

File descriptor 2 belongs to the whole process. While any thread is inside `collect_stderr`, it points to a temporary
file; what is not the library's is passed on to the real stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from typing import Callable, TypeVar

_Result = TypeVar("_Result")
_STDERR = 2


def collect_stderr(work: Callable[[], _Result], is_theirs: Callable[[str], bool]) -> tuple[_Result, list[str]]:
    """Runs work, and keeps the lines that its library writes to stderr off the terminal.

    Several threads may be inside at once. If one of them was warned, nobody knows which: then the work is done again,
    alone.

    Args:
        work: must be repeatable.
        is_theirs: whether a line is the library's. Other lines are written to stderr.

    Returns:
        The result of the work, and the library's lines.
    """
    result, lines, alone = _window.run(work, is_theirs, alone=False)
    if lines and not alone:
        result, lines, _ = _window.run(work, is_theirs, alone=True)
    return result, lines


@dataclass(eq=False)
class _Visit:
    """One thread's stay inside the window."""

    lines: list[str] = field(default_factory=list)
    alone: bool = True


class _Window:
    """The time in which file descriptor 2 points to a temporary file: from the first visitor to the last."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._visits: list[_Visit] = []
        self._is_reserved = False
        self._file = -1
        self._read_bytes = 0
        self._real = -1
        self._unfinished = b""

    def run(
        self, work: Callable[[], _Result], is_theirs: Callable[[str], bool], alone: bool
    ) -> tuple[_Result, list[str], bool]:
        """Does work inside the window.

        Returns:
            The result, the library's lines, and whether no other thread was inside meanwhile.
        """
        visit = self._enter(alone)
        try:
            result = work()
        finally:
            self._leave(visit, is_theirs, alone)
        return result, visit.lines, visit.alone

    def _enter(self, alone: bool) -> _Visit:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_reserved)
            self._is_reserved = alone  # then no thread enters from here on
            try:
                if alone:
                    self._changed.wait_for(lambda: not self._visits)
                if not self._visits:
                    self._open()
            except BaseException:  # also an interrupt: the other threads would wait for ever
                self._is_reserved = False
                self._changed.notify_all()
                raise
            visit = _Visit(alone=not self._visits)
            for one in self._visits:
                one.alone = False
            self._visits.append(visit)
            return visit

    def _leave(self, visit: _Visit, is_theirs: Callable[[str], bool], alone: bool) -> None:
        # Asked outside the lock, which other threads wait for, and with it for Python's own.
        is_silent = os.fstat(self._file).st_size <= self._read_bytes
        with self._changed:
            if is_silent and not alone and len(self._visits) > 1:
                self._visits.remove(visit)  # whoever waits, waits for the last
                return
            is_last = len(self._visits) == 1
            if is_last:
                self._close()
            # Whoever left before has taken its lines along, so these are of someone who is still inside.
            theirs, others = self._new_lines(is_theirs, is_last)
            for one in self._visits:
                one.lines += theirs
            self._visits.remove(visit)
            self._pass_on(others)
            if alone:
                self._is_reserved = False
            self._changed.notify_all()

    def _open(self) -> None:
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
        _open_closed_stderr()
        if self._file < 0:
            self._file = _temporary_file()
        self._real = os.dup(_STDERR)
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        self._read_bytes = 0
        os.dup2(self._file, _STDERR)

    def _close(self) -> None:
        os.dup2(self._real, _STDERR)
        os.close(self._real)
        self._real = -1

    def _new_lines(self, is_theirs: Callable[[str], bool], is_last: bool) -> tuple[list[str], bytes]:
        """Reads what was written since the last time: the library's lines, and everything else."""
        new = _read_from(self._file, self._read_bytes)
        self._read_bytes += len(new)
        text = self._unfinished + new
        end = len(text) if is_last else text.rfind(b"\n") + 1
        self._unfinished = text[end:]
        theirs: list[str] = []
        others = b""
        for raw in text[:end].splitlines(keepends=True):
            line = raw.decode("utf-8", "replace").strip()
            if is_theirs(line):
                theirs.append(line)
            else:
                others += raw
        return theirs, others

    def _pass_on(self, text: bytes) -> None:
        """Writes to the real stderr."""
        target = self._real if self._visits else _STDERR
        if text:
            with contextlib.suppress(OSError):
                os.write(target, text)

    def forget(self) -> None:
        """Starts anew in a forked process: the file and the threads inside are the parent's."""
        if self._visits and self._real >= 0:
            os.dup2(self._real, _STDERR)
            os.close(self._real)
        if self._file >= 0:
            os.close(self._file)
        self.__init__()  # type: ignore[misc]


def _open_closed_stderr() -> None:
    """Opens /dev/null as stderr where that is closed, as a daemon's may be: another file would take its number."""
    try:
        os.fstat(_STDERR)
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        if nothing != _STDERR:
            os.dup2(nothing, _STDERR)
            os.close(nothing)


def _temporary_file() -> int:
    """A file without a name that lives as long as the process."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("superpoint-stderr")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _read_from(file: int, start: int) -> bytes:
    """Everything from a place on. The file's own place belongs to its writers, so it stays (but on Windows)."""
    size = os.fstat(file).st_size - start
    if size <= 0:
        return b""
    if hasattr(os, "pread"):
        return os.pread(file, size, start)
    os.lseek(file, start, os.SEEK_SET)
    found = os.read(file, size)
    os.lseek(file, 0, os.SEEK_END)
    return found


_window = _Window()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_window.forget)
