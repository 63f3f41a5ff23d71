"""`superpoint extract` as processes: killed at random moments, two at once, and on a full disk."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from faults.processes import assert_refused, call, finish, needs_root, start
from helpers import rarely
from pipeline.features import assert_equal, content, write_photographs

pytest.importorskip("h5py", reason="feature files in HDF5 need h5py: pip install '.[bulk]'")

COUNT = 60


@pytest.fixture(scope="module")
def command(exported, tmp_path_factory):
    """A command line that takes about as long to start as to work, and the folder it reads."""
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder, COUNT)
    model = exported("v6", dynamic=True, max_batch_size=2)
    line = f"extract {folder} --model {model} --max-keypoints 50 --shard-size 4 --threads 1 --loaders 1 --output"
    return line.split()


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    """For both kinds of output, the content after a run to the end, and the seconds from its manifest to its end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    made = {}
    for output in ("f.h5", "folder"):
        process = start([*command, output], folder)
        wait_for(folder / f"{output}.shards/manifest.json")
        started = time.monotonic()
        done = finish(process)
        assert done.code == 0, done
        made[output] = content(folder / output), time.monotonic() - started
    return made


def wait_for(path: Path, process: subprocess.Popen[str] | None = None) -> None:
    """Waits for a file; if a process is given, no longer than it lives."""
    deadline = time.monotonic() + 60
    while not path.exists() and (process is None or process.poll() is None):
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.002)


def finished(folder: Path, output: str) -> dict[Path, tuple[int, int]]:
    """The finished shards, with what changes if one is written again."""
    shards = folder / f"{output}.shards"
    reports = list(shards.glob("*[0-9].json"))
    both = [path for report in reports for path in (report, report.with_suffix(".packed")) if path.exists()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in both}


@pytest.mark.parametrize(("output", "kills"), [("f.h5", 4), *rarely(("f.h5", 20), ("folder", 20))])
def test_killed_at_random_moments(command, uninterrupted, tmp_path, output, kills):
    """What was finished is not done again, and the result equals that of an uninterrupted run to the bit.

    A run that is killed is started again, a little longer each time, until it comes to its end. Then the next begins,
    until there were enough kills.
    """
    expected, seconds = uninterrupted[output]
    moments = random.Random(kills)
    killed = runs = 0
    while killed < kills:
        runs += 1
        folder = tmp_path / str(runs)
        folder.mkdir()
        before: dict[Path, tuple[int, int]] = {}
        code, longest_s = None, 0.5 * seconds
        while code != 0:
            process = start([*command, output], folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for(folder / f"{output}.shards/manifest.json", process)
            time.sleep(moments.uniform(0, longest_s))
            longest_s *= 1.2  # the machine may be busier than it was
            process.send_signal(signal.SIGKILL)
            code = process.wait()
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            now = finished(folder, output)
            assert code == 0 or is_complete(folder, output) or {path: now.get(path) for path in before} == before
            before = now
        assert_equal(content(folder / output), expected)
        assert [path.name for path in folder.iterdir()] == [output]


def is_complete(folder: Path, output: str) -> bool:
    """Whether the output is merged, so that shards may go."""
    return (folder / output / "superpoint_trt.json" if output == "folder" else folder / output).exists()


def test_two_at_once(command, uninterrupted, tmp_path):
    """The second is refused as long as the first lives; stopped, not slow, so that it certainly does."""
    first = start([*command, "f.h5"], tmp_path)
    wait_for(tmp_path / "f.h5.shards/00000.json")
    first.send_signal(signal.SIGSTOP)
    for more in ([], ["--shard", "1/2"], ["--overwrite"]):
        assert_refused(call([*command, "f.h5", *more], tmp_path), "another process works on", "f.h5.shards/lock")
    first.send_signal(signal.SIGCONT)
    assert finish(first).code == 0
    assert_equal(content(tmp_path / "f.h5"), uninterrupted["f.h5"][0])


def test_processes_side_by_side(command, uninterrupted, tmp_path):
    parts = [start([*command, "f.h5", "--shard", f"{part}/3"], tmp_path) for part in (1, 2, 3)]
    told = [finish(part) for part in parts]
    assert [one.code for one in told] == [0, 0, 0], told
    assert sum("features      f.h5" in one.out for one in told) >= 1
    assert_equal(content(tmp_path / "f.h5"), uninterrupted["f.h5"][0])
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5"]


def test_a_full_disk_is_one_line_and_finished_shards_stay(command, uninterrupted, tmp_path):
    """Files may grow to 10 kB only, less than a shard: writing ends with EFBIG, as it does with ENOSPC."""
    assert call([*command, "f.h5", "--shard", "1/2"], tmp_path).code == 0
    before = finished(tmp_path, "f.h5")
    assert before
    done = call([*command, "f.h5"], tmp_path, limits={resource.RLIMIT_FSIZE: 10_000})
    assert_refused(done, "cannot be written", "File too large")
    assert finished(tmp_path, "f.h5") == before and not list((tmp_path / "f.h5.shards").glob(".*"))
    # Enough for a shard, not for the file that all are merged into.
    largest = max(path.stat().st_size for path in before)
    done = call([*command, "f.h5"], tmp_path, limits={resource.RLIMIT_FSIZE: 2 * largest})
    assert_refused(done, "f.h5 cannot be written", "File too large")
    assert [path.name for path in tmp_path.iterdir()] == ["f.h5.shards"]
    after = finished(tmp_path, "f.h5")
    assert {path: after[path] for path in before} == before and len(after) == 2 * -(-COUNT // 4)
    done = call([*command, "f.h5"], tmp_path)
    assert done.code == 0 and "done          0 of 60" in done.out
    assert_equal(content(tmp_path / "f.h5"), uninterrupted["f.h5"][0])


@needs_root
@pytest.mark.parametrize(("output", "size"), [("f.h5", "400k"), *rarely(("f.h5", "200k"), ("folder", "200k"))])
def test_a_file_system_without_space(command, uninterrupted, tmp_path, output, size):
    """As above, on a real file system that is full, whatever HDF5 makes of it."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        done = call([*command, output], small)
        assert_refused(done, "cannot be written", "No space left on device")
        kept = finished(small, output)
        assert kept
        subprocess.run(["mount", "-o", "remount,size=20m", str(small)], check=True)
        assert call([*command, output], small).code == 0
        assert_equal(content(small / output), uninterrupted[output][0])
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_an_interrupt_keeps_what_is_finished(command, uninterrupted, tmp_path):
    process = start([*command, "f.h5"], tmp_path)
    wait_for(tmp_path / "f.h5.shards/00001.json")
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130 and "Traceback" not in done.err
    assert not list((tmp_path / "f.h5.shards").glob(".*"))
    assert call([*command, "f.h5"], tmp_path).code == 0
    assert_equal(content(tmp_path / "f.h5"), uninterrupted["f.h5"][0])
    assert os.listdir(tmp_path) == ["f.h5"]
