"""Matches of many pairs: known ones, equal to matching one pair at a time, and runs that are killed and go on."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from helpers import rarely
from matchers import plain_matcher, points, shuffled
from pipeline.hand_made import orthogonal, write_features

from superpoint_trt.checkpoint.matcher import save_matcher
from superpoint_trt.core.types import Keypoints, SuperPointError
from superpoint_trt.match.learned import LearnedMatcher
from superpoint_trt.match.matcher import HostMatcher
from superpoint_trt.match.nearest import MatchOptions, match
from superpoint_trt.pipeline import FeatureWriter
from superpoint_trt.pipeline import match_pairs as module
from superpoint_trt.pipeline.match_files import MatchFile
from superpoint_trt.pipeline.match_pairs import PairMatchOptions, match_pairs
from superpoint_trt.pipeline.merge import MadeBy
from superpoint_trt.pipeline.pairs import write_pairs
from superpoint_trt.pipeline.shards import CHECKPOINT, DESCRIPTORS_OF

pytest.importorskip("h5py", reason="feature and match files need h5py (extra bulk)")

ON_CPU = PairMatchOptions(device="cpu")


@pytest.fixture()
def features(tmp_path):
    return write_features(
        tmp_path / "features.h5",
        {
            "a/1.jpg": orthogonal([5, 6, 7]),
            "a/2.jpg": orthogonal([7, 5]),
            "b.jpg": orthogonal([]),
            "c.jpg": orthogonal([6]),
        },
    )


def test_known_matches(features, tmp_path):
    pairs = write_pairs(tmp_path / "pairs.txt", itertools.combinations(["a/1.jpg", "a/2.jpg", "b.jpg", "c.jpg"], 2))
    options = PairMatchOptions(MatchOptions(max_distance=0.5), "cpu")
    summary = match_pairs(features, pairs, tmp_path / "matches.h5", options)
    assert (summary.pairs, summary.done_before, summary.matches) == (6, 0, 3)
    with MatchFile(tmp_path / "matches.h5") as found:
        assert found["a/1.jpg", "a/2.jpg"].matches0.tolist() == [1, -1, 0]
        assert found["a/1.jpg", "c.jpg"].matches0.tolist() == [-1, 0, -1]
        assert found["a/1.jpg", "b.jpg"].matches0.tolist() == [-1, -1, -1]
        assert found["b.jpg", "c.jpg"].matches0.tolist() == []
        assert found["a/2.jpg", "c.jpg"].scores0.tolist() == [0, 0]
        assert found["a/1.jpg", "a/2.jpg"].scores0.tolist() == [1, 0, 1]


def test_features_of_another_network_as_long_are_refused(tmp_path):
    """The file says which checkpoint found them. A file that does not say so, as hloc's, is matched."""
    first = points(40)
    path = write_features(tmp_path / "f.h5", {"1.jpg": first, "2.jpg": shuffled(first)[0]})
    weights = replace(plain_matcher(), features={32: "a" * 64})
    options = PairMatchOptions(device="cpu", matcher=save_matcher(weights, tmp_path / "w.safetensors"))
    again = replace(options, overwrite=True)
    for text in (None, "of another tool", MadeBy("1", {"model": "x"}).to_json(), described("a" * 64)):
        describe(path, text)
        assert match_pairs(path, [("1.jpg", "2.jpg")], tmp_path / "m.h5", again).matches == 40
    describe(path, described("b" * 64, "a" * 64))  # of another network, lifted to what the matcher knows
    assert match_pairs(path, [("1.jpg", "2.jpg")], tmp_path / "m.h5", again).matches == 40
    describe(path, described("a" * 64, "b" * 64))
    with pytest.raises(SuperPointError, match=r"f\.h5 has features of another network"):
        match_pairs(path, [("1.jpg", "2.jpg")], tmp_path / "other.h5", options)
    describe(path, described("b" * 64))
    with pytest.raises(SuperPointError, match=r"f\.h5 has features of another network .*w\.safetensors learned"):
        match_pairs(path, [("1.jpg", "2.jpg")], tmp_path / "other.h5", options)
    assert not list(tmp_path.glob("other*"))
    assert match_pairs(path, [("1.jpg", "2.jpg")], tmp_path / "near.h5", ON_CPU).matches == 40


