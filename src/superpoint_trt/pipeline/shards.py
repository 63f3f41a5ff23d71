"""What a long run keeps on disk, so that it can be killed at any time and started again.

A run over many images is cut into shards of some dozen images. While it is not complete there is a folder beside the
output, OUTPUT.shards, with

    manifest.json   what makes the run: model and options, a digest of the images' names, the size of a shard
    to-do.ID.npz    which of the images had no entry when the run began
    00012.packed    the entries of a shard (an .h5 as output only; .npz are written in their place at once)
    00012.json      how the shard ended: counts, failures, a hash. Written last: it makes the shard finished
    lock            who works on which shards

When all shards are finished they are merged into the output, and the folder goes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt._version import __version__
from superpoint_trt.core.files import make_folder, read_bytes, write_atomically, write_npz
from superpoint_trt.core.typed_json import JsonError, flag, integer, mapping, member, optional_text, parse, text
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.inputs import Item

FORMAT = 2
"""Version of the .json files. It rises when an older reader can no longer read them."""

Settings = Mapping[str, object]
"""What decides the content of an entry: hash of the model, decode options, type of the descriptors."""

CHECKPOINT = "checkpoint_sha256"
"""The setting that says of which weights a model was made; None: it does not tell. It is not compared: the hash of the
model decides alone, and outputs of earlier versions lack this one."""

DESCRIPTORS_OF = "descriptors_of"
"""The setting that says of which checkpoint the descriptors are, where the model was exported with `--descriptors-of`;
None: of its own."""

_MOST_CHARS = 1 << 26
_MOST = 1 << 40
MERGE_LOCK = 1 << 40
"""The number that is locked by who merges; shards have smaller ones."""


@dataclass(frozen=True)
class Manifest:
    """What makes a run."""

    run_id: str
    """Random; the merged output names the run that was merged last."""
    settings: Settings
    names_sha256: str
    """Of the names of all inputs, in their order."""
    images: int
    """To be worked on: the inputs without those that had an entry when the run began."""
    shard_size: int
    """Images in a shard; the last may have fewer."""
    replaces: bool
    """Whether entries that the output has already are to go."""
    superpoint_trt_version: str = __version__

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-self.images // self.shard_size)

    def fits(self, settings: Settings, names_sha256: str) -> bool:
        """Whether a run with these settings over images of these names is this one."""
        return difference(self.settings, settings) is None and self.names_sha256 == names_sha256

    def images_of(self, number: int) -> range:
        """Which of the images a shard has."""
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, self.images))

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        return (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            SuperPointError: the file is damaged, or of a later format.
        """
        flat = _read_json(path)
        try:
            integer(member(flat, "format"), "format", FORMAT, FORMAT)
            return cls(
                text(member(flat, "run_id"), "run_id"),
                mapping(member(flat, "settings"), "settings"),
                text(member(flat, "names_sha256"), "names_sha256"),
                integer(member(flat, "images"), "images", 1, _MOST),
                integer(member(flat, "shard_size"), "shard_size", 1, _MOST),
                flag(member(flat, "replaces"), "replaces"),
                text(member(flat, "superpoint_trt_version"), "superpoint_trt_version"),
            )
        except JsonError as error:
            raise _damaged(path, error) from error


@dataclass(frozen=True)
class ShardReport:
    """How a shard ended."""

    done: int
    """Images with an entry."""
    failed: tuple[tuple[str, str], ...]
    """(name, reason) of the others."""
    sha256: str | None
    """Of the shard's file; None: it has no entry, or the output is a folder of .npz."""
    ran_on: str
    """Backend, device and precision; they may differ between the shards of one run."""

    @classmethod
    def read(cls, path: Path) -> ShardReport:
        """Reads a shard's .json.

        Raises:
            SuperPointError: the file is damaged.
        """
        flat = _read_json(path)
        try:
            failed = member(flat, "failed")
            if not isinstance(failed, list) or not all(isinstance(row, list) and len(row) == 2 for row in failed):
                raise JsonError("failed is no list of names with reasons")
            return cls(
                integer(member(flat, "done"), "done", 0, _MOST),
                tuple((text(name, "name"), text(reason, "reason")) for name, reason in failed),
                optional_text(member(flat, "sha256"), "sha256"),
                text(member(flat, "ran_on"), "ran_on"),
            )
        except JsonError as error:
            raise _damaged(path, error) from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        return mapping(parse(read_bytes(path, "state of a run"), _MOST_CHARS), "the file")
    except JsonError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> SuperPointError:
    if path.stem.isdigit():  # how one shard ended; the others are not lost with it
        return SuperPointError(f"{path} is damaged ({error}); remove it, and its shard is done again.")
    return SuperPointError(f"{path} is damaged ({error}); remove {path.parent} and start the run anew.")


@dataclass(frozen=True)
class Shard:
    """Some images that are finished together."""

    number: int
    """From 0."""
    items: Sequence[Item]


