"""`bench`: stages that add up, delays that show where they are, models in turn, and errors before the long run."""

from __future__ import annotations

import json
import sys
import time

import cv2
import numpy as np
import pytest

from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import OutputType, SuperPointError
from superpoint_trt.prove import benchmark
from superpoint_trt.prove.benchmark import STAGES, BenchOptions, bench, plot, synthetic_photograph
from superpoint_trt.run.backends.onnxruntime import OnnxRuntimeBackend
from superpoint_trt.run.runner import HostRunner

QUICK = BenchOptions(iterations=6, warm_up=1)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    monkeypatch.setattr(benchmark, "REST_S", 0.0)


@pytest.fixture(scope="module")
def models(checkpoint_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    return [
        export(checkpoint_file("v6"), folder / "static.onnx", ExportOptions(height_px=120, width_px=160)),
        export(
            checkpoint_file("v6"),
            folder / "batch.onnx",
            ExportOptions(OutputType.KEYPOINTS, 120, 160, dynamic=True, max_batch_size=4),
        ),
    ]


def medians(report, index=0):
    stages = report.to_json()["models"][index]["stages_ms"]
    return {stage: summary and summary["median"] for stage, summary in stages.items()}


def test_the_report(models):
    report = json.loads(json.dumps(bench(models, QUICK).to_json()))
    assert set(report) == {"machine", "method", "options", "models"}
    assert report["machine"]["cpu"]
    assert report["machine"]["versions"]["onnxruntime"]
    first, second = report["models"]
    assert list(first["stages_ms"]) == list(STAGES)
    for stage in ("preprocess", "network", "decode", "wall"):
        figures = first["stages_ms"][stage]
        assert 0 < figures["median"] <= figures["p95"] <= figures["p99"]
    for stage in ("host_to_device", "device_to_host"):
        assert first["stages_ms"][stage] is None, "a transfer that does not exist is not 0"
    assert first["images_per_s"] == pytest.approx(1e3 / first["stages_ms"]["wall"]["median"])
    assert "onnxruntime" in first["runtime"]
    assert second["description"]["superpoint_trt.type"] == "keypoints"
    assert first["keypoints"] > 20


def test_the_stages_make_up_the_whole(models):
    times = medians(bench(models[:1], BenchOptions(iterations=30)))
    assert times["preprocess"] + times["network"] + times["decode"] == pytest.approx(times["wall"], rel=0.35)


@pytest.mark.parametrize(("step", "stage"), [("prepare", "preprocess"), ("_infer", "network"), ("decode", "decode")])
def test_a_delay_shows_in_its_stage_and_in_the_whole_and_nowhere_else(step, stage, models, monkeypatch):
    usual = medians(bench(models[:1], QUICK))
    owner = OnnxRuntimeBackend if step == "_infer" else HostRunner
    honest = getattr(owner, step)

    def slow(self, *arguments):
        time.sleep(0.05)
        return honest(self, *arguments)

    monkeypatch.setattr(owner, step, slow)
    delayed = medians(bench(models[:1], QUICK))
    for name in ("preprocess", "network", "decode", "wall"):
        added = delayed[name] - usual[name]
        assert (40 < added < 70) if name in (stage, "wall") else abs(added) < 20


def test_models_are_taken_in_turn(models, monkeypatch):
    order = []
    honest = benchmark._Run.call

    def noted(self, measured):
        order.append(self.times.model)
        honest(self, measured)

    monkeypatch.setattr(benchmark._Run, "call", noted)
    bench(models, BenchOptions(iterations=8, warm_up=2))
    names = [str(model) for model in models]
    turn = benchmark.CALLS_PER_TURN
    assert order == [names[0]] * turn + [names[1]] * turn + [names[0]] * turn + [names[1]] * turn


def test_a_batch_is_that_many_images(models):
    report = bench(models[1:], BenchOptions(batch=4, iterations=3, warm_up=1))
    assert report.images_per_s(report.models[0]) == pytest.approx(4e3 / medians(report)["wall"])


def test_another_size(models):
    report = bench(models[1:], BenchOptions(size_hw=(64, 96), iterations=2, warm_up=0))
    assert report.models[0].size_hw == (64, 96)


def test_progress_ends_at_all(models):
    seen = []
    bench(models, QUICK, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (14, 14)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"size_hw": (240, 320)}, r"static\.onnx takes 120x160 only"),
        ({"batch": 2}, "takes batches up to 1, not 2"),
    ],
)
def test_what_a_model_cannot_take_is_said_before_anything_is_timed(options, word, models, monkeypatch):
    monkeypatch.setattr(benchmark._Run, "call", lambda *_: pytest.fail("timed"))
    with pytest.raises(SuperPointError, match=word):
        bench([models[1], models[0]], BenchOptions(**options))


def test_nonsense_is_refused(models, tmp_path):
    with pytest.raises(SuperPointError, match="iterations is 0"):
        BenchOptions(iterations=0)
    with pytest.raises(SuperPointError, match="at least one"):
        bench([])
    with pytest.raises(SuperPointError, match=r"no\.onnx"):
        bench([tmp_path / "no.onnx"])


def test_the_picture_is_always_the_same_and_not_blank():
    picture = synthetic_photograph(120, 160)
    assert picture.shape == (120, 160)
    assert picture.std() > 30
    np.testing.assert_array_equal(picture, synthetic_photograph(120, 160))


def test_the_command(models, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    words = ["bench", "--model", str(models[0]), "--model", str(models[1]), "--iterations", "3"]
    assert run(cli, [*words, "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png")]) == 0
    out = capsys.readouterr().out
    assert out.count("images/s") == 2
    assert "device_to_host" in out
    assert len(json.loads((tmp_path / "b.json").read_text())["models"]) == 2
    assert cv2.imread(str(tmp_path / "b.png")).shape[1] > 600
    for words in (["--size", "big"], ["--iterations", "0"], ["--batch", "3"]):
        assert run(cli, ["bench", "--model", str(models[0]), *words]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "start"), [("b.jpg", b"\xff\xd8\xff"), ("b.PNG", b"\x89PNG"), ("b.svg", b"<?xml"), ("b.pdf", b"%PDF")]
)
def test_a_plot_is_what_its_name_says(name, start, models, tmp_path):
    pytest.importorskip("matplotlib")
    written = plot(bench(models[:1], BenchOptions(iterations=1, warm_up=0)), tmp_path / name)
    assert written.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("name", "missing", "words"),
    [
        ("b.txt", None, "b.txt: a plot's name ends in .png, .jpg, .jpeg, .svg, .pdf"),
        ("b", None, "a plot's name ends in"),
        ("b.png", "matplotlib", "the plot needs matplotlib: pip install"),
    ],
)
def test_a_plot_that_cannot_be_is_refused_before_the_timing(
    name, missing, words, models, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(benchmark, "bench", lambda *_: pytest.fail("timed"))
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    assert run(cli, ["bench", "--model", str(models[0]), "--plot", str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_plot_keeps_what_is_on_disk_when_it_fails(models, tmp_path):
    pytest.importorskip("matplotlib")
    report = bench(models[:1], QUICK)
    with pytest.raises(SuperPointError, match="does not exist"):
        plot(report, tmp_path / "nowhere" / "b.png")
