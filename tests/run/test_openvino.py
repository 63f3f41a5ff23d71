"""OpenVINO against the PyTorch reference on real photographs; what it says of itself; and what it refuses."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import onnx
import pytest
from conftest import photograph
from onnx import numpy_helper

from superpoint_trt import Keypoints, SuperPoint, SuperPointError, packaged
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.cast import cast
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.qdq import quantize
from superpoint_trt.core.types import OutputType, Precision
from superpoint_trt.prove.verify import verify
from superpoint_trt.run.backends import devices_for, open_backend

PHOTOGRAPHS = ("astronaut", "coffee", "camera")
KINDS = [kind.value for kind in OutputType]


@pytest.fixture(scope="module")
def openvino():
    return pytest.importorskip("openvino", reason="openvino is not installed: pip install '.[openvino]'")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in PHOTOGRAPHS:
        assert cv2.imwrite(str(folder / f"{name}.png"), photograph(240, 320, name))
    return folder


@pytest.fixture(scope="module")
def int8_model(exported, images, tmp_path_factory):
    source = exported("packaged", OutputType.HEADS, 240, 320)
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    model = onnx.load(source)
    path.write_bytes(quantize(model, calibrate(source, sorted(images.iterdir()))).SerializeToString())
    return path


# ------------------------------------------------------------------------------------------------ against the reference


@pytest.mark.parametrize("device", ["openvino", "openvino:fp32"])
@pytest.mark.parametrize(
    ("kind", "dynamic"), [("dense", True), ("dense", False), ("heads", True), ("keypoints", False)]
)
def test_it_finds_the_references_points(openvino, exported, images, kind, dynamic, device):
    """By the limits of the precision that OpenVINO really computes in: scores, points, order, descriptors, matches."""
    model = exported("packaged", OutputType(kind), 240, 320, dynamic=dynamic, max_keypoints=2048)
    found = verify(model, packaged.WEIGHTS, images, device=device, threads=1)
    assert found.passed, [(gate.name, gate.value, gate.limit) for gate in found.failed]
    assert found.precision is Precision.FP32 or device == "openvino"
    assert "OpenVINO" in found.model_runtime


@pytest.mark.parametrize("device", ["openvino", "openvino:fp32"])
@pytest.mark.parametrize("kind", ["dense", "heads"])
def test_it_finds_the_small_networks_points(openvino, exported, checkpoint_file, images, kind, device):
    model = exported("small", OutputType(kind), 240, 320, dynamic=True)
    found = verify(model, checkpoint_file("small"), images, device=device, threads=1)
    assert found.passed, [(gate.name, gate.value, gate.limit) for gate in found.failed]


@pytest.mark.parametrize("size_hw", [(240, 320), (64, 72), (128, 200)])
def test_score_map_and_descriptors_in_fp32(openvino, exported, size_hw):
    image = np.stack([photograph(*size_hw, name) for name in PHOTOGRAPHS[:2]])[:, None]
    model = exported("packaged", dynamic=True, max_batch_size=2)
    with open_backend(model, "openvino:fp32", 1) as here, open_backend(packaged.WEIGHTS, "cpu") as reference:
        found, expected = here.infer(image), reference.infer(image)
    np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
    assert (found["descriptors"] * expected["descriptors"]).sum(axis=1).min() > 0.99999


def test_a_changed_weight_is_found(openvino, exported, images, tmp_path):
    """The limits hold something: one layer at 0.7 of its strength fails them, also in OpenVINO's own precision."""
    model = onnx.load(exported("packaged", dynamic=True))
    weight = next(w for w in model.graph.initializer if "conv3a" in w.name and len(w.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(0.7), weight.name))
    (tmp_path / "changed.onnx").write_bytes(model.SerializeToString())
    assert not verify(tmp_path / "changed.onnx", packaged.WEIGHTS, images, device="openvino", threads=1).passed


def test_other_layouts_and_legacy_sampling(openvino, exported, photo):
    model = exported("magicleap", dynamic=True)
    with SuperPoint(model, device="openvino:fp32") as here, SuperPoint(model, device="cpu") as there:
        found, expected = here.extract(photo), there.extract(photo)
    here, there = ({tuple(xy): row for row, xy in enumerate(one.xy.tolist())} for one in (found, expected))
    assert set(here) == set(there) and len(there) > 20, "equal scores may change places, points may not"
    rows = [here[point] for point in there]
    np.testing.assert_allclose(found.scores[rows], expected.scores, atol=1e-5)
    assert (found.descriptors[rows] * expected.descriptors).sum(axis=1).min() > 0.9999


def test_int8_runs_in_int8(openvino, int8_model, images):
    found = verify(int8_model, packaged.WEIGHTS, images, device="openvino:fp32", threads=1)
    assert found.precision is Precision.INT8
    assert "int8" in found.model_runtime.split("computed in")[-1]
    values = {gate.name: gate.value for gate in found.gates}
    assert values["keypoints_found_share"] > 0.8 and values["descriptor_cosine_median"] > 0.97


# ----------------------------------------------------------------------------------------------- what it says of itself


