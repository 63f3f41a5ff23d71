"""Backends, one module for each runtime. `open_backend` chooses by the file's ending."""

from __future__ import annotations

from pathlib import Path

from superpoint_trt.core.files import PathLike
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import ENGINE_SUFFIXES, SuperPointError
from superpoint_trt.run.backends.base import Backend, Outputs, RuntimeInfo

__all__ = ["ENGINE_SUFFIXES", "Backend", "Outputs", "RuntimeInfo", "open_backend"]

ONNX_SUFFIXES = (".onnx",)
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".safetensors")


def open_backend(path: PathLike, device: str = "auto", threads: int | None = None) -> Backend:
    """Opens a model with the backend for its kind of file.

    Args:
        path: `.onnx` (onnxruntime), `.pth`/`.safetensors` (the PyTorch reference), `.engine`/`.trt`/`.plan` (TensorRT).
        device: "auto" (the best that works; `Backend.runtime` names it), or "cpu", "cuda" or "cuda:N": that device or
            an error.
        threads: CPU threads; None leaves the choice to the runtime.

    Raises:
        SuperPointError: unknown kind of file, missing runtime, unusable model or device.
    """
    suffix = Path(path).suffix.lower()
    if suffix in ONNX_SUFFIXES:
        from superpoint_trt.run.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(path, device, threads)
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

        return TensorRTBackend(path, device)
    known = ", ".join((*ONNX_SUFFIXES, *CHECKPOINT_SUFFIXES, *ENGINE_SUFFIXES))
    raise SuperPointError(f"{path}: a model's name ends in one of {known}.")
