"""SuperPoint from a PyTorch checkpoint to ONNX to TensorRT.

Importing this package costs numpy alone; everything heavier is imported where it is used.

    from superpoint_trt import SuperPoint
    with SuperPoint("superpoint.onnx") as superpoint:
        keypoints = superpoint.extract("photo.jpg")
"""

from __future__ import annotations

from superpoint_trt._version import __version__
from superpoint_trt.core.types import Keypoints, ModelDescription, OutputType, Precision, Sampling, SuperPointError
from superpoint_trt.run.extractor import SuperPoint

__all__ = [
    "Keypoints",
    "ModelDescription",
    "OutputType",
    "Precision",
    "Sampling",
    "SuperPoint",
    "SuperPointError",
    "__version__",
]
