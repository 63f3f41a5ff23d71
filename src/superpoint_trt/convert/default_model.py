"""A packaged network as an .onnx, exported once and kept in the user's cache."""

from __future__ import annotations

from pathlib import Path

from superpoint_trt import packaged
from superpoint_trt._version import __version__
from superpoint_trt.core.files import PathLike, cache_folder, read_bytes, sha256
from superpoint_trt.core.networks import packaged_network
from superpoint_trt.core.types import SuperPointError

_FORMAT = 3
"""Part of the file's name. Raise it when the same weights should be exported anew."""


def default_model(network: str = packaged.DEFAULT) -> Path:
    """Path of a dynamic fp32 `dense` .onnx of a packaged network, exported if the cache has none.

        with SuperPoint(default_model()) as superpoint:
            keypoints = superpoint.extract("photo.jpg")

    Args:
        network: its name, one of `packaged.NETWORKS`.

    Raises:
        SuperPointError: no network has that name, or the cache cannot be written.
    """
    found = packaged_network(network)
    if found is None:
        raise SuperPointError(f"{network} is a file, not the name of a packaged network.")
    weights = found.weights
    digest = sha256(read_bytes(weights, "packaged checkpoint"))[:12]
    path = cache_folder() / f"superpoint-{network}-{__version__}-{_FORMAT}-{digest}.onnx"
    if not path.is_file():
        from superpoint_trt.convert.export import ExportOptions, export

        export(weights, path, ExportOptions(dynamic=True))
    return path


def model_path(model: PathLike | None) -> Path:
    """The file that `SuperPoint(model)` opens: a path as it is; a packaged network, by its name or None, exported.

    Raises:
        SuperPointError: as `default_model`.
    """
    model = packaged.DEFAULT if model is None else model
    network = packaged_network(model)
    return default_model(network.name) if network else Path(model)
