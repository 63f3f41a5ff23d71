"""The command doctor, and what it finds: what this machine can do, and the command that adds what it cannot."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module, metadata, util
from pathlib import Path

import click
from rich.table import Table

import superpoint_trt
from superpoint_trt import packaged
from superpoint_trt._version import __version__
from superpoint_trt.cli.progress import progress_bar
from superpoint_trt.cli.terminal import console
from superpoint_trt.core.files import one_line
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.onnx_runtime import import_onnxruntime
from superpoint_trt.core.progress import Progress
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.tensorrt_api import MODULES, RTX_TARGETS, RUNTIME_MODULES, Flavor, installed, installed_runtimes
from superpoint_trt.prove.benchmark import BenchOptions, bench
from superpoint_trt.run.backends import devices_for
from superpoint_trt.run.backends.openvino import openvino_devices

_ADD_CUDA = "pip uninstall onnxruntime, then pip install onnxruntime-gpu (NVIDIA GPU with CUDA)"
_ADD_OPENVINO = f"{install_hint('openvino')}; twice as fast where the CPU computes in bf16"
_ADD_TORCH = install_hint("torch")
_ADD_TENSORRT = install_hint(*(flavor.value for flavor in Flavor))


@click.command()
def doctor() -> None:
    """Say what this machine can do, and the command that adds what it cannot."""
    print_findings("this machine", "version, or how to add it", examine())
    print_findings("what you can do", "how, or what is missing", abilities())
    with progress_bar("timing .onnx on this CPU") as progress:
        found = fastest_on_cpu(progress)
    print_findings(f".onnx on this CPU, {_TIMED}", "ms of the network", found)


def print_findings(title: str, detail: str, findings: Iterable[Finding]) -> None:
    """Prints findings as a table, whose last column is headed `detail`."""
    table = Table(title, "", detail)
    for finding in findings:
        table.add_row(finding.name, "yes" if finding.present else "no", finding.detail)
    console().print(table, markup=False)


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    name: str
    present: bool
    detail: str
    """What was found and its version; if it is missing, the command that adds it."""


def examine() -> Iterator[Finding]:
    """Looks at this machine. Imports the libraries that it reports on, so that "present" means that they load."""
    yield Finding("Python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("superpoint-trt", True, f"{__version__} ({Path(superpoint_trt.__file__).parent})")
    yield from _core()
    yield _openvino()
    yield _torch()
    yield _gpu()
    yield _cuda_driver()
    yield _module("cuda-bindings", "cuda.bindings", install_hint("tensorrt"))
    for flavor, module in MODULES.items():
        yield _module(module.replace("_", "-"), module, f"{install_hint(flavor.value)}; docs/tensorrt.md")
    here = installed_runtimes()
    for part, modules in RUNTIME_MODULES.items():
        yield _module(
            modules[0].replace("_", "-"), here.get(part, modules[0]), f"{install_hint('lean')}; runs engines only"
        )
    yield from _bulk()


_TIMING = BenchOptions(size_hw=(240, 320), iterations=4, warm_up=1)
_TIMED = "320x240, fastest of 4"


def fastest_on_cpu(progress: Progress | None = None) -> list[Finding]:
    """Times the network `full` in each runtime that is installed for this CPU; the fastest comes first.

    Args:
        progress: called with (calls done, all calls).
    """
    devices = [device for device in devices_for("model.onnx") if device in ("cpu", "openvino:CPU")]
    try:
        report = bench([packaged.DEFAULT], _TIMING, device=devices, progress=progress)
    except SuperPointError as error:
        return [Finding("timing failed", False, str(error))]
    times = sorted(report.models, key=lambda model: min(model.times_ms["network"]))
    found = [
        Finding(f"--device {device}", True, f"{min(model.times_ms['network']):.1f} in {model.runtime}")
        for model in times
        for device in ["openvino" if model.runtime.backend.startswith("OpenVINO") else "cpu"]
    ]
    if "openvino:CPU" not in devices:
        found.append(Finding("--device openvino", False, _ADD_OPENVINO))
    return [replace(found[0], name=f"{found[0].name} (take this)" if len(times) > 1 else found[0].name), *found[1:]]


def abilities() -> Iterator[Finding]:
    """Tells what a user can do on this machine."""
    has_torch = _torch().present
    yield Finding("export .safetensors to .onnx", True, "superpoint export")
    yield Finding("export .pth to .onnx", has_torch, "superpoint export" if has_torch else _ADD_TORCH)
    yield Finding("find keypoints with .onnx", True, "superpoint infer")
    on_cuda = "CUDAExecutionProvider" in _providers()
    yield Finding("the same on an NVIDIA GPU", on_cuda, "superpoint infer --device cuda" if on_cuda else _ADD_CUDA)
    yield from _engines()
    lacking = [finding for finding in _bulk() if not finding.present]
    how = "superpoint reconstruct" if not lacking else "; ".join(dict.fromkeys(finding.detail for finding in lacking))
    yield Finding("map photographs and videos", not lacking, how)


def _bulk() -> Iterator[Finding]:
    for module, name, extra in (("h5py", "h5py", "bulk"), ("av", "PyAV", "bulk"), ("pycolmap", "pycolmap", "colmap")):
        yield _module(name, module, install_hint(extra))


def _engines() -> Iterator[Finding]:
    """Asks the libraries themselves whether engines can be built and run here."""
    gpu, why = None, ""
    try:
        gpu = cuda.current_device().capability
    except SuperPointError as error:
        why = str(error)
    flavors = installed()
    if Flavor.TENSORRT in flavors and gpu:
        builds = "superpoint build"
    elif Flavor.RTX in flavors:
        builds = "superpoint build --runtime rtx" + ("" if gpu in RTX_TARGETS else " --target sm89 (RTX GPUs)")
    else:
        builds = None
    full = gpu is not None and (Flavor.TENSORRT in flavors or gpu in RTX_TARGETS) and bool(flavors)
    runs = full or (gpu is not None and bool(installed_runtimes()))
    how = "superpoint infer --model X.engine" + ("" if full else " (built with --version-compatible)")
    no_gpu = f"no usable NVIDIA GPU: {why}" if why else "no NVIDIA GPU that the installed TensorRT runs on"
    lacking = no_gpu if flavors else f"{_ADD_TENSORRT}; docs/tensorrt.md"
    yield Finding("build TensorRT engines", builds is not None, builds or lacking)
    yield Finding("run TensorRT engines", runs, how if runs else no_gpu if installed_runtimes() else lacking)


def _core() -> Iterator[Finding]:
    import onnx

    yield Finding("numpy", True, metadata.version("numpy"))
    yield Finding("OpenCV", True, str(import_module("cv2").__version__))
    yield Finding("onnx", True, f"{onnx.__version__} (opsets 11 to {onnx.defs.onnx_opset_version()})")
    onnxruntime = import_onnxruntime()
    yield Finding("onnxruntime", True, f"{onnxruntime.__version__} ({', '.join(_providers())})")


def _providers() -> list[str]:
    available: list[str] = import_onnxruntime().get_available_providers()
    return available


def _openvino() -> Finding:
    found = _module("openvino", "openvino", _ADD_OPENVINO)
    return replace(found, detail=f"{found.detail} ({', '.join(openvino_devices())})") if found.present else found


def _torch() -> Finding:
    if util.find_spec("torch") is None:
        return Finding("torch", False, _ADD_TORCH)
    try:
        import torch
    except Exception as error:  # a broken installation can raise anything
        return Finding("torch", False, f"installed but does not import: {one_line(error)}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    return Finding("torch", True, f"{torch.__version__} ({gpu})")


def _gpu() -> Finding:
    """Asks nvidia-smi; on a Jetson without it, reads the board's release file."""
    tegra = Path("/etc/nv_tegra_release")
    if shutil.which("nvidia-smi") is None:
        if tegra.exists():
            return Finding("NVIDIA GPU", True, f"Jetson: {tegra.read_text().splitlines()[0].lstrip('# ')}")
        return Finding("NVIDIA GPU", False, "no nvidia-smi; with an NVIDIA GPU, install its driver")
    query = "--query-gpu=name,compute_cap,driver_version,memory.total"
    try:
        answer = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("NVIDIA GPU", False, f"nvidia-smi does not run: {error}")
    if answer.returncode:
        reason = (answer.stdout + answer.stderr).strip().splitlines()
        return Finding("NVIDIA GPU", False, f"nvidia-smi: {reason[0] if reason else answer.returncode}")
    gpus = [line.rsplit(", ", 3) for line in answer.stdout.strip().splitlines()]
    if not gpus or any(len(fields) != 4 for fields in gpus):
        return Finding("NVIDIA GPU", False, f"nvidia-smi answers: {answer.stdout.strip() or 'nothing'}")
    return Finding("NVIDIA GPU", True, "; ".join(f"{n} (SM {c}), driver {d}, {m}" for n, c, d, m in gpus))


def _cuda_driver() -> Finding:
    driver, version = cuda.driver(), ctypes.c_int(0)
    try:
        failed = driver.cuDriverGetVersion(ctypes.byref(version)) if driver else None
    except AttributeError:
        failed = None
    if failed is None:
        return Finding("CUDA driver", False, "no libcuda; it comes with the NVIDIA driver")
    if failed:
        return Finding("CUDA driver", False, f"cuDriverGetVersion failed with code {failed}")
    return Finding("CUDA driver", True, f"CUDA {version.value // 1000}.{version.value % 1000 // 10}")


def _module(name: str, module: str, add: str) -> Finding:
    try:
        found = import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "") in (module, module.split(".")[0])
        return Finding(name, False, add if missing else f"installed but does not import: {one_line(error)}")
    except Exception as error:  # for example, its libraries do not load
        return Finding(name, False, f"installed but does not import: {one_line(error)}")
    return Finding(name, True, str(getattr(found, "__version__", "present")))
