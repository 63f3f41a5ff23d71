"""The published guide's commands and snippets, run as written, other than the engine: an .onnx stands in for it.

The guide: huluoboge/SuperPoint, TENSORRT_CONVERSION_GUIDE.md.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from conftest import photograph

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, checkpoint_file):
    """A folder as the guide's reader has it: weights/, test.jpg, the scripts beside."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "weights").mkdir()
    (folder / "weights/superpoint_v6_from_tf.pth").write_bytes(checkpoint_file("v6").read_bytes())
    cv2.imwrite(str(folder / "test.jpg"), photograph(480, 640))
    for script in ROOT.glob("*.py"):
        (folder / script.name).symlink_to(script)
    return folder


def guide(desk: Path, command: str) -> subprocess.CompletedProcess:
    words = [sys.executable, *shlex.split(command.replace("\\\n", " "))[1:]]
    return subprocess.run(words, cwd=desk, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def dense(desk):
    done = guide(
        desk,
        """python convert_to_onnx.py \\
    --weights weights/superpoint_v6_from_tf.pth \\
    --output superpoint_dense.onnx \\
    --type dense \\
    --height 480 \\
    --width 640""",
    )
    assert done.returncode == 0, done.stderr
    return desk / "superpoint_dense.onnx"


def outputs(path: Path) -> dict[str, list]:
    graph = onnx.load(path).graph
    return {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in graph.output}


def test_step_1_dense(dense):
    model = onnx.load(dense)
    assert model.opset_import[0].version == 11
    # The guide later builds dynamic engines from this very file.
    assert outputs(dense) == {
        "scores": ["batch", "height", "width"],
        "descriptors": ["batch", 32, "height/8", "width/8"],
    }


def test_step_1_keypoints(desk):
    done = guide(
        desk,
        """python convert_to_onnx.py \\
    --weights weights/superpoint_v6_from_tf.pth \\
    --output superpoint_keypoints.onnx \\
    --type keypoints \\
    --max-keypoints 1024 \\
    --height 480 \\
    --width 640""",
    )
    assert done.returncode == 0, done.stderr
    shapes = outputs(desk / "superpoint_keypoints.onnx")
    assert [shapes[name] for name in ("keypoints", "scores", "descriptors")] == [
        ["batch", 1024, 2],
        ["batch", 1024],
        ["batch", 1024, 32],
    ]
    done = guide(
        desk, "python tensorrt_inference.py --engine superpoint_keypoints.onnx --image test.jpg --type keypoints"
    )
    assert done.returncode == 0, done.stderr
    assert (desk / "output_keypoints.jpg").exists()


def test_step_1_defaults(desk):
    assert guide(desk, "python convert_to_onnx.py").returncode == 0
    assert (desk / "superpoint.onnx").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--engine superpoint_fp32.trt --workspace 2.0",
        "--engine superpoint_fp16.trt --fp16 --workspace 2.0",
        "--engine superpoint_dynamic.trt --fp16 --dynamic-shapes --min-height 240 --min-width 320 --opt-height 480 "
        "--opt-width 640 --max-height 960 --max-width 1280 --workspace 4.0",
        "--engine superpoint_fp16.trt --fp16 --max-batch-size 4",
    ],
)
def test_step_2_builds(desk, dense, flags):
    """With the real TensorRT-RTX, which needs to be told a GPU where there is none."""
    pytest.importorskip("tensorrt_rtx")
    done = guide(desk, f"python convert_to_tensorrt.py --onnx superpoint_dense.onnx {flags} --target sm89")
    assert done.returncode == 0, done.stderr
    (engine,) = desk.glob("*.trt")
    metadata = json.loads(engine.with_name(engine.name + ".json").read_text())
    dynamic, batch = "--dynamic-shapes" in flags, 4 if "4" in flags.split() else 1
    assert metadata["profile"]["min"] == [1, 240, 320] if dynamic else [1, 480, 640]
    assert metadata["profile"]["max"] == [batch, *((960, 1280) if dynamic else (480, 640))]
    assert metadata["description"]["superpoint_trt.precision"] == ("fp16" if "--fp16" in flags else "fp32")
    engine.unlink()


