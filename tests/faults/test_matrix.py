"""Every command that writes, with too little of something, or ended in the middle: the old file stays whole."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.processes import COMMAND, UNKNOWN_UID, Done, assert_refused, call, finish, needs_root, start

pytest_plugins = ["faults.fixtures"]

OLD = b"precious: a file that was there before"

WRITING = {
    "export": "export --weights checkpoint.safetensors --height 48 --width 64 --output out.onnx",
    "convert": "weights convert checkpoint.safetensors out.safetensors",
    "cast": "cast --onnx dense.onnx --output out.onnx",
    "build": "build --onnx dense.onnx --engine out.engine --precision fp16 --runtime rtx --target sm89",
    "quantize": "quantize --onnx heads.onnx --calibration ranges.calibration.json --no-verify --output out.onnx",
    "calibrate": "quantize --onnx heads.onnx --calibration-images good.png --no-verify --output out.onnx",
    "infer": "infer --model dense.onnx --image good.png --save out.npz --output out.png",
    "match": "match --model dense.onnx good.png good.png --save out.npz --output out.png",
    "bench": "bench --model dense.onnx --iterations 2 --json out.json --plot out.svg",
}
OUTPUTS = {
    "calibrate": ("out.onnx", "heads.calibration.json", "heads.calibration.int8.safetensors"),
    "build": ("out.engine", "out.engine.json"),
}
EVERY = pytest.mark.parametrize("name", WRITING)
KEY_COMMANDS = pytest.mark.parametrize("name", ["export", "build", "quantize", "infer"])


def words(name: str) -> list[str]:
    if name == "build":
        pytest.importorskip("tensorrt_rtx")
    return WRITING[name].split()


def outputs(name: str) -> tuple[str, ...]:
    return OUTPUTS.get(name, tuple(word for word in WRITING[name].split() if word.startswith("out.")))


@pytest.fixture
def desk(small_desk: Path) -> Path:
    """Good inputs, and a precious file under every name that commands write."""
    for name in WRITING:
        for output in outputs(name):
            (small_desk / output).write_bytes(OLD)
    return small_desk


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_whole(folder: Path, name: str, before: dict[str, bytes]) -> None:
    """Each output is the old file or a sound new one; nothing else has changed."""
    for file, content in contents(folder).items():
        if file not in outputs(name):
            assert before.get(file, content) == content, f"{file} has changed"
        elif content != OLD:
            assert is_sound(folder / file), f"{file} is neither the old file nor a sound new one"


def is_sound(path: Path) -> bool:
    """Whether a file is complete; opened by what it is, not by this package."""
    import json
    import xml.dom.minidom

    import cv2
    import numpy as np
    import onnx
    from safetensors.numpy import load_file

    readers: dict[str, Callable[[], object]] = {
        ".onnx": lambda: onnx.checker.check_model(str(path), full_check=True),
        ".safetensors": lambda: load_file(path),
        ".json": lambda: json.loads(path.read_bytes()),
        ".npz": lambda: [np.load(path)[key] for key in np.load(path)],
        ".png": lambda: cv2.imread(str(path)).shape,
        ".svg": lambda: xml.dom.minidom.parseString(path.read_bytes()),
        ".engine": lambda: (path.read_bytes()[:4] == b"vtrt" and path.stat().st_size > 1000) or 1 / 0,
    }
    try:
        readers[path.suffix]()
    except Exception:
        return False
    return True


def left_over(folder: Path, before: dict[str, bytes]) -> list[str]:
    """Files that were not there: temporary ones that nobody took away."""
    return [file for file in contents(folder) if file not in before]


# ------------------------------------------------------------------------------------------------------------ disk


@EVERY
def test_a_full_disk_keeps_the_old_file(desk, name):
    """Files may grow to 100 bytes only: writing ends with EFBIG, as it ends with ENOSPC on a full disk."""
    before = contents(desk)
    done = call(words(name), desk, limits={resource.RLIMIT_FSIZE: 100})
    assert_refused(done, "cannot be written", warned=name == "calibrate")
    assert contents(desk) == before


@pytest.fixture
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system with no block to spare, and an old file on it."""
    folder = tmp_path_factory.mktemp("full")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@needs_root
