"""Engines of networks with a topology: the sum at 1/16 of any size, descriptors of 64 numbers, int8.

A random network stands in; each packaged network that has a topology is tested on top of it.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import build_level
from test_lanes import assert_same, in_numpy

from superpoint_trt import packaged
from superpoint_trt.checkpoint.layouts import load
from superpoint_trt.convert.engine import BuildOptions, build
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.gptq import round_weights
from superpoint_trt.convert.quantize.options import COARSE, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import quantize_file
from superpoint_trt.convert.quantize.ranges_file import ranges_path, save_calibration
from superpoint_trt.core.types import OutputType, Precision
from superpoint_trt.prove.verify import verify
from superpoint_trt.run.backends import open_backend
from superpoint_trt.run.extractor import SuperPoint

NAMED = [network.weights for network in packaged.NETWORKS if load(network.weights).topology]


@pytest.fixture(params=[None, *NAMED], ids=lambda path: path.stem if path else "random")
def compact(request, compact_weights) -> Path:
    return request.param or compact_weights


def picture(path: Path) -> np.ndarray:
    """Gray uint8, 640x480 px."""
    return cv2.resize(cv2.imread(str(path), cv2.IMREAD_GRAYSCALE), (640, 480), interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("size_hw", [(480, 640), (488, 648)], ids=str)
def test_fp32_equals_pytorch(engine, reference, compact, size_hw):
    with SuperPoint(engine("dense", "fp32", size_hw=size_hw, checkpoint=compact)) as superpoint:
        for truth in reference(size_hw, compact)[:2]:
            outputs = superpoint.infer(truth["inputs"])
            for name in ("scores", "descriptors"):
                assert np.abs(outputs[name] - truth[name]).max() < 1e-3, name


@pytest.mark.parametrize("size_hw", [(240, 320), (248, 328), (480, 640), (488, 648), (960, 1280)], ids=str)
def test_dynamic_sizes_equal_pytorch(engine, reference, compact, size_hw):
    with SuperPoint(engine("dense", "fp32", dynamic=True, batch=2, checkpoint=compact)) as superpoint:
        for truth in reference(size_hw, compact)[:2]:
            outputs = superpoint.infer(truth["inputs"])
            assert np.abs(outputs["scores"] - truth["scores"]).max() < 1e-3
            assert np.abs(outputs["descriptors"] - truth["descriptors"]).max() < 1e-3


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("dynamic", "batch"), [(False, 1), (True, 8)])
def test_keypoints_equal_the_host_decode(engine, photos, compact, precision, half, dynamic, batch):
    """From the host's image to the host's keypoints in one CUDA graph; descriptors of 64 numbers."""
    images = [picture(photo) for photo in photos[:3]]
    model = engine("heads", precision, dynamic, batch, checkpoint=compact)
    with SuperPoint(model, half_descriptors=half, max_keypoints=1024) as superpoint:
        assert "decode on the GPU (CUDA)" in str(superpoint.runtime)
        for image in images:  # plain, captured, replayed
            found = superpoint.extract(image)
            assert found.descriptors.shape[1] == load(compact).descriptor_dim and len(found) > 100
            assert_same(found, in_numpy(superpoint, image))
        expected = [superpoint.extract(image) for image in images]
        for one, truth in zip(superpoint.extract_many(images, batch, 2), expected):
            distance = np.linalg.norm(one.xy[:, None] - truth.xy[None], axis=2)
            assert (distance.min(axis=1) <= 1).mean() >= 0.97


@pytest.fixture(scope="module")
def ranges_of(photos, tmp_path_factory):
    """Checkpoint -> its fp32 heads .onnx and the ranges measured on four photographs."""
    made: dict[Path, tuple[Path, Path]] = {}

    def get(checkpoint: Path) -> tuple[Path, Path]:
        if checkpoint not in made:
            folder = tmp_path_factory.mktemp("fp32")
            model = export(checkpoint, folder / "heads.onnx", ExportOptions(OutputType.HEADS, 480, 640))
            found = round_weights(model, calibrate(model, photos[4:]), photos[4:])
            made[checkpoint] = model, save_calibration(found, ranges_path(model))
        return made[checkpoint]

    return get


@pytest.mark.parametrize("keep", [(COARSE,), ()], ids=["coarse", "every"])
def test_int8_computes_what_its_graph_says(tensorrt, ranges_of, photos, compact, tmp_path, keep):
    """Against the Q/DQ graph in onnxruntime: nearer to it than the fp32 network is."""
    model, ranges = ranges_of(compact)
    quantized = quantize_file(model, tmp_path / "int8.onnx", ranges, QuantizeOptions(keep_fp16=keep))
    options = BuildOptions(
        Precision.INT8, workspace_gib=4.0, calibration=ranges, keep_fp16=keep, optimization_level=build_level()
    )
    build(model, tmp_path / "int8.engine", options)
    image = picture(photos[0])[None, None].astype(np.float32) / np.float32(255)
    heads = []
    for path, device in ((tmp_path / "int8.engine", "cuda"), (quantized, "cpu"), (model, "cpu")):
        with open_backend(path, device) as backend:
            heads.append({name: value.astype(np.float32) for name, value in backend.infer(image).items()})
    engine, graph, fp32 = heads
    for name in graph:
        off, lost = (float(np.abs(graph[name] - other[name]).mean()) for other in (engine, fp32))
        print(name, "engine", off, "fp32", lost)
        assert off < 0.7 * lost


@pytest.mark.parametrize("weights", NAMED, ids=lambda path: path.stem)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_packaged_networks_pass_their_gates(tensorrt, ranges_of, photos, tmp_path, weights, precision):
    model, ranges = ranges_of(weights)
    low = {"calibration": ranges, "keep_fp16": (COARSE,)} if precision == "int8" else {}
    options = BuildOptions(Precision(precision), workspace_gib=4.0, optimization_level=build_level(), **low)
    build(model, tmp_path / "a.engine", options)
    found = verify(tmp_path / "a.engine", model, photos[:4])
    print(precision, {gate.name: gate.value for gate in found.gates})
    assert found.passed, [gate for gate in found.gates if not gate.passed]