def test_device_precision_and_threads_are_named(openvino, exported):
    model = exported("packaged", dynamic=True)
    with open_backend(model, "openvino:fp32", 1) as backend:
        version = openvino.__version__.split("-")[0]
        text = str(backend.runtime)
        assert text.startswith(f"OpenVINO {version}, openvino:CPU:fp32 (") and text.endswith(", 1 threads), fp32")
        assert backend.runtime.computed is Precision.FP32
    with open_backend(model, "openvino") as backend:
        can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        expected = Precision.BF16 if "BF16" in can else Precision.FP16 if "FP16" in can else Precision.FP32
        assert backend.runtime.computed is expected
        assert expected.value in backend.runtime.precision


def test_an_fp16_file_names_both_precisions(openvino, exported, tmp_path):
    model = cast(exported("packaged", height_px=120, width_px=160), tmp_path / "fp16.onnx", Precision.FP16)
    with open_backend(model, "openvino:fp32") as backend:
        assert backend.runtime.precision == "fp16 model, computed in fp32"


def test_what_all_devices_are(openvino):
    found = devices_for("model.onnx")
    assert found[0] == "cpu" and "openvino:CPU" in found
    assert devices_for("model.engine") == ["cuda"]


# --------------------------------------------------------------------------------------------------------- several runs


def test_runs_side_by_side_find_what_single_runs_find(openvino, exported, images):
    files = [*sorted(images.iterdir()), images / "missing.png"] * 3
    with SuperPoint(exported("packaged", dynamic=True, max_batch_size=2), device="openvino:fp32") as superpoint:
        alone = {path: superpoint.extract(path) for path in files[:3]}
        results = list(superpoint.extract_many(files, in_flight=3))
        stream = superpoint.extract_many(files, in_flight=3)
        next(stream)
        stream.close()  # the runs under way are waited for
    assert len(results) == len(files)
    for path, found in zip(files, results):
        if path.exists():
            assert isinstance(found, Keypoints)
            np.testing.assert_allclose(found.xy, alone[path].xy, atol=1e-3)
        else:
            assert isinstance(found, SuperPointError)


def test_a_result_is_the_callers_own(openvino, exported):
    with open_backend(exported("v6", height_px=64, width_px=64), "openvino") as backend:
        first = backend.infer(np.zeros((1, 1, 64, 64), np.float32))["scores"]
        kept = first.copy()
        backend.infer(np.random.default_rng(0).random((1, 1, 64, 64), np.float32))
        np.testing.assert_array_equal(first, kept)


# -------------------------------------------------------------------------------------------------------------- refused


def test_without_openvino_the_command_that_installs_it(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SuperPointError, match=r"OpenVINO is not installed here: pip install '.\[openvino\]'"):
        open_backend(exported("v6"), "openvino")
    assert devices_for("model.onnx")[0] == "cpu" and not any("openvino" in name for name in devices_for("model.onnx"))


@pytest.mark.parametrize("unit", ["GPU.9", "NPU"])
def test_a_device_that_is_not_there(openvino, exported, unit):
    if unit in openvino.Core().available_devices:
        pytest.skip(f"this machine has an {unit}")
    with pytest.raises(SuperPointError, match=f"openvino:{unit} was asked for, but OpenVINO finds only openvino:CPU"):
        open_backend(exported("v6"), f"openvino:{unit}")


@pytest.mark.parametrize("content", [b"no model", b"\x08\x07" * 40])
def test_a_file_that_is_no_model(openvino, tmp_path, content):
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(SuperPointError, match=r"bad\.onnx is not a model OpenVINO can load: (?!.*\.cpp)") as caught:
        open_backend(tmp_path / "bad.onnx", "openvino")
    assert "\n" not in str(caught.value)


def test_weights_in_another_file_are_refused(openvino, exported, tmp_path, monkeypatch):
    """OpenVINO itself reads them, from wherever the model says."""
    onnx.save(
        onnx.load(exported("v6")), tmp_path / "e.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SuperPointError, match=r"keeps its weights .* in another file"):
        open_backend("e.onnx", "openvino")


def test_another_network_is_refused(openvino, tmp_path):
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 8, 8]) for name in ("image", "scores")]
    graph = helper.make_graph([helper.make_node("Relu", ["image"], ["scores"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SuperPointError, match="is not one of this project's models"):
        open_backend(tmp_path / "other.onnx", "openvino")


def test_an_image_of_another_size_and_a_closed_model(openvino, exported):
    backend = open_backend(exported("v6", height_px=64, width_px=64), "openvino")
    with pytest.raises(SuperPointError, match="takes only 64x64"):
        backend.infer(np.zeros((1, 1, 64, 72), np.float32))
    backend.close()
    with pytest.raises(SuperPointError, match="was closed"):
        backend.infer(np.zeros((1, 1, 64, 64), np.float32))


@pytest.mark.parametrize("name", ["model.engine", "model.safetensors"])
def test_what_openvino_does_not_run(name):
    with pytest.raises(SuperPointError, match=r"openvino:CPU was asked for, but OpenVINO runs \.onnx files"):
        open_backend(name, "openvino")


def test_the_command_line_names_it(openvino, exported, images, capsys):
    image, model = images / "camera.png", exported("packaged", dynamic=True)
    assert run(cli, ["infer", "--model", str(model), "--image", str(image), "--device", "openvino:fp32"]) == 0
    assert "ran on        OpenVINO" in capsys.readouterr().out
    assert run(cli, ["infer", "--model", str(model), "--image", str(image), "--device", "openvino:TPU"]) == 2
    assert "expected auto, cpu, cuda, cuda:N, openvino" in capsys.readouterr().err
