"""Runs one command on strange files and says what is wrong with how it ended, if anything is.

A command passes in two ways: exit code 0 and a sound result, or exit code 2 and exactly one line on stderr that begins
with "error: ". In both cases nothing else stands on stderr (at file-descriptor level), no input file has changed,
nothing is left behind, and memory and time stay under their limits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
MOST_MIB = 512
"""Beyond what the process has before the command starts. The inputs are small: a few kilobytes."""
MOST_SECONDS = 20.0
"""Generous: the machine may be busy. A hang is what it finds; a good run takes 0.02 s."""
LONGEST_MESSAGE = 1000
OTHERS_FILES = (".ses",)
"""What libraries leave in the temporary folder: onnxruntime 1.32 keeps the number of its session there."""
RUN_STATE = re.compile(r"\.shards(/|$)|\.failed\.tsv$")
"""What a bulk run keeps for its next start and tells of its failures: it may change, stay, or go."""
ALLOWED = re.compile(r"^(warning|note|left out): ", re.MULTILINE)
"""Lines of ours that may stand on stderr of a command that succeeds."""


@dataclass(frozen=True)
class Case:
    """Files, and a command that is to read them."""

    files: Mapping[str, bytes]
    """Name below the desk -> content."""
    arguments: Sequence[str]
    """After the program's name."""
    program: str = "superpoint"
    outputs: Sequence[str] = ()
    """Files that the command may write if it succeeds."""
    special: Mapping[str, str] = field(default_factory=dict)
    """Name below the desk -> "fifo", "folder", or "link:TARGET"."""
    follow_up: Sequence[str] = ()
    """A command that has to succeed on the result."""


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int | None
    out: str
    err: str
    escaped: str | None
    """Exception and function, if one came out of the command."""
    trace: str | None
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Finding:
    """What is wrong with an ending."""

    kind: str
    """Of like faults: "traceback ValueError in core/types.py:from_metadata"."""
    detail: str


