"""The int8 workflow as one function: what it writes, says and refuses, and that it parses its .onnx once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import onnx
import pytest
from conftest import COMPACT, photograph

from superpoint_trt import int8, packaged
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export import export
from superpoint_trt.convert.export_options import ExportOptions
from superpoint_trt.convert.onnx_file import OnnxFile, load_onnx, quantized_type, read_onnx
from superpoint_trt.convert.quantize import gptq
from superpoint_trt.convert.quantize.ranges_file import load_calibration
from superpoint_trt.core.types import OutputType, Precision, SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor
from superpoint_trt.int8 import (
    COARSE,
    BuildOptions,
    FirstConvolution,
    LowPrecisionOptions,
    QuantizeOptions,
    Rounding,
    quantize_and_verify,
)
from superpoint_trt.prove.gates import GATE_NAMES
from superpoint_trt.prove.sensitivity import LayerCost

SIZE = (120, 160)
NAMES = ("coffee", "chelsea", "astronaut", "camera")
LOOSE = {**dict.fromkeys(GATE_NAMES, 0.0), "findings": 9.0, "score_error_max": 1.0}
COARSE_LAYERS = ("conv4a", "conv4b", "convPa", "convPb", "convDa", "convDb")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in NAMES:
        cv2.imwrite(str(folder / f"{name}.png"), photograph(*SIZE, name=name))
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint_file, tmp_path_factory) -> bytes:
    """A small random network: the workflow is the same, and takes seconds."""
    path = tmp_path_factory.mktemp("model") / "superpoint.onnx"
    return export(checkpoint_file("magicleap"), path, ExportOptions(OutputType.HEADS, *SIZE)).read_bytes()


@pytest.fixture
def model(exported, tmp_path) -> Path:
    """An fp32 .onnx in a folder of its own: ranges are written beside it."""
    path = tmp_path / "superpoint.onnx"
    path.write_bytes(exported)
    return path


@pytest.fixture(scope="module")
def ranges(exported, photos, tmp_path_factory) -> Path:
    """Measured once, weights rounded to the nearest step."""
    model = tmp_path_factory.mktemp("ranges") / "superpoint.onnx"
    model.write_bytes(exported)
    options = LowPrecisionOptions(photos, rounding=Rounding.NEAREST, verify=False)
    return quantize_and_verify(model, options, model.with_name("q.onnx")).ranges


# ------------------------------------------------------------------------------------------------------- parsed once


@pytest.fixture
def parses(model, monkeypatch) -> Callable[[], int]:
    """How often the given .onnx was parsed, by its bytes or by its path."""
    given, counted = model.read_bytes(), []

    def counting(original):
        def parse(source, *more, **options):
            by_onnx_itself = sys._getframe(1).f_globals["__name__"].startswith("onnx.")  # infer_shapes hands bytes over
            if not by_onnx_itself and (source == given or str(source) == str(model)):
                counted.append(original.__name__)
            return original(source, *more, **options)

        return parse

    for name in ("load", "load_model", "load_from_string", "load_model_from_string"):
        monkeypatch.setattr(onnx, name, counting(getattr(onnx, name)))
    return lambda: len(counted)


def test_the_count_counts(model, parses):
    load_onnx(model)
    onnx.load(str(model))
    source = read_onnx(model)
    assert read_onnx(source) is source and isinstance(source, OnnxFile)
    assert parses() == 3


def test_quantize_parses_its_onnx_once(model, photos, parses, tmp_path, capsys):
    """All of it: calibration, rounding, ranks, a choice of layers, the written .onnx, verification."""
    gates = [word for name, limit in LOOSE.items() for word in ("--gate", f"{name}={limit}")]
    words = ["quantize", "--onnx", model, "--output", tmp_path / "q.onnx", "--calibration-images", photos, "--auto"]
    assert run(cli, [*map(str, words), *gates]) == 0
    assert "PASSED" in capsys.readouterr().out
    assert parses() == 1


@pytest.mark.parametrize(
    ("precision", "more"),
    [("fp16", []), ("int8", ["--rounding", "nearest", "--gate", "keypoints_found_share=0.1"])],
)
def test_build_parses_its_onnx_once(model, photos, parses, tmp_path, capsys, precision, more):
    pytest.importorskip("tensorrt_rtx")
    words = ["build", "--onnx", model, "--engine", tmp_path / "a.engine", "--precision", precision, *more]
    words += ["--runtime", "rtx", "--target", "sm89"] + (["--calibration-images", photos] if more else [])
    assert run(cli, [*map(str, words)]) in (0, 1)
    assert "built in" in capsys.readouterr().out
    assert parses() == 1


# -------------------------------------------------------------------------------------------------------- the function


def test_the_five_lines_of_the_docstring_run(tmp_path, monkeypatch, capsys):
    """On a folder that is called as theirs is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gptq, "POSITIONS", 300)
    export(packaged.WEIGHTS, tmp_path / "superpoint.onnx", ExportOptions(OutputType.HEADS, 240, 320))
    (tmp_path / "photographs").mkdir()
    for name in NAMES:
        cv2.imwrite(f"photographs/{name}.png", photograph(240, 320, name=name))
    lines = [line[4:] for line in (int8.__doc__ or "").splitlines() if line.startswith("    ")]
    assert 3 <= len(lines) <= 5, lines
    exec("\n".join(lines), {})
    assert "percentile 99.99, 4 images, weights rounded with feedback" in capsys.readouterr().out
    assert quantized_type(load_onnx("superpoint_int8.onnx")) is Precision.INT8


