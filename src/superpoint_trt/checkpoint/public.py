"""The public checkpoints: where they are, whose they are, and a download that is verified."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from superpoint_trt.core.files import PathLike, check_writable, git_blob_id, one_line, write_atomically
from superpoint_trt.core.types import Family, SuperPointError

TIMEOUT_S = 30.0
CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class PublicWeights:
    """A checkpoint that anybody can download."""

    name: str
    family: Family
    url: str
    git_blob: str
    """What `git hash-object FILE` prints for the right content."""
    license: str
    commercial_use: bool
    about: str

    @property
    def filename(self) -> str:
        """The file's name in its address."""
        return self.url.rsplit("/", 1)[-1]


PUBLIC: tuple[PublicWeights, ...] = (
    PublicWeights(
        name="v6",
        family=Family.V6,
        url="https://raw.githubusercontent.com/rpautrat/SuperPoint/1411bbd68c50163555d39c1b26e9e046ebd48f27/weights/superpoint_v6_from_tf.pth",
        git_blob="f645e8db1b10a7be84d4e50d67a3c64dd240a49a",
        license="MIT",
        commercial_use=True,
        about="trained on COCO by R. Pautrat and P.-E. Sarlin (rpautrat/SuperPoint)",
    ),
    PublicWeights(
        name="magicleap",
        family=Family.MAGICLEAP,
        url="https://raw.githubusercontent.com/magicleap/SuperPointPretrainedNetwork/master/superpoint_v1.pth",
        git_blob="107a444ca318d487390137d619d49f2f0a3b1ad8",
        license="Magic Leap: academic or non-profit, non-commercial research only",
        commercial_use=False,
        about="the paper's own weights, as SuperGlue and LightGlue use them",
    ),
)


def find(name: str) -> PublicWeights:
    """The public checkpoint of that name.

    Raises:
        SuperPointError: no such name.
    """
    for weights in PUBLIC:
        if weights.name == name:
            return weights
    known = ", ".join(weights.name for weights in PUBLIC)
    raise SuperPointError(f"no public checkpoint is called {name!r}; known are: {known} (superpoint weights list).")


def is_verified(weights: PublicWeights, path: PathLike) -> bool:
    """Whether the file at `path` is this checkpoint, byte for byte."""
    path = Path(path)
    return path.is_file() and git_blob_id(path.read_bytes()) == weights.git_blob


def fetch(weights: PublicWeights, path: PathLike, progress: Callable[[int, int | None], None] | None = None) -> Path:
    """Downloads a checkpoint, verifies its content, and only then writes it.

    Args:
        weights: which checkpoint.
        path: the file to write. Nothing is downloaded if it holds the checkpoint already.
        progress: called with (bytes so far, bytes in all); None in all: the server does not say.

    Returns:
        The path.

    Raises:
        SuperPointError: the server cannot be reached or refuses, or sends other content than was published.
    """
    path = check_writable(path)
    if is_verified(weights, path):
        return path
    data = _download(weights.url, progress)
    got = git_blob_id(data)
    if got != weights.git_blob:
        raise SuperPointError(
            f"{weights.url} answered with other content than published ({len(data)} bytes, git blob {got}, expected "
            f"{weights.git_blob}); nothing was written. A proxy's page, perhaps: open the address in a browser."
        )
    return write_atomically(path, data)


def _download(url: str, progress: Callable[[int, int | None], None] | None) -> bytes:
    data = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            length = answer.headers.get("Content-Length")
            total = int(length) if length else None
            while chunk := answer.read(CHUNK_BYTES):
                data += chunk
                if progress:
                    progress(len(data), total)
    except urllib.error.HTTPError as error:
        raise SuperPointError(
            f"{url} answered {error.code} {error.reason}; download it elsewhere and pass its path."
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or one_line(error) or type(error).__name__
        raise SuperPointError(
            f"{url} cannot be reached ({reason}); connect to the network, or download it elsewhere and pass its path."
        ) from error
    return bytes(data)