class Judge:
    """A desk with good files, and a process that runs commands on it.

    Args:
        folder: an empty folder for the desk.
        stock: files that every command may read, and none may change.
        most_seconds: a command that takes longer hangs.
    """

    def __init__(self, folder: Path, stock: Mapping[str, bytes], most_seconds: float = MOST_SECONDS) -> None:
        self._most_seconds = most_seconds
        self.desk = folder / "desk"
        self.desk.mkdir(parents=True)
        self._temporary = folder / "tmp"
        self._temporary.mkdir()
        for name, content in stock.items():
            (self.desk / name).write_bytes(content)
        self._stock = _snapshot(self.desk)
        self._process: subprocess.Popen[str] | None = None
        self.endings: Counter[object] = Counter()
        """How many commands ended with which exit code."""
        self.last: Ending | None = None

    def run(self, arguments: Sequence[str], program: str = "superpoint") -> Ending:
        """Runs one command in the desk."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        request = {"program": program, "arguments": list(arguments), "folder": str(self.desk)}
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self._most_seconds)
        line = process.stdout.readline() if ready else ""
        if line:
            return Ending(**json.loads(line))
        escaped = "hangs"
        if ready:
            process.wait()
            code = process.returncode
            escaped = f"dies of {signal.Signals(-code).name}" if code < 0 else f"ends the process with code {code}"
        self.close()
        return Ending(None, "", "", escaped, None, self._most_seconds, 0.0)

    def judge(self, case: Case, sound: Callable[[Path, Ending], str | None] | None = None) -> Finding | None:
        """Puts the files on the desk, runs the command, and looks.

        Args:
            case: files and command.
            sound: says what is wrong with the result of a command that succeeds; None if nothing is.
        """
        self._lay_out(case)
        before = _snapshot(self.desk)
        self.last = ending = self.run(case.arguments, case.program)
        self.endings[ending.code] += 1
        try:
            return (
                _stated(ending)
                or self._touched(before, case, ending)
                or (self._result(case, ending, sound) if ending.code == 0 else None)
            )
        finally:
            self._clear()

    def _result(self, case: Case, ending: Ending, sound: Callable[[Path, Ending], str | None] | None) -> Finding | None:
        missing = [name for name in case.outputs if not (self.desk / name).is_file()]
        if missing:
            return Finding("exit 0 without its output", ", ".join(missing))
        wrong = sound(self.desk, ending) if sound else None
        if wrong:
            return Finding(f"unsound: {wrong}", ending.out[-500:])
        if case.follow_up:
            after = self.run(case.follow_up)
            if after.code != 0:
                return Finding(f"{case.follow_up[0]} refuses the result", after.err or str(after.escaped))
        return None

    def _touched(self, before: Mapping[str, object], case: Case, ending: Ending) -> Finding | None:
        after = _snapshot(self.desk)
        inputs = {name: content for name, content in before.items() if not RUN_STATE.search(name)}
        changed = [name for name, content in inputs.items() if after.get(name) != content]
        if changed:
            return Finding("input changed", ", ".join(changed))
        written = case.outputs if ending.code in (0, 1) else ()
        allowed = {str(path) for output in written for path in (Path(output), *Path(output).parents)}
        left = [name for name in after if not (name in before or name in allowed or RUN_STATE.search(name))]
        left += [str(path) for path in self._temporary.iterdir() if path.name not in OTHERS_FILES]
        if left:
            return Finding("files left behind", f"exit {ending.code}: {', '.join(left)}")
        return None

    def _lay_out(self, case: Case) -> None:
        for name, kind in case.special.items():
            path = self.desk / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "fifo":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir(exist_ok=True)
            else:
                path.symlink_to(kind[len("link:") :])
        for name, content in case.files.items():
            path = self.desk / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _clear(self) -> None:
        for path in (*self.desk.iterdir(), *self._temporary.iterdir()):
            if path.name in self._stock:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "MALLOC_ARENA_MAX": "2",
                "TMPDIR": str(self._temporary),
                "SUPERPOINT_CACHE": str(self._temporary.parent / "cache"),
            }
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), str(MOST_MIB)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                text=True,
            )
            assert self._process.stdout is not None
            assert self._process.stdout.readline() == "ready\n"  # the time of the imports is not the first command's
        return self._process

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None


def _stated(ending: Ending) -> Finding | None:
    """What is wrong with exit code, streams, memory and time."""
    if ending.escaped:
        kind = ending.escaped if ending.trace is None else f"traceback {ending.escaped}"
        return Finding(kind, ending.trace or ending.escaped)
    if ending.peak_mib > MOST_MIB:
        return Finding("memory", f"{ending.peak_mib:.0f} MiB; {ending.err}")
    if ending.code == 0:
        foreign = [line for line in ending.err.splitlines() if not ALLOWED.match(line)]
        if foreign:
            return Finding(f"exit 0, stderr {_shape(foreign[0])}", ending.err)
        return None
    if ending.code == 1 and not ending.err.startswith("error"):  # a gate failed, which is a result
        return None
    if ending.code != 2:
        return Finding(f"exit {ending.code}", ending.err)
    lines = ending.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if len(errors) != 1:
        return Finding(f"exit 2 with {len(errors)} error lines", ending.err)
    others = [line for line in lines if line not in errors]
    if others:
        return Finding(f"exit 2, stderr {_shape(others[0])}", ending.err)
    if len(errors[0]) > LONGEST_MESSAGE:
        return Finding("error line too long", f"{len(errors[0])} characters: {errors[0][:200]}")
    return None


def _shape(line: str) -> str:
    """A line without its numbers and paths, so that like lines count as one."""
    line = re.sub(r"/\S+/", "", line)
    return re.sub(r"0x[0-9a-f]+|\d+", "N", line)[:90]


def _snapshot(folder: Path) -> dict[str, object]:
    """Every path below, and what tells whether it changed."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        name = path.relative_to(folder).as_posix()
        if stat.S_ISREG(status.st_mode):
            found[name] = (status.st_mtime_ns, status.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            found[name] = status.st_mode
    return found
