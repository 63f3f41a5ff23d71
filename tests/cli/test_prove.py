"""match, verify and evaluate on the command line: exit codes, files, pictures, one clear line for bad input."""

from __future__ import annotations

import json
import re
import sys

import cv2
import numpy as np
import pytest
from conftest import photograph
from helpers import SAME, write_sequence

from superpoint_trt import packaged
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export import ExportOptions, export


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
    assert "0 inliers of one fundamental matrix" in out
    assert "none: the matches support no fundamental matrix" in out
    assert (tmp_path / "m.png").exists()


def verifying(desk):
    """The command that proves the desk's model."""
    return ("verify", "--model", desk / "m.onnx", "--weights", desk / "w.pth", "--images", desk / "images")


def test_verify_passes_and_writes_its_evidence(desk, capsys):
    pytest.importorskip("jinja2")
    out, _ = text(
        desk,
        capsys,
        *verifying(desk),
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
        *verifying(desk),
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


def test_evaluate_calls_the_packaged_weights_by_their_name(desk, capsys, tmp_path):
    """In the table and in the JSON."""
    write_sequence(tmp_path / "data" / "v_a")
    line = ("evaluate", "--dataset", tmp_path / "data", "--no-baselines", "--json", tmp_path / "e.json")
    out, _ = text(desk, capsys, *line)
    model = json.loads((tmp_path / "e.json").read_text())["model"]
    assert model == packaged.DEFAULT and f"{model} " in out


def test_sequences_called_like_kinds_keep_their_rows(desk, capsys, tmp_path):
    """A row for each of the four sequences, for each of the three kinds, and the total."""
    for name in ("total", "other", "viewpoint", "v_illumination", "i_a"):
        write_sequence(tmp_path / name, homographies=(SAME,))
    words = ["evaluate", "--model", desk / "m.onnx", "--dataset", tmp_path, "--no-baselines"]
    out, _ = text(desk, capsys, *words)
    rows = [(cells[0], cells[1]) for line in out.splitlines() if len(cells := re.findall(r"[\w.]+", line)) > 9]
    assert rows[1:] == [
        ("i_a", "1"),
        ("other", "1"),
        ("total", "1"),
        ("v_illumination", "1"),
        ("viewpoint", "1"),
        ("illumination", "1"),
        ("other", "3"),
        ("viewpoint", "1"),
        ("total", "5"),
    ]


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


VERIFY = ["verify", "--model", "DESK/m.onnx", "--weights", "DESK/w.pth", "--images", "DESK/images"]
EVALUATE = ["evaluate", "--model", "DESK/m.onnx", "--dataset", "DESK/data", "--no-baselines"]
BENCH = ["bench", "--model", "DESK/m.onnx", "--model", "DESK/w.pth", "--image", "DESK/images/a.png"]


@pytest.mark.parametrize(
    ("command", "outputs"),
    [
        (VERIFY, ["--json", "DESK/m.onnx"]),
        (VERIFY, ["--json", "DESK/images/../w.pth"]),
        (VERIFY, ["--json", "DESK/link"]),
        (VERIFY, ["--json", "DESK/images/b.png"]),
        (VERIFY, ["--report", "DESK/m.onnx"]),
        (VERIFY, ["--report", "DESK/w.pth"]),
        (VERIFY, ["--report", "DESK/images/a.png"]),
        (VERIFY, ["--report", "DESK/new", "--json", "DESK/new"]),
        ([*VERIFY[:-1], "DESK/images/a.png"], ["--json", "DESK/images/a.png"]),
        (EVALUATE, ["--json", "DESK/m.onnx"]),
        (EVALUATE, ["--json", "DESK/data/v_a/1.ppm"]),
        (EVALUATE, ["--json", "DESK/data/v_a/H_1_3"]),
        ([*EVALUATE[:-2], "DESK/data/v_a"], ["--json", "DESK/data/v_a/H_1_2"]),
        (BENCH, ["--json", "DESK/m.onnx"]),
        (BENCH, ["--json", "DESK/w.pth"]),
        (BENCH, ["--json", "DESK/images/a.png"]),
        (BENCH, ["--plot", "DESK/images/a.png"]),
        (BENCH, ["--plot", "DESK/new.png", "--json", "DESK/new.png"]),
    ],
)
def test_no_output_is_written_over_an_input_or_another_output(command, outputs, desk, capsys):
    if not (desk / "data").exists():
        write_sequence(desk / "data" / "v_a")
        (desk / "link").symlink_to(desk / "m.onnx")
    before = everything(desk)
    _, err = text(desk, capsys, *(word.replace("DESK", str(desk)) for word in (*command, *outputs)), code=2)
    assert len(err.splitlines()) == 1
    assert "would overwrite" in err
    assert everything(desk) == before


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_report_that_cannot_be_made_is_said_before_the_work(package, desk, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("superpoint_trt.prove.verify.verify", lambda *_: pytest.fail("verified"))
    monkeypatch.setitem(sys.modules, package, None)
    words = [*(word.replace("DESK", str(desk)) for word in VERIFY), "--report", tmp_path / "v.html"]
    _, err = text(desk, capsys, *words, code=2)
    assert err == f"error: the report needs {package}: pip install '.[report]' (in your clone of superpoint-trt).\n"


@pytest.mark.parametrize("gate", ["findings=nan", "findings=-inf", "findings=", "findings", "a=1", "=1"])
def test_a_limit_that_is_none_lists_the_gates(gate, desk, capsys):
    _, err = text(desk, capsys, *(word.replace("DESK", str(desk)) for word in VERIFY), "--gate", gate, code=2)
    assert len(err.splitlines()) == 1
    assert "gates are: score_error_max, keypoints_found_share, score_rank_correlation, " in err


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
