"""The PyTorch reference as a backend. Verification and benchmarks compare other models with it."""

from __future__ import annotations

import torch

from superpoint_trt.checkpoint.layouts import load
from superpoint_trt.checkpoint.reference import dense, network
from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.types import ModelDescription, OutputType, SuperPointError
from superpoint_trt.run.backends.base import Backend, Image, Outputs, RuntimeInfo, as_unit_range

MOST_BATCH = 1024
"""Largest batch that is offered; eager torch takes any batch that fits into memory."""


class TorchBackend(Backend):
    """A checkpoint run eagerly in float32, as a dynamic `dense` model.

    Args:
        path: checkpoint of any known layout.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; torch sets them for the whole process.

    Raises:
        SuperPointError: not a checkpoint, or the device cannot be used.
    """

    def __init__(self, path: PathLike, device: str = "auto", threads: int | None = None) -> None:
        choice = DeviceChoice.parse(device)
        checkpoint = load(path)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if choice.kind == "cuda" and not count:
            raise SuperPointError(f"device {choice} was asked for, but torch sees no GPU; use --device cpu.")
        if choice.index is not None and choice.index >= count:
            there = ", ".join(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(count))
            raise SuperPointError(f"device {choice} was asked for, but this machine has only {there}.")
        self._device = torch.device(str(choice) if choice.kind != "auto" else "cuda" if count else "cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self._net = network(checkpoint).to(self._device)
        self.description = ModelDescription(
            type=OutputType.DENSE,
            sampling=checkpoint.sampling,
            family=checkpoint.family,
            checkpoint_sha256=checkpoint.sha256,
            dynamic=True,
            max_batch_size=MOST_BATCH,
            stride_px=checkpoint.stride_px,
            descriptor_dim=checkpoint.descriptor_dim,
            subpixel=checkpoint.subpixel,
        )
        on_gpu = self._device.type == "cuda"
        where = torch.cuda.get_device_name(self._device) if on_gpu else f"{torch.get_num_threads()} threads"
        self.runtime = RuntimeInfo(f"torch {torch.__version__} eager", f"{self._device} ({where})", "fp32")

    def _infer(self, image: Image) -> Outputs:
        # Without this cuDNN computes fp32 in TF32, and the reference must be exact.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            scores, descriptors = dense(*self._net(torch.from_numpy(as_unit_range(image)).to(self._device)))
        return {"scores": scores.cpu().numpy(), "descriptors": descriptors.cpu().numpy()}
