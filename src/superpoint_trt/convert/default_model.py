"""The packaged weights as an .onnx, exported once and kept in the user's cache."""

from __future__ import annotations

from pathlib import Path

from superpoint_trt import packaged
from superpoint_trt._version import __version__
from superpoint_trt.core.files import cache_folder, read_bytes, sha256

_FORMAT = 2
"""Part of the file's name. Raise it when the same weights should be exported anew."""


def default_model() -> Path:
    """Path of a dynamic fp32 `dense` .onnx of the packaged weights, exported if the cache has none.

        with SuperPoint(default_model()) as superpoint:
            keypoints = superpoint.extract("photo.jpg")

    Raises:
        SuperPointError: the cache cannot be written.
    """
    digest = sha256(read_bytes(packaged.WEIGHTS, "packaged checkpoint"))[:12]
    path = cache_folder() / f"superpoint_trt-{__version__}-{_FORMAT}-{digest}.onnx"
    if not path.is_file():
        from superpoint_trt.convert.export import ExportOptions, export

        export(packaged.WEIGHTS, path, ExportOptions(dynamic=True))
    return path