@pytest.mark.parametrize(
    ("flags", "says"),
    [("--int8", "calibration"), ("--workspace 2.0", "GPU"), ("--target sm42", "sm42"), ("--max-batch-size 0", "1 or")],
)
def test_step_2_says_what_is_missing(desk, dense, flags, says):
    done = guide(desk, f"python convert_to_tensorrt.py --onnx superpoint_dense.onnx {flags}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert not list(desk.glob("*.trt"))


@pytest.mark.parametrize("benchmark", ["", pytest.param("--benchmark", marks=pytest.mark.exhaustive)])
def test_step_3_inference_and_benchmark(desk, dense, benchmark):
    done = guide(
        desk,
        f"""python tensorrt_inference.py \\
    --engine superpoint_dense.onnx \\
    --image test.jpg \\
    --output result.jpg \\
    --type dense \\
    --threshold 0.005 \\
    --top-k 1000 {benchmark}""",
    )
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout, "what really ran is named"
    assert ("median" in done.stdout) == bool(benchmark)
    assert cv2.imread(str(desk / "result.jpg")).shape == (480, 640, 3)


def test_step_3_refuses_a_model_of_the_other_type(desk, dense):
    done = guide(desk, "python tensorrt_inference.py --engine superpoint_dense.onnx --image test.jpg --type keypoints")
    assert done.returncode == 2
    assert "dense model" in done.stderr


def test_python_example(desk, dense, monkeypatch):
    """The guide's snippet, line for line but for the file's name."""
    monkeypatch.chdir(desk)
    from tensorrt_inference import SuperPointTRT

    model = SuperPointTRT("superpoint_dense.onnx", output_type="dense")
    image = cv2.imread("test.jpg", cv2.IMREAD_GRAYSCALE)
    outputs = model.infer(image)
    results = model.extract_keypoints_from_dense(outputs["scores"], outputs["descriptors"], threshold=0.005, top_k=1000)
    keypoints = results[0]["keypoints"]  # [N, 2]
    scores = results[0]["scores"]  # [N]
    descriptors = results[0]["descriptors"]  # [N, 256]
    assert keypoints.shape == (len(scores), 2)
    assert descriptors.shape == (len(scores), 32)
    assert 0 < len(scores) <= 1000


def test_comparison_script_really_compares(desk, dense, monkeypatch):
    """The guide's comparison, whose last line was left to the reader."""
    monkeypatch.chdir(desk)
    import torch
    from superpoint_pytorch import SuperPoint
    from tensorrt_inference import SuperPointTRT

    image = cv2.imread("test.jpg", cv2.IMREAD_GRAYSCALE)
    image_tensor = torch.from_numpy(image).float() / 255.0
    image_tensor = image_tensor.unsqueeze(0).unsqueeze(0)
    pytorch_model = SuperPoint()
    pytorch_model.load_state_dict(torch.load("weights/superpoint_v6_from_tf.pth"))
    pytorch_model.eval()
    with torch.no_grad():
        pytorch_out = pytorch_model({"image": image_tensor})
    trt_model = SuperPointTRT("superpoint_dense.onnx", "dense")
    trt_out = trt_model.infer(image)
    found = trt_model.extract_keypoints_from_dense(trt_out["scores"], trt_out["descriptors"])[0]
    place = {tuple(point): row for row, point in enumerate(found["keypoints"].tolist())}
    order = [place[tuple(point)] for point in pytorch_out["keypoints"][0].tolist()]
    assert len(order) == len(place), "the same points, none more"
    np.testing.assert_allclose(found["scores"][order], pytorch_out["keypoint_scores"][0].numpy(), atol=1e-5)
    cosine = (found["descriptors"][order] * pytorch_out["descriptors"][0].numpy()).sum(axis=1)
    assert cosine.min() > 0.99999
    # The line that the guide leaves to the reader.
    report = trt_model.compare(pytorch_out, trt_out)
    assert "100.00% of PyTorch's and 100.00% of the engine's within 1 px" in report and "cosine 1.000000" in report
    shifted = {**trt_out, "scores": np.roll(trt_out["scores"], 3, axis=2)}
    assert "100.00%" not in trt_model.compare(pytorch_out, shifted)
