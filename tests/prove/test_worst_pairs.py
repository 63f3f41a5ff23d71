"""The pairs with the worst homographies, and their pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import MOVE, SAME, write_sequence

from superpoint_trt import Keypoints, SuperPointError
from superpoint_trt.prove.datasets import Pair
from superpoint_trt.prove.evaluate import PairResult, evaluate
from superpoint_trt.prove.protocol import Protocol, Resize
from superpoint_trt.prove.worst_pairs import (
    JudgedPair,
    WorstPairs,
    draw_worst_pairs,
    folder_of,
    pair_caption,
)

NOTHING = Keypoints(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), np.zeros((0, 4), np.float32), (64, 48))


def judged(name: str, *errors_px: float) -> JudgedPair:
    pair = Pair(name, "other", Path(f"{name}/1.ppm"), Path(f"{name}/2.ppm"), SAME)
    return JudgedPair(
        PairResult(pair, None, None, [], list(errors_px), 0.0, 0.0, 0, 0), NOTHING, NOTHING, SAME, np.zeros((0, 2), int)
    )


def test_the_worst_are_kept_in_order():
    worst = WorstPairs(3)
    for pair in (judged("a", 1.0), judged("b", np.inf), judged("c", 5.0), judged("d", 0.1), judged("e", 5.0)):
        worst.add(pair)
    assert [pair.result.pair.sequence for pair in worst.pairs] == ["b", "c", "e"]


def test_captions():
    assert pair_caption("x/m.onnx", judged("graf", 1.0, 12.34, 90.0), 7, 10) == (
        "graf 1 and 2, m.onnx: 7 of 10 matches right, homography off by 12.3 px"
    )
    assert pair_caption("full", judged("graf", np.inf), 0, 0).endswith("0 of 0 matches right, no homography found")


def test_folders_of_models():
    assert folder_of("out", "full") == str(Path("out/full"))
    assert folder_of("out", "/some/where/m.onnx") == str(Path("out/some_where_m.onnx"))
    assert folder_of("out", "..") == str(Path("out/model"))


def test_pictures_of_a_dataset(exported, tmp_path):
    """Of a shift and a wrong homography the wrong one is drawn first, with wrong lines; the shift has right ones."""
    wrong = np.array([[1.0, 0, 200], [0, 1, 100], [0, 0, 1]])
    folder = write_sequence(tmp_path / "data" / "v_a", homographies=(MOVE, SAME))
    np.savetxt(folder / "H_1_3", wrong)
    worst = WorstPairs(5)
    evaluation = evaluate(exported("v6", dynamic=True), tmp_path / "data", Protocol(resize=Resize.NONE), worst=worst)
    paths = draw_worst_pairs(evaluation, worst, tmp_path / "pictures")
    assert [path.name for path in paths] == ["01_v_a_1_3.jpg", "02_v_a_1_2.jpg"]
    assert worst.pairs[0].error_px > 10 > 1 > worst.pairs[1].error_px
    vermilion, blue = [], []
    for path in paths:
        picture = cv2.imread(str(path))[:480, 600:690, ::-1].astype(int)  # around the gap: lines on gray photographs
        vermilion.append(int(((picture[..., 0] - picture[..., 2] > 80) & (picture[..., 1] < 140)).sum()))
        blue.append(int((picture[..., 2] - picture[..., 0] > 60).sum()))
    assert blue[1] > 20 * max(blue[0], 1), "right lines are blue"
    assert vermilion[0] > 3 * vermilion[1], "wrong lines are vermilion"


def test_a_lost_image_is_an_error(exported, tmp_path):
    write_sequence(tmp_path / "v_a", homographies=(SAME,))
    worst = WorstPairs(1)
    evaluation = evaluate(exported("v6", dynamic=True), tmp_path, Protocol(resize=Resize.NONE), worst=worst)
    (pair,) = worst.pairs
    gone = replace(pair.result.pair, second=tmp_path / "gone.ppm")
    worst.pairs[0] = replace(pair, result=replace(pair.result, pair=gone))
    with pytest.raises(SuperPointError, match="does not exist"):
        draw_worst_pairs(evaluation, worst, tmp_path / "out")
