"""`--launcher ray` with two actors on this machine: the same file as without Ray, also if an actor is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.processes import assert_refused, call, finish, start
from pipeline.features import assert_equal, content, write_photographs

pytest.importorskip("h5py", reason="feature files in HDF5 need h5py: pip install '.[bulk]'")

COUNT = 120


@pytest.fixture(scope="module")
def command(exported, tmp_path_factory):
    pytest.importorskip("ray", reason="a Ray cluster needs Ray: pip install '.[ray]'")
    folder = tmp_path_factory.mktemp("photographs")
    write_photographs(folder, COUNT)
    model = exported("v6", dynamic=True, max_batch_size=2)
    return f"extract {folder} --model {model} --max-keypoints 50 --shard-size 2 --threads 1 --output f.h5".split()


def actors(parent: int) -> list[int]:
    """Processes of actors that extract, of the Ray that a process has started; found by their names in /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if "ShardActor" in (entry / "cmdline").read_text() and parent in ancestors(int(entry.name)):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def ancestors(process: int) -> list[int]:
    above = []
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        above.append(process)
    return above


@pytest.mark.exhaustive
@pytest.mark.parametrize("kill", [False, True])
def test_two_actors(command, tmp_path, kill):
    plain, ray = tmp_path / "plain", tmp_path / "ray"
    plain.mkdir()
    ray.mkdir()
    assert call(command, plain).code == 0
    process = start([*command, "--launcher", "ray", "--actors", "2"], ray, stderr=subprocess.DEVNULL)
    if kill:
        deadline = time.monotonic() + 100
        while not list((ray / "f.h5.shards").glob("*[0-9].json")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        victims = actors(process.pid)
        assert victims
        os.kill(victims[0], signal.SIGKILL)
    done = finish(process)
    assert done.code == 0 and "2 Ray actors" in done.out and f"done          {COUNT} of {COUNT}" in done.out
    assert_equal(content(ray / "f.h5"), content(plain / "f.h5"))
    assert [path.name for path in ray.iterdir()] == ["f.h5"]


def test_what_ray_is_asked_for_is_checked(command, tmp_path):
    assert_refused(call([*command, "--launcher", "ray", "--actors", "0"], tmp_path), "--actors is 0")


def test_without_ray(exported, tmp_path):
    program = "import sys; sys.modules['ray'] = None; from superpoint_trt.__main__ import main; main()"
    write_photographs(tmp_path / "photos", 2)
    line = ["extract", "photos", "--model", str(exported("v6", dynamic=True)), "--output", "f.h5", "--launcher", "ray"]
    done = call(line, tmp_path, program=(sys.executable, "-c", program))
    assert_refused(done, "--launcher ray needs Ray: pip install '.[ray]'")
