"""The fp32 reference that `verify` holds a model against: a checkpoint, or an fp32 .onnx."""

from __future__ import annotations

import tempfile
from importlib import util
from pathlib import Path
from typing import Protocol

from superpoint_trt.checkpoint.layouts import Checkpoint, lifted, load
from superpoint_trt.core.files import PathLike, write_atomically
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.networks import weights_path
from superpoint_trt.core.types import Float32, ModelDescription, OutputType, Precision, SuperPointError
from superpoint_trt.run import decode
from superpoint_trt.run.backends import CHECKPOINT_SUFFIXES, Outputs, open_backend


class Reference(Protocol):
    """An fp32 network on the CPU.

    Attributes:
        description: what the network is.
        runtime: what it runs on, in words.
        note: what the reader of a verdict should know about this reference; empty if nothing.
    """

    description: ModelDescription
    runtime: str
    note: str

    def __call__(self, image: Float32) -> Outputs:
        """Runs the network.

        Args:
            image: (1, 1, H, W) float32 in [0, 1].

        Returns:
            `scores` (1, H, W) and `descriptors` (1, D, H/8, W/8), float32; where the reference has raw heads also
            `logits` (1, 65, H/8, W/8) and `coarse_descriptors` (1, D, H/8, W/8).
        """


def open_reference(weights: PathLike, descriptors_of: str | None = None) -> Reference:
    """Opens a checkpoint, a packaged network by its name, or an fp32 `dense` or `heads` .onnx, as the reference.

    A checkpoint runs in PyTorch. Without PyTorch it is exported to a temporary .onnx, which onnxruntime runs.

    Args:
        weights: the file or the name.
        descriptors_of: SHA-256 of the checkpoint to whose descriptors a checkpoint's are lifted by its map; None: they
            stay its own.

    Raises:
        SuperPointError: the file cannot be used, or is not an fp32 `dense` or `heads` model, or has no such map.
    """
    weights = weights_path(weights)
    if Path(weights).suffix.lower() not in CHECKPOINT_SUFFIXES:
        return _OnnxReference(weights)
    if util.find_spec("torch"):
        return _TorchReference(weights, descriptors_of)
    from superpoint_trt.convert.export import ExportOptions, to_onnx

    with tempfile.TemporaryDirectory() as folder:
        model = to_onnx(_load(weights, descriptors_of), ExportOptions(OutputType.HEADS, dynamic=True))
        exported = write_atomically(Path(folder) / "m.onnx", model.SerializeToString())
        return _OnnxReference(exported, _OWN_EXPORT)


def _load(weights: PathLike, descriptors_of: str | None) -> Checkpoint:
    checkpoint = load(weights)
    return lifted(checkpoint, descriptors_of, str(weights)) if descriptors_of else checkpoint


_OWN_EXPORT = (
    "without PyTorch the reference is this package's own export, run by onnxruntime; "
    f"{install_hint('torch')} makes it independent"
)
"""The note of a checkpoint's reference where PyTorch is missing."""


class _OnnxReference:
    """An fp32 .onnx in onnxruntime."""

    def __init__(self, path: PathLike, note: str = "") -> None:
        self.note = note
        self._backend = open_backend(path, "cpu")
        self.description = self._backend.description
        self.runtime = str(self._backend.runtime)
        if self.description.type is OutputType.KEYPOINTS or self.description.precision is not Precision.FP32:
            kind = f"{self.description.type.value}, {self.description.precision.value}"
            raise SuperPointError(f"{path} is {kind}; a reference is a checkpoint, or an fp32 dense or heads .onnx.")

    def __call__(self, image: Float32) -> Outputs:
        outputs = dict(self._backend.infer(image))
        if self.description.type is OutputType.HEADS:
            outputs["scores"] = decode.scores_from_logits(outputs["logits"])
            outputs["descriptors"] = decode.normalize(outputs["coarse_descriptors"], axis=1)
        return outputs


class _TorchReference:
    """A checkpoint in the PyTorch network of `checkpoint/reference.py`."""

    note = ""

    def __init__(self, path: PathLike, descriptors_of: str | None) -> None:
        import torch

        from superpoint_trt.checkpoint.reference import network

        loaded = _load(path, descriptors_of)
        self._net = network(loaded)
        self.runtime = f"torch {torch.__version__} eager, cpu, fp32"
        self.description = ModelDescription(
            OutputType.HEADS,
            sampling=loaded.sampling,
            family=loaded.family,
            checkpoint_sha256=loaded.sha256,
            descriptors_of=loaded.descriptors_of,
            dynamic=True,
            stride_px=loaded.stride_px,
            descriptor_dim=loaded.descriptor_dim,
            subpixel=loaded.subpixel,
        )

    def __call__(self, image: Float32) -> Outputs:
        import torch

        from superpoint_trt.checkpoint.reference import dense

        with torch.inference_mode():
            logits, coarse = self._net(torch.from_numpy(image))
            scores, descriptors = dense(logits, coarse)
        tensors = {"logits": logits, "coarse_descriptors": coarse, "scores": scores, "descriptors": descriptors}
        return {name: tensor.numpy() for name, tensor in tensors.items()}
