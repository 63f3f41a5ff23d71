"""The commands of the learned matcher: matcher export, build, verify; match and evaluate with --matcher; --poses."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import photograph
from helpers import write_sequence
from matchers import plain_matcher, random_matcher

from superpoint_trt import LearnedMatcher, packaged
from superpoint_trt.checkpoint.matcher import MatcherShape, save_matcher
from superpoint_trt.cli.main import cli
from superpoint_trt.core.files import file_sha256
from superpoint_trt.core.types import SuperPointError

SHAPE = MatcherShape((256,), 256, 4, 1)


@pytest.fixture(scope="module")
def matcher_file(tmp_path_factory):
    """Of the packaged network's descriptors; gives their mutual best."""
    folder = tmp_path_factory.mktemp("matcher")
    weights = save_matcher(plain_matcher(SHAPE), folder / "w.safetensors")
    assert run("matcher", "export", "--weights", weights, "--output", folder / "m.onnx").exit_code == 0
    return folder / "m.onnx"


def test_info_says_what_it_is(matcher_file):
    done = run("info", matcher_file)
    assert done.exit_code == 0 and "learned matcher, 1 layers, fp32" in done.output
    assert "any number of keypoints of each image, descriptors of 256 numbers" in done.output


def test_info_says_what_weights_are(tmp_path):
    weights = replace(plain_matcher(MatcherShape((256, 64), 256, 4, 2)), features={64: "b" * 64})
    done = run("info", save_matcher(weights, tmp_path / "w.safetensors"))
    assert done.exit_code == 0 and "weights of a learned matcher, 2 layers, width 256, 4 heads" in done.output
    assert "descriptors of 256 numbers; unknown" in done.output
    assert f"descriptors of 64 numbers; {'b' * 64}" in done.output
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert isinstance(run("info", tmp_path / "x.safetensors").exception, SuperPointError)


def run(*words):
    return CliRunner().invoke(cli, [str(word) for word in words])


@pytest.fixture
def images(tmp_path):
    whole = photograph(260, 340, "coffee")
    for index, (top, left) in enumerate(((0, 0), (16, 8))):
        cv2.imwrite(str(tmp_path / f"{index}.png"), whole[top : top + 240, left : left + 320])
    return tmp_path / "0.png", tmp_path / "1.png"


def test_match_by_a_matcher(matcher_file, images, tmp_path):
    words = ["match", *images, "--device", "cpu", "--max-keypoints", 200, "--save", tmp_path / "m.npz"]
    done = run(*words, "--matcher", matcher_file)
    assert done.exit_code == 0, done.output
    assert "1 layers, onnxruntime" in done.output and "supported" in done.output
    with np.load(tmp_path / "m.npz") as found:
        matches = found["matches"]
        moved = found["keypoints0"][matches[:, 0]] - found["keypoints1"][matches[:, 1]]
    assert len(matches) > 50 and (abs(moved - [8, 16]).max(axis=1) < 1).mean() > 0.8


def test_options_that_do_not_go_together(matcher_file, images):
    done = run("match", *images, "--matcher", matcher_file, "--ratio", 0.9, "--device", "cpu")
    assert done.exit_code == 2 and "--ratio and --max-distance are for --matcher nearest" in done.output
    done = run("match", *images, "--min-score", 0.2, "--device", "cpu")
    assert done.exit_code == 2 and "--min-score has no effect" in done.output


def test_learned_without_weights_is_one_clear_line(images, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "MATCHER", tmp_path / "none.safetensors")
    done = run("match", *images, "--matcher", "learned", "--device", "cpu")
    assert isinstance(done.exception, SuperPointError)
    assert "comes without weights of a learned matcher; name a file instead" in str(done.exception)


@pytest.fixture
def packaged_matcher(tmp_path, monkeypatch):
    """A version that comes with a matcher, of the packaged network `full`."""
    weights = replace(plain_matcher(SHAPE), features={256: file_sha256(packaged.WEIGHTS)})
    monkeypatch.setattr(packaged, "MATCHER", save_matcher(weights, tmp_path / "packaged.safetensors"))
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path / "cache"))


def test_learned_is_the_packaged_matcher(packaged_matcher, images, tmp_path):
    """Exported once; a network whose descriptors are as long is named, one of others is refused."""
    words = ["match", *images, "--device", "cpu", "--max-keypoints", 200, "--matcher", "learned"]
    done = run(*words)
    assert done.exit_code == 0 and "learned (1 layers, onnxruntime" in done.output, done.output
    assert "supported" in done.output and "another network" not in done.output
    kept = list((tmp_path / "cache").glob("superpoint_trt-matcher-*.onnx"))
    assert len(kept) == 1
    with LearnedMatcher(device="cpu") as matcher:
        assert matcher.description.features_sha256 == file_sha256(packaged.WEIGHTS)
    assert list((tmp_path / "cache").glob("superpoint_trt-matcher-*.onnx")) == kept
    done = run(*words, "--model", "full-v1")
    assert done.exit_code == 0 and "the matcher learned the descriptors of another network than full-v1" in done.output
    done = run(*words, "--model", "small")
    assert isinstance(done.exception, SuperPointError)
    assert re.search("have 64 numbers; the matcher .* takes 256: it belongs to another network", str(done.exception))
    assert "note:" not in done.output, "the error says it alone"


