"""Backends, one module for each runtime. `open_backend` chooses by the file's ending."""

from __future__ import annotations

from pathlib import Path

from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import ENGINE_SUFFIXES, SuperPointError
from superpoint_trt.run.backends.base import AsyncBackend, Backend, Outputs, PendingRun, RuntimeInfo

__all__ = ["ENGINE_SUFFIXES", "AsyncBackend", "Backend", "Outputs", "PendingRun", "RuntimeInfo", "open_backend"]

ONNX_SUFFIXES = (".onnx",)
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")


def devices_for(path: PathLike) -> list[str]:
    """The devices of this machine that a model of this kind can run on, as `open_backend` takes them.

    OpenVINO's come with ":fp32", too, where it would compute in another type.
    """
    suffix = Path(path).suffix.lower()
    if suffix in ENGINE_SUFFIXES:
        return ["cuda"]
    if suffix in CHECKPOINT_SUFFIXES:
        return ["auto"]
    from superpoint_trt.core.onnx_runtime import import_onnxruntime
    from superpoint_trt.run.backends.onnxruntime import PROVIDERS
    from superpoint_trt.run.backends.openvino import openvino_devices

    available = import_onnxruntime().get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider in available] + openvino_devices()


def open_backend(
    path: PathLike,
    device: str = "auto",
    threads: int | None = None,
    allow_host_code: bool = False,
    busy_wait: bool = True,
) -> Backend:
    """Opens a model with the backend for its kind of file.

    Args:
        path: `.onnx` (onnxruntime, or OpenVINO if the device says so), `.pth`/`.safetensors` (the PyTorch reference),
            `.engine`/`.trt`/`.plan` (TensorRT).
        device: "auto" (the best that works; `Backend.runtime` names it), or "cpu", "cuda", "cuda:N", "openvino",
            "openvino:GPU", "openvino:NPU": that device or an error. ":fp32" behind the last three has OpenVINO
            compute in float32.
        threads: CPU threads; None leaves the choice to the runtime.
        allow_host_code: run the code that a version-compatible engine carries.
        busy_wait: whether onnxruntime's threads wait for each other in a loop.

    Raises:
        SuperPointError: unknown kind of file, missing runtime, unusable model or device.
    """
    suffix = Path(path).suffix.lower()
    choice = DeviceChoice.parse(device)
    if choice.kind == "openvino" and suffix in (*CHECKPOINT_SUFFIXES, *ENGINE_SUFFIXES):
        raise SuperPointError(
            f"device {choice} was asked for, but OpenVINO runs .onnx files, not {path}: superpoint export makes one of "
            "a checkpoint."
        )
    if suffix in ONNX_SUFFIXES and choice.kind == "openvino":
        from superpoint_trt.run.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(path, device, threads)
    if suffix in ONNX_SUFFIXES:
        from superpoint_trt.run.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(path, device, threads, busy_wait)
    if suffix in CHECKPOINT_SUFFIXES:
        try:
            from superpoint_trt.run.backends.torch import TorchBackend
        except ImportError:
            raise SuperPointError(
                f"running the checkpoint {path} itself needs PyTorch: {install_hint('torch')}. Without: "
                "superpoint export makes an .onnx of it."
            ) from None
        return TorchBackend(path, device, threads)
    if suffix in ENGINE_SUFFIXES:
        from superpoint_trt.run.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(path, device, allow_host_code)
    known = ", ".join((*ONNX_SUFFIXES, *CHECKPOINT_SUFFIXES, *ENGINE_SUFFIXES))
    raise SuperPointError(f"{path}: a model's name ends in one of {known}.")
