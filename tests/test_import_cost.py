"""Importing the package costs numpy alone; `-h` of every command works without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs sys.stdlib_module_names")
def test_the_package_and_all_its_names_import_numpy_and_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import superpoint_trt as package; assert 'numpy' not in sys.modules\n"
        "every = [getattr(package, name) for name in dir(package)]\n"
        "from superpoint_trt import Keypoints, SuperPoint, match_images\n"
        "print(*(set(sys.modules) - before))"
    )
    roots = {name.split(".")[0] for name in python(code).split()}
    assert roots - set(sys.stdlib_module_names) == {"numpy", "superpoint_trt"}


def test_public_names():
    import superpoint_trt

    assert set(superpoint_trt.__all__) == {*superpoint_trt._HOMES, "__version__"}
    assert set(superpoint_trt.__all__) <= set(dir(superpoint_trt))
    with pytest.raises(AttributeError, match="no attribute 'Superpoint'"):
        _ = superpoint_trt.Superpoint


HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "cv2",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "skimage",
    "h5py",
    "av",
    "pycolmap",
    "ray",
)


def test_help_needs_no_heavy_library():
    """Of every command and every script of the guide."""
    code = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in HEAVY)
    code += """
import click
from superpoint_trt.cli import guide
from superpoint_trt.cli.main import cli, run

def show(command, *names):
    print(">>", *names, flush=True)
    assert run(command, ["--help"]) == 0
    for name, inner in getattr(command, "commands", {}).items():
        show(inner, *names, name)

show(cli, "superpoint")
for script in (guide.convert_to_onnx, guide.convert_to_tensorrt, guide.tensorrt_inference):
    show(script, script.name)
"""
    told = python(code)
    shown = [line[3:] for line in told.splitlines() if line.startswith(">> ")]
    assert {"superpoint export", "superpoint match", "superpoint weights fetch", "superpoint quantize"} < set(shown)
    assert told.count("Usage:") == len(shown) > 18


def test_the_extractor_runs_without_torch(checkpoint_file, tmp_path, photo):
    """The base install: no torch, from safetensors to keypoints."""
    import numpy as np

    image = tmp_path / "photo.npy"
    np.save(image, photo)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from superpoint_trt import SuperPoint\n"
        "from superpoint_trt.convert.export import export\n"
        f"model = export({str(checkpoint_file('own'))!r}, {str(tmp_path / 'm.onnx')!r})\n"
        f"print(len(SuperPoint(model).extract(np.load({str(image)!r}))))\n"
    )
    assert int(python(code)) > 10
