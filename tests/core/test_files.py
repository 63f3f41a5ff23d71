"""Reading files: regular ones of a bounded size only, and errors that name the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from superpoint_trt.core.files import cache_folder, is_regular_file, read_bytes
from superpoint_trt.core.image import find_images
from superpoint_trt.core.types import SuperPointError


def test_a_file_is_read_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"\r\n\x1a" * 100_000)
    assert read_bytes(tmp_path / "a", "image") == b"\r\n\x1a" * 100_000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        for read in (read_bytes, is_regular_file, lambda path, _: find_images(path)):
            with pytest.raises(SuperPointError, match=rf"image {path} is no regular file"):
                read(path, "image")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing", "does not exist"),
        (".", "is a folder"),
        ("empty", "is empty"),
        ("a\0b", "no file name"),
        ("\ud800", "no file name"),
        ("x" * 300, "cannot be read"),
        ("empty/below", "cannot be read"),
    ],
)
def test_what_cannot_be_read(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    Path("empty").touch()
    with pytest.raises(SuperPointError, match=says):
        read_bytes(name, "image")


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    for what, size in (("calibration", (1 << 24) + 1), ("image", 1 << 31)):
        with open(tmp_path / "large", "wb") as file:
            file.truncate(size)
        with pytest.raises(SuperPointError, match=f"{size} bytes; at most"):
            read_bytes(tmp_path / "large", what)


def test_only_regular_files_are(tmp_path):
    (tmp_path / "a").touch()
    assert is_regular_file(tmp_path / "a", "image")
    assert not is_regular_file(tmp_path, "image")
    assert not is_regular_file(tmp_path / "a" / "below", "image")


def test_the_cache_folder(tmp_path, monkeypatch):
    for name in ("SUPERPOINT_CACHE", "LOCALAPPDATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(SuperPointError, match="set SUPERPOINT_CACHE"):
        cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "usual"))
    assert cache_folder() == tmp_path / "usual" / "superpoint-trt"
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