@KEY_COMMANDS
def test_a_file_system_without_space_keeps_the_old_file(desk, full_disk, name):
    for output in outputs(name):
        (full_disk / output).write_bytes(OLD)
    with (full_disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while ballast.write(bytes(1024)):
                pass
        except OSError:
            pass
    arguments = [str(full_disk / word) if word in outputs(name) else word for word in words(name)]
    before = contents(full_disk)
    assert_refused(call(arguments, desk), "No space left")
    assert contents(full_disk) == before


@EVERY
def test_a_read_only_folder_is_refused_before_the_work(desk, name):
    """As another user where root runs this, to whom permissions do not apply."""
    root = os.getuid() == 0
    shelf = desk / "shelf"
    shelf.mkdir()
    for output in outputs(name):
        (shelf / output).write_bytes(OLD)
    shelf.chmod(0o555)
    for folder in (desk, *desk.parents):
        if root and folder.stat().st_uid == 0 and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    before = contents(desk)
    arguments = [f"shelf/{word}" if word in outputs(name) else word for word in words(name)]
    if name == "calibrate":  # its ranges lie beside the model
        arguments[arguments.index("heads.onnx")] = "shelf/heads.onnx"
        shutil.copy(desk / "heads.onnx", shelf)
        before = contents(desk)
    done = call(arguments, desk, uid=UNKNOWN_UID if root else None, env={"HOME": "/nowhere"})
    shelf.chmod(0o755)
    assert_refused(done, "not writable")
    assert contents(desk) == before


# ------------------------------------------------------------------------------------------------ ended in the middle

STEPS = ("before writing", "written, not yet on the disk", "before the rename")
ENDER = """  # ends the process at the n-th call of a function that every output goes through
import importlib, os, signal, sys
step, number, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from superpoint_trt.cli.main import cli, run
import pathlib
from superpoint_trt.core import files
owner, name = {"before writing": (files, "_open_private"), "written, not yet on the disk": (os, "fsync"),
    "before the rename": (pathlib.Path, "replace")}[step]
whole = getattr(owner, name)
calls = 0
def ending(*arguments, **options):
    global calls
    calls += 1
    if calls == count:
        os.kill(os.getpid(), number)
    return whole(*arguments, **options)
setattr(owner, name, ending)
sys.exit(run(cli, sys.argv[4:]))
"""


def ended(name: str, desk: Path, step: str, number: int, count: int = 1) -> Done:
    """Runs a command that is sent a signal at a certain step of writing its output."""
    return call([step, str(int(number)), str(count), *words(name)], desk, program=(sys.executable, "-c", ENDER))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("step", STEPS)
@KEY_COMMANDS
def test_a_killed_command_leaves_the_old_file_or_the_new_one(desk, name, step, count):
    before = contents(desk)
    done = ended(name, desk, step, signal.SIGKILL, count)
    assert done.code == -signal.SIGKILL or count > len(outputs(name)), done
    assert_whole(desk, name, before)


@pytest.mark.parametrize("step", STEPS)
@KEY_COMMANDS
def test_an_interrupted_command_leaves_nothing_behind(desk, name, step):
    before = contents(desk)
    done = ended(name, desk, step, signal.SIGINT)
    assert done.code == 130 and "Traceback" not in done.err, done
    assert_whole(desk, name, before)
    assert left_over(desk, before) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@KEY_COMMANDS
def test_a_command_ended_at_any_moment_leaves_whole_files(desk, name, number):
    began = time.monotonic()
    assert call(words(name), desk).code == 0
    took = time.monotonic() - began
    for output in outputs(name):
        (desk / output).write_bytes(OLD)
    before = contents(desk)
    for moment in range(10):
        process = start(words(name), desk)
        time.sleep(took * (0.3 + 0.08 * moment))
        process.send_signal(number)
        done = finish(process)
        assert done.code in (0, 130, -number), done
        assert_whole(desk, name, before)
        if number == signal.SIGINT:
            assert left_over(desk, before) == []


# --------------------------------------------------------------------------------------------------------- two writers


@pytest.mark.exhaustive
@KEY_COMMANDS
def test_two_writers_leave_a_whole_file(desk, name):
    before = contents(desk)
    for _ in range(3):
        both = [start(words(name), desk) for _ in range(2)]
        for done in map(finish, both):
            assert done.code == 0, done.err
        assert_whole(desk, name, before)
        assert left_over(desk, before) == []
        assert all((desk / output).read_bytes() != OLD for output in outputs(name))


@pytest.mark.exhaustive
def test_two_that_make_the_default_model_at_once(small_desk):
    environ = {"SUPERPOINT_CACHE": str(small_desk / "cache")}
    both = [start(("infer", "--image", "good.png", "--max-side", "64"), small_desk, env=environ) for _ in range(2)]
    for done in map(finish, both):
        assert (done.code, done.err) == (0, ""), done
    made = list((small_desk / "cache").iterdir())
    assert len(made) == 1 and is_sound(made[0])


# --------------------------------------------------------------------------------------------------- memory and files


def needed(arguments: list[str], folder: Path) -> int:
    """Address space in bytes that a command takes when it has all it wants."""
    code = (
        "import sys; from superpoint_trt.cli.main import cli, run; run(cli, sys.argv[1:]);"
        "print('VMPEAK', next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmPeak')))"
    )
    done = call(arguments, folder, program=(sys.executable, "-c", code))
    return int(done.out.rpartition("VMPEAK")[2]) * 1024


@pytest.mark.exhaustive
@pytest.mark.parametrize("share", [0.98, 0.9, 0.8, 0.6])
@EVERY
def test_too_little_memory_is_one_line(desk, name, share):
    """A native library that runs out of memory may end the process in its own words; nothing else may.

    onnx and TensorRT print lines of their own beside ours ("Schema error: std::bad_alloc").
    """
    before = contents(desk)
    most = int(needed(words(name), desk) * share)
    for output in outputs(name):
        (desk / output).write_bytes(OLD)
    done = call(words(name), desk, limits={resource.RLIMIT_AS: most})
    assert_whole(desk, name, before)
    assert "Traceback" not in done.err, done.err[-1500:]
    if done.code == 2:
        if name == "build" or "Schema error: std::bad_alloc" in done.err:
            ours = [line for line in done.err.splitlines(keepends=True) if line.startswith("error: ")]
            done = Done(done.code, done.out, "".join(ours))
        assert_refused(done, "memory")
        assert left_over(desk, before) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("most", [8, 12, 16, 24, 48])
@EVERY
def test_too_few_file_descriptors_are_one_line(desk, name, most):
    before = contents(desk)
    done = call(words(name), desk, limits={resource.RLIMIT_NOFILE: most})
    if done.code != 0:
        assert_refused(done)
        assert left_over(desk, before) == []
    assert_whole(desk, name, before)


@pytest.mark.exhaustive
def test_a_long_stream_takes_no_more_memory(small_desk):
    """2,000 extracts and 200 openings: the figure that was good, kept."""
    code = """
import numpy as np
from superpoint_trt import SuperPoint
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1024
image = np.random.default_rng(0).integers(0, 255, (48, 64), np.uint8)
with SuperPoint("dense.onnx", device="cpu", threads=1) as superpoint:
    for turn in range(2000):
        superpoint.extract(image)
        if turn == 200:
            before = resident()
    grown = resident() - before
for turn in range(200):
    with SuperPoint("dense.onnx", device="cpu", threads=1) as superpoint:
        superpoint.extract(image)
    if turn == 40:
        before = resident()
print(f"{grown:.1f} {resident() - before:.1f}")
"""
    done = call((), small_desk, program=(sys.executable, "-c", code))
    assert done.code == 0, done.err
    extracts, openings = map(float, done.out.split())
    assert extracts < 8 and openings < 16, f"grown by {extracts} MiB over extracts, {openings} MiB over openings"


# ------------------------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("closed", ["1", "2", "1 2"])
@KEY_COMMANDS
def test_closed_streams_do_no_harm(desk, name, closed):
    """`superpoint ... >&-`: the files that are opened next must not take the streams' places."""
    if closed != "2":
        words(name)
    closing = " ".join(f"{stream}>&-" for stream in closed.split())
    script = f'exec "$@" {closing}'
    done = call([*COMMAND, *words(name)], desk, program=("sh", "-c", script, "sh"))
    assert done.code == 0, done
    for output in outputs(name):
        content = (desk / output).read_bytes()
        assert content != OLD and is_sound(desk / output)
        assert b"error" not in content[:20] and b"model " not in content[:20]


def test_a_closed_stream_and_a_bad_input(desk):
    done = call([*COMMAND, "info", "nothing.onnx"], desk, program=("sh", "-c", 'exec "$@" 2>&-', "sh"))
    assert done.code == 2 and done.err == ""
