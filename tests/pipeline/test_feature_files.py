"""Feature files: hloc's layout as h5py sees it, round trips, names, and a file that is never half there."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from superpoint_trt import Keypoints, SuperPointError
from superpoint_trt.pipeline import FeatureFile, FeatureWriter, read_features

h5py = pytest.importorskip("h5py", reason="feature files in HDF5 need h5py: pip install '.[bulk]'")

NAMES = ("street/b.jpg", "a.png", "video.mp4/000123_4.100s", "street/with space.jpg", "straße/日本.jpg")


def keypoints(seed: int, count: int = 5, dim: int = 16) -> Keypoints:
    rng = np.random.default_rng(seed)
    descriptors = rng.normal(size=(count, dim)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    xy = (rng.random((count, 2)) * 4000).astype(np.float32)
    return Keypoints(xy, np.sort(rng.random(count).astype(np.float32))[::-1], descriptors, (4000, 3000))


def write(path, names=NAMES, **how):
    with FeatureWriter(path, **how) as writer:
        for index, name in enumerate(names):
            writer.write(name, keypoints(index, count=index % 9), (4000, 3000), uncertainty=3.5)
    return path


@pytest.fixture(params=["features.h5", "folder"])
def path(request, tmp_path):
    return tmp_path / request.param


def test_the_layout_that_hloc_reads(tmp_path):
    """Read as hloc's readers do: `list_h5_names`, `get_keypoints`, and the matchers' `v.__array__()`."""
    with h5py.File(write(tmp_path / "features.h5"), "r") as file:
        found = set()
        file.visititems(
            lambda _, item: found.add(item.parent.name.strip("/")) if isinstance(item, h5py.Dataset) else None
        )
        assert found == set(NAMES)
        group, expected = file[NAMES[3]], keypoints(3, count=3)
        assert set(group) == {"keypoints", "scores", "descriptors", "image_size"}
        assert group["keypoints"].dtype == np.float32 and group["keypoints"].shape == (3, 2)
        np.testing.assert_array_equal(group["keypoints"].__array__(), expected.xy)
        assert group["keypoints"].attrs["uncertainty"] == 3.5
        assert group["descriptors"].dtype == np.float16 and group["descriptors"].shape == (16, 3)
        np.testing.assert_allclose(group["descriptors"].__array__(), expected.descriptors.T, atol=1e-3)
        assert group["image_size"].dtype == np.int64 and group["image_size"].__array__().tolist() == [4000, 3000]


def test_round_trip(path):
    write(path, dtype="float32")
    entries = dict(read_features(path))
    assert list(entries) == sorted(NAMES)
    for index, name in enumerate(NAMES):
        found, expected = entries[name], keypoints(index, count=index)
        np.testing.assert_array_equal(found.keypoints, expected.xy)
        np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_array_equal(found.descriptors, expected.descriptors)
        assert found.image_size == (4000, 3000) and found.uncertainty == 3.5 and len(found) == index
        assert found.to_keypoints().descriptors.flags.c_contiguous


def test_random_access(path):
    write(path)
    with FeatureFile(path) as features:
        assert len(features) == len(NAMES) and list(features) == features.names() == sorted(NAMES)
        assert NAMES[2] in features and "video.mp4" not in features and "other" not in features
        assert len(features[NAMES[2]]) == 2
        with pytest.raises(SuperPointError, match=r"has no entry 'other'.*another root"):
            features["other"]


def test_keypoints_beyond_2048_px_keep_their_place(tmp_path):
    """float16, as other tools store them, has steps of 2 px there."""
    with FeatureWriter(tmp_path / "f.h5") as writer:
        place = np.array([[3001.25, 2999.75]], np.float32)
        writer.write("a", Keypoints(place, np.ones(1), np.ones((1, 8)), (1, 1)), (4000, 3000))
    with FeatureFile(tmp_path / "f.h5") as features:
        np.testing.assert_array_equal(features["a"].keypoints, place)


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", "a/./b", "a/", "a\0b"])
def test_a_name_that_leaves_the_file(path, name):
    with pytest.raises(SuperPointError, match="cannot name an image"), FeatureWriter(path) as writer:
        writer.write(name, keypoints(0), (9, 9))


def test_one_name_twice(tmp_path):
    with pytest.raises(SuperPointError, match=r"has an entry 'a' already"):
        write(tmp_path / "f.h5", ("a", "a"))
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_middle_leaves_the_old_file(tmp_path):
    path = write(tmp_path / "f.h5")
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), FeatureWriter(path) as writer:
        writer.write("new", keypoints(0), (9, 9))
        assert path.read_bytes() == before
        raise ZeroDivisionError
    assert [file.name for file in tmp_path.iterdir()] == ["f.h5"] and path.read_bytes() == before


def test_damaged_files(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    with pytest.raises(SuperPointError, match=r"text\.h5 cannot be read as HDF5"):
        FeatureFile(text)
    with pytest.raises(SuperPointError, match="does not exist"):
        FeatureFile(tmp_path / "missing.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a/keypoints"] = np.zeros((3, 2))
        file["b/keypoints"], file["b/scores"] = np.zeros((3, 2)), np.zeros(2)
        file["b/descriptors"], file["b/image_size"] = np.zeros((8, 3)), np.zeros(2)
    with FeatureFile(tmp_path / "other.h5") as features:
        for name in "ab":
            with pytest.raises(SuperPointError, match=f"entry '{name}' cannot be read"):
                features[name]


def test_without_h5py(tmp_path, monkeypatch):
    write(tmp_path / "f.h5")
    real = builtins.__import__

    def without(name, *rest):
        if name == "h5py":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for use in (FeatureFile, FeatureWriter):
        with pytest.raises(SuperPointError, match=r"need h5py: pip install '\.\[bulk\]'"):
            use(tmp_path / "f.h5")
    write(tmp_path / "folder")
    assert dict(read_features(tmp_path / "folder"))


def damaged_by(tmp_path, change):
    """A file of one sound entry, "a", that `change` damages."""
    path = write(tmp_path / "f.h5", ("none", "a"))
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def replaced(key, value):
    def change(file):
        del file["a"][key]
        file["a"][key] = value

    return change


DAMAGE = {
    "it has no scores": lambda file: file["a"].__delitem__("scores"),
    "keypoints is no array of numbers": replaced("keypoints", np.array([[b"x", b"y"]])),
    "descriptors is no array of numbers": replaced("descriptors", np.full((16, 1), b"x")),
    "scores is no array of numbers": replaced("scores", h5py.Empty("f4")),
    r"keypoints \(\)": replaced("keypoints", 3.0),
    "image_size is": replaced("image_size", np.array([np.nan, 3.0])),
    "keypoints hold numbers that are not finite": replaced("keypoints", np.array([[np.nan, 1]])),
    "descriptors hold numbers that are not finite": replaced("descriptors", np.full((16, 1), np.inf)),
    "descriptors are uint8": replaced("descriptors", np.ones((16, 1), np.uint8)),
    "more than the file can hold": lambda file: (
        file["a"].__delitem__("keypoints"),
        file["a"].create_dataset("keypoints", (10**12, 2), "f4", chunks=(1024, 2)),
    ),
    "could not convert": lambda file: file["a/keypoints"].attrs.__setitem__("uncertainty", "x"),
}


@pytest.mark.parametrize("told", DAMAGE)
def test_an_entry_of_something_else(tmp_path, told):
    with FeatureFile(damaged_by(tmp_path, DAMAGE[told])) as features:
        assert features.names() == ["a", "none"]
        with pytest.raises(SuperPointError, match=rf"f\.h5: the entry 'a' cannot be read \(.*{told}"):
            features["a"]


def test_links_that_go_in_circles(tmp_path):
    def change(file):
        file["circle/again"] = file["/"]
        file["soft"], file["nowhere"] = h5py.SoftLink("/"), h5py.SoftLink("/missing")

    with FeatureFile(damaged_by(tmp_path, change)) as features:
        assert features.names() == ["a", "none"]


def test_a_name_that_is_no_text(path):
    with pytest.raises(SuperPointError, match="no UTF-8 text; rename the file"), FeatureWriter(path) as writer:
        writer.write("\udcff.png", keypoints(0), (9, 9))


def test_an_uncertainty_that_is_no_number(tmp_path):
    write(tmp_path / "folder", ("a",))
    with np.load(tmp_path / "folder" / "a.npz") as arrays:
        np.savez(tmp_path / "folder" / "a.npz", **{**arrays, "uncertainty": np.array(["x"])})
    with FeatureFile(tmp_path / "folder") as features, pytest.raises(SuperPointError, match="uncertainty is no number"):
        features["a"]