class ShardFolder:
    """The folder beside an output in which its run is kept.

    Args:
        output: the feature file.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = Path(f"{output}.shards")
        self.lock_path = self.folder / "lock"
        self._manifest_path = self.folder / "manifest.json"

    def manifest(self) -> Manifest | None:
        """The run that is kept here; None: there is none.

        Raises:
            SuperPointError: the file is damaged.
        """
        try:
            return Manifest.read(self._manifest_path) if self._manifest_path.exists() else None
        except SuperPointError:
            if not self._manifest_path.exists():  # another process has just merged
                return None
            raise

    def begin(self, manifest: Manifest, to_do: Sequence[int]) -> Manifest:
        """Keeps a new run here. If another process was faster, its run counts.

        Args:
            manifest: the run.
            to_do: positions of the inputs to be worked on, rising.

        Returns:
            The run that is kept.
        """
        make_folder(self.folder)
        write_npz(self._to_do_path(manifest), {"positions": np.asarray(to_do, dtype=np.int64)})
        own = self.folder / f"manifest.{manifest.run_id}"
        write_atomically(own, manifest.to_json())
        try:
            os.link(own, self._manifest_path)  # fails if there is one, which a rename would replace
        except FileExistsError:
            pass
        except OSError as error:  # a file system without hard links
            if not own.exists():
                raise SuperPointError(f"{self.folder} was removed while the run began; start it again.") from error
            if not self._manifest_path.exists():
                own.replace(self._manifest_path)
        with suppress(OSError):
            own.unlink()
        return Manifest.read(self._manifest_path)

    def to_do(self, manifest: Manifest, inputs: int) -> list[int]:
        """Positions of the inputs that a run works on.

        Args:
            manifest: the run.
            inputs: how many inputs there are.

        Raises:
            SuperPointError: the file is damaged.
        """
        path = self._to_do_path(manifest)
        try:
            with np.load(io.BytesIO(read_bytes(path, "state of a run")), allow_pickle=False) as arrays:
                positions: NDArray[Any] = arrays["positions"]
        except Exception as error:  # a damaged zip raises whatever its reader stumbles over
            raise _damaged(path, error) from error
        if positions.shape != (manifest.images,) or positions.dtype.kind != "i":
            raise _damaged(path, ValueError(f"{positions.dtype} {positions.shape} for {manifest.images} images"))
        if positions[0] < 0 or positions[-1] >= inputs or (np.diff(positions) <= 0).any():
            raise _damaged(path, ValueError(f"positions are not rising, or not among the {inputs} inputs"))
        found: list[int] = positions.tolist()
        return found

    def _to_do_path(self, manifest: Manifest) -> Path:
        return self.folder / f"to-do.{manifest.run_id}.npz"

    def packed(self, number: int) -> Path:
        """The entries of a shard."""
        return self.folder / f"{number:05d}.packed"

    def report(self, number: int) -> ShardReport | None:
        """How a shard ended; None: it is not finished."""
        path = self.report_path(number)
        return ShardReport.read(path) if path.exists() else None

    def finish(self, number: int, report: ShardReport) -> None:
        """Makes a shard finished. Its entries must be on disk."""
        content = {**asdict(report), "superpoint_trt_version": __version__}
        write_atomically(self.report_path(number), (json.dumps(content, indent=1) + "\n").encode())

    def unfinished(self, manifest: Manifest) -> list[int]:
        """Numbers of the shards that are not finished."""
        finished = {entry.name for entry in os.scandir(self.folder)} if self.folder.is_dir() else set()
        return [number for number in range(manifest.shards) if self.report_path(number).name not in finished]

    def report_path(self, number: int) -> Path:
        """The .json of a shard."""
        return self.folder / f"{number:05d}.json"

    def clean(self, pattern: str) -> None:
        """Removes files that a killed process has left: ".00012.*" of a shard, ".features.h5.*" of a merge."""
        for left in self.folder.glob(pattern):
            with suppress(OSError):
                left.unlink()

    def remove(self) -> None:
        """Removes the folder. The manifest goes last, so that a kill in between is mended by the next run."""
        if not self.folder.is_dir():
            return
        last = [self._manifest_path, self.lock_path]
        for path in [path for path in self.folder.iterdir() if path not in last] + last:
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()


def digest_names(names: Iterable[str]) -> str:
    """SHA-256 over names, in their order."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def range_of(part: int, parts: int, shards: int) -> range:
    """The shards that one of several runs works on, neighbors: videos and folders are read by one of them.

    Args:
        part: from 1.
        parts: how many runs share the work.
        shards: how many shards there are.
    """
    return range((part - 1) * shards // parts, part * shards // parts)


def difference(kept: Settings, asked: Settings) -> str | None:
    """In words, the first setting that differs; None: none does."""
    for name in ("matcher", *asked, *kept):
        if name != CHECKPOINT and kept.get(name) != asked.get(name):
            if name in ("model", "matcher"):  # hashes tell nothing
                return f"another {name}"
            return f"{name} {_shown(kept.get(name))}, not {_shown(asked.get(name))}"
    return None


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
