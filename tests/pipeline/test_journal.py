"""Adding to an .h5: whatever the moment at which the process ends, the old content or the new one is there."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
from helpers import rarely
from pipeline.test_feature_files import NAMES, keypoints, write

from superpoint_trt import SuperPointError
from superpoint_trt.pipeline import journal
from superpoint_trt.pipeline.feature_files import FeatureFile, FeatureWriter
from superpoint_trt.pipeline.journal import JournaledFile, Piece

pytest.importorskip("h5py", reason="feature files in HDF5 need h5py: pip install '.[bulk]'")

NEW = ("new/1.jpg", "street/new.jpg")


def append(path, names=NEW):
    with FeatureWriter(path, append=True) as writer:
        for index, name in enumerate(names):
            writer.write(name, keypoints(90 + index), (9, 9))


def content(path):
    with FeatureFile(path) as features:
        return {name: features[name].keypoints.tobytes() + features[name].descriptors.tobytes() for name in features}


def test_entries_are_added(tmp_path):
    path = write(tmp_path / "f.h5")
    before = content(path)
    append(path)
    after = content(path)
    assert set(after) == {*NAMES, *NEW} and {name: after[name] for name in NAMES} == before
    with pytest.raises(SuperPointError, match="has an entry"):
        append(path)
    assert content(path) == after
    assert [file.name for file in tmp_path.iterdir()] == ["f.h5"]


def test_other_tools_files_can_be_added_to(tmp_path):
    h5py = pytest.importorskip("h5py")
    for libver in ("earliest", "latest"):
        path = tmp_path / f"{libver}.h5"
        with h5py.File(path, "w", libver=libver) as file:
            file["other"] = np.arange(10)
        append(path)
        assert set(content(path)) == set(NEW)
        with h5py.File(path) as file:
            assert file["other"][9] == 9


def test_an_error_leaves_the_old_content(tmp_path):
    path = write(tmp_path / "f.h5")
    before = content(path)
    with pytest.raises(ZeroDivisionError), FeatureWriter(path, append=True) as writer:
        writer.write("new", keypoints(0, count=500), (9, 9))
        raise ZeroDivisionError
    assert content(path) == before
    append(path)
    assert set(content(path)) == {*NAMES, *NEW}


STEPS = ("entries", "fsync", "journal", "applied")


@pytest.mark.parametrize("step", STEPS)
def test_a_kill_at_each_step(tmp_path, step):
    """The process ends without any of Python's clean-up; entries appear together or not at all."""
    path = write(tmp_path / "f.h5", [f"{index}.jpg" for index in range(60)])
    before = content(path)
    child = os.fork()
    if child == 0:
        try:
            die_at(step)
            append(path, [f"many/{index}.jpg" for index in range(40)])
        finally:
            os._exit(7)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    after = content(path)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + (40 if step in ("journal", "applied") else 0)
    append(path)
    assert set(content(path)) == {*after, *NEW}


def die_at(step):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if step == "entries":
        real, calls = JournaledFile.write, []

        def write_some(self, data):
            calls.append(1)
            return die() if len(calls) > 60 else real(self, data)

        JournaledFile.write = write_some
    if step == "fsync":
        os.fsync = die
    if step == "journal":
        journal.recover = die  # called when the journal is written
    if step == "applied":
        real_recover = journal.recover

        def half(path):
            fsync, os.fsync = os.fsync, die
            real_recover(path)
            os.fsync = fsync

        journal.recover = half


def test_a_journal_of_another_file_is_not_applied(tmp_path):
    path = write(tmp_path / "f.h5")
    kept = path.stat().st_size
    file = JournaledFile(path, kept)
    file.seek(100)
    file.write(b"damage")
    recover, journal.recover = journal.recover, lambda _: None
    try:
        file.commit()
    finally:
        journal.recover = recover
        file.close()
    assert list(tmp_path.glob(".*journal"))
    other = write(tmp_path / "g.h5", NAMES[:2])
    other.replace(path)
    assert set(content(path)) == set(NAMES[:2])
    assert not list(tmp_path.glob(".*journal"))


def test_reads_see_what_was_written(tmp_path):
    """Against a plain file, with random reads and writes over both parts."""
    rng = np.random.default_rng(0)
    start = rng.integers(0, 256, 20_000, np.uint8).tobytes()
    plain, path = bytearray(start), tmp_path / "file"
    path.write_bytes(start)
    file = JournaledFile(path, len(start))
    for _ in range(300):
        at, length = int(rng.integers(0, len(plain))), int(rng.integers(1, 9000))
        file.seek(at)
        if rng.random() < 0.5:
            data = rng.integers(0, 256, length, np.uint8).tobytes()
            plain[at : at + length] = data
            assert file.write(data) == length
        else:
            assert file.read(length) == bytes(plain[at : at + length])
    assert path.read_bytes()[: len(start)] == start
    file.commit()
    file.close()
    assert path.read_bytes() == plain


@pytest.mark.parametrize("count", [1500, *rarely(20_000)])
def test_large_files_cost_no_more_bytes(tmp_path, monkeypatch, count):
    """Opening, reading one entry and adding one touch some blocks of HDF5's index, of 64 kB at most, in any file."""
    h5py = pytest.importorskip("h5py")
    touched = {"read": 0, "written": 0}
    real_read, real_write = JournaledFile.readinto, JournaledFile.write

    def readinto(self, buffer):
        touched["read"] += len(buffer)
        return real_read(self, buffer)

    def write_some(self, data):
        touched["written"] += len(data)
        return real_write(self, data)

    path = write(tmp_path / "f.h5", [f"images/{index:07d}.jpg" for index in range(count)])
    monkeypatch.setattr(JournaledFile, "readinto", readinto)
    monkeypatch.setattr(JournaledFile, "write", write_some)
    append(path, ["images/new.jpg"])
    assert sum(touched.values()) < 300_000, touched
    touched.update(read=0, written=0)
    with h5py.File(JournaledFile(path, path.stat().st_size), "r") as file:
        assert file[f"images/{count // 2:07d}.jpg"]["keypoints"].shape
    assert sum(touched.values()) < 300_000, touched
    assert count < 10_000 or path.stat().st_size > 15_000_000


def test_pieces_of_another_file_are_copied_behind_the_first_part(tmp_path):
    path, source = tmp_path / "f", tmp_path / "source"
    path.write_bytes(b"kept")
    source.write_bytes(b"abcdefgh")
    file = JournaledFile(path, kept=4)
    file.copy_in(source, [Piece(9, 3), Piece(4, 2)])
    file.seek(6)
    file.write(b"123")
    file.commit()
    assert path.read_bytes() == b"keptde123abc"
    with pytest.raises(OSError, match="Input/output error"):
        file.copy_in(source, [Piece(4, 8), Piece(12, 1)])
    with pytest.raises(FileNotFoundError):
        file.copy_in(tmp_path / "missing", [Piece(4, 1)])
    with pytest.raises(AssertionError):
        file.copy_in(source, [Piece(3, 1)])
    file.close()
