"""Entries that are written as bytes of HDF5: the library, and tools of others, take them for their own."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest
from pipeline.test_feature_files import NAMES, keypoints, write

from superpoint_trt import SuperPointError
from superpoint_trt.core.typed_json import JsonError
from superpoint_trt.pipeline.feature_files import FeatureFile, FeatureWriter
from superpoint_trt.pipeline.hdf5_files import Superblock, lookup3
from superpoint_trt.pipeline.packed import Entry, PackedWriter

h5py = pytest.importorskip("h5py", reason="feature files in HDF5 need h5py: pip install '.[bulk]'")

HALF = np.dtype("float16")


def test_the_checksum_of_hdf5(tmp_path):
    """A value that its author published, and those of files that the library wrote."""
    assert lookup3(b"Four score and seven years ago") == 0x17770551
    for libver in ("v108", "latest"):
        with h5py.File(tmp_path / "f.h5", "w", libver=libver) as file:
            file["x"] = np.arange(libver == "v108" or 9)
        content = (tmp_path / "f.h5").read_bytes()[:96]
        block = Superblock(content)
        assert block.end == (tmp_path / "f.h5").stat().st_size
        assert block.with_end(block.end) == content and block.with_end(block.end + 8) != content


def test_the_library_knows_the_entries_as_its_own(tmp_path):
    """It counts one link to each group, changes entries, deletes them and copies them."""
    path = write(tmp_path / "f.h5", [f"street/{index}.jpg" for index in range(40)])
    with h5py.File(path, "r+") as file:
        for index in range(40):
            assert h5py.h5o.get_info(file[f"street/{index}.jpg"].id).rc == 1
        file["street/1.jpg"].attrs["of"] = "somebody else"
        file["street/1.jpg/keypoints"].attrs["more"] = 3.0
        file["street/1.jpg/more"] = np.arange(1000)
        del file["street/2.jpg/scores"], file["street/3.jpg"]
        file.copy("street/5.jpg", "copied.jpg")
        file.move("street/6.jpg", "other/name.jpg")
    with h5py.File(path, "r") as file:
        assert dict(file["street/1.jpg/keypoints"].attrs) == {"uncertainty": 3.5, "more": 3.0}
        assert file["street/1.jpg/more"][999] == 999 and file["street/1.jpg"].attrs["of"] == "somebody else"
    with FeatureFile(path) as features:
        left = {f"street/{index}.jpg" for index in range(40) if index not in (3, 6)}
        assert set(features) == left | {"copied.jpg", "other/name.jpg"}
        for index in (0, 1, *range(7, 40)):
            np.testing.assert_array_equal(features[f"street/{index}.jpg"].keypoints, keypoints(index, index % 9).xy)
        np.testing.assert_array_equal(features["other/name.jpg"].scores, keypoints(6, 6).scores)


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


def test_a_user_block_is_refused(tmp_path):
    path = tmp_path / "f.h5"
    with h5py.File(path, "w", userblock_size=512):
        pass
    with pytest.raises(SuperPointError, match=r"f\.h5 cannot be written: it has a user block.*h5repack"):
        FeatureWriter(path, append=True)


def test_an_entry_takes_little_space(tmp_path):
    """Beside its arrays, 0.8 kB; what the library itself writes takes twice as much."""
    count = 2000
    path = write(tmp_path / "f.h5", [f"images/{index:06d}.jpg" for index in range(count)])
    arrays = sum((index % 9) * (8 + 4 + 2 * 16) for index in range(count))
    assert path.stat().st_size - arrays < 1000 * count


def test_a_tool_of_the_hdf5_group_reads_the_values(tmp_path):
    tool = shutil.which("h5dump")
    if tool is None:
        pytest.skip("h5dump is not installed: apt-get install hdf5-tools")
    path = write(tmp_path / "f.h5")
    line = [tool, "-d", f"{NAMES[3]}/keypoints", path]
    told = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert "H5T_IEEE_F32LE" in told and "(0,0): " in told and "uncertainty" in told and "(0): 3.5" in told


# -------------------------------------------------------------------------------------------------------------- packed


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
    assert (tmp_path / "packed.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()


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
        r"p has \d+ bytes of arrays, its \d entries": (whole[8:], bytes(8) + whole),
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
