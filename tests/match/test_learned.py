"""The learned matcher on keypoints: every kind of file, what it refuses, the commands that use it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matchers import plain_matcher, points, shuffled

from superpoint_trt import match_images
from superpoint_trt.checkpoint.matcher import MatcherShape, save_matcher
from superpoint_trt.convert.export_matcher import MatcherExportOptions, export_matcher
from superpoint_trt.core.matcher import MIN_SCORE
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.learned import LearnedMatcher


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_matcher(plain_matcher(), tmp_path_factory.mktemp("w") / "w.safetensors")


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    fixed = export_matcher(weights, folder / "fixed.onnx", MatcherExportOptions(50))
    return {"weights": weights, "free": export_matcher(weights, folder / "free.onnx"), "fixed": fixed}


@pytest.mark.parametrize("kind", ["weights", "free", "fixed"])
def test_every_point_is_found_again(files, kind):
    first = points(40)
    second, there = shuffled(first)
    some = second.rows(slice(0, 30))
    with LearnedMatcher(files[kind], "cpu", threads=1) as matcher:
        found = matcher.match(first, some)
        assert "cpu" in matcher.runs_on.lower()
    expected = np.flatnonzero(there < 30)
    np.testing.assert_array_equal(found.rows, np.stack([expected, there[expected]], axis=1))
    differences = first.descriptors[found.rows[:, 0]] - some.descriptors[found.rows[:, 1]]
    np.testing.assert_allclose(found.distances, np.linalg.norm(differences, axis=1), atol=1e-5)
    assert (found.scores > MIN_SCORE).all() and len(found.scores) == len(found) == 30


def test_a_matcher_of_n_rows_takes_the_best_n(files):
    first = points(80)
    with LearnedMatcher(files["fixed"], "cpu") as matcher:
        found = matcher.match(first, first)
    np.testing.assert_array_equal(found.rows, np.stack([np.arange(50)] * 2, axis=1))


def test_weights_for_two_networks_take_the_descriptors_of_both(tmp_path):
    shape = MatcherShape((32, 16), 32, 2, 1)
    both = replace(plain_matcher(shape), features={32: "a" * 64, 16: "b" * 64})
    path = save_matcher(both, tmp_path / "both.safetensors")
    with LearnedMatcher(path, "cpu", threads=1) as matcher:
        for dim in (32, 16):
            first = points(20, dim=dim)
            second, there = shuffled(first)
            assert matcher.match(first, second).rows[:, 1].tolist() == there.tolist()
        assert [matcher.is_of_another(one) for one in ("a" * 64, "b" * 64, "c" * 64, None)] == [
            False,
            False,
            True,
            False,
        ]
        with pytest.raises(
            SuperPointError, match=r"have 8 numbers; the matcher .* takes 32 or 16: it belongs to another"
        ):
            matcher.match(points(5, dim=8), points(5, dim=8))


def test_no_points_no_matches(files):
    with LearnedMatcher(files["free"], "cpu") as matcher:
        found = matcher.match(points(0), points(5))
        assert len(found) == 0 and found.rows.shape == (0, 2) and found.scores.shape == (0,)


def test_it_takes_the_place_of_neighbors(files):
    first = points(60)
    second, _ = shuffled(first)
    with LearnedMatcher(files["free"], "cpu") as matcher:
        found = match_images(first, second, matcher=matcher)
    assert len(found.matches) == 60 and found.geometry.inliers.all()


def test_a_higher_score_leaves_fewer_matches(files):
    first = points(40)
    second, _ = shuffled(first, noise=0.3)
    with LearnedMatcher(files["free"], "cpu") as usual, LearnedMatcher(files["free"], "cpu", min_score=0.9) as strict:
        many, few = usual.match(first, second), strict.match(first, second)
    assert len(few) == (many.scores > 0.9).sum() < len(many)
    with pytest.raises(SuperPointError, match=rf"from 0.001 on were asked .* gives those from {MIN_SCORE:g} on"):
        LearnedMatcher(files["free"], "cpu", min_score=0.001)


def test_what_does_not_fit_is_refused(files, tmp_path):
    with LearnedMatcher(files["free"], "cpu") as matcher, pytest.raises(SuperPointError, match="have 16 numbers"):
        matcher.match(points(5, dim=16), points(5, dim=16))
    with pytest.raises(SuperPointError, match="was closed"):
        matcher.match(points(5), points(5))
    with pytest.raises(SuperPointError, match=r"a matcher's name ends in .onnx"):
        LearnedMatcher(tmp_path / "m.txt")
    with pytest.raises(SuperPointError, match="does not exist"):
        LearnedMatcher(tmp_path / "m.onnx")
    with pytest.raises(SuperPointError, match="runs on cuda"):
        LearnedMatcher(tmp_path / "m.engine", "cpu")
    with pytest.raises(SuperPointError, match="least score is 2"):
        LearnedMatcher(files["free"], min_score=2)


def test_another_model_is_refused(checkpoint_file, tmp_path):
    from superpoint_trt.convert.export import export

    model = export(checkpoint_file("v6"), tmp_path / "m.onnx")
    with pytest.raises(SuperPointError, match="is not a matcher of this package"):
        LearnedMatcher(model, "cpu")
