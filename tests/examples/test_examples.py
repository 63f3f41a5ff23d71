"""Runs every example as a user does: a process of its own, in an empty folder."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from superpoint_trt import SuperPoint, packaged
from superpoint_trt.checkpoint.layouts import load
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import OutputType

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(folder: Path, *command: object, code: int = 0) -> str:
    """Runs a command in a folder and returns its standard output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([str(c) for c in command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> list[int]:
    """The numbers that a pattern's groups find in what an example printed."""
    found = re.search(pattern, text)
    assert found, text
    return [int(group) for group in found.groups()]


def test_every_example_is_short_and_tested():
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".cpp"))
    assert [name[:2] for name in files] == [f"{i:02d}" for i in range(1, len(files) + 1)]
    source = Path(__file__).read_text()
    for name in files:
        assert name in source
        assert len((EXAMPLES / name).read_text().splitlines()) <= 60, name


def test_extract_and_match(tmp_path):
    printed = run(tmp_path, sys.executable, EXAMPLES / "01_extract_and_match.py")
    matches, inliers = numbers(r"(\d+) matches, (\d+) of them agree", printed)
    assert matches > 200 and inliers > 0.8 * matches
    assert cv2.imread(str(tmp_path / "example_matches.jpg")) is not None


def test_extract_and_match_of_given_images(tmp_path):
    printed = run(tmp_path, sys.executable, EXAMPLES / "01_extract_and_match.py", packaged.PHOTO, packaged.PHOTO)
    matches, inliers = numbers(r"(\d+) matches, (\d+) of them agree", printed)
    assert inliers == matches > 500


def test_lightglue_hand_over(tmp_path):
    pytest.importorskip("torch")
    printed = run(tmp_path, sys.executable, EXAMPLES / "02_lightglue.py")
    shapes = {}
    for line in printed.splitlines():
        found = re.match(r"(image[01])\s+(\w+)\s+(\(.*?\))\s+torch\.float32$", line)
        if found:
            shapes[found[1], found[2]] = ast.literal_eval(found[3])
    n = shapes["image0", "keypoints"][1]
    assert n > 1000
    for image, count in (("image0", n), ("image1", 1000)):
        assert shapes[image, "keypoints"] == (1, count, 2)
        assert shapes[image, "keypoint_scores"] == (1, count)
        assert shapes[image, "descriptors"] == (1, count, load(packaged.DEFAULT).descriptor_dim)
        assert shapes[image, "image_size"] == (1, 2)


def test_opencv(tmp_path):
    printed = run(tmp_path, sys.executable, EXAMPLES / "03_opencv.py")
    matches, inliers = numbers(r"(\d+) matches, (\d+) inliers", printed)
    assert matches > 200 and inliers > 0.6 * matches
    assert cv2.imread(str(tmp_path / "example_opencv.jpg")) is not None


def test_torch_zero_copy(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU: 04_torch_zero_copy.py needs one, TensorRT, and torch with CUDA")
    pytest.importorskip("tensorrt")
    onnx, engine = tmp_path / "heads.onnx", tmp_path / "heads.engine"
    command = (sys.executable, "-m", "superpoint_trt")
    run(tmp_path, *command, "export", "--type", "heads", "--output", onnx, "--height", 512, "--width", 512)
    run(tmp_path, *command, "build", "--onnx", onnx, "--engine", engine, "--precision", "fp16")
    printed = run(tmp_path, sys.executable, EXAMPLES / "04_torch_zero_copy.py", engine)
    keypoints, mutual = numbers(r"(\d+) keypoints on cuda:0, (\d+) mutual", printed)
    assert mutual > 0.99 * keypoints > 500


def test_torch_zero_copy_says_what_it_needs(tmp_path):
    pytest.importorskip("torch")
    run(tmp_path, sys.executable, EXAMPLES / "04_torch_zero_copy.py", code=1)


def test_int8(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    picture = cv2.imread(str(packaged.PHOTO))
    for index in range(12):  # different parts of the photograph, at different sizes
        top, left = 16 * (index // 4), 32 * (index % 4)
        cv2.imwrite(str(photos / f"{index:02d}.png"), picture[top : top + 300 + 16 * index, left : left + 400])
    onnx = tmp_path / "heads.onnx"
    export(packaged.WEIGHTS, onnx, ExportOptions(type=OutputType.HEADS, height_px=240, width_px=320))

    done = subprocess.run(
        [sys.executable, EXAMPLES / "05_int8.py", onnx, photos],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert "warning: " in done.stdout, done.stdout + done.stderr  # twelve images are few
    found = re.search(r"keypoints_found_share\s+(0\.\d+)  limit 0\.9\s+(passed|FAILED)", done.stdout)
    assert found and float(found[1]) > 0.85, done.stdout
    assert done.returncode == (1 if "FAILED" in done.stdout else 0)
    with SuperPoint(tmp_path / "example_int8.onnx") as superpoint:
        assert "int8" in str(superpoint.runtime)
        assert len(superpoint.extract(packaged.PHOTO)) > 200


def compiler_flags(folder: Path) -> list[str]:
    """How to compile and link with ONNX Runtime here; skips the test where that is not possible."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: 06_keypoints.cpp cannot be compiled")
    probe = folder / "probe.cpp"
    probe.write_text("#include <onnxruntime_cxx_api.h>\nint main() { return Ort::Env().release() == nullptr; }\n")
    flags = ["-I/usr/include/onnxruntime", "-lonnxruntime"]
    command = ["g++", "-std=c++17", str(probe), "-o", str(folder / "probe"), *flags]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no onnxruntime for C++ (Debian: libonnxruntime-dev): 06_keypoints.cpp cannot be compiled")
    return flags


def test_cpp_prints_the_same_keypoints(tmp_path):
    program = tmp_path / "keypoints"
    flags = compiler_flags(tmp_path)
    warnings = ("-Wall", "-Wextra", "-Werror")
    run(tmp_path, "g++", "-std=c++17", "-O2", *warnings, EXAMPLES / "06_keypoints.cpp", *flags, "-o", program)
    image = cv2.resize(cv2.imread(str(packaged.PHOTO), cv2.IMREAD_GRAYSCALE), (320, 240), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(tmp_path / "image.pgm"), image)
    onnx = tmp_path / "keypoints.onnx"
    export(packaged.WEIGHTS, onnx, ExportOptions(type=OutputType.KEYPOINTS, height_px=240, width_px=320))

    rows = np.array([line.split() for line in run(tmp_path, program, onnx, "image.pgm").splitlines()], np.float32)
    with SuperPoint(onnx) as superpoint:
        expected = superpoint.extract(image)
    assert len(rows) == len(expected) > 200
    np.testing.assert_allclose(rows[:, :2], expected.xy, atol=1e-3)
    np.testing.assert_allclose(rows[:, 2], expected.scores, atol=1e-5)
    assert run(tmp_path, program, onnx, "missing.pgm", code=1) == ""
