"""match, verify and evaluate on the command line: exit codes, files, pictures, one clear line for bad input."""

from __future__ import annotations

import json
import re

import cv2
import numpy as np
import pytest
from conftest import photograph
from test_evaluate import write_sequence

from superpoint_trt.cli import cli, run
from superpoint_trt.export import ExportOptions, export


@pytest.fixture(scope="module")
def desk(checkpoint_file, tmp_path_factory):
    """A model, its checkpoint, two overlapping photographs and a folder of images."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "w.pth").write_bytes(checkpoint_file("v6").read_bytes())
    export(folder / "w.pth", folder / "m.onnx", ExportOptions(dynamic=True))
    whole = photograph(300, 400, "coffee")
    (folder / "images").mkdir()
    cv2.imwrite(str(folder / "images/a.png"), whole[20:260, 40:360])
    cv2.imwrite(str(folder / "images/b.png"), whole[28:268, 64:384])
    return folder


def text(desk, capsys, *words, code=0):
    assert run(cli, [str(word) for word in words]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_match_finds_the_shift_and_draws_it(desk, capsys):
    """The second cut lies 24 px right and 8 px down: its homography is that shift back."""
    a, b = desk / "images/a.png", desk / "images/b.png"
    out, _ = text(
        desk, capsys, "match", "--model", desk / "m.onnx", a, b, "--output", desk / "m.jpg", "--save", desk / "m.npz"
    )
    assert "onnxruntime" in out
    saved = np.load(desk / "m.npz")
    np.testing.assert_allclose(saved["geometry"], [[1, 0, -24], [0, 1, -8], [0, 0, 1]], atol=0.02)
    assert saved["matches"].shape == (len(saved["distances"]), 2)
    assert saved["inliers"].sum() > 100
    assert saved["keypoints0"].shape[0] > saved["matches"][:, 0].max()
    picture = cv2.imread(str(desk / "m.jpg"))
    assert picture.shape == (240, 320 + 8 + 320, 3)


def test_match_without_matches(desk, capsys, tmp_path):
    cv2.imwrite(str(tmp_path / "tiny.png"), np.zeros((8, 8), np.uint8))
    out, _ = text(
        desk,
        capsys,
        "match",
        "--model",
        desk / "m.onnx",
        tmp_path / "tiny.png",
        desk / "images/a.png",
        "--output",
        tmp_path / "m.png",
        "--geometry",
        "fundamental",
    )
    assert "none: the matches support no fundamental" in out
    assert (tmp_path / "m.png").exists()


def test_verify_passes_and_writes_its_evidence(desk, capsys):
    pytest.importorskip("jinja2")
    out, _ = text(
        desk,
        capsys,
        "verify",
        "--model",
        desk / "m.onnx",
        "--weights",
        desk / "w.pth",
        "--images",
        desk / "images",
        "--json",
        desk / "v.json",
        "--report",
        desk / "v.html",
    )
    assert out.rstrip().splitlines()[-1].startswith("report")
    assert "PASSED" in out
    assert json.loads((desk / "v.json").read_text())["passed"] is True
    page = (desk / "v.html").read_text()
    assert len(re.findall(r'src="data:image/jpeg;base64', page)) == 2, "a picture of each image"
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "self-contained"
    assert "keypoints_found_share" in page


def test_verify_fails_with_exit_code_1(desk, capsys):
    out, _ = text(
        desk,
        capsys,
        "verify",
        "--model",
        desk / "m.onnx",
        "--weights",
        desk / "w.pth",
        "--images",
        desk / "images",
        "--gate",
        "matches_kept_share=1.5",
        "--gate",
        "score_error_max=-1",
        code=1,
    )
    assert out.rstrip().endswith("FAILED: score_error_max, matches_kept_share")


def test_the_page_escapes_what_it_is_given(desk, capsys, tmp_path):
    pytest.importorskip("jinja2")
    name = tmp_path / "<script>alert(1)<"
    name.mkdir()
    cv2.imwrite(str(name / "<b>.png"), photograph(64, 64))
    text(
        desk,
        capsys,
        "verify",
        "--model",
        desk / "m.onnx",
        "--weights",
        desk / "w.pth",
        "--images",
        name,
        "--report",
        tmp_path / "v.html",
    )
    page = (tmp_path / "v.html").read_text()
    assert "<b>.png" not in page
    assert "&lt;b&gt;.png" in page


def test_evaluate_prints_all_and_writes_json(desk, capsys, tmp_path):
    folder = write_sequence(tmp_path / "data" / "v_a")
    (folder / "3.ppm").unlink()
    out, err = text(
        desk,
        capsys,
        "evaluate",
        "--model",
        desk / "m.onnx",
        "--dataset",
        tmp_path / "data",
        "--json",
        tmp_path / "e.json",
    )
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["total"]["pairs"] == 1
    assert set(report["baselines"]) == {"sift", "orb"}
    assert err.splitlines() == [f"left out: {folder}: image 3 is missing; the pair is left out."]
    for word in ("v_a", "viewpoint", "total", "sift", "orb"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["verify", "--model", "MODEL", "--weights", "WEIGHTS", "--images", "/nowhere"], "do not exist"),
        (["verify", "--model", "MODEL", "--weights", "WEIGHTS", "--images", "IMAGES", "--gate", "a"], "NAME=NUMBER"),
        (["verify", "--model", "MODEL", "--weights", "WEIGHTS", "--images", "IMAGES", "--gate", "a=1"], "no gate"),
        (["verify", "--model", "MODEL", "--weights", "/no.pth", "--images", "IMAGES"], "does not exist"),
        (["evaluate", "--model", "MODEL", "--dataset", "IMAGES"], "no image pairs"),
        (["evaluate", "--model", "surf", "--dataset", "IMAGES"], "no image pairs"),
        (["evaluate", "--model", "MODEL", "--dataset", "IMAGES", "--detector-size", "big"], "HEIGHTxWIDTH"),
        (["match", "--model", "MODEL", "IMAGES/a.png", "/no.png"], "/no.png does not exist"),
        (["match", "--model", "MODEL", "IMAGES/a.png", "IMAGES/b.png", "--ratio", "2"], "ratio is 2"),
        (["match", "--model", "MODEL", "IMAGES/a.png", "IMAGES/b.png", "--output", "m.txt"], "ends in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, expected, desk, capsys):
    places = {"MODEL": desk / "m.onnx", "WEIGHTS": desk / "w.pth", "IMAGES": desk / "images"}
    words = [re.sub("MODEL|WEIGHTS|IMAGES", lambda m: str(places[m[0]]), word) for word in words]
    _, err = text(desk, capsys, *words, code=2)
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert expected in err
