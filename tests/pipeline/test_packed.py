"""Packed entries, and .h5 of other tools that grow."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from pipeline.test_feature_files import NAMES, keypoints, write

from superpoint_trt import SuperPointError
from superpoint_trt.core.typed_json import JsonError
from superpoint_trt.pipeline.feature_files import FeatureFile, FeatureWriter
from superpoint_trt.pipeline.packed import Entry, PackedWriter

h5py = pytest.importorskip("h5py", reason="feature files in HDF5 need h5py: pip install '.[bulk]'")

HALF = np.dtype("float16")


@pytest.mark.parametrize("libver", ["earliest", "v108", "latest"])
def test_files_of_others_grow_and_can_be_changed_by_them(tmp_path, libver):
    """Superblocks 0, 2 and 3; with space that the library has freed."""
    path = tmp_path / "f.h5"
    with h5py.File(path, "w", libver=libver) as file:
        file["deleted"], file["other"] = np.zeros(5000), np.arange(1000)
    for round_ in range(3):
        with h5py.File(path, "r+") as file:
            file.pop("deleted", None)
            file[f"round {round_}"] = np.full(3000, round_)
        with FeatureWriter(path, append=True) as writer:
            for index in range(20):
                writer.write(f"{round_}/{index}", keypoints(index, index), (9, 9))
    with FeatureFile(path) as features, h5py.File(path, "r") as file:
        assert len(features) == 60 and file["other"][999] == 999
        assert all((file[f"round {round_}"][()] == round_).all() for round_ in range(3))
        for name in features:
            index = int(name.split("/")[1])
            np.testing.assert_array_equal(features[name].keypoints, keypoints(index, index).xy)


def pack(path, names=NAMES):
    with PackedWriter(path, HALF) as writer:
        for index, name in enumerate(names):
            writer.write(name, keypoints(index, count=index % 9), (4000, 3000), 3.5)
    return path


def test_packed_entries_are_those_that_are_written_one_by_one(tmp_path):
    names = [f"images/{index}.jpg" for index in range(100)]
    with FeatureWriter(tmp_path / "packed.h5") as writer:
        assert writer.add_packed(pack(tmp_path / "p", names)) == len(names)
    write(tmp_path / "one.h5", names)
    with FeatureFile(tmp_path / "packed.h5") as packed, FeatureFile(tmp_path / "one.h5") as one:
        assert list(packed) == list(one) and len(packed) == len(names)
        for name in names:
            for field in fields(packed[name]):
                np.testing.assert_array_equal(getattr(packed[name], field.name), getattr(one[name], field.name))


def test_packed_entries_are_added_once(tmp_path):
    packed, path = pack(tmp_path / "p"), write(tmp_path / "f.h5")
    before = path.read_bytes()
    with pytest.raises(SuperPointError, match="has an entry"), FeatureWriter(path, append=True) as writer:
        writer.add_packed(packed)
    assert path.read_bytes() == before and {file.name for file in tmp_path.iterdir()} == {"p", "f.h5"}


def test_packed_files_of_something_else(tmp_path):
    path = pack(tmp_path / "p")
    whole = path.read_bytes()
    refused = {
        "no packed file of entries": (b"", whole[:-1], whole[-40:], whole[:-8] + b"sptrtpk2", b"[" * 99 + whole[-16:]),
        r"p has \d+ bytes of arrays, and not those of its \d entries": (whole[8:], bytes(8) + whole),
    }
    for told, contents in refused.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(SuperPointError, match=told), FeatureWriter(tmp_path / "f.h5") as writer:
                writer.add_packed(path)
    path.write_bytes(whole)
    told = pytest.raises(SuperPointError, match="its descriptors may have another type")
    with told, FeatureWriter(tmp_path / "f.h5", "float32") as writer:
        writer.add_packed(path)
    with pytest.raises(SuperPointError, match="missing cannot be read"), FeatureWriter(tmp_path / "f.h5") as writer:
        writer.add_packed(tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_an_error_leaves_no_packed_file(tmp_path):
    with pytest.raises(SuperPointError, match="cannot name an image"):
        pack(tmp_path / "p", ["a", "../b"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "row", [None, [], ["a", 1, 2, 3, 4], ["a", -1, 2, 3, 4, 1.0], ["a", 1.5, 2, 3, 4, 1.0], [1, 1, 2, 3, 4, 1.0],
            ["a", 1, 2, 3, 4, "x"]]
)  # fmt: skip
def test_an_entry_of_something_else(row):
    with pytest.raises(JsonError):
        Entry.from_json(row)
