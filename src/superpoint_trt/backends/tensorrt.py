"""TensorRT: so far only a clear word about what is missing. Building and running engines comes with its own release."""

from __future__ import annotations

from importlib import util
from typing import NoReturn

from superpoint_trt.files import PathLike, read_bytes
from superpoint_trt.spec import SuperPointError

FLAVOURS = {"tensorrt": "superpoint-trt[tensorrt]", "tensorrt_rtx": "superpoint-trt[rtx]"}
"""Python module -> the extra that installs it."""


def installed_flavours() -> list[str]:
    """The TensorRT modules that can be imported here."""
    return [module for module in FLAVOURS if util.find_spec(module)]


def missing_tensorrt() -> str | None:
    """What to do if no TensorRT is installed; None if one is."""
    if installed_flavours():
        return None
    commands = " or ".join(f"pip install '{extra}'" for extra in FLAVOURS.values())
    return (
        f"TensorRT is not installed here: {commands} on a machine with an NVIDIA GPU (superpoint doctor says what "
        "this machine has). Without it the .onnx runs everywhere: superpoint infer --model MODEL.onnx --image IMAGE."
    )


def refuse_engine(path: PathLike) -> NoReturn:
    """Says why an engine cannot be run.

    Raises:
        SuperPointError: always.
    """
    read_bytes(path, "engine")
    raise SuperPointError(
        missing_tensorrt()
        or f"{path} is a TensorRT engine, and this release does not run engines yet; run the .onnx it was built from: "
        "superpoint infer --model MODEL.onnx --image IMAGE."
    )