def test_the_result_holds_the_evidence(model, photos, tmp_path):
    told: list[str] = []
    phases: list[tuple[str, int, int]] = []
    options = LowPrecisionOptions(photos, rounding=Rounding.NEAREST, gates=LOOSE)
    output = tmp_path / "q.onnx"
    result = quantize_and_verify(
        model, options, output, progress=lambda *report: phases.append(report), notify=told.append
    )
    assert result.ranges == tmp_path / "superpoint.calibration.json"
    assert load_calibration(result.ranges) == result.calibration and len(result.calibration.images) == 4
    assert result.quantize == QuantizeOptions(keep_fp16=(COARSE,))
    assert result.kept_layers == COARSE_LAYERS and result.first_convolutions == ("conv1a",)
    assert (result.onnx, result.engine, result.layer_costs, result.choice) == (output, None, (), None)
    assert result.verification is not None and result.passed
    assert result.verification.reference == f"{model}, fp32" and len(result.verification.images) == 4
    assert tuple(told) == result.warnings
    assert any("only 4 images" in warning for warning in told)
    assert any("too few to hold any out" in warning for warning in told)
    assert list(dict.fromkeys(label for label, _, _ in phases)) == ["calibrating", "verifying"]
    assert all(0 < done <= total for _, done, total in phases)


def test_a_network_with_a_topology_goes_the_whole_way(checkpoint_file, photos, tmp_path):
    """Of a size with an odd number of cells: measured, rounded, ranked, written, built for SM89, and verified."""
    pytest.importorskip("tensorrt_rtx")
    model = export(checkpoint_file("compact"), tmp_path / "c.onnx", ExportOptions(OutputType.HEADS, 104, 136))
    options = LowPrecisionOptions(photos, rank_layers=True, gates=LOOSE)
    build = BuildOptions(runtime=Flavor.RTX, targets=("sm89",))
    result = quantize_and_verify(model, options, tmp_path / "q.onnx", tmp_path / "q.engine", build)
    assert result.kept_layers == ("detector_hidden", "detector", "descriptor_hidden", "descriptor")
    assert result.first_convolutions == ("stem0", "patches")
    assert {cost.layer for cost in result.layer_costs} == {row[0] for row in COMPACT}
    assert result.passed and result.engine_metadata.description.descriptor_dim == 64
    assert result.verification is not None and str(result.verification.model).endswith("q.onnx")


def test_a_gate_that_fails_is_no_error(model, ranges, photos, tmp_path):
    options = LowPrecisionOptions(photos, ranges, gates={**LOOSE, "keypoints_found_share": 2.0})
    result = quantize_and_verify(model, options, tmp_path / "q.onnx")
    assert not result.passed and result.chosen and (tmp_path / "q.onnx").exists()


