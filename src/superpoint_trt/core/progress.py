"""Reports the progress of long work, for progress bars."""

from __future__ import annotations

from typing import Callable

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class Steps:
    """Counts the steps of some work and reports each.

    Args:
        total: number of steps.
        progress: is called after each step; None: nobody is.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def advance(self) -> None:
        """Counts one step."""
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)
