"""Feature files of many images: hloc's HDF5 layout, or a folder of .npz.

A feature file has one entry for each image, under the image's name: its path below the image folder, with "/". In HDF5
an entry is a group with the datasets `keypoints` (N, 2) float32, `scores` (N,) float32, `descriptors` (D, N) float16 or
float32 and `image_size` (2,) int64 (width, height); `keypoints` has the attribute `uncertainty` in px. Coordinates are
pixels of the image file as stored (before EXIF rotation), pixel centres at integers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, check_writable, make_folder, one_line, write_npz
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import Float32, Keypoints, SuperPointError
from superpoint_trt.run.store import load_features

HDF5_SUFFIXES = (".h5", ".hdf5")
DETECTION_NOISE_PX = 2.0
"""Uncertainty of a SuperPoint keypoint in the pixels it was found in, as hloc gives it."""

_UNCERTAINTY = "uncertainty"
_DATASETS = ("keypoints", "scores", "descriptors", "image_size")
_HDF5_FORMATS = ("v108", "v108")
"""The format of HDF5 1.8, which every reader knows; groups of the older format slow down above 15,000 entries."""


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """One entry of a feature file."""

    keypoints: Float32
    """(N, 2) float32: x then y in pixels of the image file as stored, pixel centres at integers."""
    scores: NDArray[Any]
    """(N,) float32, or float16 in files of other tools: by falling score in files of this package."""
    descriptors: NDArray[Any]
    """(N, D) float16 or float32, each row of unit length. Of HDF5, a transposed view of the file's (D, N)."""
    image_size: tuple[int, int]
    """(width, height) in px of the image file as stored."""
    uncertainty: float = 1.0
    """Standard deviation of the keypoints in px, on hloc's scale."""

    def __len__(self) -> int:
        return len(self.keypoints)

    def to_keypoints(self) -> Keypoints:
        """The entry as the result type of `SuperPoint.extract`; scores and descriptors as contiguous float32."""
        descriptors = np.ascontiguousarray(self.descriptors, dtype=np.float32)
        return Keypoints(self.keypoints, self.scores.astype(np.float32), descriptors, self.image_size)


def is_hdf5_name(path: PathLike) -> bool:
    """Whether a feature file of this name is HDF5 (.h5, .hdf5). Another name is that of a folder of .npz."""
    return Path(path).suffix.lower() in HDF5_SUFFIXES


def read_features(path: PathLike) -> Iterator[tuple[str, StoredFeatures]]:
    """Reads all entries of a feature file one after another, in the order of their names.

        for name, features in read_features("features.h5"):
            print(name, len(features))

    Args:
        path: an .h5, or a folder of .npz.

    Raises:
        SuperPointError: the file is missing or no feature file, an entry is damaged, or h5py is missing.
    """
    with FeatureFile(path) as features:
        for name in features.names():
            yield name, features[name]


