"""Two images matched, and their file."""

from __future__ import annotations

import numpy as np

from superpoint_trt import Keypoints, MatchOptions, match_images
from superpoint_trt.match.geometry import Model
from superpoint_trt.match.images import save_matches


def features(shift: float, count: int = 40) -> Keypoints:
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, 200, (count, 2)).astype(np.float32) + np.float32(shift)
    descriptors = rng.normal(size=(count, 8)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    return Keypoints(xy, np.linspace(1, 0.1, count, dtype=np.float32), descriptors, (300, 200))


def test_a_shift_is_found_and_written(tmp_path):
    found = match_images(features(0), features(7), MatchOptions(max_distance=0.5))
    assert len(found.matches) == 40 and found.geometry.inliers.all()
    np.testing.assert_allclose(found.geometry.matrix, [[1, 0, 7], [0, 1, 7], [0, 0, 1]], atol=1e-3)
    first, second = found.places()
    np.testing.assert_allclose(second - first, 7, atol=1e-4)
    with np.load(save_matches(tmp_path / "m.npz", found)) as arrays:
        assert set(arrays) == {
            *(f"{name}{index}" for name in ("keypoints", "scores", "descriptors", "image_size") for index in (0, 1)),
            "matches",
            "distances",
            "inliers",
            "geometry",
            "geometry_type",
            "geometry_supported",
            "geometry_log10_nfa",
        }
        assert arrays["geometry_supported"] and arrays["geometry_log10_nfa"] == found.geometry.log10_nfa < -100
        np.testing.assert_array_equal(arrays["keypoints1"], found.second.xy)
        np.testing.assert_array_equal(arrays["matches"], found.matches.rows)
        assert str(arrays["geometry_type"]) == "homography"


def test_no_geometry_is_written_as_zeros(tmp_path):
    found = match_images(features(0, 3), features(7, 3), model=Model.FUNDAMENTAL)
    with np.load(save_matches(tmp_path / "m.npz", found)) as arrays:
        assert not arrays["geometry"].any() and not arrays["inliers"].any()
        assert str(arrays["geometry_type"]) == "fundamental"
        assert not arrays["geometry_supported"] and arrays["geometry_log10_nfa"] == np.inf


def test_captions_say_what_was_found():
    found = match_images(features(0), features(7), MatchOptions(max_distance=0.5))
    assert found.caption("models/small.onnx") == "small.onnx: 40 matches, 40 inliers of one homography"
    np.testing.assert_allclose(found.distances_px(), 0, atol=1e-3)
    none = match_images(features(0, 3), features(7, 3), model=Model.FUNDAMENTAL)
    assert none.caption("full") == "full: 3 matches, no fundamental matrix"
    assert np.isinf(none.distances_px()).all()


def test_a_caption_doubts_what_chance_gives():
    rng = np.random.default_rng(1)
    one, other = features(0), features(0)
    other = Keypoints(rng.uniform(0, 200, (40, 2)).astype(np.float32), other.scores, other.descriptors, (300, 200))
    found = match_images(one, other)
    assert found.geometry.matrix is not None and not found.geometry.supported
    assert found.caption("full").endswith("of one homography, no more than chance gives")
