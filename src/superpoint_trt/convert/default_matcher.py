"""The packaged matcher as an .onnx, exported once and kept in the user's cache."""

from __future__ import annotations

from pathlib import Path

from superpoint_trt import packaged
from superpoint_trt._version import __version__
from superpoint_trt.core.files import cache_folder, read_bytes, sha256
from superpoint_trt.core.types import SuperPointError

_FORMAT = 2
"""Part of the file's name. Raise it when the same weights should be exported anew."""


def default_matcher() -> Path:
    """Path of an fp32 .onnx of the packaged matcher, for any number of keypoints, exported if the cache has none.

    Raises:
        SuperPointError: this version has no matcher, or the cache cannot be written.
    """
    if not packaged.MATCHER.is_file():
        raise SuperPointError(
            "this version comes without weights of a learned matcher; name a file instead: --matcher FILE (.onnx, or "
            "weights of python -m training.matcher)."
        )
    digest = sha256(read_bytes(packaged.MATCHER, "packaged matcher"))[:12]
    path = cache_folder() / f"superpoint_trt-matcher-{__version__}-{_FORMAT}-{digest}.onnx"
    if not path.is_file():
        from superpoint_trt.convert.export_matcher import export_matcher

        export_matcher(packaged.MATCHER, path)
    return path
