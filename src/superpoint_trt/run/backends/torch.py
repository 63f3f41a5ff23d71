"""The PyTorch reference as a backend: what verification and benchmarks compare with."""

from __future__ import annotations

import torch

from superpoint_trt.checkpoint import layouts as checkpoints
from superpoint_trt.checkpoint.reference import SuperPointNet, dense
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.types import ModelDescription, OutputType, SuperPointError
from superpoint_trt.run.backends.base import Backend, Image, Outputs, RuntimeInfo, as_unit_range

MOST_BATCH = 1024
"""Eager torch takes any batch that memory holds."""


class TorchBackend(Backend):
    """A checkpoint run eagerly in float32, as a dynamic `dense` model.

    Args:
        path: checkpoint of any known layout.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads; torch keeps this per process.
    """

    def __init__(self, path: PathLike, device: str = "auto", threads: int | None = None) -> None:
        checkpoint = checkpoints.load(path)
        cuda = torch.cuda.is_available()
        if device not in ("auto", "cpu", "cuda"):
            raise SuperPointError(f"device is {device!r}; expected auto, cpu or cuda.")
        if device == "cuda" and not cuda:
            raise SuperPointError("device cuda was asked for, but torch sees no GPU; use --device cpu.")
        self._device = torch.device("cuda" if cuda and device != "cpu" else "cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self._net = SuperPointNet.from_checkpoint(checkpoint).to(self._device)
        self.description = ModelDescription(
            type=OutputType.DENSE,
            sampling=checkpoint.sampling,
            family=checkpoint.family,
            checkpoint_sha256=checkpoint.sha256,
            dynamic=True,
            max_batch_size=MOST_BATCH,
            stride_px=checkpoint.stride_px,
            descriptor_dim=checkpoint.descriptor_dim,
        )
        where = torch.cuda.get_device_name() if self._device.type == "cuda" else f"{torch.get_num_threads()} threads"
        self.runtime = RuntimeInfo(f"torch {torch.__version__} eager", f"{self._device.type} ({where})", "fp32")

    def _infer(self, image: Image) -> Outputs:
        # cuDNN would take TF32 for fp32; this is the reference.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            scores, descriptors = dense(*self._net(torch.from_numpy(as_unit_range(image)).to(self._device)))
        return {"scores": scores.cpu().numpy(), "descriptors": descriptors.cpu().numpy()}