def described(checkpoint: str, descriptors_of: str | None = None) -> str:
    """What `extract` writes into a file of features of this checkpoint, lifted or not."""
    return MadeBy("1", {"model": "x", CHECKPOINT: checkpoint, DESCRIPTORS_OF: descriptors_of}).to_json()


def describe(path, text):
    if text is not None:
        with FeatureWriter(path, append=True) as writer:
            writer.describe(text)


def test_a_learned_matcher_takes_the_place_of_neighbors(tmp_path):
    """The plain matcher finds every point again; the file keeps its probabilities; another matcher is another run."""
    first = points(30)
    second, there = shuffled(first)
    features = write_features(tmp_path / "f.h5", {"a.jpg": first, "b.jpg": second, "none.jpg": points(0)})
    matcher = save_matcher(plain_matcher(), tmp_path / "w.safetensors")
    wanted = [("a.jpg", "b.jpg"), ("b.jpg", "none.jpg")]
    options = PairMatchOptions(device="cpu", matcher=matcher)
    summary = match_pairs(features, wanted, tmp_path / "m.h5", options)
    assert (summary.pairs, summary.matches) == (2, 30) and "torch" in summary.runs_on
    with LearnedMatcher(matcher, "cpu") as learned, MatchFile(tmp_path / "m.h5") as found:
        assert found["a.jpg", "b.jpg"].matches0.tolist() == there.tolist()
        scores = learned.match(first, second).scores
        np.testing.assert_allclose(found["a.jpg", "b.jpg"].scores0, scores, atol=2e-3)
    assert match_pairs(features, wanted, tmp_path / "m.h5", options).done_before == 2
    with pytest.raises(SuperPointError, match="was made with another matcher; choose another"):
        match_pairs(features, wanted, tmp_path / "m.h5", ON_CPU)


def noisy(count, seed):
    rng = np.random.default_rng(seed)
    base = np.random.default_rng(0).normal(size=(count, 64)) + 0.4 * rng.normal(size=(count, 64))
    unit = (base / np.linalg.norm(base, axis=1, keepdims=True)).astype(np.float32)
    order = rng.permutation(count)
    return Keypoints(np.zeros((count, 2), np.float32), np.ones(count, np.float32), unit[order], (640, 480))


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_features(
        tmp_path_factory.mktemp("many") / "features.h5", {f"{i}.jpg": noisy(40 + i, i + 1) for i in range(8)}
    )


ALL = list(itertools.combinations([f"{i}.jpg" for i in range(8)], 2))


def entries(path):
    with MatchFile(path) as found:
        return {pair: (one.matches0.tolist(), one.scores0.tolist()) for pair, one in found.entries()}


def test_equal_to_one_pair_at_a_time(many, tmp_path):
    from superpoint_trt.pipeline.feature_files import FeatureFile

    options = MatchOptions(max_ratio=0.95)
    match_pairs(many, ALL, tmp_path / "matches.h5", PairMatchOptions(options, "cpu", cache_mib=0))
    with FeatureFile(many) as features, MatchFile(tmp_path / "matches.h5") as found:
        for first, second in ALL:
            expected = match(features[first].descriptors, features[second].descriptors, options)
            assert found[first, second].rows.tolist() == expected.rows.tolist()
            assert len(expected) > 5


class Killed(BaseException):
    """What no code of the package catches, like a signal."""


@pytest.mark.parametrize("after", [0, 1, 5, 17, 27])
def test_a_killed_run_goes_on(many, tmp_path, monkeypatch, after):
    monkeypatch.setattr(module, "SHARD_PAIRS", 5)
    match_pairs(many, ALL, tmp_path / "whole.h5", ON_CPU)
    calls, real = [0], HostMatcher.match

    def fails(self, pairs):
        if calls[0] == after:
            raise Killed
        calls[0] += 1
        return real(self, pairs)

    with monkeypatch.context() as patch:
        patch.setattr(HostMatcher, "match", fails)
        with pytest.raises(Killed):
            match_pairs(many, ALL, tmp_path / "matches.h5", ON_CPU)
    assert not (tmp_path / "matches.h5").exists()
    summary = match_pairs(many, ALL, tmp_path / "matches.h5", ON_CPU)
    assert summary.done_before == after // 5 * 5 and summary.pairs == len(ALL)
    assert entries(tmp_path / "matches.h5") == entries(tmp_path / "whole.h5")
    assert not list(tmp_path.glob("*.shards"))