def test_an_engine_for_another_machine_is_verified_as_onnx(model, ranges, photos, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    build = BuildOptions(runtime=Flavor.RTX, targets=("sm89",))
    quantize = QuantizeOptions(keep_fp16=("convP*",), first_convolution=FirstConvolution.FP16)
    phases: list[str] = []
    result = quantize_and_verify(
        model,
        LowPrecisionOptions(photos, ranges, quantize=quantize, gates=LOOSE),
        engine=tmp_path / "a.engine",
        build=build,
        progress=lambda label, done, total: phases.append(label),
    )
    assert result.engine_metadata is not None and result.verification is not None
    assert result.engine_metadata.description.kept_layers == "conv1a convPa convPb" == " ".join(result.kept_layers)
    assert f"--calibration {ranges}" in result.engine_metadata.rebuild
    assert result.verification.model.endswith("a.onnx") and "onnxruntime" in result.verification.model_runtime
    assert any(label.startswith("building: ") for label in phases) and phases[-1] == "verifying"


@pytest.mark.parametrize("least", [0.0, 2.0], ids=["met at once", "never met"])
def test_chosen_layers_are_what_is_written(model, ranges, photos, tmp_path, monkeypatch, least):
    """Layers that the options name stay in fp16; if no choice meets the gates, nothing is written."""
    costs = [LayerCost("conv3b", 0.5, 0.5), LayerCost("conv2a", 0.9, 1.0)]
    monkeypatch.setattr(int8, "rank", lambda *_: costs)
    options = LowPrecisionOptions(
        photos,
        ranges,
        quantize=QuantizeOptions(keep_fp16=("convPb",)),
        choose_layers=True,
        gates={**LOOSE, "keypoints_found_share": least},
    )
    result = quantize_and_verify(model, options, tmp_path / "q.onnx")
    assert result.layer_costs == tuple(costs) and list(result.choice.steps[0].kept) == ["convPb"]
    assert result.passed is result.chosen is (tmp_path / "q.onnx").exists() is (least == 0.0)
    if least == 0.0:
        assert result.kept_layers == ("convPb",) and result.quantize.keep_fp16 == ("convPb",)
        assert "kept_layers: convPb" in _metadata(result.onnx)
    else:
        assert "conv3b" in result.choice.steps[1].kept and result.onnx is None and result.verification is None


def _metadata(path: Path) -> list[str]:
    entries = load_onnx(path).metadata_props
    return [f"{entry.key.rpartition('.')[2]}: {entry.value}" for entry in entries]


def test_ranking_alone_writes_nothing_but_ranges(model, ranges, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "rank", lambda *_: [LayerCost("conv3b", 0.5, 0.5)])
    result = quantize_and_verify(model, LowPrecisionOptions(photos, ranges, rank_layers=True))
    assert [cost.layer for cost in result.layer_costs] == ["conv3b"] and result.passed
    assert (result.onnx, result.engine, result.verification) == (None, None, None)
    assert {path.name for path in tmp_path.iterdir()} == {"superpoint.onnx"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "int8 needs ranges measured on images"),
        ({"images": "synthetic", "choose_layers": True}, "--auto tries layers on photographs"),
        ({"images": "photos", "gates": {"speed": 1.0}}, "no gate is called 'speed'"),
        ({"images": "photos", "quantize": QuantizeOptions(keep_fp16=("x*",))}, r"no convolution is called 'x\*'"),
        ({"ranges": "r.json", "rounding": Rounding.NEAREST}, "r.json says how its weights are rounded"),
        ({"images": "photos", "quantize": QuantizeOptions(Precision.FP8, (), FirstConvolution.PARTS)}, "fp8 of this"),
    ],
)
def test_options_are_validated_before_the_calibration(model, tmp_path, monkeypatch, options, says):
    monkeypatch.setattr(int8, "calibrate", None)
    with pytest.raises(SuperPointError, match=says):
        quantize_and_verify(model, LowPrecisionOptions(**options), tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_nothing_to_do_is_refused(model, ranges):
    with pytest.raises(SuperPointError, match="nothing to do"):
        quantize_and_verify(model, LowPrecisionOptions(ranges=ranges))


def test_what_is_read_is_not_written_over(model, ranges):
    with pytest.raises(SuperPointError, match="would overwrite"):
        quantize_and_verify(model, LowPrecisionOptions(ranges=ranges), model)
    with pytest.raises(SuperPointError, match=r"ends in one of \.engine"):
        quantize_and_verify(model, LowPrecisionOptions(ranges=ranges), engine=model)


def test_a_quantized_model_is_no_source(model, ranges, tmp_path):
    options = LowPrecisionOptions(ranges=ranges)
    written = quantize_and_verify(model, options, tmp_path / "q.onnx").onnx
    with pytest.raises(SuperPointError, match="already quantized; use the fp32"):
        quantize_and_verify(written, options, tmp_path / "r.onnx")


# ------------------------------------------------------------------------------------------------- errors stand alone


@pytest.fixture
def with_batch_norms(checkpoint_file, tmp_path) -> Path:
    """A model that is warned of."""
    return export(checkpoint_file("v6"), tmp_path / "norms.onnx", ExportOptions(OutputType.HEADS, *SIZE))


def refused(model: Path, options: LowPrecisionOptions) -> list[str]:
    """The warnings that were told before the workflow refused."""
    told: list[str] = []
    with pytest.raises(SuperPointError):
        quantize_and_verify(model, options, model.with_name("q.onnx"), notify=told.append)
    return told


def test_nothing_is_warned_of_before_a_refusal(with_batch_norms, ranges, tmp_path):
    assert refused(with_batch_norms, LowPrecisionOptions(tmp_path / "nothing")) == []
    assert refused(with_batch_norms, LowPrecisionOptions(ranges=tmp_path / "none.calibration.json")) == []
    assert refused(with_batch_norms, LowPrecisionOptions(ranges=ranges)) == [], "ranges of another network"


def test_ranges_that_cannot_be_written_are_refused_before_the_calibration(model, photos):
    model.with_name("superpoint.calibration.json").mkdir()
    assert refused(model, LowPrecisionOptions(photos)) == []