class FeatureFile:
    """Reads single entries of a feature file. A context manager.

        with FeatureFile("features.h5") as features:
            points = features["street/0001.jpg"].keypoints

    Args:
        path: an .h5, or a folder of .npz.

    Raises:
        SuperPointError: the file is missing or no feature file, or h5py is missing.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._source: _Source = _NpzFolder(self.path) if self.path.is_dir() else _Hdf5File(self.path)
        self._names: list[str] | None = None

    def names(self) -> list[str]:
        """The names of all entries, sorted. The first call walks through the file, about 50 us for each entry."""
        if self._names is None:
            self._names = sorted(self._source.names())
        return list(self._names)

    def __len__(self) -> int:
        return len(self.names())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._source.has(name)

    def __getitem__(self, name: str) -> StoredFeatures:
        """Reads an entry.

        Raises:
            SuperPointError: there is none of this name, or it is damaged.
        """
        if name not in self:
            raise SuperPointError(f"{self.path} has no entry {name!r}; its images have other names, or another root.")
        return self._source.read(name)

    def close(self) -> None:
        """Closes the file."""
        self._source.close()

    def __enter__(self) -> FeatureFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FeatureWriter:
    """Writes a new feature file. A context manager.

        with FeatureWriter("features.h5") as writer:
            writer.write("street/0001.jpg", keypoints, keypoints.image_size)

    An .h5 is written beside its place and renamed when the context ends without an error: until then there is no such
    file, or the old one. In a folder each .npz appears whole as soon as it is written.

    Args:
        path: an .h5 (or .hdf5), or a folder of .npz.
        dtype: of the descriptors, float16 or float32.

    Raises:
        SuperPointError: the place cannot be written to, or h5py is missing.
    """

    def __init__(self, path: PathLike, dtype: type[np.floating[Any]] = np.float16) -> None:
        self.path = Path(path)
        self._target: _Target = _NewHdf5(self.path) if is_hdf5_name(path) else _NewNpzFolder(self.path)
        self._dtype = np.dtype(dtype)

    def write(
        self, name: str, keypoints: Keypoints, image_size: tuple[int, int], uncertainty: float = DETECTION_NOISE_PX
    ) -> None:
        """Writes the entry of one image.

        Args:
            name: the image's path below the image folder, with "/".
            keypoints: in pixels of the image file as stored.
            image_size: (width, height) in px of the image file as stored.
            uncertainty: standard deviation of the keypoints in px, on hloc's scale: 2 px of the network's input.

        Raises:
            SuperPointError: the name cannot be one, the file has it already, or it cannot be written (a full disk).
        """
        check_name(name)
        arrays = {
            "keypoints": np.ascontiguousarray(keypoints.xy, dtype=np.float32),
            "scores": np.ascontiguousarray(keypoints.scores, dtype=np.float32),
            "descriptors": np.asarray(keypoints.descriptors).astype(self._dtype, copy=False),
            "image_size": np.asarray(image_size, dtype=np.int64),
        }
        self._target.write(name, arrays, float(uncertainty))

    def close(self) -> None:
        """Completes the file and gives it its name.

        Raises:
            SuperPointError: it cannot be written; a file that was there is unchanged.
        """
        self._target.finish()

    def abandon(self) -> None:
        """Ends without a file of that name; an old one stays."""
        self._target.abandon()

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def check_name(name: str) -> None:
    """Checks that a text can be the name of an entry.

    Raises:
        SuperPointError: it is empty, absolute, or has parts such as "..".
    """
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise SuperPointError(
            f"{name!r} cannot name an image in a feature file; expected a path below a folder: a/b.jpg."
        )


# ---------------------------------------------------------------------------------------------------------------- HDF5


def import_h5py() -> ModuleType:
    """The module h5py.

    Raises:
        SuperPointError: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise SuperPointError(f"feature files in HDF5 need h5py: {install_hint('bulk')}.") from error
    module: ModuleType = h5py
    return module


class _Source(Protocol):
    """What `FeatureFile` reads from."""

    def names(self) -> Iterator[str]: ...

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> StoredFeatures: ...

    def close(self) -> None: ...


class _Hdf5File:
    """An .h5 that is read."""

    def __init__(self, path: Path) -> None:
        self._h5py, self._path = import_h5py(), path
        self._file = open_hdf5(path)

    def names(self) -> Iterator[str]:
        yield from self._below(self._file, "")

    def _below(self, group: Any, prefix: str) -> Iterator[str]:
        for key in group:
            inner = group.get(key)
            if not isinstance(inner, self._h5py.Group):
                continue
            if isinstance(inner.get("keypoints"), self._h5py.Dataset):
                yield prefix + key
            else:
                yield from self._below(inner, f"{prefix}{key}/")

    def has(self, name: str) -> bool:
        return f"{name}/keypoints" in self._file

    def read(self, name: str) -> StoredFeatures:
        try:
            group = self._file[name]
            keypoints, scores, descriptors, size = (group[key][()] for key in _DATASETS)
            uncertainty = float(group["keypoints"].attrs.get(_UNCERTAINTY, 1.0))
            _check_shapes(keypoints, scores, descriptors.T, size)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise SuperPointError(
                f"{self._path}: the entry {name!r} cannot be read ({one_line(error)}); extract that image again."
            ) from error
        width, height = (int(side) for side in size)
        return StoredFeatures(keypoints.astype(np.float32), scores, descriptors.T, (width, height), uncertainty)

    def close(self) -> None:
        self._file.close()


