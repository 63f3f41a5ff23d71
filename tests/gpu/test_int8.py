"""int8 engines against the fp32 network: the gates of `superpoint verify`, the kernels, batches and sizes.

SUPERPOINT_TEST_CALIBRATION   ranges of SUPERPOINT_TEST_WEIGHTS (.calibration.json); default: measured on four photos
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import build_level

from superpoint_trt.convert import engine as engines
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.gptq import round_weights
from superpoint_trt.convert.quantize.options import COARSE, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import quantize_file
from superpoint_trt.convert.quantize.ranges_file import ranges_path, save_calibration
from superpoint_trt.core.image import load_image, to_gray
from superpoint_trt.core.types import OutputType, Precision
from superpoint_trt.prove.agreement import within
from superpoint_trt.prove.verify import verify
from superpoint_trt.run.extractor import SuperPoint

SIZE_HW = (480, 640)
PROOF = 4
GIVEN = os.environ.get("SUPERPOINT_TEST_CALIBRATION")


@pytest.fixture(scope="module")
def reference_model(weights, tmp_path_factory) -> Path:
    """The fp32 heads .onnx, which onnxruntime runs on the CPU."""
    return export(weights, tmp_path_factory.mktemp("fp32") / "heads.onnx", ExportOptions(OutputType.HEADS, *SIZE_HW))


@pytest.fixture(scope="module")
def ranges(reference_model, photos) -> Path:
    """Of photographs that the proof does not see."""
    if GIVEN:
        return Path(GIVEN)
    found = round_weights(reference_model, calibrate(reference_model, photos[PROOF:]), photos[PROOF:])
    return save_calibration(found, ranges_path(reference_model))


@pytest.fixture(scope="module")
def proof(photos) -> list[Path]:
    """All of them if the ranges come from elsewhere: few photographs say little."""
    return photos if GIVEN else photos[:PROOF]


@pytest.fixture(scope="module")
def int8_engine(tensorrt, weights, ranges, tmp_path_factory) -> Callable[..., Path]:
    """(type, dynamic, batch, keep) -> a built int8 engine, the coarse layers in fp16 as by default on the command line.

    The same arguments give the same file.
    """
    folder = Path(os.environ.get("SUPERPOINT_ENGINES") or tmp_path_factory.mktemp("int8"))
    folder.mkdir(exist_ok=True)

    def make(kind: str, dynamic: bool = False, batch: int = 1, keep: tuple[str, ...] = (COARSE,)) -> Path:
        kept = "-".join(keep) or "every"
        built = folder / f"{weights.stem}-int8-{kind}-{'dynamic' if dynamic else 'static'}-{batch}-{kept}.engine"
        if not built.exists():
            options = ExportOptions(OutputType(kind), *SIZE_HW, dynamic=dynamic, max_batch_size=batch)
            model = export(weights, built.with_suffix(".onnx"), options)
            build = engines.BuildOptions(
                Precision.INT8,
                workspace_gib=4.0,
                max_batch_size=batch,
                timing_cache=folder / "timing.cache",
                calibration=ranges,
                keep_fp16=keep,
                optimization_level=build_level(),
            )
            print(f"built {built.name} in {engines.build(model, built, build).build['seconds']} s")
        return built

    return make


def gray(path: Path) -> np.ndarray:
    return to_gray(load_image(path))


@pytest.mark.parametrize("kind", ["dense", "keypoints", "heads"])
def test_int8_keeps_its_points(int8_engine, reference_model, proof, kind):
    found = verify(int8_engine(kind), reference_model, proof)
    print(kind, {gate.name: gate.value for gate in found.gates})
    assert found.precision is Precision.INT8
    assert found.passed, [gate for gate in found.gates if not gate.passed]


def test_tensorrt_rounds_as_onnxruntime_does(int8_engine, reference_model, ranges, proof, tmp_path):
    """The same Q/DQ graph on the CPU in float32: nearer to it than the fp32 network is."""
    quantized = quantize_file(
        reference_model, tmp_path / "int8.onnx", ranges, options=QuantizeOptions(keep_fp16=(COARSE,))
    )
    shares: dict[str, list[float]] = {"int8": [], "fp32": []}
    with SuperPoint(int8_engine("heads")) as engine:
        found = [engine.extract(gray(photo)) for photo in proof]
    for name, model in (("int8", quantized), ("fp32", reference_model)):
        with SuperPoint(model, device="cpu") as onnxruntime:
            for photo, ours in zip(proof, found):
                shares[name].append(float(within(onnxruntime.extract(gray(photo)).xy, ours.xy).mean()))
    means = {name: float(np.mean(values)) for name, values in shares.items()}
    print("points of onnxruntime that the int8 engine finds:", means)
    assert means["int8"] > means["fp32"]


@pytest.mark.parametrize(("keep", "least"), [((), 10), ((COARSE,), 6)], ids=["every", "coarse"])
def test_the_kernels_are_int8(int8_engine, keep, least):
    with SuperPoint(int8_engine("heads", keep=keep)) as superpoint:
        layers = superpoint._backend.engine.layers()
    if not layers:
        pytest.skip("this plan was built without the details that the inspector needs")
    reads = [str(layer.get("Inputs")) for layer in layers if "onv" in layer["LayerType"]]
    assert sum("Int8" in text for text in reads) >= least, reads


def test_batches_and_dynamic_agree_with_static(int8_engine, photos):
    # Exactly the static size: a larger image would be shrunk for one engine and not for the other.
    grays = [np.ascontiguousarray(gray(photo)[:480, :640]) for photo in photos[:3]]
    with SuperPoint(int8_engine("heads")) as static, SuperPoint(int8_engine("heads", True, 8)) as dynamic:
        alone = [static.extract(one) for one in grays]
        for one, other in zip(alone, dynamic.extract_batch(grays)):
            assert within(one.xy, other.xy).mean() >= 0.95
        assert len(dynamic.extract(np.ascontiguousarray(grays[0][:240, :320]))) > 0
