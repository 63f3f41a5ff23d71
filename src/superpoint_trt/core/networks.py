"""Names of the packaged networks, wherever a path may be given."""

from __future__ import annotations

import os
from pathlib import PurePath

from superpoint_trt import packaged
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.types import SuperPointError


def packaged_network(name: PathLike) -> packaged.Network | None:
    """The packaged network that a text names.

    A name wins over a file: `small` is the network even where a file is called so; `./small` is the file.

    Args:
        name: a name, or a path. What has a separator or an ending is a path, and so is every `Path` object.

    Returns:
        None: it is a path.

    Raises:
        SuperPointError: no network has that name, and there is no such file.
    """
    if not isinstance(name, str) or not name or PurePath(name).suffix or PurePath(name).name != name:
        return None
    for network in packaged.NETWORKS:
        if network.name == name:
            return network
    if os.path.lexists(name):
        return None
    known = ", ".join(network.name for network in packaged.NETWORKS)
    raise SuperPointError(
        f"{name[:80]!r} is no packaged network and no file here; the networks are: {known} (superpoint weights list)."
    )


def weights_path(weights: PathLike) -> PathLike:
    """The checkpoint that a packaged network's name stands for; a path as it is.

    Raises:
        SuperPointError: as `packaged_network`.
    """
    network = packaged_network(weights)
    return weights if network is None else network.weights
