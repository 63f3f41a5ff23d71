"""Engines built once a session on the GPU at hand, and an exact reference on photographs.

Without any of these variables the tests use the packaged weights and views of the packaged photograph.

SUPERPOINT_TEST_WEIGHTS   another checkpoint; .safetensors where this Python has no torch
SUPERPOINT_TEST_PHOTOS    a folder of photographs
SUPERPOINT_TORCH_PYTHON   a Python with torch and safetensors, for the reference. Without torch here or there the
                          reference is the fp32 .onnx on the CPU, which `make test` holds against PyTorch.
SUPERPOINT_BUILD_LEVEL    the builder's optimization level: 0 or 1 build in seconds (default: TensorRT's, 3)
SUPERPOINT_ENGINES        a folder to keep engines and the timing cache in (default: a temporary one)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from views import write_batchnorm_checkpoint, write_compact_checkpoint, write_views

SIZE_HW = (480, 640)
PHOTOS = 8


@pytest.fixture(scope="session")
def weights() -> Path:
    from superpoint_trt import packaged

    return Path(os.environ.get("SUPERPOINT_TEST_WEIGHTS") or packaged.WEIGHTS)


@pytest.fixture(scope="session")
def batchnorm_weights(tmp_path_factory) -> Path:
    """A small random network whose BatchNorm stays in the graph."""
    return write_batchnorm_checkpoint(tmp_path_factory.mktemp("checkpoint") / "batchnorm.safetensors")


@pytest.fixture(scope="session")
def compact_weights(tmp_path_factory) -> Path:
    """A random network with a topology, descriptors of 64 numbers."""
    return write_compact_checkpoint(tmp_path_factory.mktemp("checkpoint") / "compact.safetensors")


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> list[Path]:
    folder = os.environ.get("SUPERPOINT_TEST_PHOTOS")
    if not folder:
        return write_views(tmp_path_factory.mktemp("photos"), PHOTOS)
    return sorted(path for path in Path(folder).iterdir() if path.suffix in (".png", ".jpg"))[:PHOTOS]


@pytest.fixture(scope="session")
def tensorrt():
    """The TensorRT here, on a GPU it runs on."""
    from superpoint_trt.core.types import SuperPointError
    from superpoint_trt.gpu import cuda
    from superpoint_trt.gpu.tensorrt_api import Flavor, installed, load

    if Flavor.TENSORRT not in installed():
        pytest.skip("no tensorrt in this Python")
    try:
        cuda.current_device()
    except SuperPointError as error:
        pytest.skip(f"no GPU: {error}")
    return load(Flavor.TENSORRT)


def build_level() -> int | None:
    """The builder's optimization level that was asked for."""
    level = os.environ.get("SUPERPOINT_BUILD_LEVEL")
    return int(level) if level else None


@pytest.fixture(scope="session")
def engine(tensorrt, weights, tmp_path_factory) -> Callable[..., Path]:
    """(type, precision, **export and build options) -> a built engine; the same arguments give the same file."""
    from superpoint_trt.convert.engine import BuildOptions, build
    from superpoint_trt.convert.export import ExportOptions, export
    from superpoint_trt.core.types import OutputType, Precision

    folder = Path(os.environ.get("SUPERPOINT_ENGINES") or tmp_path_factory.mktemp("engines"))
    folder.mkdir(exist_ok=True)

    def make(
        kind: str,
        precision: str,
        dynamic: bool = False,
        batch: int = 1,
        size_hw=SIZE_HW,
        linear_heads: bool = False,
        checkpoint: Path | None = None,
        **decode: object,
    ) -> Path:
        height, width = size_hw
        source = checkpoint or weights
        name = f"{source.stem}-{kind}-{precision}-{height}x{width}-{'dynamic' if dynamic else 'static'}-{batch}"
        name += "-linear" if linear_heads else ""
        name += "".join(f"-{key}{value}" for key, value in decode.items())
        built = folder / f"{name}.engine"
        if not built.exists():
            options = ExportOptions(OutputType(kind), height, width, dynamic=dynamic, max_batch_size=batch, **decode)
            model = export(source, folder / f"{name}.onnx", options)
            settings = BuildOptions(
                Precision(precision),
                workspace_gib=4.0,
                max_batch_size=batch,
                timing_cache=folder / "timing.cache",
                linear_heads=linear_heads,
                optimization_level=build_level(),
            )
            metadata = build(model, built, settings)
            print(f"built {name} in {metadata.build['seconds']} s")
        return built

    return make


@pytest.fixture(scope="session")
def reference(weights, photos, tmp_path_factory) -> Callable[..., list[dict[str, np.ndarray]]]:
    """(height, width), checkpoint -> for each photograph: inputs (1, 1, H, W), and exact scores and descriptors."""
    folder = tmp_path_factory.mktemp("reference")
    known: dict[tuple[object, ...], list[dict[str, np.ndarray]]] = {}

    def get(size_hw: tuple[int, int] = SIZE_HW, checkpoint: Path | None = None) -> list[dict[str, np.ndarray]]:
        source = checkpoint or weights
        key = (size_hw, source)
        if key not in known:
            out = folder / f"{len(known)}.npz"
            script = Path(__file__).with_name("reference.py")
            arguments = [script, source, out, f"{size_hw[0]}x{size_hw[1]}", *photos]
            python, environment = _reference_python()
            subprocess.run([python, *map(str, arguments)], check=True, env=environment)
            with np.load(out) as data:
                names = ("inputs", "scores", "descriptors")
                known[key] = [{n: data[f"{n}_{i}"] for n in names} for i in range(len(photos))]
        return known[key]

    return get


def _reference_python() -> tuple[str, dict[str, str]]:
    """The Python that makes the reference, and its environment: the one with torch if it works, else this one."""
    given = os.environ.get("SUPERPOINT_TORCH_PYTHON")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")}
    if given:
        probe = subprocess.run([given, "-c", "import torch, safetensors, cv2"], env=clean, capture_output=True)
        if not probe.returncode:
            return given, clean
        print(f"{given} lacks torch, safetensors or cv2")
    return sys.executable, dict(os.environ)