SLOWLY = """
import sys, time
from superpoint_trt.match.matcher import HostMatcher
from superpoint_trt.pipeline import FeatureWriter
from superpoint_trt.pipeline import match_pairs as module
real = HostMatcher.match
HostMatcher.match = lambda self, pairs: time.sleep(0.02) or real(self, pairs)
module.SHARD_PAIRS = 2
module.match_pairs(sys.argv[1], sys.argv[2], sys.argv[3], module.PairMatchOptions(device="cpu"))
"""


@pytest.mark.parametrize("finished", [1, 7, *rarely(0, 2, 4, 10, 13, 14)])
def test_a_process_that_is_killed_goes_on(many, tmp_path, finished):
    """By SIGKILL, when so many of 14 shards are finished."""
    pairs, output = write_pairs(tmp_path / "pairs.txt", ALL), tmp_path / "matches.h5"
    with subprocess.Popen([sys.executable, "-c", SLOWLY, str(many), str(pairs), str(output)]) as process:
        folder = tmp_path / "matches.h5.shards"
        while process.poll() is None and len(list(folder.glob("0*.json"))) < finished:
            time.sleep(0.002)
        process.kill()
    summary = match_pairs(many, pairs, output, ON_CPU)
    assert 2 * finished <= summary.done_before <= len(ALL)
    match_pairs(many, pairs, tmp_path / "whole.h5", ON_CPU)
    assert entries(output) == entries(tmp_path / "whole.h5")
    assert not folder.exists()


def test_a_finished_run_is_not_done_again_and_takes_more_pairs(many, tmp_path, monkeypatch):
    output = tmp_path / "matches.h5"
    match_pairs(many, ALL[:10], output, ON_CPU)
    with monkeypatch.context() as patch:
        patch.setattr(HostMatcher, "match", lambda *_: pytest.fail("matched again"))
        assert match_pairs(many, ALL[:10], output, ON_CPU).done_before == 10
    assert match_pairs(many, ALL[5:], output, ON_CPU).done_before == 5
    match_pairs(many, ALL, tmp_path / "whole.h5", ON_CPU)
    assert entries(output) == entries(tmp_path / "whole.h5")


def test_other_options_or_features_are_refused(many, features, tmp_path):
    output = tmp_path / "matches.h5"
    match_pairs(many, ALL[:2], output, ON_CPU)
    other = PairMatchOptions(MatchOptions(max_ratio=0.9), "cpu")
    with pytest.raises(
        SuperPointError, match=r"made with max_ratio none, not 0\.9; choose another --output, or --overwrite"
    ):
        match_pairs(many, ALL[:2], output, other)
    with pytest.raises(SuperPointError, match="made of other features"):
        match_pairs(features, [("a/1.jpg", "a/2.jpg")], output, ON_CPU)
    match_pairs(features, [("a/1.jpg", "a/2.jpg")], output, PairMatchOptions(device="cpu", overwrite=True))
    assert list(entries(output)) == [("a-1.jpg", "a-2.jpg")]


@pytest.fixture()
def unfinished(many, tmp_path, monkeypatch):
    """An output whose run was killed when all its shards were finished."""
    monkeypatch.setattr(module, "SHARD_PAIRS", 10)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_join", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            match_pairs(many, ALL, tmp_path / "matches.h5", ON_CPU)
    return tmp_path / "matches.h5"


def test_an_unfinished_run_of_something_else_is_refused(many, unfinished):
    with pytest.raises(SuperPointError, match="was made with mutual True, not False"):
        match_pairs(many, ALL, unfinished, PairMatchOptions(MatchOptions(mutual=False), "cpu"))
    with pytest.raises(SuperPointError, match="unfinished run over other pairs"):
        match_pairs(many, ALL[1:], unfinished, ON_CPU)
    assert match_pairs(many, ALL, unfinished, PairMatchOptions(device="cpu", overwrite=True)).done_before == 0


def test_a_damaged_shard_is_named(many, unfinished):
    part = sorted(unfinished.parent.glob("*.shards/*.npz"))[1]
    part.write_bytes(part.read_bytes()[:-30])
    with pytest.raises(SuperPointError, match=r"shard 1 .* another 00001\.npz .*; remove (.*) and run") as caught:
        match_pairs(many, ALL, unfinished, ON_CPU)
    os.remove(str(caught.value).split("remove ")[1].split(" and run")[0])
    assert match_pairs(many, ALL, unfinished, ON_CPU).done_before == 18
    assert len(entries(unfinished)) == len(ALL)


