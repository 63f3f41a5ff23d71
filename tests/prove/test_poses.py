"""`evaluate --poses`: areas with known answers, scenes and lists, and what is refused."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from conftest import SHARED, photograph

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.prove.posed_pairs import load_posed_pairs
from superpoint_trt.prove.poses import (
    MatcherPoses,
    PoseOptions,
    PoseResult,
    area_under_errors,
    direction_error_deg,
    evaluate_poses,
    rotation_error_deg,
)


@pytest.mark.parametrize(
    ("errors", "limit", "area"),
    [
        ([0, 0, 0], 5, 1.0),
        ([float("inf")] * 3, 20, 0.0),
        ([30, 40], 20, 0.0),
        ([0, float("inf")], 10, 0.5),
        # One pair, error 5: the share rises along a line from 0 at 0 to 1 at 5, and stays: (2.5 + 5) / 10.
        ([5], 10, 0.75),
        # Two pairs at 2 and 4: 0.5 at 2 (area 0.5), 1 at 4 (area 1.5), then 1 up to 10 (area 6).
        ([4, 2], 10, 0.8),
        ([], 5, 0.0),
    ],
)
def test_areas(errors, limit, area):
    assert area_under_errors(errors, limit) == pytest.approx(area)


def test_errors_of_angles():
    turned = cv2.Rodrigues(np.array([0, 0, np.radians(30)]))[0]
    assert rotation_error_deg(turned, np.eye(3)) == pytest.approx(30)
    assert direction_error_deg(np.array([1.0, 0, 0]), np.array([1.0, 1, 0])) == pytest.approx(45)
    assert direction_error_deg(np.array([-2.0, 0, 0]), np.array([1.0, 0, 0])) == 0, "the sign is not judged"


def test_the_worse_error_counts():
    assert PoseResult("a", "b", 1.0, 7.0, 10, 5).error_deg == 7.0
    lucky = MatcherPoses("nearest", [PoseResult("a", "b", 0.0, 0.0, 9, 9, (float("inf"), 0.0, float("inf")))])
    assert lucky.pose_auc == {5: 0.5, 10: 0.5, 20: 0.5}, "the mean over the orders"
    rows = MatcherPoses("nearest", [PoseResult("a", "b", None, None, 3, 0), PoseResult("a", "c", 0.0, 0.0, 9, 9)])
    report = rows.to_json()
    assert report["total"] == {"pairs": 2, "pose_auc": {"5": 0.5, "10": 0.5, "20": 0.5}, "matches": 6, "inliers": 4.5}
    assert report["pairs"][0]["error_deg"] is None and report["pairs"][1]["error_deg"] == 0


FOCAL, SIZE = 500.0, (320, 240)


def write_scene(folder, gaps=(0, 1, 2)):
    """A photograph far away and another before it, seen from cameras that move to the side."""
    (folder / "images").mkdir(parents=True)
    back, front = photograph(480, 640, "coffee"), photograph(200, 260, "astronaut")
    cameras = {}
    for index, place in enumerate(gaps):
        view = np.zeros(SIZE[::-1], np.uint8)
        for picture, depth in ((back, 8.0), (front, 4.0)):
            height, width = picture.shape
            scale = depth / 6  # of a pixel of the picture on the picture's plane, in units of FOCAL px at depth 1
            middle = FOCAL * -0.4 * place / depth
            shift = [[scale * 6 / depth, 0, SIZE[0] / 2 - width / 2 + middle], [0, 1, SIZE[1] / 2 - height / 2]]
            matrix = np.array([[1, 0, shift[0][2]], [0, 1, shift[1][2]]], np.float64)
            inside = cv2.warpAffine(np.full_like(picture, 255), matrix, SIZE) > 254
            view[inside] = cv2.warpAffine(picture, matrix, SIZE, flags=cv2.INTER_CUBIC)[inside]
        cv2.imwrite(str(folder / "images" / f"{index}.png"), view)
        cameras[f"{index}.png"] = {
            "fx_fy_cx_cy": [FOCAL, FOCAL, 159.5, 119.5],
            "cam_from_world_rotation": np.eye(3).tolist(),
            "centre": [0.4 * place, 0, 0],
        }
    (folder / "cameras.json").write_text(json.dumps(cameras))
    return folder


def test_a_scene_gives_its_pairs(tmp_path):
    pairs = load_posed_pairs(write_scene(tmp_path / "s"))
    assert [(pair.first.name, pair.second.name) for pair in pairs] == [
        ("0.png", "1.png"),
        ("0.png", "2.png"),
        ("1.png", "2.png"),
    ]
    np.testing.assert_allclose(pairs[1].translation, [-0.8, 0, 0])
    np.testing.assert_array_equal(pairs[0].rotation, np.eye(3))
    assert len(load_posed_pairs(tmp_path / "s", 2)) == 1
    with pytest.raises(SuperPointError, match="none of them 3 apart"):
        load_posed_pairs(tmp_path / "s", 3)


def test_a_list_gives_the_same_pairs(tmp_path):
    scene = write_scene(tmp_path / "s")
    numbers = " ".join(map(str, [500, 0, 159.5, 0, 500, 119.5, 0, 0, 1]))
    pose = "1 0 0 -0.8  0 1 0 0  0 0 1 0  0 0 0 1"
    listed = scene / "pairs.txt"
    listed.write_text(f"images/0.png images/2.png 0 0 {numbers} {numbers} {pose}\n\n")
    pair, same = load_posed_pairs(listed)[0], load_posed_pairs(scene)[1]
    assert (pair.first, pair.second) == (same.first, same.second)
    for name in ("first_intrinsics", "second_intrinsics", "rotation", "translation"):
        np.testing.assert_allclose(getattr(pair, name), getattr(same, name))
    for text, said in (
        ("a b 1 2\n", "4 columns; expected 38"),
        (listed.read_text().replace(".png 0 0", ".png 1 0"), "turned by quarters"),
        (listed.read_text().replace("images/2", "images/9"), "does not exist"),
        (listed.read_text().replace(" 1 0 0 -0.8", " 9 0 0 -0.8"), "the rotation is none"),
        ("", "empty"),
    ):
        listed.write_text(text)
        with pytest.raises(SuperPointError, match=said):
            load_posed_pairs(listed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda cameras: cameras["1.png"].pop("centre"), "centre"),
        (lambda cameras: cameras["1.png"].update(centre=[1, 2]), "expected .3,. finite numbers"),
        (lambda cameras: cameras["1.png"].update(cam_from_world_rotation=[[2, 0, 0]] * 3), "the rotation is none"),
        (lambda cameras: cameras.update({"9.png": cameras["1.png"]}), "names 9.png, which is neither"),
        (lambda cameras: cameras["1.png"].update(centre="x"), "cannot be read"),
    ],
)
def test_damaged_scenes_are_refused(tmp_path, change, said):
    scene = write_scene(tmp_path / "s")
    cameras = json.loads((scene / "cameras.json").read_text())
    change(cameras)
    (scene / "cameras.json").write_text(json.dumps(cameras))
    with pytest.raises(SuperPointError, match=said):
        load_posed_pairs(scene)


def test_a_sideways_move_is_found(tmp_path):
    """Real features on pictures with parallax: the pose is right for every pair, and the report says so."""
    scene = write_scene(tmp_path / "s")
    from superpoint_trt.convert.default_model import default_model

    found = evaluate_poses(default_model(), scene, PoseOptions(max_keypoints=400, orders=3), device="cpu", threads=1)
    report = found.to_json()
    assert report["matcher"] == "nearest" and report["total"]["pairs"] == len(report["pairs"]) == 3
    assert report["total"]["pose_auc"]["20"] > 0.6
    assert set(report["baselines"]) == {
        "nearest, ratio 0.95",
        "nearest, ratio 0.9",
        "nearest, ratio 0.85",
        "nearest, ratio 0.8",
    }
    assert report["total"]["inliers"] > 50
    assert all(len(row["further_errors_deg"]) == 2 for row in report["pairs"])
    with pytest.raises(SuperPointError, match="orders are 0"):
        PoseOptions(orders=0)


def test_an_unreadable_image_is_named(tmp_path):
    from superpoint_trt.convert.default_model import default_model

    scene = write_scene(tmp_path / "s")
    (scene / "images" / "0.png").write_bytes(b"nothing")
    found = evaluate_poses(default_model(), scene, PoseOptions(max_keypoints=100), device="cpu", threads=1)
    assert len(found.problems) == 1 and "0.png" in found.problems[0]
    assert len(found.matchers[0].pairs) == 1


def test_the_surveyed_scenes_are_read():
    scene = SHARED / "data" / "sfm" / "Herz-Jesus-P8"
    if not scene.is_dir():
        pytest.skip("../shared/data/sfm is not here")
    pairs = load_posed_pairs(scene, 3)
    assert len(pairs) == 15
    angles = [rotation_error_deg(pair.rotation, np.eye(3)) for pair in pairs]
    assert min(angles) > 10 and max(angles) < 70
