"""What a command says: standard streams that may fail without stopping the work, and notes that wait for its end."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO, cast


class Notes(list[str]):
    """Lines to print on stderr if a command succeeds; a command that fails says one line only.

    `run` gives them to click as the context's object.
    """


class StandardStreams:
    """Replaces sys.stdout and sys.stderr by streams that note an error and go on, as long as the context is open.

    A command then writes its files even if nobody reads what it prints (`superpoint ... | true`), or if that goes to a
    file on a full disk. Characters that the terminal's encoding lacks are printed as numbers.
    """

    def __enter__(self) -> StandardStreams:
        self._before = sys.stdout, sys.stderr
        self._errors = getattr(sys.stdout, "errors", None)
        _reconfigure(sys.stdout, "backslashreplace")
        self._streams = [_Forgiving(stream, []) if stream is not None else None for stream in self._before]
        sys.stdout, sys.stderr = cast("tuple[TextIO, TextIO]", self._streams)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self._before
        for stream in self._streams:
            if stream is not None:
                stream.end()
        _reconfigure(sys.stdout, self._errors)

    def problem(self) -> str | None:
        """Why standard output cannot be written; None if it can, or if its reader has seen enough (`... | head`)."""
        output = self._streams[0]
        if output is None:
            return None
        output.flush()
        if not output.errors_met or output.errors_met[0].errno == errno.EPIPE:
            return None
        return f"standard output cannot be written: {output.errors_met[0].strerror}."


class _Forgiving:
    """A stream that notes the first error of the operating system, and takes what is written after it for written.

    Args:
        stream: a text stream, or the binary one below it.
        errors_met: takes the error.
    """

    def __init__(self, stream: Any, errors_met: list[OSError]) -> None:
        self._stream = stream
        self.errors_met = errors_met

    def write(self, content: Any) -> int:
        """Writes text or bytes; returns their length."""
        if not self.errors_met:
            try:
                return int(self._stream.write(content))
            except OSError as error:
                self.errors_met.append(error)
        return len(content)

    def writelines(self, lines: Iterable[Any]) -> None:
        """Writes several pieces."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hands everything to the operating system."""
        if not self.errors_met:
            try:
                self._stream.flush()
            except OSError as error:
                self.errors_met.append(error)

    @property
    def buffer(self) -> _Forgiving:
        """The binary stream below; click takes it if the encoding is ASCII."""
        return _Forgiving(self._stream.buffer, self.errors_met)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def end(self) -> None:
        """Drops what could not be written: otherwise Python tries again when it ends, and complains."""
        self.flush()
        if not self.errors_met:
            return
        with suppress(OSError, ValueError):
            number = self._stream.fileno()
            kept, nowhere = os.dup(number), os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, number)
                self._stream.flush()
            finally:
                os.dup2(kept, number)
                os.close(kept)
                os.close(nowhere)


def _reconfigure(stream: Any, errors: str | None) -> None:
    """Sets what a stream does with characters that its encoding lacks; streams of tests may not have the method."""
    if errors and hasattr(stream, "reconfigure"):
        with suppress(OSError, ValueError):
            stream.reconfigure(errors=errors)
