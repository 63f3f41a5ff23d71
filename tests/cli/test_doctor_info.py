"""`superpoint doctor` on machines that lack things, and `superpoint info` of every kind of file."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import LAYOUTS

import superpoint_trt
from superpoint_trt import __version__
from superpoint_trt.cli import doctor
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import DecodeOptions, Keypoints, OutputType
from superpoint_trt.match.geometry import Model
from superpoint_trt.match.images import match_images, save_matches
from superpoint_trt.run.store import _GEOMETRIES, save_features

# --------------------------------------------------------------------------------------------------------------- doctor


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in (*doctor.examine(), *doctor.abilities())}


def test_doctor_names_versions(capfd):
    assert run(cli, ["doctor"]) == 0
    out, err = capfd.readouterr()
    for words in (__version__, np.__version__, onnx.__version__, onnxruntime.__version__, torch.__version__):
        assert words in out
    assert sys.version.split()[0] in out
    assert "CPUExecutionProvider" in out
    assert err == ""


@pytest.fixture
def without(monkeypatch):
    """Hides installed modules, as on a machine that lacks them."""

    def hide(*names: str) -> None:
        real_find, real_import = importlib.util.find_spec, doctor.import_module

        def find_spec(name, package=None):
            return None if name.split(".")[0] in names else real_find(name, package)

        def import_module(name, package=None):
            if name.split(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
            return real_import(name, package)

        monkeypatch.setattr("importlib.util.find_spec", find_spec)
        monkeypatch.setattr(doctor, "import_module", import_module)

    return hide


def test_what_maps_need(without):
    without("pycolmap", "h5py")
    found = findings()
    assert not found["pycolmap"].present and "[colmap]" in found["pycolmap"].detail
    mapping = found["map photographs and videos"]
    assert not mapping.present and "[colmap]" in mapping.detail and "[bulk]" in mapping.detail


def test_doctor_names_the_command_for_what_is_missing(without, monkeypatch, capfd):
    without("torch", "cuda", "tensorrt", "tensorrt_rtx")
    monkeypatch.setenv("PATH", "")
    assert run(cli, ["doctor"]) == 0
    out = capfd.readouterr().out
    for command in (
        "pip install '.[torch]' (in your clone",
        "pip install '.[tensorrt]' (in your clone",
        "pip install '.[rtx]' (in your clone",
        "no nvidia-smi; with an NVIDIA GPU, install its driver",
    ):
        assert command in out
    found = findings()
    for name in ("torch", "cuda-bindings", "tensorrt", "tensorrt-rtx", "NVIDIA GPU", "export .pth to .onnx"):
        assert not found[name].present, name
    for name in ("numpy", "OpenCV", "onnx", "onnxruntime", "find keypoints with .onnx", "export .safetensors to .onnx"):
        assert found[name].present, name


def test_doctor_says_it_short_and_where_the_package_is(without, capfd):
    without("tensorrt", "tensorrt_rtx")
    assert run(cli, ["doctor"]) == 0
    out = capfd.readouterr().out
    assert "version, or how to add it" in out and "how, or what is missing" in out
    assert "superpoint doctor" not in out, "this is doctor"
    found = findings()
    for name in ("build TensorRT engines", "run TensorRT engines"):
        assert found[name].detail.startswith("pip install '.[tensorrt]' or pip install '.[rtx]'")
    assert found["superpoint-trt"].detail == f"{__version__} ({Path(superpoint_trt.__file__).parent})"


def test_doctor_with_torch():
    found = findings()
    assert found["torch"].present and found["torch"].detail.startswith(torch.__version__)
    assert found["export .pth to .onnx"].present


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("ImportError('libnvinfer.so.10: cannot open shared object file')", "libnvinfer.so.10"),
        ("OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),  # what ctypes.CDLL raises
        ("RuntimeError('Unable to find CUDA')", "Unable to find CUDA"),
        ("ModuleNotFoundError('No module named \\'tensorrt_libs\\'', name='tensorrt_libs')", "tensorrt_libs"),
    ],
)
def test_doctor_survives_a_module_that_does_not_import(tmp_path, monkeypatch, capfd, error, says):
    (tmp_path / "tensorrt.py").write_text(f"raise {error}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    found = findings()["tensorrt"]
    assert not found.present
    assert "does not import" in found.detail and says in found.detail
    assert run(cli, ["doctor"]) == 0
    assert "does not import" in capfd.readouterr().out


def test_doctor_with_a_tensorrt(tmp_path, monkeypatch):
    (tmp_path / "tensorrt.py").write_text("__version__ = '10.9.0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    found = findings()
    del sys.modules["tensorrt"]  # for good: monkeypatch would bring it back for the tests that follow
    assert (found["tensorrt"].present, found["tensorrt"].detail) == (True, "10.9.0")
    running = found["run TensorRT engines"]
    assert not running.present and "no usable NVIDIA GPU: " in running.detail, "a library alone runs nothing"


NVIDIA_SMI = {
    # What it prints, its exit code -> whether there is a GPU, and what the report says.
    "one": (
        "NVIDIA H100 80GB HBM3, 9.0, 580.65.06, 81559 MiB",
        0,
        True,
        "NVIDIA H100 80GB HBM3 (SM 9.0), driver 580.65.06, 81559 MiB",
    ),
    "two": ("NVIDIA L4, 8.9, 550.1, 23034 MiB\nNVIDIA L4, 8.9, 550.1, 23034 MiB", 0, True, "23034 MiB; NVIDIA L4 (SM"),
    "no-driver": ("NVIDIA-SMI has failed because it could not talk to the driver.\nMore.", 9, False, "has failed"),
    "no-devices": ("No devices were found", 6, False, "No devices were found"),
    "no-devices-success": ("No devices were found", 0, False, "No devices were found"),
    "silent-success": ("", 0, False, "nvidia-smi"),
    "silent": ("", 3, False, "3"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
@pytest.mark.parametrize("what", NVIDIA_SMI)
def test_doctor_reads_nvidia_smi(tmp_path, monkeypatch, what):
    printed, code, present, says = NVIDIA_SMI[what]
    (tmp_path / "printed").write_text(printed + "\n" if printed else "")
    script = tmp_path / "nvidia-smi"
    script.write_text(
        f"#!/bin/sh\nwhile IFS= read -r line; do echo \"$line\"; done < '{tmp_path}/printed'\nexit {code}\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = findings()["NVIDIA GPU"]
    assert found.present == present
    assert says in found.detail


# ----------------------------------------------------------------------------------------------------------------- info


@pytest.fixture
def info(capfd):
    """What `superpoint info FILE` prints, as label -> value."""

    def rows(path) -> dict[str, str]:
        capfd.readouterr()
        assert run(cli, ["info", str(path)]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return {line[:14].strip(): line[14:] for line in out.splitlines()}

    return rows


def git_blob(path) -> str:
    return subprocess.run(["git", "hash-object", path], capture_output=True, text=True, check=True).stdout.strip()


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Convolutions of conftest's small network, counted by hand: 9 per kernel, and the bias.
PARAMETERS = (
    (1 * 8 + 8 * 8) * 9 + 16  # conv1
    + (8 * 8 + 8 * 8) * 9 + 16  # conv2
    + (8 * 16 + 16 * 16) * 9 + 32  # conv3
    + (16 * 16 + 16 * 16) * 9 + 32  # conv4
    + 2 * (16 * 24 * 9 + 24)  # the heads' hidden layers
    + 24 * 65 + 65 + 24 * 32 + 32  # convPb, convDb
)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_info_of_a_checkpoint(info, checkpoint_file, layout):
    path = checkpoint_file(layout)
    rows = info(path)
    assert str(path) in rows["file"] and f"{path.stat().st_size / 1e6:.2f} MB" in rows["file"]
    assert rows["layout"] == {"own": "superpoint-trt"}.get(layout, layout)
    assert rows["batch norm"] == {"v6": "after-relu", "own": "after-relu"}.get(layout, "none")
    assert rows["sampling"] == {"v6": "half-pixel", "own": "half-pixel"}.get(layout, "legacy")
    assert rows["channels"] == "8 8 16 16 24"
    assert rows["descriptors"] == "32, one per 8x8 px"
    assert rows["parameters"] == f"{PARAMETERS:,}"
    assert rows["sha256"] == sha256(path)
    assert rows["git blob"] == git_blob(path)
    assert "published as" not in rows


@pytest.mark.parametrize(
    ("name", "layout"), [("packaged", "superpoint-trt"), ("real-v6", "v6"), ("real-amd", "magicleap")]
)
def test_info_of_a_published_network(info, checkpoint_file, name, layout):
    rows = info(checkpoint_file(name))
    assert rows["layout"] == layout
    assert rows["channels"] == "64 64 128 128 256"
    assert rows["descriptors"] == "256, one per 8x8 px"
    assert rows["parameters"] == "1,300,865"  # the paper's network, 1.3 M
    assert rows["sampling"] == "half-pixel"


def test_info_names_a_published_checkpoint(info, checkpoint_file, monkeypatch):
    import dataclasses

    from superpoint_trt.checkpoint import public

    path = checkpoint_file("v6")
    published = dataclasses.replace(public.PUBLIC[0], git_blob=git_blob(path))
    monkeypatch.setattr(public, "PUBLIC", (published,))
    assert info(path)["published as"].startswith("v6, ") and "MIT" in info(path)["published as"]


@pytest.mark.parametrize("kind", OutputType)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_info_of_a_model(info, checkpoint_file, tmp_path, kind, dynamic):
    decode = DecodeOptions(nms_radius_px=3, remove_borders_px=6, threshold=0.015)
    options = ExportOptions(
        kind, height_px=64, width_px=96, dynamic=dynamic, max_batch_size=5, max_keypoints=77, decode=decode, opset=16
    )
    path = export(checkpoint_file("magicleap"), tmp_path / "model.onnx", options)
    rows = info(path)
    assert kind.value in rows["what"] and "fp32" in rows["what"]
    assert rows["made by"] == f"superpoint-trt {__version__}"
    assert rows["opset"] == "16"
    assert rows["size"] == ("any (multiples of 8 px, 96x64 px expected)" if dynamic else "96x64 px")
    assert rows["largest batch"] == ("any (superpoint-trt runs 5 at a time)" if dynamic else "5")
    assert rows["keypoints at"] == "whole pixels"
    assert rows["sampling"] == "legacy"
    assert rows["inputs"] == f"image [batch, 1, {'height, width' if dynamic else '64, 96'}] float"
    assert rows["checkpoint"] == f"layout magicleap, sha256 {sha256(checkpoint_file('magicleap'))}"
    assert rows["sha256"] == sha256(path)
    for name in {
        OutputType.DENSE: ["scores [batch, ", "descriptors [batch, 32, "],
        OutputType.KEYPOINTS: ["keypoints [batch, 77, 2]", "scores [batch, 77]", "num_keypoints [batch] int32"],
        OutputType.HEADS: ["logits [batch, 65, ", "coarse_descriptors [batch, 32, "],
    }[kind]:
        assert name in rows["outputs"]
    decoded = "NMS radius 3 px, border 6 px, threshold 0.015, 77 keypoints"
    assert rows.get("decode") == (decoded if kind is OutputType.KEYPOINTS else None)


def test_info_of_another_tools_model(info, tmp_path):
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 3])],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, producer_name="pytorch"), tmp_path / "other.onnx")
    rows = info(tmp_path / "other.onnx")
    assert "another tool's model" in rows["what"]
    assert rows["made by"] == "pytorch"
    assert rows["opset"] == "13"
    assert rows["inputs"] == "x [n, 3] float16"
    assert rows["outputs"] == "y [n, 3] float16"


def test_info_of_a_model_whose_input_is_no_tensor(info, tmp_path):
    """Sequences are ONNX too (skl2onnx writes them)."""
    from onnx import TensorProto, helper

    item = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_value_info("x", helper.make_sequence_type_proto(item))],
        [helper.make_value_info("y", helper.make_sequence_type_proto(item))],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "sequence.onnx")
    assert "another tool's model" in info(tmp_path / "sequence.onnx")["what"]


@pytest.mark.parametrize("count", [0, 3])
def test_info_of_features(info, tmp_path, count):
    features = Keypoints(
        np.zeros((count, 2), np.float32),
        np.linspace(0.75, 0.25, count, dtype=np.float32),
        np.zeros((count, 32), np.float32),
        (641, 479),
    )
    rows = info(save_features(tmp_path / "features.npz", features))
    assert rows["what"] == "keypoints of one image"
    assert rows["image"] == "641x479 px"
    assert rows["keypoints"] == str(count)
    assert rows["descriptors"] == "32 x float32"
    assert rows.get("scores") == ("0.2500 to 0.7500" if count else None)


@pytest.mark.parametrize("shift", [0, 7])
def test_info_of_matches(info, tmp_path, shift):
    """Of points that move by 7 px, and of none."""
    rng = np.random.default_rng(0)
    count = 40 if shift else 0
    xy = rng.uniform(10, 90, (count, 2)).astype(np.float32)
    rows = np.eye(count, 64, dtype=np.float32)
    scores = np.full(count, 0.5, np.float32)
    first, second = (
        Keypoints(places, scores, rows, size) for places, size in ((xy, (100, 90)), (xy + shift, (80, 70)))
    )
    path = save_matches(tmp_path / "m.npz", match_images(first, second))
    found = info(path)
    assert found["what"] == "matches of two images"
    assert found["first image"] == f"100x90 px, {count} keypoints"
    assert found["second image"] == f"80x70 px, {count} keypoints"
    assert found["matches"] == f"{count}, {count} inliers of one homography model"
    assert found["geometry"] == ("supported" if shift else "none")


@pytest.mark.parametrize("name", ["inliers", "geometry", "geometry_type", "image_size0", "matches", "keypoints1"])
def test_a_damaged_file_of_matches_is_one_line(tmp_path, capfd, name):
    none = Keypoints(*(np.zeros(shape, np.float32) for shape in ((0, 2), (0,), (0, 8))), (100, 90))
    path = save_matches(tmp_path / "m.npz", match_images(none, none))
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, name: np.array("odd")})
    assert run(cli, ["info", str(path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "m.npz is not a file of matches" in line
    del arrays[name]
    np.savez(path, **arrays)
    assert run(cli, ["info", str(path)]) == 2
    assert "m.npz is not a f" in capfd.readouterr().err


def test_info_does_not_care_for_the_case_of_endings(info, checkpoint_file, tmp_path):
    (tmp_path / "MODEL.PTH").write_bytes(checkpoint_file("v6").read_bytes())
    assert info(tmp_path / "MODEL.PTH")["layout"] == "v6"


def test_info_knows_every_geometry():
    assert set(_GEOMETRIES) == {model.value for model in Model}
