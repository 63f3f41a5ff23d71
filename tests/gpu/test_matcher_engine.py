"""A matcher's engine on the GPU here gives the matches that onnxruntime finds with the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/matchers.py
from matchers import plain_matcher, points, random_matcher, shuffled

from superpoint_trt.checkpoint.matcher import MatcherShape, save_matcher
from superpoint_trt.convert.export_matcher import MatcherExportOptions, export_matcher
from superpoint_trt.convert.matcher_engine import build_matcher
from superpoint_trt.core.types import Precision, SuperPointError
from superpoint_trt.match.learned import LearnedMatcher

USUAL = MatcherShape((256,), 256, 4, 6)


def engine_of(weights, folder: Path, **options) -> Path:
    export_matcher(weights, folder / "m.onnx", MatcherExportOptions(256, **options))
    build_matcher(folder / "m.onnx", folder / "m.engine")
    return folder / "m.engine"


@pytest.mark.parametrize(
    ("precision", "half_softmax", "least"), [("fp32", False, 0.999), ("fp16", False, 0.97), ("fp16", True, 0.95)]
)
def test_engine_and_onnxruntime_agree(tmp_path, precision, half_softmax, least):
    weights = save_matcher(random_matcher(USUAL), tmp_path / "w.safetensors", half=False)
    plain = export_matcher(weights, tmp_path / "fp32.onnx", MatcherExportOptions(256))
    path = engine_of(weights, tmp_path, precision=Precision(precision), half_softmax=half_softmax)
    with LearnedMatcher(path) as matcher, LearnedMatcher(plain, "cpu") as reference:
        for count, seed in ((256, 0), (100, 1), (3, 2), (200, 3)):  # the second run is recorded, later ones replayed
            first = points(count, seed, 256)
            second = shuffled(first, noise=0.05)[0].rows(slice(0, max(1, count - 20)))
            found, expected = (set(map(tuple, one.match(first, second).rows.tolist())) for one in (matcher, reference))
            assert len(expected) > count // 3
            assert len(found & expected) / len(found | expected) >= least


def test_the_plain_matcher_finds_every_point(tmp_path):
    weights = save_matcher(plain_matcher(MatcherShape((256,), 256, 4, 1)), tmp_path / "w.safetensors")
    first = points(200, dim=256)
    second, there = shuffled(first, noise=0.02)
    with LearnedMatcher(engine_of(weights, tmp_path, precision=Precision.FP16)) as matcher:
        found = matcher.match(first, second)
        assert "cuda:" in matcher.runs_on and matcher.description.rows == 256
    np.testing.assert_array_equal(found.rows, np.stack([np.arange(200), there], axis=1))


def test_another_engine_is_refused(tmp_path):
    (tmp_path / "m.engine").write_bytes(b"ftrtnothing")
    with pytest.raises(SuperPointError, match="not an engine that can be loaded here"):
        LearnedMatcher(tmp_path / "m.engine")
