"""`bench`: stages that add up, models in turn, and errors before the long run."""

from __future__ import annotations

import json
import sys
import time

import cv2
import numpy as np
import onnxruntime
import pytest

from superpoint_trt.cli.main import cli, run
from superpoint_trt.core.image import synthetic_photograph
from superpoint_trt.core.types import OutputType, SuperPointError
from superpoint_trt.prove import benchmark
from superpoint_trt.prove.benchmark import STAGES, BenchOptions, bench, plot
from superpoint_trt.run.backends.onnxruntime import OnnxRuntimeBackend
from superpoint_trt.run.extractor import SuperPoint

try:  # the steps of a model that decodes on the host
    from superpoint_trt.run.runner import HostRunner as STEPS
except ImportError:
    STEPS = SuperPoint

QUICK = BenchOptions(iterations=6, warm_up=1)


@pytest.fixture(autouse=True)
def no_rest(monkeypatch):
    monkeypatch.setattr(benchmark, "REST_S", 0.0)


@pytest.fixture
def models(exported):
    """A static dense model, and a dynamic keypoints model that takes batches."""
    return [
        exported("v6", height_px=120, width_px=160),
        exported("v6", OutputType.KEYPOINTS, 120, 160, dynamic=True, max_batch_size=4),
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


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("batch", [1, 3])
def test_each_step_counts_in_its_stage_and_the_stages_make_up_the_whole(batch, models, monkeypatch):
    """By a clock on which preparing an image takes 1 ms, a run of the network 20 ms, decoding a batch 400 ms.

    3 ms of the call that is made step by step lie in no stage.
    """
    clock = Clock()

    def slowed(honest, cost_ms):
        def step(self, *arguments):
            clock.now_s += cost_ms * 1e-3
            return honest(self, *arguments)

        return step

    for owner, step, cost_ms in (
        (STEPS, "prepare", 1),
        (OnnxRuntimeBackend, "_infer", 20),
        (STEPS, "decode", 400),
        (SuperPoint, "extract_timed", 3),
    ):
        monkeypatch.setattr(owner, step, slowed(getattr(owner, step), cost_ms))
    monkeypatch.setattr(time, "perf_counter", clock)
    report = bench(models[1:], BenchOptions(batch=batch, iterations=6, warm_up=1))
    assert medians(report) == {
        "preprocess": pytest.approx(batch),
        "host_to_device": None,
        "network": pytest.approx(20),
        "decode": pytest.approx(400),
        "device_to_host": None,
        "other": pytest.approx(3),
        "wall": pytest.approx(batch + 420),
    }
    assert report.images_per_s(report.models[0]) == pytest.approx(batch * 1e3 / (batch + 420))


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
        ({"size_hw": (240, 320)}, r"\.onnx takes 120x160 only"),
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
    words = ["bench", "--model", str(models[0]), "--model", str(models[1]), "--iterations", "3", "--device", "cpu"]
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


def test_all_devices_and_the_table(models, tmp_path, capsys):
    """One row for each model and device; what a device does not take is left out and named."""
    from superpoint_trt.run.backends import devices_for

    markdown = tmp_path / "table.md"
    arguments = ["bench", "--model", str(models[0]), "--model", str(models[1]), "--device", "all", "--threads", "1"]
    assert run(cli, [*arguments, "--iterations", "2", "--markdown", str(markdown)]) == 0
    lines = markdown.read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[0][:4] == ["model", "runs on", "computed in", "network, ms"]
    assert len(rows) - 2 == len(models) * len(devices_for("model.onnx")) and all(len(row) == 7 for row in rows)
    assert rows[2][:3] == [models[0].name, f"onnxruntime {onnxruntime.__version__}, cpu", "fp32"]
    assert "120x160" not in lines[-1] and "160x120, batch 1; median (fastest) of 2 calls in turn" in lines[-1]
    assert "ran on" in capsys.readouterr().out


def test_a_device_that_refuses_a_model(models, tmp_path, monkeypatch):
    def open_model(model, device, threads, allow_host_code):
        if device == "odd":
            raise SuperPointError("not this one")
        return SuperPoint(model, device=device, threads=threads)

    monkeypatch.setattr(benchmark, "_open", open_model)
    monkeypatch.setattr(benchmark, "devices_for", lambda _: ["cpu", "odd"])
    report = bench(models[:1], QUICK, device="all")
    assert report.left_out == ["odd: not this one"] and len(report.models) == 1
    with pytest.raises(SuperPointError, match="not this one"):
        bench(models[:1], QUICK, device=["cpu", "odd"])
    monkeypatch.setattr(benchmark, "devices_for", lambda _: ["odd"])
    with pytest.raises(SuperPointError, match="not this one"):
        bench(models[:1], QUICK, device="all")


def test_a_model_that_no_device_takes_is_an_error(models, tmp_path):
    """Also beside one that runs."""
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    for bad, told in (
        (tmp_path / "missing.onnx", "does not exist"),
        (tmp_path / "bad.onnx", "not a model onnxruntime"),
    ):
        with pytest.raises(SuperPointError, match=told):
            bench([models[0], bad], QUICK, device="all")


def test_bench_refuses_a_device_of_another_name(models, capsys):
    assert run(cli, ["bench", "--model", str(models[0]), "--device", "cpu", "--device", "tpu"]) == 2
    assert "device is 'tpu'; expected auto, cpu" in capsys.readouterr().err
