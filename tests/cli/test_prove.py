"""match, verify and evaluate on the command line: exit codes, files, pictures, one clear line for bad input."""

from __future__ import annotations

import json
import re
import sys

import cv2
import numpy as np
import onnx
import pytest
from conftest import photograph
from helpers import SAME, write_sequence

from superpoint_trt import packaged
from superpoint_trt.cli.demo import WARP, warped_copy
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
    assert picture.shape[1] == 320 + 8 + 320 and 240 < picture.shape[0] < 320, "both images and a caption"


def test_match_draws_as_many_lines_as_it_is_told(desk, capsys):
    """Without lines both photographs are as they were."""
    a, b = desk / "images/a.png", desk / "images/b.png"
    text(desk, capsys, "match", "--model", desk / "m.onnx", a, b, "--output", desk / "none.png", "--max-lines", 0)
    picture = cv2.imread(str(desk / "none.png"))
    np.testing.assert_array_equal(picture[:240, :320], cv2.imread(str(a)))
    np.testing.assert_array_equal(picture[:240, 328:648], cv2.imread(str(b)))


def test_the_demos_copy_has_no_mirrored_border():
    """The warp puts the photograph's corners inside the copy; what lies outside of them is white."""
    photo = np.full((512, 512, 3), 200, np.uint8)
    copy = warped_copy(photo)
    corners = np.array([[0, 0, 1], [511, 0, 1], [511, 511, 1], [0, 511, 1]]) @ WARP.T
    corners = corners[:, :2] / corners[:, 2:]
    assert (corners > 0).all() and (corners < 511).all(), "all of the photograph is seen"
    inside = cv2.fillConvexPoly(np.zeros((512, 512), np.uint8), np.round(corners).astype(np.int32), 1)
    well_inside, well_outside = cv2.erode(inside, np.ones((5, 5))) > 0, cv2.dilate(inside, np.ones((5, 5))) == 0
    assert (copy[well_inside] == 110).all() and (copy[well_outside] == 255).all()
    assert well_outside.mean() > 0.2


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


def test_evaluate_compares_several_models(desk, capsys, tmp_path):
    """One table of all, a figure in bold in each column, and pictures of each model in a folder of its own."""
    write_sequence(tmp_path / "data" / "v_a")
    models = ("--model", desk / "m.onnx", "--model", "orb", "--model", "orb")
    files = ("--table", tmp_path / "t.md", "--json", tmp_path / "e.json", "--pictures", tmp_path / "p", "--worst", 1)
    out, _ = text(desk, capsys, "evaluate", *models, "--dataset", tmp_path / "data", "--no-baselines", *files)
    header, _, first, second = (tmp_path / "t.md").read_text().splitlines()
    assert header.startswith("| model | pairs | rep. | loc. px | MMA@1 ")
    assert first.startswith(f"| {desk / 'm.onnx'} | 2 | ") and second.startswith("| orb | 2 | ")
    assert "**" in first + second
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["model"] == str(desk / "m.onnx") and list(report["baselines"]) == ["orb"]
    pictures = sorted(path.relative_to(tmp_path / "p") for path in (tmp_path / "p").rglob("*.jpg"))
    assert len(pictures) == 2 and pictures[0].parts[0] == "orb" and pictures[1].parts[0].endswith("m.onnx")
    assert out.count("pictures      1 in ") == 2


@pytest.mark.parametrize(
    "words, said",
    [
        (("--table", "t.xls"), "ends in .md"),
        (("--worst", "0"), "0 is not in the range"),
    ],
)
def test_evaluate_checks_before_the_work(desk, capsys, tmp_path, words, said):
    write_sequence(tmp_path / "data" / "v_a")
    _, err = text(desk, capsys, "evaluate", "--model", "orb", "--dataset", tmp_path / "data", *words, code=2)
    assert said in err


def test_verify_compares_several_models(desk, capsys, tmp_path):
    """The model passes; a copy with one damaged weight fails, and so does the command."""
    pytest.importorskip("jinja2")
    damaged = onnx.load(desk / "m.onnx")
    weight = next(one for one in damaged.graph.initializer if len(one.dims) == 4)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight)[::-1].copy(), weight.name))
    onnx.save(damaged, tmp_path / "other.onnx")
    both = ("--model", tmp_path / "other.onnx", "--table", tmp_path / "t.csv", "--json", tmp_path / "v.json")
    out, _ = text(desk, capsys, *verifying(desk), *both, "--report", tmp_path / "v.html", code=1)
    assert "PASSED" in out and "FAILED: " in out
    rows = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()]
    assert rows[0] == ["gate", str(desk / "m.onnx"), str(tmp_path / "other.onnx")]
    assert rows[1:3] == [["verdict", "passed", "FAILED"], ["precision", "fp32", "fp32"]]
    (error,) = (row for row in rows if row[0] == "score_error_max")
    assert float(error[1]) < 1e-3 < float(error[2])
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["passed"] is False and [one["passed"] for one in report["models"]] == [True, False]
    page = (tmp_path / "v.html").read_text()
    assert "<h1>2 models</h1>" in page and page.count("<h2>Gates") == 2
    assert '<td>verdict</td><td class="">passed</td><td class="bad">FAILED</td>' in page
    assert 'href="#model2"' in page and 'id="model2"' in page


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
