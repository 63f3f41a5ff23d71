"""What readers and writers share as context managers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import TypeVar

_Closes = TypeVar("_Closes", bound="Closes")


class Closes(ABC):
    """Is closed when its context ends."""

    @abstractmethod
    def close(self) -> None:
        """Ends the use."""

    def __enter__(self: _Closes) -> _Closes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class WritesWhole(Closes):
    """Makes a file that appears when the context ends without an error, and not at all after an error."""

    @abstractmethod
    def abandon(self) -> None:
        """Ends without a file of that name; an old one stays."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
