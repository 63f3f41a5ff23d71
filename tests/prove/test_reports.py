"""The keys of every JSON report: other people's scripts read them, so none may change unnoticed."""

from __future__ import annotations

import json

import cv2
import pytest
from conftest import photograph
from helpers import SAME, write_sequence

from superpoint_trt.core.types import OutputType
from superpoint_trt.prove import benchmark
from superpoint_trt.prove.benchmark import BenchOptions, bench
from superpoint_trt.prove.evaluate import evaluate, report_with_baselines
from superpoint_trt.prove.gates import Gate
from superpoint_trt.prove.known_faults import Finding
from superpoint_trt.prove.protocol import Protocol, Resize
from superpoint_trt.prove.sensitivity import Choice, Step
from superpoint_trt.prove.verify import verify

GATES = [
    "score_error_max",
    "keypoints_found_share",
    "score_rank_correlation",
    "descriptor_cosine_median",
    "descriptor_cosine_p1",
    "matches_kept_share",
    "findings",
]
ERRORS = ["max", "mean", "p50", "p99"]


def plain(report):
    """As a reader of the file gets it."""
    return json.loads(json.dumps(report))


def keys(text: str) -> list[str]:
    return text.split()


def test_verify(checkpoint_file, exported, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), photograph(120, 160))
    model = exported("v6", OutputType.KEYPOINTS, 120, 160, max_keypoints=400)
    report = plain(verify(model, checkpoint_file("v6"), tmp_path).to_json())
    assert list(report) == keys(
        "passed model model_runtime reference precision gates findings outputs images problems notes"
    )
    assert [gate["name"] for gate in report["gates"]] == GATES
    assert all(list(gate) == keys("name value limit at_least passed") for gate in report["gates"])
    outputs = {name: list(errors) for name, errors in report["outputs"].items()}
    assert outputs == {"keypoints": ERRORS, "scores": ERRORS, "descriptors": ERRORS}
    (image,) = report["images"]
    assert list(image) == keys(
        "name reference_keypoints model_keypoints found_again found_back score_rank_correlation cosine_median "
        "cosine_p1 reference_matches model_matches outputs findings"
    )


def test_a_finding():
    assert plain(Finding("border", "3 keypoints").to_json()) == {"name": "border", "detail": "3 keypoints"}


def test_evaluate(exported, tmp_path):
    write_sequence(tmp_path / "v_a", homographies=(SAME,))
    evaluation = evaluate(exported("v6", dynamic=True), tmp_path, Protocol(resize=Resize.NONE))
    report = plain(report_with_baselines(evaluation))
    assert list(report) == keys("model runtime matcher protocol sequences kinds total problems seconds")
    assert list(report["protocol"]) == keys(
        "resize detector_size_hw detector_nms_radius_px detector_keypoints repeatability_px descriptor_size_hw "
        "descriptor_nms_radius_px descriptor_keypoints matching_px threshold subpixel homography_px mma_px estimator "
        "ransac_px ransac_orders"
    )
    assert set(report["seconds"]) == {"read", "extract", "match"}
    for row in (report["total"], report["sequences"]["v_a"], report["kinds"]["viewpoint"]):
        assert list(row) == keys(
            "pairs repeatability localisation_error_px mma homography matching_score nn_map matches right_matches"
        )
        assert list(row["mma"]) == [str(px) for px in range(1, 11)]
        assert list(row["homography"]) == ["1", "3", "5"]
    assert list(report_with_baselines(evaluation, evaluation)["baselines"]) == [evaluation.model]


def test_bench(exported, monkeypatch):
    monkeypatch.setattr(benchmark, "REST_S", 0.0)
    report = plain(bench([exported("v6", height_px=120, width_px=160)], BenchOptions(iterations=1)).to_json())
    assert list(report) == keys("machine method options models")
    assert list(report["machine"]) == keys("cpu cores gpu system python versions threads time")
    assert list(report["options"]) == keys("batch size_hw iterations warm_up")
    (model,) = report["models"]
    assert list(model) == keys("model runtime description size_hw keypoints stages_ms images_per_s")
    assert list(model["stages_ms"]) == keys("preprocess host_to_device network decode device_to_host other wall")
    assert list(model["stages_ms"]["wall"]) == keys("median p95 p99")


@pytest.mark.parametrize("value", [0.5, None])
def test_choice_of_layers(value):
    step = Step([], [Gate("findings", value, 0.0, False)], "as asked")
    assert plain(Choice(["conv1a"], True, [step], ["*"]).to_json()) == {
        "kept": ["conv1a"],
        "passed": True,
        "steps": [
            {
                "kept": [],
                "gates": [{"name": "findings", "value": value, "limit": 0.0, "at_least": False}],
                "because": "as asked",
            }
        ],
        "patterns": ["*"],
    }
