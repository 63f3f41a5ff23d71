"""Shows on stderr how far long work is: a bar on a terminal; in a pipe or a file, a line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Callable, Optional

import click

from superpoint_trt.cli.terminal import console
from superpoint_trt.core.progress import PhaseProgress, Progress

DownloadProgress = Callable[[int, Optional[int]], None]
"""Called with (bytes done, all bytes)."""

FIRST_LINE_S = 5.0
"""Work that is done sooner says nothing, so that what is soon refused stays one line."""
LINES_EVERY_S = 10.0


@contextmanager
def progress_bar(phase: str) -> Iterator[Progress]:
    """Shows work of one phase.

    Yields:
        What to call with (steps done, steps in all).
    """
    with phase_bar(phase) as progress:
        yield lambda done, total: progress(phase, done, total)


@contextmanager
def phase_bar(phase: str = "preparing") -> Iterator[PhaseProgress]:
    """Shows work in several phases.

    Args:
        phase: what is done until the work reports its first.

    Yields:
        What to call with (phase, steps done, steps in all; 0 if nobody knows).
    """
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    screen = console(stderr=True)
    if not screen.is_terminal:
        with _lines(phase) as lines:
            yield lines.report
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=screen, transient=True) as bar:
        task = bar.add_task(phase, total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total or None)


@contextmanager
def rate_bar(unit: str) -> Iterator[PhaseProgress]:
    """Shows long work with its speed and the time that is left.

    Args:
        unit: what is counted, "images".

    Yields:
        What to call with (phase, steps done, steps in all).
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    screen = console(stderr=True)
    if not screen.is_terminal:
        with _lines("preparing", unit) as lines:
            yield lines.report
        return
    speed = TextColumn("{task.fields[speed]}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    with Bar(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("preparing", total=None, speed="")
        pace = _Pace(unit)

        def report(phase: str, done: int, total: int) -> None:
            bar.update(task, description=phase, completed=done, total=total or None, speed=pace.speed(phase, done))

        yield report


class _Pace:
    """How fast the work of a phase goes.

    Args:
        unit: what is counted.
    """

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._phase, self._started = "", time.monotonic()

    def speed(self, phase: str, done: int) -> str:
        """For example "12.3 images/s"; empty at the beginning of a phase."""
        rate = self._rate(phase, done)
        return f"{rate:.3g} {self._unit}/s" if rate else ""

    def left(self, phase: str, done: int, total: int) -> str:
        """For example "140 s left"."""
        rate = self._rate(phase, done)
        return f"{(total - done) / rate:.0f} s left" if rate else ""

    def _rate(self, phase: str, done: int) -> float:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._started = phase, now
        return done / (now - self._started) if now > self._started else 0.0


@contextmanager
def download_bar(name: str) -> Iterator[DownloadProgress]:
    """Shows bytes and speed of a download; on a terminal the bar stays when it is done."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    screen = console(stderr=True)
    if not screen.is_terminal:
        with _lines(f"{name}: kB") as lines:
            yield lambda done, total: lines.report(f"{name}: kB", done // 1000, (total or 0) // 1000)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=screen) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _lines(phase: str, unit: str | None = None) -> Iterator[_Lines]:
    """Prints lines as long as the context is open.

    Args:
        phase: what is done until the work reports its first.
        unit: what is counted, if its speed should be told.
    """
    lines = _Lines(phase, unit)
    ended = threading.Event()

    def tell() -> None:
        wait_s = FIRST_LINE_S
        while not ended.wait(wait_s):
            click.echo(lines.line(), err=True)
            wait_s = LINES_EVERY_S

    # A thread of its own, because some work reports nothing for minutes.
    teller = threading.Thread(target=tell, daemon=True)
    try:
        teller.start()
    except RuntimeError:  # no more threads may be started; the work itself may do without
        yield lines
        return
    try:
        yield lines
    finally:
        ended.set()
        teller.join()


class _Lines:
    """What was reported last, as a line."""

    def __init__(self, phase: str, unit: str | None = None) -> None:
        self._last = (phase, 0, 0)
        self._started = time.monotonic()
        self._pace = _Pace(unit) if unit else None

    def report(self, phase: str, done: int, total: int) -> None:
        """Notes how far the work is."""
        if self._pace and phase != self._last[0]:
            self._pace.speed(phase, done)  # the phase's time runs from here on
        self._last = (phase, done, total)

    def line(self) -> str:
        """For example "timing: 30 of 200 (15 s)"."""
        phase, done, total = self._last
        steps = f": {done} of {total}" if total else ""
        if self._pace and done:
            steps += f", {self._pace.speed(phase, done)}, {self._pace.left(phase, done, total)}"
        return f"{phase}{steps} ({time.monotonic() - self._started:.0f} s)"
