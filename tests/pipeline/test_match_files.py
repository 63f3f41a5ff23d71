"""Match files as hloc's readers see them, and names that collide."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.nearest import Matches
from superpoint_trt.pipeline.match_files import (
    MatchFile,
    MatchWriter,
    StoredMatches,
    check_group_names,
    group_name,
    to_stored,
)

h5py = pytest.importorskip("h5py", reason="match files need h5py (extra bulk)")

FOUND = Matches(np.array([[0, 2], [3, 0]]), np.array([0.0, 1.0], np.float32))


def test_stored_by_hand():
    stored = to_stored(FOUND, 4, 3)
    assert stored.matches0.tolist() == [2, -1, -1, 0] and stored.matches0.dtype == np.int16
    # Distance 1 of unit vectors is 60 degrees: cosine 0.5, score 0.75.
    assert stored.scores0.tolist() == [1.0, 0.0, 0.0, 0.75] and stored.scores0.dtype == np.float16
    assert stored.rows.tolist() == [[0, 2], [3, 0]]


@pytest.mark.parametrize("count", [0, 1, 2048, 29_999, 30_001, 70_000])
def test_every_number_of_keypoints_is_read_as_written(tmp_path, count):
    rows = np.stack([np.arange(0, count, 2)] * 2, axis=1)
    stored = to_stored(Matches(rows, np.full(len(rows), 0.5, np.float32)), count, count)
    with MatchWriter(tmp_path / "matches.h5") as writer:
        writer.write(("a", "b"), stored)
    with MatchFile(tmp_path / "matches.h5") as found:
        assert found["a", "b"].matches0.tolist() == stored.matches0.tolist()
        assert found["a", "b"].scores0.tolist() == stored.scores0.tolist()


@pytest.mark.parametrize(("count", "dtype"), [(32768, np.int16), (32769, np.int32)])
def test_rows_beyond_int16_are_int32(count, dtype):
    last = Matches(np.array([[0, count - 1]]), np.zeros(1, np.float32))
    stored = to_stored(last, 1, count)
    assert stored.matches0.dtype == dtype and stored.matches0[0] == count - 1


def test_plain_h5py_reads_what_hloc_documents(tmp_path):
    """Group name0/name1 with "-" for "/", datasets matches0 and matching_scores0."""
    with MatchWriter(tmp_path / "matches.h5") as writer:
        writer.write(("a/1.jpg", "b/2.jpg"), to_stored(FOUND, 4, 3))
        writer.write(("a/1.jpg", "3.jpg"), to_stored(Matches(FOUND.rows[:0], FOUND.distances[:0]), 4, 0))
        writer.write(("3.jpg", "b/2.jpg"), to_stored(Matches(FOUND.rows[:0], FOUND.distances[:0]), 0, 3))
    with h5py.File(tmp_path / "matches.h5") as file:
        assert sorted(file) == ["3.jpg", "a-1.jpg"] and sorted(file["a-1.jpg"]) == ["3.jpg", "b-2.jpg"]
        group = file["a-1.jpg"]["b-2.jpg"]
        assert sorted(group) == ["matches0", "matching_scores0"]
        matches, scores = group["matches0"].__array__(), group["matching_scores0"].__array__()
        assert matches.dtype == np.int16 and scores.dtype == np.float16
        rows = np.where(matches != -1)[0]
        assert np.stack([rows, matches[rows]], -1).tolist() == [[0, 2], [3, 0]]
        assert scores[rows].tolist() == [1.0, 0.75]
        assert file["3.jpg"]["b-2.jpg"]["matches0"].shape == (0,)


def test_read_as_written(tmp_path):
    pairs = [("a/1.jpg", "b/2.jpg"), ("b/2.jpg", "c.jpg")]
    with MatchWriter(tmp_path / "matches.h5") as writer:
        for pair in pairs:
            writer.write(pair, to_stored(FOUND, 4, 3))
        assert not (tmp_path / "matches.h5").exists(), "a reader never sees a part"
    with MatchFile(tmp_path / "matches.h5") as found:
        assert list(found.pairs(["a/1.jpg", "b/2.jpg", "c.jpg"])) == pairs
        assert pairs[0] in found and pairs[0][::-1] not in found
        assert found[pairs[1]].rows.tolist() == FOUND.rows.tolist()
        with pytest.raises(SuperPointError, match=r"no matches of 'c\.jpg' with 'a/1\.jpg'"):
            found["c.jpg", "a/1.jpg"]
        with pytest.raises(SuperPointError, match=r"matches of 'c\.jpg', which is not among the 2 images"):
            list(found.pairs(["a/1.jpg", "b/2.jpg"]))


def test_files_of_others(tmp_path):
    """Without scores, int32 or int64."""
    with h5py.File(tmp_path / "matches.h5", "w") as file:
        file.create_group("a/b").create_dataset("matches0", data=np.array([1, -1], np.int64))
    with MatchFile(tmp_path / "matches.h5") as found:
        assert found["a", "b"].rows.tolist() == [[0, 1]] and found["a", "b"].scores0.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("values", [np.zeros((2, 2), np.int16), np.zeros(2, np.float32)], ids=["shape", "type"])
def test_damaged_entries(tmp_path, values):
    with h5py.File(tmp_path / "matches.h5", "w") as file:
        file.create_group("a/b").create_dataset("matches0", data=values)
    with MatchFile(tmp_path / "matches.h5") as found, pytest.raises(SuperPointError, match="cannot be read"):
        found["a", "b"]


def test_names_that_collide_are_refused():
    assert group_name("a/b", "c/d/e") == "a-b/c-d-e"
    check_group_names(["a/b", "a/c", "b"])
    with pytest.raises(SuperPointError, match="'a/b' and 'a-b' have the same name"):
        check_group_names(["a/b", "c", "a-b"])


def test_the_same_pair_twice_is_refused_and_leaves_the_old_file(tmp_path):
    path, stored = tmp_path / "matches.h5", to_stored(FOUND, 4, 3)
    with MatchWriter(path) as writer:
        writer.write(("a", "b"), stored)
    before = path.read_bytes()
    with pytest.raises(SuperPointError, match="has the pair 'a' and 'b' already"), MatchWriter(path) as writer:
        writer.write(("a", "b"), stored)
        writer.write(("a", "b"), StoredMatches(stored.matches0, stored.scores0))
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["matches.h5"]


def test_a_missing_file_and_one_of_another_kind(tmp_path):
    with pytest.raises(SuperPointError, match=r"match file .* does not exist"):
        MatchFile(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(SuperPointError, match="cannot be read as HDF5"):
        MatchFile(tmp_path / "text.h5")


def test_a_file_with_other_things_in_it(tmp_path):
    features, nowhere = tmp_path / "dataset.h5", tmp_path / "link.h5"
    with h5py.File(features, "w") as file:
        file["a.png"] = np.zeros((3, 2))
    with h5py.File(nowhere, "w") as file:
        file["a.png"] = h5py.SoftLink("/missing")
    for path in (features, nowhere):
        with MatchFile(path) as matches:
            for read in (lambda: list(matches.pairs(["a.png", "b.png"])), lambda: list(matches.entries())):
                with pytest.raises(SuperPointError, match=rf"{path.name} is no match file"):
                    read()
            with pytest.raises(SuperPointError, match="no matches of"):
                matches["a.png", "b.png"]
