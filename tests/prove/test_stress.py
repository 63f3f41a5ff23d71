"""Stress curves by known answers: perfect features share all points, wrong places none; and real photographs."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
from benchmarks import stress_plot
from click.testing import CliRunner
from conftest import photograph
from helpers import SAME

from superpoint_trt import packaged
from superpoint_trt.cli.main import cli, run
from superpoint_trt.cli.stress import StressArgs
from superpoint_trt.core.types import Keypoints, SuperPointError
from superpoint_trt.prove import stress as stress_module
from superpoint_trt.prove.changes import Change
from superpoint_trt.prove.metrics import warp
from superpoint_trt.prove.opencv_features import opencv_extractor
from superpoint_trt.prove.stress import TURNED_AND_SHRUNK, UNCHANGED, Figures, StressOptions, stress
from superpoint_trt.prove.stress_plot import model_title, plot_stress

FEW = StressOptions(rotations_deg=(0, 180), zooms=(1, 0.5), defocus_px=(0, 4), motion_px=(0, 10))
MATRIX = np.array([[0.5, -0.1, 30], [0.1, 0.5, 20], [0, 0, 1]])


def keypoints(xy, descriptors, size=(320, 240)):
    return Keypoints(np.float32(xy), np.linspace(1, 0.1, len(xy), dtype=np.float32), np.float32(descriptors), size)


def grid():
    """Sixty points, each with a descriptor of its own."""
    xy = np.array([[x, y] for y in range(20, 220, 40) for x in range(10, 310, 25)])
    return keypoints(xy, np.eye(len(xy)))


def test_perfect_features_share_every_point():
    first = grid()
    second = keypoints(warp(first.xy, MATRIX), first.descriptors)
    assert Figures.of(first, second, MATRIX) == Figures(1, 1, 1, 1)


def test_a_wrong_homography_shares_none():
    first = grid()
    second = keypoints(warp(first.xy, MATRIX), first.descriptors)
    wrong = np.array([[1, 0, 6.5], [0, 1, 0], [0, 0, 1]]) @ MATRIX
    found = Figures.of(first, second, wrong)
    assert (found.right, found.mma1, found.mma3) == (0, 0, 0)


def test_right_matches_are_shared_out_among_all_points_and_accuracy_among_matches():
    """Of 60 points 20 have no partner, 10 lie 2 px off and 10 lie 5 px off: 30 of 60, 20 of 40 and 30 of 40."""
    first = grid()
    xy = first.xy.copy()
    xy[:10, 0] += 2
    xy[10:20, 0] += 5
    second = keypoints(xy[:40], first.descriptors[:40])
    found = Figures.of(first, second, SAME)
    assert (found.right, found.mma1, found.mma3) == (0.5, 0.5, 0.75)


def test_pictures_without_points_count_0():
    nothing = grid().top(0)
    for pair in ((nothing, grid()), (grid(), nothing), (nothing, nothing)):
        assert Figures.of(*pair, SAME) == Figures(0, 0, 0, 0)


def test_points_outside_the_second_picture_do_not_count():
    first = grid()
    half = keypoints(first.xy, first.descriptors, (160, 240))
    inside = first.xy[:, 0] < 160
    assert 0 < inside.sum() < len(first)
    assert Figures.of(first, half, SAME).right == 1


def test_changes_are_each_made_once():
    changes = StressOptions().changes
    assert len(changes) == len(set(changes)) == 1 + 8 + 7 + 6 + 4 + 1
    assert changes[0] == UNCHANGED and TURNED_AND_SHRUNK in changes
    curves = StressOptions().curves
    assert curves["zoom"][1] == curves["rotation_deg"][0] == curves["defocus_px"][0] == curves["motion_px"][0]


def test_rootsift_is_the_root_of_sift():
    gray = photograph().astype(np.float32) / 255
    sift, root = (opencv_extractor(name, 200)(gray) for name in ("sift", "rootsift"))
    np.testing.assert_array_equal(sift.xy, root.xy)
    sums = sift.descriptors.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(root.descriptors, np.sqrt(sift.descriptors / sums), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(root.descriptors, axis=1), 1, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ workflow


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photographs, a small one and a file that is none."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee", "camera"):
        cv2.imwrite(str(folder / f"{name}.png"), photograph(240, 320, name))
    cv2.imwrite(str(folder / "small.png"), photograph(100, 200))
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff no picture")
    return folder


@pytest.fixture(scope="module")
def report(photos):
    return stress([photos], [packaged.DEFAULT, "rootsift"], FEW)


def test_the_report_on_real_photographs(report):
    assert report.photographs == ["astronaut.png", "camera.png", "coffee.png"]
    assert ["small.png" in report.problems[0], "torn.jpg" in report.problems[1]] == [True, True]
    ours, sift = report.models
    assert (ours.model, ours.precision, ours.subpixel) == (packaged.DEFAULT, "fp32", True)
    assert ours.backend.startswith("onnxruntime") and sift.backend.startswith("OpenCV")
    for figures in (ours.figures, sift.figures):
        assert figures[UNCHANGED].right > 0.5
        assert figures[UNCHANGED].mma3 > 0.9
        for worse in (Change(zoom=0.5), Change(defocus_px=4), TURNED_AND_SHRUNK):
            assert figures[worse].right < figures[UNCHANGED].right
    turned = Change(turn_deg=180)
    assert sift.figures[turned].right > 0.9 * sift.figures[UNCHANGED].right  # SIFT measures the angle
    assert sift.figures[TURNED_AND_SHRUNK].right / sift.figures[UNCHANGED].right == sift.of_unturned


def test_the_schema_of_the_json(report):
    data = json.loads(json.dumps(report.to_json()))
    assert set(data) == {"options", "photographs", "problems", "notes", "models"}
    assert data["options"]["max_keypoints"] == 1000
    figures = {"right", "mma", "repeatability"}
    for model in data["models"]:
        assert set(model) == {
            *("model", "backend", "device", "precision", "subpixel", "keypoints", "curves", "turned_90_zoom_0.5")
        }
        assert {name: [row["at"] for row in rows] for name, rows in model["curves"].items()} == {
            "rotation_deg": [0, 180],
            "zoom": [1, 0.5],
            "defocus_px": [0, 4],
            "motion_px": [0, 10],
        }
        assert all(set(row) == {"at", *figures} for rows in model["curves"].values() for row in rows)
        combined, unturned = model["turned_90_zoom_0.5"], model["curves"]["rotation_deg"][0]
        assert set(combined) == {*figures, "right_of_unturned"}
        assert combined["right_of_unturned"] == combined["right"] / unturned["right"]
        assert set(combined["mma"]) == {"1", "3"}


def test_a_photograph_is_changed_alike_under_every_name(photos, tmp_path):
    (tmp_path / "other.png").write_bytes((photos / "coffee.png").read_bytes())
    first, second = (stress([path], ["sift"], FEW) for path in (photos / "coffee.png", tmp_path / "other.png"))
    assert first.models == second.models


def test_photographs_are_spread_over_all(photos):
    two = StressOptions(photographs=2, rotations_deg=(), zooms=(), defocus_px=(), motion_px=())
    names = [photos / f"{name}.png" for name in ("astronaut", "camera", "coffee")]
    assert stress(names, ["orb"], two).photographs == ["astronaut.png", "coffee.png"]


def test_a_model_of_fixed_size_says_that_it_saw_shrunk_pictures(exported, photos):
    model = exported("v6", height_px=240, width_px=320)
    report = stress([photos / "coffee.png"], [model], FEW)
    assert len(report.notes) == 1
    assert "takes 320x240 px" in report.notes[0] and "--dynamic" in report.notes[0]
    assert not stress([photos / "coffee.png"], [exported("v6", dynamic=True)], FEW).notes


def test_a_missing_model_is_told_before_the_work(photos, monkeypatch):
    monkeypatch.setattr(stress_module, "_judge", lambda *_: pytest.fail("worked"))
    with pytest.raises(SuperPointError, match=r"no\.onnx"):
        stress([photos], ["sift", "no.onnx"], FEW)
    with pytest.raises(SuperPointError, match="no model"):
        stress([photos], [], FEW)


# -------------------------------------------------------------------------------------------------------------- picture


def test_the_picture_has_a_line_for_each_model_in_each_panel(report, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = cv2.imread(str(plot_stress(report.to_json()["models"], tmp_path / "s.png")))
    height, width = drawn.shape[:2]
    assert 800 < width < 1200 and 700 < height < 1200
    for bgr in ((178, 114, 0), (0, 94, 213)):
        there = (np.abs(drawn.astype(int) - bgr) < 8).all(axis=2)
        quarters = [there[y : y + height // 3, x : x + width // 2] for y in (0, height // 3) for x in (0, width // 2)]
        assert all(quarter.sum() > 200 for quarter in quarters)


def test_the_script_draws_models_of_several_files(report, tmp_path):
    pytest.importorskip("matplotlib")
    one, two, other = (tmp_path / f"{name}.json" for name in ("one", "two", "other"))
    data = report.to_json()
    one.write_text(json.dumps({**data, "models": data["models"][:1]}))
    two.write_text(json.dumps({**data, "models": data["models"][1:]}))
    other.write_text(json.dumps({**data, "photographs": ["another.png"]}))
    assert list(stress_plot.models_of((one, two))) == [packaged.DEFAULT, "rootsift"]
    drawn = tmp_path / "s.svg"
    words = [str(one), str(two), "--output", str(drawn), "--title", f"{packaged.DEFAULT}=version 1"]
    done = CliRunner().invoke(stress_plot.main, words)
    assert not done.exit_code, done.output
    assert drawn.exists()
    assert CliRunner().invoke(stress_plot.main, [*words, "--only", "nobody"]).exit_code == 2
    assert CliRunner().invoke(stress_plot.main, [str(one), str(other), "--output", str(drawn)]).exit_code == 2


def test_titles_say_what_differs():
    model = {"model": "runs/full.onnx", "precision": "int8", "subpixel": False}
    assert model_title(model) == "full, int8, whole pixels"
    assert model_title({"model": "packaged weights", "precision": "fp32", "subpixel": True}) == "packaged weights"


def test_files_of_one_name_are_told_apart(report, tmp_path):
    pytest.importorskip("matplotlib")
    data = report.to_json()
    first, second = ({**data["models"][0], "model": f"{folder}/full.onnx"} for folder in ("old", "new"))
    drawn = plot_stress([first, second], tmp_path / "s.svg").read_text()
    assert "old/full.onnx" in drawn and "new/full.onnx" in drawn
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps({**data, "models": [first]}))
    two.write_text(json.dumps({**data, "models": [second]}))
    done = CliRunner().invoke(stress_plot.main, [str(one), str(two), "--output", str(tmp_path / "s.png")])
    assert done.exit_code == 2 and "has another model named full" in done.output


# -------------------------------------------------------------------------------------------------------------- command


def command(capsys, *words, code=0):
    assert run(cli, ["evaluate", *(str(word) for word in words)]) == code
    return capsys.readouterr()


@pytest.fixture
def quick(monkeypatch):
    """Few changes, since the command has no options for them."""

    def options(self, subpixel):
        return replace(FEW, photographs=self.photographs, max_keypoints=self.max_keypoints, subpixel=subpixel)

    monkeypatch.setattr(StressArgs, "options", options)


def test_the_command_has_the_defaults_of_the_function():
    assert StressArgs().options(None) == StressOptions()
    assert StressArgs(3, 200, 320).options(False) == StressOptions(3, 200, 320, False)


def test_the_command(quick, photos, tmp_path, capsys, exported):
    pytest.importorskip("matplotlib")
    model = exported("v6", dynamic=True)
    outputs = ("--json", tmp_path / "s.json", "--plot", tmp_path / "s.png", "--table", tmp_path / "s.csv")
    told = command(
        capsys, "--stress", photos, "--model", model, "--model", "orb", "--no-subpixel", "--max-keypoints", 99, *outputs
    )
    assert "3, 2 left out" in told.out
    assert told.err.count("left out: ") == 2 and "torn.jpg" in told.err and "small.png" in told.err
    assert told.out.count("turned 90 degrees and shrunk to 0.5") == told.out.count("against none") == 4
    data = json.loads((tmp_path / "s.json").read_text())
    assert [one["model"] for one in data["models"]] == [str(model), "orb", "rootsift"]
    assert data["models"][0]["subpixel"] is False
    assert data["options"]["max_keypoints"] == 99 >= data["models"][0]["keypoints"]
    assert cv2.imread(str(tmp_path / "s.png")) is not None
    names, *rows = csv.reader((tmp_path / "s.csv").read_text().splitlines())
    assert names == ["right", str(model), "orb", "rootsift"] and rows[0][0] == "none" and rows[-1][0] == "against none"
    for column, one in enumerate(data["models"], start=1):
        assert float(rows[0][column]) == pytest.approx(one["curves"]["rotation_deg"][0]["right"], abs=1e-5)
        assert float(rows[-1][column]) == pytest.approx(one["turned_90_zoom_0.5"]["right_of_unturned"], abs=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stress", "{}/nowhere"], "do not exist"),
        (["--stress", "{}/torn.jpg", "--model", "sift"], "none of 1 photographs can be used"),
        (["--stress", "{}/small.png", "--model", "sift"], "200x100 px; a side must have 128 px"),
        (["--stress", "{}", "--dataset", "{}"], "one of --dataset FOLDER, --stress PHOTOS or --poses SCENE"),
        ([], "one of --dataset FOLDER, --stress PHOTOS or --poses SCENE"),
        (["--stress", "{}", "--resize", "fit"], "--resize has no effect with --stress"),
        (["--dataset", "{}", "--plot", "s.png"], "--plot has no effect with --dataset"),
        (["--stress", "{}", "--table", "t.xls"], "a table's name ends in"),
        (["--poses", "{}", "--table", "t.md"], "--table has no effect with --poses"),
        (["--stress", "{}", "--worst", "3"], "--worst has no effect with --stress"),
        (["--stress", "{}", "--plot", "s.txt"], "a plot's name ends in"),
        (["--stress", "{}", "--json", "{}/coffee.png"], "would overwrite"),
        (["--stress", "{}", "--photographs", "0"], "number of photographs is 0"),
        (["--stress", "{}", "--max-side", "9"], "longer side is 9; expected 128 to 8192"),
        (["--stress", "{}", *["--model", "orb"] * 8, "--plot", "s.png"], "9 models to draw"),
    ],
)
def test_bad_input_is_one_line(words, told, photos, capsys, tmp_path, monkeypatch):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stress_module, "_judge", lambda *_: pytest.fail("worked"))
    err = command(capsys, *(word.format(photos) for word in words), code=2).err
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_plot_without_matplotlib_is_refused_first(photos, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "the plot needs matplotlib" in command(capsys, "--stress", photos, "--plot", "s.png", code=2).err
