"""Version-compatible engines without a GPU: which TensorRT runs which, host code, and NVIDIA's real lean bindings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from gpu_host.test_engine_file import METADATA

from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.engine import BuildOptions, build
from superpoint_trt.core.types import OutputType, Precision, SuperPointError
from superpoint_trt.gpu import tensorrt_api
from superpoint_trt.gpu.engine import _fitting_runtime, check_host_code
from superpoint_trt.gpu.engine_file import EngineMetadata, VersionCompatible, check_runs_here, why_refused
from superpoint_trt.gpu.tensorrt_api import Flavor, Part, TensorRT

PATH = Path("a.engine")
INSIDE, APART = VersionCompatible.LEAN_INSIDE, VersionCompatible.LEAN_APART


def built_by(version: str, compatible: VersionCompatible | None = INSIDE) -> EngineMetadata:
    return replace(METADATA, tensorrt_version=version, version_compatible=compatible)


# ------------------------------------------------------------------------------------------------ which runs which plan


@pytest.mark.parametrize(
    ("made", "here", "part"),
    [
        ("8.6.0", "10.16.1.11", Part.DISPATCH),  # seen on an H200
        ("8.6.0", "8.6.0", Part.FULL),
        ("10.3.0", "10.16.1.11", Part.LEAN),
        ("10.16.1.11", "11.4.0", Part.DISPATCH),
        ("10.3.0", "11.4.0", Part.FULL),
    ],
)
def test_a_plan_with_the_lean_runtime_inside_runs(made, here, part):
    assert why_refused(built_by(made), Flavor.TENSORRT, here, part) == ""
    check_runs_here(built_by(made), PATH, Flavor.TENSORRT, here, "sm86", part)


@pytest.mark.parametrize(
    ("metadata", "flavor", "here", "part", "told"),
    [
        (built_by("8.6.0"), Flavor.TENSORRT, "11.4.0", Part.DISPATCH, "TensorRT 11 runs plans of 10.0 and newer"),
        (built_by("10.16.0"), Flavor.TENSORRT, "10.3.0", Part.FULL, "runs in its own version of TensorRT and newer"),
        (built_by("8.6.0"), Flavor.RTX, "1.7.1", Part.FULL, "was built by tensorrt 8.6.0, here is rtx 1.7.1"),
        (built_by("10.3.0", APART), Flavor.TENSORRT, "10.16.0", Part.LEAN, "it needs tensorrt 10.3.0, full or lean"),
        (built_by("10.3.0", APART), Flavor.TENSORRT, "10.3.0", Part.DISPATCH, "here is tensorrt dispatch runtime 10.3"),
        (built_by("8.6.0", None), Flavor.TENSORRT, "8.6.0", Part.LEAN, "built with --version-compatible only"),
        (built_by("8.6.0", None), Flavor.TENSORRT, "10.3.0", Part.FULL, "was built by tensorrt 8.6.0, here is"),
    ],
)
def test_what_is_refused_and_why(metadata, flavor, here, part, told):
    with pytest.raises(SuperPointError, match=told) as caught:
        check_runs_here(metadata, PATH, flavor, here, "sm86", part)
    assert metadata.rebuild in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [Part.FULL, Part.LEAN])
def test_without_the_lean_runtime_inside_its_own_version_runs_it(part):
    assert why_refused(built_by("10.3.0", APART), Flavor.TENSORRT, "10.3.0", part) == ""


def test_another_gpu_is_refused_all_the_same():
    with pytest.raises(SuperPointError, match=r"was built for sm86 .*, this GPU is sm90"):
        check_runs_here(built_by("8.6.0"), PATH, Flavor.TENSORRT, "10.16.1.11", "sm90", Part.DISPATCH)


# ------------------------------------------------------------------------------------------------------- .json and code


@pytest.mark.parametrize("compatible", [None, INSIDE, APART])
def test_the_json_says_what_runs_it(compatible):
    metadata = built_by("8.6.0", compatible)
    flat = json.loads(metadata.to_json())
    assert EngineMetadata.from_json(metadata.to_json(), PATH) == metadata
    assert flat.get("runs_with", metadata.runs_with) == metadata.runs_with and ("runs_with" in flat) == bool(compatible)
    assert metadata.runs_with.startswith("tensorrt 8.6.0") and ("dispatch" in metadata.runs_with) == (
        compatible is INSIDE
    )
    broken = json.dumps({**flat, "version_compatible": "sometimes"}).encode()
    with pytest.raises(SuperPointError, match="version_compatible"):
        EngineMetadata.from_json(broken, PATH)


def test_host_code_must_be_allowed():
    with pytest.raises(
        SuperPointError, match=r"a\.engine carries host code .*--allow-host-code .*allow_host_code=True"
    ):
        check_host_code(built_by("8.6.0"), PATH, allowed=False)
    check_host_code(built_by("8.6.0"), PATH, allowed=True)
    check_host_code(built_by("10.3.0", APART), PATH, allowed=False)
    check_host_code(built_by("8.6.0", None), PATH, allowed=False)


def test_the_options_of_build(exported, tmp_path):
    command = BuildOptions(version_compatible=True, exclude_lean_runtime=True).command(
        "a.onnx", "a.engine", Flavor.TENSORRT
    )
    assert command.endswith("--version-compatible --exclude-lean-runtime")
    with pytest.raises(SuperPointError, match="--exclude-lean-runtime is for --version-compatible"):
        BuildOptions(exclude_lean_runtime=True)


def test_rtx_builds_none(exported, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx", reason="needs a TensorRT that builds without a GPU")
    model, engine = exported("v6", OutputType.HEADS), tmp_path / "a.engine"
    with pytest.raises(SuperPointError, match=r"TensorRT-RTX \S+ builds no version-compatible engines"):
        build(model, engine, BuildOptions(Precision.FP16, targets=("sm89",), version_compatible=True))
    arguments = ["build", "--onnx", str(model), "--engine", str(engine), "--runtime", "rtx", "--target", "sm89"]
    assert run(cli, [*arguments, "--version-compatible"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "leave out --version-compatible" in line and not engine.exists()


# ------------------------------------------------------------------------------------ the real lean and dispatch wheels


@pytest.fixture(params=[Part.DISPATCH, Part.LEAN])
def runtime(request) -> TensorRT:
    if request.param not in tensorrt_api.installed_runtimes():
        pytest.skip(f"TensorRT's {request.param.value} runtime is not installed: pip install '.[lean]'")
    return next(one for one in tensorrt_api.runtimes(Flavor.TENSORRT) if one.part is request.param)


def test_it_is_loaded_and_named(runtime):
    assert str(runtime) == f"TensorRT {runtime.part.value} runtime {runtime.module.__version__}"
    assert runtime.flavor is Flavor.TENSORRT


def test_what_this_package_uses_is_there(runtime):
    """Every attribute of the module and of its classes that running an engine needs; TensorFormat is what lacks."""
    trt = runtime.module
    assert not hasattr(trt, "TensorFormat") and not hasattr(trt, "Builder")
    assert hasattr(trt.Runtime, "engine_host_code_allowed") and hasattr(trt.Runtime, "deserialize_cuda_engine")
    for name in ("get_tensor_format_desc", "get_tensor_profile_shape", "num_optimization_profiles", "get_tensor_mode"):
        assert hasattr(trt.ICudaEngine, name)
    for name in ("set_tensor_address", "set_input_shape", "execute_async_v3", "set_optimization_profile_async"):
        assert hasattr(trt.IExecutionContext, name)
    assert trt.TensorIOMode.OUTPUT.name == "OUTPUT" and trt.nptype(trt.DataType.HALF).__name__ == "float16"
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None and trt.DataType.BF16 is not None


@pytest.mark.parametrize("part", [Part.DISPATCH, Part.LEAN])
def test_without_a_gpu_it_says_so(part):
    """These bindings return an empty runtime then, and end the process when it is used. In a process of its own."""
    from superpoint_trt.gpu import cuda

    if part not in tensorrt_api.installed_runtimes():
        pytest.skip(f"TensorRT's {part.value} runtime is not installed: pip install '.[lean]'")
    if cuda.driver() is not None:
        pytest.skip("there is a CUDA driver here")
    code = f"""
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor, Part, runtimes
trt = next(one for one in runtimes(Flavor.TENSORRT) if one.part is Part("{part.value}"))
try:
    with trt.explaining("a.engine is not an engine that can be loaded here") as log:
        trt.deserialize(b"ftrt" + bytes(1000), True, log)
