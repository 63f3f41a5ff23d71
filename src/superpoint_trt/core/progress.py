"""How far long work is: what a progress bar is told."""

from __future__ import annotations

from typing import Callable

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class Steps:
    """Counts what is done."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self) -> None:
        """One step more."""
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)
