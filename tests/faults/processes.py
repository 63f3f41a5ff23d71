"""Commands as real processes with little of something: disk, memory, files, time."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzz.judge import LONGEST_MESSAGE

import superpoint_trt

SOURCES = str(Path(superpoint_trt.__file__).parents[1])
COMMAND = (sys.executable, "-m", "superpoint_trt")
MOST_SECONDS = 120.0


@dataclass(frozen=True)
class Done:
    """A process that has ended."""

    code: int
    out: str
    err: str


def environment(**changed: str | None) -> dict[str, str]:
    """What a process of this package needs; None takes a variable away."""
    base = {**os.environ, "PYTHONPATH": SOURCES, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", **changed}
    return {name: value for name, value in base.items() if value is not None}


def become(uid: int) -> None:
    """Makes this process one of another user, who may write nowhere but still read everything.

    The Python that runs the tests may lie where only root reads (/root), so CAP_DAC_READ_SEARCH is kept across exec:
    capabilities(7), "Ambient".
    """
    read_all, libc = 2, ctypes.CDLL(None, use_errno=True)
    keep_capabilities, ambient, raise_one = 8, 47, 2
    libc.prctl(keep_capabilities, 1, 0, 0, 0)
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    version = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)(1 << read_all, 1 << read_all, 1 << read_all, 0, 0, 0)
    if libc.capset(version, sets) or libc.prctl(ambient, raise_one, read_all, 0, 0):
        raise OSError(ctypes.get_errno(), "capabilities cannot be set")


def start(
    arguments: Sequence[str],
    folder: Path,
    limits: Mapping[int, int] | None = None,
    uid: int | None = None,
    env: Mapping[str, str | None] | None = None,
    program: Sequence[str] = COMMAND,
    **streams: object,
) -> subprocess.Popen[str]:
    """Starts a command.

    Args:
        arguments: after `superpoint`.
        folder: to work in.
        limits: resource.RLIMIT_... -> limit.
        uid: to run as; needs root.
        env: variables to set, or to take away (None).
        program: instead of `python -m superpoint_trt`.
        streams: of `subprocess.Popen`.
    """

    def prepare() -> None:
        for kind, value in (limits or {}).items():
            resource.setrlimit(kind, (value, value))
        if uid is not None:
            become(uid)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [*program, *arguments], cwd=folder, env=environment(**(env or {})), preexec_fn=prepare, text=True, **pipes
    )


def finish(process: subprocess.Popen[str]) -> Done:
    """Waits for a process that `start` started."""
    try:
        out, err = process.communicate(timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Done(process.returncode, out or "", err or "")


def call(arguments: Sequence[str], folder: Path, **how: object) -> Done:
    """Runs a command to its end; arguments as `start`."""
    return finish(start(arguments, folder, **how))  # type: ignore[arg-type]


def assert_refused(done: Done, *says: str, warned: bool = False) -> None:
    """Exit code 2 and one line; `warned`: behind warnings, which belong to work that was done before it."""
    assert done.code == 2, done
    lines = [line for line in done.err.splitlines() if not (warned and line.startswith("warning: "))]
    assert len(lines) == 1 and lines[0].startswith("error: "), f"expected one line:\n{done.err}"
    assert len(done.err) < LONGEST_MESSAGE
    for words in says:
        assert words in done.err, f"{words!r} is not in: {done.err}"


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user, or mount")
UNKNOWN_UID = 54321
"""No user of this machine has it: so it has no home."""