except SuperPointError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"TensorRT {part.value} runtime" in done.stdout and "TensorRT finds no usable GPU" in done.stdout


def test_the_one_that_runs_the_plan_is_chosen(runtime):
    """The dispatch runtime runs what carries a lean runtime; the lean one what was built by its version without."""
    version = runtime.version
    if runtime.part is Part.DISPATCH and Flavor.TENSORRT not in tensorrt_api.installed():
        assert _fitting_runtime(Flavor.TENSORRT, built_by("8.6.0")) is runtime
    if runtime.part is Part.LEAN and Flavor.TENSORRT not in tensorrt_api.installed():
        assert _fitting_runtime(Flavor.TENSORRT, built_by(version, APART)) is runtime


def test_nothing_installed_names_both_ways(monkeypatch):
    monkeypatch.setattr(tensorrt_api, "installed", list)
    monkeypatch.setattr(tensorrt_api, "installed_runtimes", dict)
    with pytest.raises(SuperPointError, match=r"TensorRT is not installed here: .*'\.\[tensorrt\]'.*'\.\[lean\]'"):
        next(tensorrt_api.runtimes(Flavor.TENSORRT))


# -------------------------------------------------------------------------------------------------------------- formats


def in_words(words: str) -> SimpleNamespace:
    """An engine that tells its format in words, as far as these bindings tell it."""
    return SimpleNamespace(
        get_tensor_format_desc=lambda name, profile=0: words, get_tensor_shape=lambda name: (1, 65, 3, 4)
    )


LINEAR = "Row major linear FP32 format (kLINEAR)"
CHANNELS_LAST = "Channel major FP16 format where channel % 8 == 0 (kHWC8)"


@pytest.mark.parametrize(
    ("words", "stated", "pitch"),
    [(LINEAR, None, 0), (LINEAR, "LINEAR", 0), (CHANNELS_LAST, "HWC8", 72), ("", "HWC8", 72), ("", "LINEAR", 0)],
)
def test_formats_come_from_tensorrts_words_or_the_json(runtime, words, stated, pitch):
    assert runtime.pixel_pitch(in_words(words), "logits", 0, stated) == pitch


def test_formats_are_not_guessed(runtime):
    with pytest.raises(SuperPointError, match=r"does not tell the format of logits, and there is no \.json that does"):
        runtime.pixel_pitch(in_words(""), "logits")
    with pytest.raises(SuperPointError, match=r"has TensorRT's format HWC8, but the engine's \.json says LINEAR"):
        runtime.pixel_pitch(in_words(CHANNELS_LAST), "logits", 0, "LINEAR")


def test_the_json_states_formats():
    metadata = replace(METADATA, build={"channels_last": ["logits"]})
    assert (metadata.format_of("logits"), metadata.format_of("image")) == ("HWC8", "LINEAR")
