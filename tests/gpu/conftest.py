"""Engines built once a session on the GPU at hand, and the PyTorch reference on real photographs.

SUPERPOINT_TEST_WEIGHTS   checkpoint (default: ../shared's v6); .safetensors where this Python has no torch
SUPERPOINT_TEST_PHOTOS    folder of photographs (default: ../shared's kodak)
SUPERPOINT_TORCH_PYTHON   a Python with torch for the reference (default: this one)
SUPERPOINT_ENGINES        folder to keep engines and the timing cache in (default: a temporary one)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SIZE_HW = (480, 640)
PHOTOS = 8


def _given(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.exists():
        pytest.skip(f"{path} is not here: set {variable}")
    return path


@pytest.fixture(scope="session")
def weights() -> Path:
    return _given("SUPERPOINT_TEST_WEIGHTS", DATA / "weights" / "superpoint_v6_int8deq.pth")


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    folder = _given("SUPERPOINT_TEST_PHOTOS", DATA / "photos" / "kodak")
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".jpg"))[:PHOTOS]


@pytest.fixture(scope="session")
def tensorrt():
    """The TensorRT here, on a GPU it runs on."""
    from superpoint_trt.core.types import SuperPointError
    from superpoint_trt.gpu import cuda
    from superpoint_trt.gpu import tensorrt_api as trt

    if trt.Flavor.TENSORRT not in trt.installed():
        pytest.skip("no tensorrt in this Python")
    try:
        cuda.current_device()
    except SuperPointError as error:
        pytest.skip(f"no GPU: {error}")
    return trt.load(trt.Flavor.TENSORRT)


@pytest.fixture(scope="session")
def engine(tensorrt, weights, tmp_path_factory) -> Callable[..., Path]:
    """(type, precision, **export and build options) -> a built engine; the same arguments give the same file."""
    from superpoint_trt.convert import engine as engines
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
        **decode: object,
    ) -> Path:
        height, width = size_hw
        name = f"{kind}-{precision}-{height}x{width}-{'dynamic' if dynamic else 'static'}-{batch}"
        name += "-linear" if linear_heads else ""
        name += "".join(f"-{key}{value}" for key, value in decode.items())
        built = folder / f"{name}.engine"
        if not built.exists():
            options = ExportOptions(OutputType(kind), height, width, dynamic=dynamic, max_batch_size=batch, **decode)
            model = export(weights, folder / f"{name}.onnx", options)
            build = engines.BuildOptions(
                Precision(precision),
                workspace_gib=4.0,
                max_batch_size=batch,
                timing_cache=folder / "timing.cache",
                linear_heads=linear_heads,
            )
            metadata = engines.build(model, built, build)
            print(f"built {name} in {metadata.build['seconds']} s")
        return built

    return make


@pytest.fixture(scope="session")
def reference(weights, photos, tmp_path_factory) -> Callable[..., list[dict[str, np.ndarray]]]:
    """(height, width) -> for each photograph: inputs (1, 1, H, W), and PyTorch's scores and descriptors of it."""
    folder = tmp_path_factory.mktemp("reference")
    known: dict[tuple[int, int], list[dict[str, np.ndarray]]] = {}

    def get(size_hw: tuple[int, int] = SIZE_HW) -> list[dict[str, np.ndarray]]:
        if size_hw not in known:
            out = folder / f"{size_hw[0]}x{size_hw[1]}.npz"
            python = os.environ.get("SUPERPOINT_TORCH_PYTHON", sys.executable)
            clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")}
            script = Path(__file__).with_name("reference.py")
            command = [python, script, weights, out, f"{size_hw[0]}x{size_hw[1]}", *photos]
            subprocess.run(list(map(str, command)), check=True, env=clean)
            with np.load(out) as data:
                names = ("inputs", "scores", "descriptors")
                known[size_hw] = [{n: data[f"{n}_{i}"] for n in names} for i in range(len(photos))]
        return known[size_hw]

    return get