def test_weights_list_names_the_packaged_matcher(packaged_matcher, tmp_path, monkeypatch):
    said = run("weights", "list").output
    assert "learned (packaged matcher, --matcher learned): for the descriptors of full\n" in said
    assert "256 a descriptor" in said and "packaged.safetensors" in said
    monkeypatch.setattr(packaged, "MATCHER", tmp_path / "none.safetensors")
    assert "learned" not in run("weights", "list").output


def test_verify_passes_for_the_right_weights_and_fails_for_others(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), photograph(120, 160))
    weights = save_matcher(random_matcher(SHAPE), tmp_path / "w.safetensors")
    other = save_matcher(random_matcher(SHAPE, 1), tmp_path / "o.safetensors")
    run("matcher", "export", "--weights", weights, "--output", tmp_path / "m.onnx", "--min-score", 0.01)
    words = ["matcher", "verify", "--model", tmp_path / "m.onnx", "--images", tmp_path, "--device", "cpu"]
    done = run(*words, "--weights", weights, "--json", tmp_path / "v.json")
    assert done.exit_code == 0 and "PASSED" in done.output, done.output
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["passed"] and report["same_share"] == 1 and report["reference_matches"] > 20
    done = run(*words, "--weights", other)
    assert done.exit_code == 1 and "FAILED" in done.output


def test_evaluate_sets_the_matcher_beside_neighbors(matcher_file, tmp_path):
    write_sequence(tmp_path / "d" / "v_shift")
    words = [
        "evaluate",
        "--dataset",
        tmp_path / "d",
        "--no-baselines",
        "--device",
        "cpu",
        "--descriptor-size",
        "240x320",
    ]
    words += ["--descriptor-keypoints", 200, "--pictures", tmp_path / "p", "--worst", 1]
    done = run(*words, "--matcher", matcher_file, "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    assert sorted(path.parent.name for path in (tmp_path / "p").rglob("*.jpg")) == ["full", "full_learned"]
    report = json.loads((tmp_path / "r.json").read_text())
    nearest = report["baselines"]["nearest"]
    assert report["matcher"] == "learned" and nearest["matcher"] == "nearest"
    for one in (report, nearest):
        assert one["total"]["homography"]["3"] == 1 and one["total"]["right_matches"] > 50
    assert abs(report["total"]["matches"] - nearest["total"]["matches"]) < 10
    assert "learned matcher" in done.output


def test_poses_of_a_scene(matcher_file, tmp_path):
    from prove.test_poses import write_scene  # the same pictures with parallax

    scene = write_scene(tmp_path / "s")
    words = ["evaluate", "--poses", scene, "--pose-keypoints", 300, "--device", "cpu", "--json", tmp_path / "p.json"]
    done = run(*words, "--matcher", matcher_file, "--min-gap", 2)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "p.json").read_text())
    assert report["matcher"] == "learned" and report["total"]["pairs"] == 1
    assert set(report["total"]["pose_auc"]) == {"5", "10", "20"}
    assert all(0 <= area <= 1 for area in report["total"]["pose_auc"].values())
    assert report["pairs"][0]["first"] == "0.png" and "nearest, ratio 0.8" in report["baselines"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--poses", "s", "--dataset", "d"],
            "evaluate takes one of --dataset FOLDER, --stress PHOTOS or --poses SCENE",
        ),
        (["--dataset", "d", "--min-gap", "2"], "--min-gap has no effect with --dataset"),
        (["--poses", "s", "--ransac-orders", "2"], "--ransac-orders has no effect with --poses"),
        (["--stress", "s", "--matcher", "learned"], "--matcher has no effect with --stress"),
        (["--poses", "s", "--model", "a", "--model", "b"], "2 models were given; with --poses evaluate takes one"),
    ],
)
def test_ways_of_evaluate_do_not_mix(words, said):
    done = run("evaluate", *words)
    assert done.exit_code == 2 and said in done.output


def test_build_names_the_gpu_it_builds_for(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    weights = save_matcher(random_matcher(), tmp_path / "w.safetensors")
    run("matcher", "export", "--weights", weights, "--output", tmp_path / "m.onnx", "--keypoints", 64, "--layers", 1)
    words = ["matcher", "build", "--onnx", tmp_path / "m.onnx", "--engine", tmp_path / "m.engine", "--runtime", "rtx"]
    done = run(*words, "--target", "sm89")
    assert done.exit_code == 0 and "1 layers, 64 keypoints, fp32" in done.output, done.output


def test_match_pairs_takes_a_matcher(matcher_file, images, tmp_path):
    pytest.importorskip("h5py", reason="feature and match files need h5py (extra bulk)")
    features, pairs = tmp_path / "f.h5", tmp_path / "pairs.txt"
    assert run("extract", *images, "--output", features, "--device", "cpu", "--max-keypoints", 150).exit_code == 0
    pairs.write_text("0.png 1.png\n")
    words = ["match-pairs", "--features", features, "--pairs", pairs, "--device", "cpu", "--matcher", matcher_file]
    done = run(*words, "--output", tmp_path / "m.h5", "--min-score", 0.2)
    assert done.exit_code == 0 and "onnxruntime" in done.output, done.output
    done = run(*words, "--output", tmp_path / "n.h5", "--ratio", 0.9)
    assert done.exit_code == 2 and "--ratio and --max-distance are for --matcher nearest" in done.output
