"""The options of `convert.export.export`, and their limits."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx

from superpoint_trt.core.files import PathLike
from superpoint_trt.core.types import DecodeOptions, OutputType, SuperPointError

OLDEST_OPSET = 11

NEWEST_OPSET: int = onnx.defs.onnx_opset_version()

DEFAULT_OPSET = 17
"""The newest opset that TensorRT 8.6's parser takes."""

LARGEST_SIDE_PX = 32768

LARGEST_BATCH = 4096

MOST_KEYPOINTS = 1_000_000


@dataclass(frozen=True)
class ExportOptions:
    """What graph to write. Defaults are the guide's and the MIT reference's."""

    type: OutputType = OutputType.DENSE
    height_px: int = 480
    width_px: int = 640
    dynamic: bool = False
    """Height, width and batch are free; height_px and width_px are then the most usual size."""
    max_batch_size: int = 1
    """Above 1, the batch axis is free up to this many images."""
    max_keypoints: int = 1024
    """N of a `keypoints` model."""
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    """NMS radius, border and threshold of a `keypoints` model. `subpixel` is any model's default; None: the
    checkpoint's."""
    opset: int = DEFAULT_OPSET
    shift_channels: tuple[str, ...] = ()
    """Layers ("conv1a", ...) whose BatchNorm after the ReLU is folded into the next convolution exactly, its shift in
    one more channel (convert/fold.py). Pays where that channel costs less than the BatchNorm."""
    fold_batchnorm: bool = False
    """Folds every BatchNorm after a ReLU into the next convolutions, its shift as a bias. This is an approximation near
    the input's border (`reach_of_padding_px`): there a convolution reads the shift where the padding has zeros. A
    BatchNorm in front of a max-pool stays if one of its scales is not positive."""
    descriptors_of: PathLike | None = None
    """Checkpoint, or packaged network, whose descriptors the model's are to match: the checkpoint's map to them is
    multiplied into its last descriptor convolution. None: the checkpoint's own descriptors."""

    def validate(self, stride_px: int) -> None:
        """Refuses options that no graph can be written for.

        Raises:
            SuperPointError: naming the first option out of range, and the range.
        """
        for name, side in (("height", self.height_px), ("width", self.width_px)):
            if not stride_px <= side <= LARGEST_SIDE_PX:
                raise SuperPointError(f"{name} is {side} px; expected {stride_px} to {LARGEST_SIDE_PX}.")
            if side % stride_px:
                below = side // stride_px * stride_px
                raise SuperPointError(
                    f"{name} {side} is not a multiple of {stride_px}; use {below} or {below + stride_px} "
                    "(images of any size fit either: they are padded, and keypoints come back in their own pixels)."
                )
        if not OLDEST_OPSET <= self.opset <= NEWEST_OPSET:
            raise SuperPointError(
                f"opset is {self.opset}; expected {OLDEST_OPSET} to {NEWEST_OPSET} "
                f"(the newest of onnx {onnx.__version__})."
            )
        if not 1 <= self.max_batch_size <= LARGEST_BATCH:
            raise SuperPointError(f"the largest batch is {self.max_batch_size} images; expected 1 to {LARGEST_BATCH}.")
        if not 1 <= self.max_keypoints <= MOST_KEYPOINTS:
            raise SuperPointError(f"the number of keypoints is {self.max_keypoints}; expected 1 to {MOST_KEYPOINTS}.")
        if self.fold_batchnorm and self.shift_channels:
            raise SuperPointError("fold_batchnorm and shift_channels are two ways to do the same; choose one.")
        if self.type is OutputType.KEYPOINTS:
            self._validate_decode()

    def _validate_decode(self) -> None:
        if self.max_keypoints > self.height_px * self.width_px and not self.dynamic:
            raise SuperPointError(
                f"{self.max_keypoints} keypoints were asked for, but {self.width_px}x{self.height_px} has only "
                f"{self.height_px * self.width_px} pixels; lower --max-keypoints."
            )
        if 2 * self.decode.remove_borders_px > min(self.height_px, self.width_px):
            raise SuperPointError(
                f"a border of {self.decode.remove_borders_px} px on each side leaves nothing of "
                f"{self.width_px}x{self.height_px}; lower --remove-borders."
            )
