"""Feature files: what is saved is read again; what is none is refused before it is unpacked."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt import Keypoints, SuperPointError
from superpoint_trt.run.store import load_features, save_features


def keypoints(count: int = 5, kind: type = np.float32) -> Keypoints:
    rng = np.random.default_rng(0)
    xy, scores = rng.random((count, 2), np.float32), np.sort(rng.random(count, np.float32))[::-1]
    return Keypoints(xy, scores, rng.random((count, 8)).astype(kind), (640, 480))


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_what_is_saved_is_read_again(tmp_path, count, kind):
    saved = keypoints(count, kind)
    found = load_features(save_features(tmp_path / "f.npz", saved))
    for name in ("xy", "scores", "descriptors"):
        np.testing.assert_array_equal(getattr(found, name), getattr(saved, name).astype(np.float32))
    assert found.image_size == (640, 480)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("scores", np.full(5, 1e300), "scores holds values"),
        ("keypoints", np.full((5, 2), np.nan), "keypoints holds values"),
        ("scores", np.zeros(4), "shapes"),
        ("descriptors", np.zeros((5, 8, 1)), "shapes"),
        ("image_size", np.zeros(3, int), "shapes"),
        ("scores", np.array(["a"] * 5), "not numbers"),
        ("descriptors", np.zeros((5, 8), complex), "not numbers"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_feature_file(tmp_path, name, array, says):
    np.savez(tmp_path / "f.npz", **{**keypoints().to_dict(), name: array})
    with pytest.raises(SuperPointError, match=rf"f\.npz is not a feature file.*{says}"):
        load_features(tmp_path / "f.npz")
