"""Reports how far long work is."""

from __future__ import annotations

from typing import Callable

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

PhaseProgress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all; 0 if nobody knows)."""

BUILDING = "building: kernels are timed, this can take minutes"
"""The phase of a builder that has not reported one; TensorRT 8.6 reports none."""


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