def test_a_kill_after_the_joining(many, tmp_path, monkeypatch):
    """The output is complete, its shards are still there."""
    output = tmp_path / "matches.h5"
    with monkeypatch.context() as patch:
        patch.setattr(module.ShardFolder, "remove", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            match_pairs(many, ALL, output, ON_CPU)
    assert match_pairs(many, ALL, output, ON_CPU).done_before == len(ALL)
    assert [path.name for path in tmp_path.iterdir()] == ["matches.h5"]


def test_several_processes_share_the_work(many, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_PAIRS", 3)
    match_pairs(many, ALL, tmp_path / "whole.h5", ON_CPU)
    parts = [
        match_pairs(many, ALL, tmp_path / "m.h5", PairMatchOptions(device="cpu", part=i, parts=3)) for i in (3, 1, 2)
    ]
    assert [part.unfinished_shards > 0 for part in parts] == [True, True, False]
    assert sum(part.pairs for part in parts) == len(ALL)
    assert entries(tmp_path / "m.h5") == entries(tmp_path / "whole.h5")


def test_the_same_part_twice_at_once_is_refused(many, unfinished):
    code = f"""
import os
from pathlib import Path
from superpoint_trt.pipeline.locks import RangeLock
with RangeLock(Path({str(unfinished) + ".shards"!r}) / "lock") as lock:
    assert lock.take(0, 1)
    print("locked", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(SuperPointError, match="another process works on this part"):
            match_pairs(many, ALL, unfinished, ON_CPU)
        other.communicate("\n")
    assert match_pairs(many, ALL, unfinished, ON_CPU).done_before == len(ALL)


def test_images_of_two_models_are_named(tmp_path):
    features = write_features(tmp_path / "f.h5", {"a": orthogonal([1], 64), "b": orthogonal([1], 256)})
    with pytest.raises(SuperPointError, match=r"f\.h5: descriptors of 'a' have 64 numbers, those of 'b' 256"):
        match_pairs(features, [("a", "b")], tmp_path / "m.h5", ON_CPU)


def test_an_image_without_features_and_names_that_collide(features, tmp_path):
    with pytest.raises(SuperPointError, match="no entry 'x'"):
        match_pairs(features, [("a/1.jpg", "x")], tmp_path / "m.h5", ON_CPU)
    with pytest.raises(SuperPointError, match="same name in a match file"):
        match_pairs(features, [("a/1.jpg", "a-1.jpg")], tmp_path / "m.h5", ON_CPU)


def test_a_gpu_that_is_not_there(features, tmp_path):
    from superpoint_trt.gpu import cuda

    try:
        cuda.current_device()
    except SuperPointError:
        with pytest.raises(SuperPointError):
            match_pairs(features, [("a/1.jpg", "a/2.jpg")], tmp_path / "m.h5", PairMatchOptions(device="cuda"))
        assert "CPU" in match_pairs(features, [("a/1.jpg", "a/2.jpg")], tmp_path / "m.h5").runs_on
    else:
        pytest.skip("there is a GPU")


def test_features_are_never_overwritten(features, tmp_path):
    before = features.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(SuperPointError, match="would overwrite"):
            match_pairs(
                features, [("a/1.jpg", "a/2.jpg")], features, PairMatchOptions(device="cpu", overwrite=overwrite)
            )
    assert features.read_bytes() == before


def test_a_folder_that_was_extracted_anew_is_other_features(tmp_path):
    """Entries of the same sizes and of another model."""
    pairs, folder = [("a", "b")], tmp_path / "npz"
    write_features(folder, {"a": orthogonal([1, 2]), "b": orthogonal([2, 1])})
    assert match_pairs(folder, pairs, tmp_path / "m.h5", ON_CPU).matches == 2
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert match_pairs(copy, pairs, tmp_path / "m.h5", ON_CPU).done_before == 1
    write_features(folder, {"b": orthogonal([7, 1])})
    with pytest.raises(SuperPointError, match="was made of other features"):
        match_pairs(folder, pairs, tmp_path / "m.h5", ON_CPU)


def test_a_device_that_is_not_there_leaves_nothing(features, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SuperPointError):
        match_pairs(features, [("a/1.jpg", "a/2.jpg")], tmp_path / "m.h5", PairMatchOptions(device="cuda:99"))
    assert sorted(tmp_path.iterdir()) == before
