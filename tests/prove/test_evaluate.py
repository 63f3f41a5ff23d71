"""`evaluate` on small datasets made here, whose right answers are known; layouts, broken parts, baselines."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from conftest import SHARED, photograph
from helpers import MOVE, SAME, write_sequence

from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.prove import evaluate as evaluation_module
from superpoint_trt.prove.datasets import ILLUMINATION, OTHER, VIEWPOINT, load_pairs
from superpoint_trt.prove.evaluate import evaluate
from superpoint_trt.prove.protocol import Protocol, Resize, resize_to_protocol


@pytest.fixture(scope="module")
def model(checkpoint_file, tmp_path_factory):
    return export(checkpoint_file("v6"), tmp_path_factory.mktemp("m") / "m.onnx", ExportOptions(dynamic=True))


def test_both_layouts_are_recognized(tmp_path):
    write_sequence(tmp_path / "v_wall")
    write_sequence(tmp_path / "i_lamp")
    write_sequence(tmp_path / "leuven", oxford=True, suffix="png")
    write_sequence(tmp_path / "bikes", oxford=True, suffix="png")
    found = load_pairs(tmp_path)
    assert not found.problems
    kinds = {pair.sequence: pair.kind for pair in found.pairs}
    assert kinds == {"v_wall": VIEWPOINT, "i_lamp": ILLUMINATION, "leuven": ILLUMINATION, "bikes": OTHER}
    assert len(found.pairs) == 8
    np.testing.assert_array_equal(found.pairs[0].homography, MOVE)
    assert len(load_pairs(tmp_path / "v_wall").pairs) == 2, "a sequence may be the dataset itself"


@pytest.mark.parametrize("name", ["model", "sift", "orb"])
def test_exact_copies_score_perfectly(name, model, tmp_path):
    """A whole-pixel shift by three cells and one: the network sees the same cells, so all metrics are near 1."""
    write_sequence(tmp_path / "v_shift")
    protocol = Protocol(resize=Resize.NONE, threshold=0.02)
    report = evaluate(model if name == "model" else name, tmp_path, protocol).to_json()
    total = report["total"]
    assert total["pairs"] == 2
    assert total["repeatability"] > 0.9
    assert total["localisation_error_px"] < 0.5
    assert total["mma"]["1"] > 0.8
    assert total["homography"]["3"] == total["homography"]["5"] == 1.0
    assert total["matching_score"] > 0.8
    assert total["nn_map"] > 0.8


def test_a_wrong_homography_scores_nothing(model, tmp_path):
    folder = write_sequence(tmp_path / "v_shift")
    np.savetxt(folder / "H_1_2", np.array([[1.0, 0, -100], [0, 1, 60], [0, 0, 1]]))
    np.savetxt(folder / "H_1_3", np.array([[-1.0, 0, 639], [0, 1, 0], [0, 0, 1]]))
    total = evaluate(model, tmp_path, Protocol(resize=Resize.NONE)).to_json()["total"]
    assert total["mma"]["3"] < 0.05
    assert total["homography"]["5"] == 0.0
    assert total["matching_score"] < 0.1


def test_the_report_has_the_contract_s_shape(model, tmp_path):
    write_sequence(tmp_path / "v_a")
    write_sequence(tmp_path / "i_b")
    report = json.loads(json.dumps(evaluate(model, tmp_path).to_json()))
    assert set(report) >= {"model", "protocol", "sequences", "total"}
    keys = {"pairs", "repeatability", "localisation_error_px", "mma", "homography", "matching_score", "nn_map"}
    keys |= {"matches", "right_matches"}
    for row in (report["total"], *report["sequences"].values(), *report["kinds"].values()):
        assert set(row) == keys
        assert list(row["mma"]) == [str(px) for px in range(1, 11)]
        assert list(row["homography"]) == ["1", "3", "5"]
    assert set(report["sequences"]) == {"v_a", "i_b"}
    assert report["protocol"]["detector_size_hw"] == [240, 320]
    assert report["total"]["pairs"] == sum(row["pairs"] for row in report["sequences"].values()) == 4


def test_broken_parts_are_one_line_each_and_the_rest_is_evaluated(model, tmp_path):
    folder = write_sequence(tmp_path / "v_a", homographies=(MOVE, SAME, MOVE, MOVE, MOVE))
    (folder / "H_1_2").write_text("not numbers\n")
    np.savetxt(folder / "H_1_3", np.zeros((3, 3)))
    (folder / "4.ppm").unlink()
    (folder / "5.ppm").write_bytes(b"P6 broken")
    evaluation = evaluate(model, tmp_path)
    assert [result.pair.second.name for result in evaluation.pairs] == ["6.ppm"]
    assert len(evaluation.problems) == 4
    for word, problem in zip(("H_1_2", "H_1_3", "image 4", "5.ppm"), evaluation.problems):
        assert word in problem
        assert len(problem.splitlines()) == 1


def test_blank_images_have_no_matches_and_no_crash(checkpoint_file, tmp_path):
    model = export(checkpoint_file("packaged"), tmp_path / "m.onnx", ExportOptions(dynamic=True))
    folder = tmp_path / "data" / "i_blank"
    folder.mkdir(parents=True)
    for index in (1, 2):
        cv2.imwrite(str(folder / f"{index}.ppm"), np.full((240, 320, 3), 127, np.uint8))
    np.savetxt(folder / "H_1_2", np.eye(3))
    total = evaluate(model, folder).to_json()["total"]
    assert total["repeatability"] is None
    assert total["homography"]["5"] == 0.0
    assert total["mma"]["10"] == 0.0


@pytest.mark.parametrize("name", ["sift", "orb"])
def test_a_black_image_costs_nothing_but_its_pair_s_points(name, tmp_path):
    """Second image black: not one right match in that pair; the other pair is as good as ever."""
    folder = write_sequence(tmp_path / "v_a")
    cv2.imwrite(str(folder / "2.ppm"), np.zeros((480, 640, 3), np.uint8))
    evaluation = evaluate(name, tmp_path, Protocol(resize=Resize.NONE))
    assert not evaluation.problems
    black, same = evaluation.pairs
    assert black.pair.second.name == "2.ppm"
    assert (black.mma[9], black.matching_score, black.nn_map) == (0.0, 0.0, 0.0)
    assert black.homography_errors_px == [float("inf")]
    assert (same.repeatability, same.mma[0], same.matching_score) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, -3.0, 1e9])
def test_a_homography_is_one_at_any_scale(scale, tmp_path):
    """H and s h are the same map, whatever the determinant comes to: 1e-18 for 1e-6."""
    folder = write_sequence(tmp_path / "v_a")
    np.savetxt(folder / "H_1_2", scale * MOVE)
    found = load_pairs(tmp_path)
    assert not found.problems
    matrix = found.pairs[0].homography
    np.testing.assert_allclose(matrix / matrix[2, 2], MOVE, rtol=1e-9)
    (folder / "H_1_2").write_text("1 2 3\n2 4 6\n0 0 1\n")
    assert "no invertible" in load_pairs(tmp_path).problems[0]


@pytest.mark.parametrize("size", [(121, 163), (479, 637), (33, 57)])
@pytest.mark.parametrize("name", ["model", "sift"])
def test_odd_sizes(name, size, model, tmp_path):
    """Images of exactly the size that is asked for are not touched: a copy is found again to the last point."""
    folder = tmp_path / "v_a"
    folder.mkdir()
    for index in (1, 2):
        cv2.imwrite(str(folder / f"{index}.png"), photograph(*size))
    np.savetxt(folder / "H_1_2", np.eye(3))
    protocol = Protocol(detector_size_hw=size, descriptor_size_hw=size)
    (result,) = evaluate(model if name == "model" else name, tmp_path, protocol).pairs
    assert (result.repeatability, result.localization_error_px, result.mma[0]) == (1.0, 0.0, 1.0)
    assert result.homography_errors_px == pytest.approx([0.0], abs=1e-3)


def test_sizes_without_a_cell_are_refused(model, tmp_path):
    for size in ((7, 320), (240, 0), (240, 8193)):
        for name in ("detector_size_hw", "descriptor_size_hw"):
            with pytest.raises(SuperPointError, match=r"has a side of \d+ px; expected 8 to 8192"):
                Protocol(**{name: size})
    with pytest.raises(SuperPointError, match="expected more than 0"):
        Protocol(matching_px=float("nan"))


@pytest.mark.parametrize("name", ["model", "sift", "orb"])
def test_an_image_that_shrinks_to_a_line_is_left_out(name, model, tmp_path):
    """240x320 holds a picture of 10x4000 at 1 px of height: the same pairs are left out whatever the model."""
    for sequence in ("v_thin", "v_usual"):
        write_sequence(tmp_path / sequence, homographies=(SAME,))
    for index in (1, 2):
        cv2.imwrite(str(tmp_path / f"v_thin/{index}.ppm"), np.zeros((10, 4000, 3), np.uint8))
    evaluation = evaluate(model if name == "model" else name, tmp_path, Protocol(resize=Resize.FIT))
    assert [result.pair.sequence for result in evaluation.pairs] == ["v_usual"]
    first = tmp_path / "v_thin" / "1.ppm"
    assert evaluation.problems[0] == f"{first}: 4000x10 px shrink to 320x1; the smallest usable is 8x8."


def test_a_sequence_without_homographies_is_said(model, tmp_path):
    write_sequence(tmp_path / "v_a")
    for name, oxford in (("bikes", True), ("v_b", False)):
        folder = write_sequence(tmp_path / name, oxford)
        for path in folder.glob("H*"):
            path.unlink()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "plot.png").write_bytes(b"nothing of a dataset")
    found = load_pairs(tmp_path)
    assert [pair.sequence for pair in found.pairs] == ["v_a", "v_a"]
    assert [problem.split(":")[0] for problem in found.problems] == [str(tmp_path / "bikes"), str(tmp_path / "v_b")]
    assert all("no homography (H_1_2, ... or H1to2p, ...)" in problem for problem in found.problems)
    with pytest.raises(SuperPointError, match="no homography"):
        load_pairs(tmp_path / "v_b")


@pytest.mark.parametrize("place", [".", "../v_a", "inner/.."])
def test_a_sequence_is_called_as_its_folder_is(place, tmp_path, monkeypatch):
    folder = write_sequence(tmp_path / "v_a")
    (folder / "inner").mkdir()
    monkeypatch.chdir(folder)
    assert {(pair.sequence, pair.kind) for pair in load_pairs(place).pairs} == {("v_a", VIEWPOINT)}


def test_the_detector_s_stage_keeps_no_descriptors(model, tmp_path, monkeypatch):
    write_sequence(tmp_path / "v_a")
    seen = []
    honest = evaluation_module._score

    def noted(pair, detected, described, *rest):
        seen.append((detected.first.descriptors.size, described.first.descriptors.shape[1]))
        return honest(pair, detected, described, *rest)

    monkeypatch.setattr(evaluation_module, "_score", noted)
    evaluate(model, tmp_path)
    assert seen == [(0, 32), (0, 32)]


def test_no_dataset(model, tmp_path):
    with pytest.raises(SuperPointError, match="not a folder"):
        evaluate(model, tmp_path / "nowhere")
    with pytest.raises(SuperPointError, match="holds no image pairs"):
        evaluate(model, tmp_path)
    folder = tmp_path / "v_a"
    folder.mkdir()
    (folder / "H_1_2").write_text("x")
    with pytest.raises(SuperPointError, match="H_1_2"):
        evaluate(model, tmp_path)


@pytest.mark.parametrize("size", [(240, 320), (241, 323), (323, 241)])
@pytest.mark.parametrize("rule", [Resize.CROP, Resize.FIT])
def test_resizing_keeps_points_on_what_they_mark(rule, size):
    """A bright dot at a known place ends where the matrix says, for sizes that crop either way."""
    for height, width in ((600, 800), (480, 900), (900, 480)):
        image = np.zeros((height, width), np.float32)
        y, x = height // 2 + 31, width // 2 - 47
        image[y - 3 : y + 4, x - 3 : x + 4] = 1.0
        resized, to_view = resize_to_protocol(image, size, rule)
        if rule is Resize.CROP:
            assert resized.shape == size
        else:
            assert resized.shape[0] <= size[0]
            assert resized.shape[1] <= size[1]
        place = to_view @ [x, y, 1]
        rows, columns = np.nonzero(resized > 0)
        weights = resized[rows, columns]
        center = np.array([(columns * weights).sum(), (rows * weights).sum()]) / weights.sum()
        np.testing.assert_allclose(place[:2], center, atol=0.05)


@pytest.mark.skipif(not (SHARED / "data/homography").is_dir(), reason="the homography dataset is not here")
@pytest.mark.exhaustive
def test_pytorch_and_onnx_agree_to_the_third_decimal(checkpoint_file, tmp_path):
    """On a part of the real dataset; the whole table is in docs/evaluation.md."""
    weights = checkpoint_file("packaged")
    model = export(weights, tmp_path / "m.onnx", ExportOptions(dynamic=True))
    dataset = SHARED / "data/homography/oxford_graf"
    totals = [evaluate(source, dataset).to_json()["total"] for source in (model, weights)]
    for key in ("repeatability", "localisation_error_px", "matching_score", "nn_map"):
        assert totals[0][key] == pytest.approx(totals[1][key], abs=5e-4)
    for key in ("mma", "homography"):
        assert totals[0][key] == pytest.approx(totals[1][key], abs=5e-4)