def open_hdf5(path: Path, what: str = "feature file") -> Any:
    """Opens an .h5 for reading.

    Args:
        path: the file.
        what: what it should be, for the error.

    Raises:
        SuperPointError: it is missing, no HDF5, or h5py is missing.
    """
    h5py = import_h5py()
    if not path.is_file():
        raise SuperPointError(f"{what} {path} does not exist (looked in {Path.cwd()}).")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise SuperPointError(f"{path} cannot be read as HDF5: {one_line(error)}; make it again.") from error


def _check_shapes(keypoints: Any, scores: Any, descriptors: Any, size: Any) -> None:
    """Checks the arrays of one entry, descriptors as (N, D).

    Raises:
        ValueError: naming the shapes.
    """
    count = keypoints.shape[0]
    if keypoints.shape != (count, 2) or scores.shape != (count,) or descriptors.shape[:-1] != (count,):
        raise ValueError(f"keypoints {keypoints.shape}, scores {scores.shape}, descriptors {descriptors.T.shape}")
    if size.shape != (2,):
        raise ValueError(f"image_size has shape {size.shape}")


class _Target(Protocol):
    """What `FeatureWriter` writes to."""

    def write(self, name: str, arrays: dict[str, NDArray[Any]], uncertainty: float) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


class _NewHdf5:
    """An .h5 that grows beside its place."""

    def __init__(self, path: Path) -> None:
        self._h5py, self._path = import_h5py(), path
        target = check_writable(path).resolve()
        self._place, self._beside = target, target.with_name(f".{target.name}.{os.urandom(8).hex()}")
        with self._reported():
            self._file = self._h5py.File(self._beside, "w-", libver=_HDF5_FORMATS)

    def write(self, name: str, arrays: dict[str, NDArray[Any]], uncertainty: float) -> None:
        if f"{name}/keypoints" in self._file:
            raise SuperPointError(f"{self._path} has an entry {name!r} already; two images have the same name.")
        with self._reported():
            group = self._file.create_group(name)
            for key, array in arrays.items():
                group.create_dataset(key, data=array.T if key == "descriptors" else array)
            group["keypoints"].attrs[_UNCERTAINTY] = uncertainty

    def finish(self) -> None:
        try:
            with self._reported():
                self._file.close()
                with open(self._beside, "r+b") as whole:
                    os.fsync(whole.fileno())
                self._beside.replace(self._place)
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        with suppress(Exception):  # on a full disk it cannot be closed, either
            self._file.close()
        with suppress(OSError):
            self._beside.unlink()

    def _reported(self) -> _Reported:
        return _Reported(self._path)


class _Reported:
    """Turns h5py's errors of writing into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, (OSError, RuntimeError, ValueError)):
            raise SuperPointError(f"{self._path} cannot be written: {_why(error)}.") from error


def _why(error: BaseException) -> str:
    """The operating system's words if it is the reason; else HDF5's."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else one_line(error)


# ---------------------------------------------------------------------------------------------------------------- .npz


class _NpzFolder:
    """A folder of .npz that is read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> Iterator[str]:
        for folder, _, files in os.walk(self._folder):
            below = Path(folder).relative_to(self._folder).as_posix()
            prefix = "" if below == "." else f"{below}/"
            yield from (prefix + file[: -len(".npz")] for file in files if _is_entry(file))

    def has(self, name: str) -> bool:
        return _npz_path(self._folder, name).is_file()

    def read(self, name: str) -> StoredFeatures:
        path = _npz_path(self._folder, name)
        found = load_features(path)
        with np.load(path, allow_pickle=False) as arrays:
            uncertainty = float(arrays[_UNCERTAINTY]) if _UNCERTAINTY in arrays else 1.0
        return StoredFeatures(found.xy, found.scores, found.descriptors, found.image_size, uncertainty)

    def close(self) -> None: ...


class _NewNpzFolder:
    """A folder that gets one .npz for each image."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)

    def write(self, name: str, arrays: dict[str, NDArray[Any]], uncertainty: float) -> None:
        path = _npz_path(self._folder, name)
        make_folder(path.parent)
        write_npz(path, {**arrays, _UNCERTAINTY: np.float64(uncertainty)})

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


def _npz_path(folder: Path, name: str) -> Path:
    return folder / PurePosixPath(f"{name}.npz")


def _is_entry(file: str) -> bool:
    return file.endswith(".npz") and not file.startswith(".")
