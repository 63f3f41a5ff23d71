"""Feature files of many images: hloc's HDF5 layout, or a folder of .npz.

A feature file has one entry for each image, under the image's name: its path below the image folder, with "/". In HDF5
an entry is a group with the datasets `keypoints` (N, 2) float32, `scores` (N,) float32, `descriptors` (D, N) float16 or
float32 and `image_size` (2,) int64 (width, height); `keypoints` has the attribute `uncertainty` in px. Coordinates are
pixels of the image file as stored (before EXIF rotation), pixel centres at integers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from superpoint_trt.core.files import PathLike, make_folder, one_line, read_bytes, write_atomically, write_npz
from superpoint_trt.core.types import Float32, Keypoints, SuperPointError
from superpoint_trt.pipeline.contexts import Closes, WritesWhole
from superpoint_trt.pipeline.hdf5_files import description_of, import_h5py, open_hdf5, open_target
from superpoint_trt.pipeline.journal import Piece
from superpoint_trt.pipeline.packed import Entry, check_name, read_entries, stored_arrays
from superpoint_trt.run.store import load_features

HDF5_SUFFIXES = (".h5", ".hdf5")
DETECTION_NOISE_PX = 2.0
"""Uncertainty of a SuperPoint keypoint in the pixels it was found in, as hloc gives it."""

DTYPES = ("float16", "float32")
"""Types in which descriptors are stored."""

_DESCRIPTION_FILE = "superpoint_trt.json"
"""In a folder of .npz."""
UNCERTAINTY = "uncertainty"
"""Attribute of `keypoints`."""
_DATASETS = ("keypoints", "scores", "descriptors", "image_size")
_MOST_PACKED = 1100
"""How many times smaller than its content an HDF5 file can be; deflate packs zeros 1,032-fold."""


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


class FeatureFile(Closes):
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

    @property
    def description(self) -> str | None:
        """The text that `FeatureWriter.describe` has kept in the file."""
        return self._source.description()

    def close(self) -> None:
        """Closes the file."""
        self._source.close()


class FeatureWriter(WritesWhole):
    """Writes a feature file. A context manager.

        with FeatureWriter("features.h5") as writer:
            writer.write("street/0001.jpg", keypoints, keypoints.image_size)

    An .h5 changes when the context ends without an error; a process that is killed before leaves the old file, or none.
    In a folder each .npz appears whole as soon as it is written.

    Args:
        path: an .h5 (or .hdf5), or a folder of .npz.
        dtype: of the descriptors, float16 or float32.
        append: keep the entries of a file that is there, and add to them, in a time that does not depend on their
            number. False: an .h5 that is there is replaced.
        scratch: a folder of the same file system, in which a new .h5 grows; None: the one that it will lie in.

    Raises:
        SuperPointError: the place cannot be written to, the file to be kept is no HDF5, or h5py is missing.
    """

    def __init__(
        self, path: PathLike, dtype: DTypeLike = "float16", append: bool = False, scratch: Path | None = None
    ) -> None:
        self.path = Path(path)
        self._dtype = np.dtype(dtype)
        if self._dtype.name not in DTYPES:
            raise SuperPointError(f"the type of descriptors is {dtype}; expected {' or '.join(DTYPES)}.")
        self._target: _Target = (
            _Hdf5Entries(self.path, self._dtype, append, scratch)
            if is_hdf5_name(path)
            else _NewNpzFolder(self.path, self._dtype)
        )

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
        self._target.write(name, keypoints, image_size, float(uncertainty))

    def add_packed(self, path: Path) -> int:
        """Adds the entries of a file that `PackedWriter` made, with the same type of descriptors.

        Returns:
            How many there were.

        Raises:
            SuperPointError: this is a folder, the source is no such file, or the .h5 has one of the entries already.
        """
        return self._target.add_packed(path)

    def describe(self, text: str) -> None:
        """Keeps a text in the file that readers of entries do not see; `FeatureFile.description` returns it."""
        self._target.describe(text)

    def close(self) -> None:
        """Completes the file and gives it its name.

        Raises:
            SuperPointError: it cannot be written; a file that was there is unchanged.
        """
        self._target.finish()

    def abandon(self) -> None:
        """Ends without a file of that name; an old one stays."""
        self._target.abandon()


# ---------------------------------------------------------------------------------------------------------------- HDF5


class _Source(Protocol):
    """What `FeatureFile` reads from."""

    def names(self) -> Iterator[str]: ...

    def has(self, name: str) -> bool: ...

    def read(self, name: str) -> StoredFeatures: ...

    def description(self) -> str | None: ...

    def close(self) -> None: ...


class _Hdf5File:
    """An .h5 that is read."""

    def __init__(self, path: Path) -> None:
        self._h5py, self._path = import_h5py(), path
        self._file = open_hdf5(path)

    def names(self) -> Iterator[str]:
        found: list[Any] = []
        try:
            self._file.visit(found.append)  # each group once, also where links go in circles
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            raise SuperPointError(f"{self._path} is damaged ({one_line(error)}); make it again.") from error
        ending = f"/{_DATASETS[0]}"
        return (name[: -len(ending)] for name in found if isinstance(name, str) and name.endswith(ending))

    def has(self, name: str) -> bool:
        try:
            return f"{name}/keypoints" in self._file
        except (OSError, RuntimeError, KeyError, ValueError):  # a damaged group, or a name that HDF5 cannot have
            return False

    def read(self, name: str) -> StoredFeatures:
        try:
            group = self._file[name]
            missing = [key for key in _DATASETS if key not in group]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            keypoints, scores, descriptors, size = (self._array(group[key]) for key in _DATASETS)
            uncertainty = float(group["keypoints"].attrs.get(UNCERTAINTY, 1.0))
            return _as_features(keypoints, scores, descriptors.T, size, uncertainty)
        except (KeyError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise SuperPointError(
                f"{self._path}: the entry {name!r} cannot be read ({one_line(error)}); extract that image again."
            ) from error

    def _array(self, dataset: Any) -> NDArray[Any]:
        """Reads a dataset of numbers.

        Raises:
            ValueError: it is something else, or it says that it is much larger than the file.
        """
        name = dataset.name.rsplit("/", 1)[-1]
        if not isinstance(dataset, self._h5py.Dataset) or dataset.shape is None or dataset.dtype.kind not in "fiu":
            raise ValueError(f"{name} is no array of numbers")
        if dataset.nbytes > _MOST_PACKED * self._file.id.get_filesize():
            raise ValueError(f"{name} has the shape {dataset.shape}, more than the file can hold")
        values: NDArray[Any] = dataset[()]
        return values

    def description(self) -> str | None:
        return description_of(self._file)

    def close(self) -> None:
        self._file.close()


def _as_features(
    keypoints: NDArray[Any], scores: NDArray[Any], descriptors: NDArray[Any], size: NDArray[Any], uncertainty: float
) -> StoredFeatures:
    """Checks the arrays of one entry, descriptors as (N, D).

    Raises:
        ValueError: naming what is wrong.
    """
    count = len(scores) if scores.ndim == 1 else -1
    if keypoints.shape != (count, 2) or descriptors.ndim != 2 or len(descriptors) != count:
        raise ValueError(f"keypoints {keypoints.shape}, scores {scores.shape}, descriptors {descriptors.T.shape}")
    if descriptors.dtype.kind != "f":
        raise ValueError(f"descriptors are {descriptors.dtype}; expected floating-point numbers")
    if size.shape != (2,) or not (np.isfinite(size).all() and (size >= 1).all()):
        raise ValueError(f"image_size is {size.tolist()}; expected width and height in pixels")
    for name, values in (("keypoints", keypoints), ("scores", scores), ("descriptors", descriptors)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} hold numbers that are not finite")
    width, height = (int(side) for side in size)
    return StoredFeatures(keypoints.astype(np.float32), scores, descriptors, (width, height), uncertainty)


class _Target(Protocol):
    """What `FeatureWriter` writes to."""

    def write(self, name: str, keypoints: Keypoints, image_size: tuple[int, int], uncertainty: float) -> None: ...

    def add_packed(self, path: Path) -> int: ...

    def describe(self, text: str) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


class _Hdf5Entries:
    """An .h5 that gets entries. h5py's lower layer writes them, which takes half the time for small parts.

    Args:
        path: its name.
        dtype: of the descriptors.
        append: keep the entries of a file that is there.
        scratch: a folder in which a new .h5 grows.

    Raises:
        SuperPointError: it cannot be written, or is no HDF5.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], append: bool, scratch: Path | None) -> None:
        self._h5py, self._path, self._dtype = import_h5py(), path, dtype
        self._target = open_target(path, append, scratch)
        h5p, h5t = self._h5py.h5p, self._h5py.h5t
        self._links = h5p.create(h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        self._links.set_char_encoding(h5t.CSET_UTF8)
        self._layout = h5p.create(h5p.DATASET_CREATE)
        self._layout.set_obj_track_times(False)  # equal bytes for equal entries
        self._layout.set_alloc_time(self._h5py.h5d.ALLOC_TIME_EARLY)  # `add_packed` asks for places before it writes
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="superpoint-merge-copy")
        self._copying: Future[None] | None = None
        self._types = {np.dtype(kind): h5t.py_create(np.dtype(kind)) for kind in ("<f2", "<f4", "<f8", "<i8")}

    def write(self, name: str, keypoints: Keypoints, image_size: tuple[int, int], uncertainty: float) -> None:
        """Writes one image's arrays."""
        arrays = stored_arrays(keypoints, self._dtype)
        with self._target.reported():
            made = self._make(Entry(name, len(arrays[1]), len(arrays[2]), image_size, uncertainty))
            for dataset, array in zip(made, arrays):
                if array.size:
                    dataset.write(self._h5py.h5s.ALL, self._h5py.h5s.ALL, array)

    def add_packed(self, path: Path) -> int:
        """Adds the entries of a packed file; returns their number.

        HDF5 only makes room for the arrays. Another thread copies them there, for each is in the file as it is here.
        """
        entries, pieces = read_entries(path, self._dtype), []
        with self._target.reported():
            for entry in entries:
                for dataset, nbytes in zip(self._make(entry), entry.sizes(self._dtype)):
                    if nbytes:
                        pieces.append(Piece(dataset.get_offset(), nbytes))
            self._wait()
            self._copying = self._copier.submit(self._copy, path, pieces)
        return len(entries)

    def _copy(self, path: Path, pieces: Sequence[Piece]) -> None:
        try:
            self._target.disk.copy_in(path, pieces)
        except OSError as error:
            raise SuperPointError(f"{path} cannot be read: {error.strerror}.") from error

    def _wait(self) -> None:
        """Waits until the arrays of the packed file before are copied.

        Raises:
            SuperPointError: they cannot be read.
        """
        copying, self._copying = self._copying, None
        if copying is not None:
            copying.result()

    def _make(self, entry: Entry) -> list[Any]:
        """Makes an entry whose arrays are still to be written; returns their datasets."""
        low = self._h5py
        try:
            group = low.h5g.create(self._target.file.id, entry.name.encode(), lcpl=self._links)
        except ValueError as error:
            if entry.name not in self._target.file:
                raise
            raise SuperPointError(
                f"{self._path} has an entry {entry.name!r} already; two images have the same name."
            ) from error
        kinds = ("<f4", "<f4", self._dtype.newbyteorder("<"), "<i8")
        made = [
            low.h5d.create(
                group, name.encode(), self._types[np.dtype(kind)], low.h5s.create_simple(shape), dcpl=self._layout
            )
            for name, kind, shape in zip(_DATASETS, kinds, (*entry.shapes, (2,)))
        ]
        noise, scalar = np.array(entry.uncertainty, "<f8"), low.h5s.create(low.h5s.SCALAR)
        low.h5a.create(made[0], UNCERTAINTY.encode(), self._types[noise.dtype], scalar).write(noise)
        made[-1].write(low.h5s.ALL, low.h5s.ALL, np.array(entry.image_size, "<i8"))
        return made[:-1]

    def describe(self, text: str) -> None:
        """Keeps a text in the file."""
        self._target.describe(text)

    def finish(self) -> None:
        """Completes the file; from then on readers see it."""
        try:
            self._wait()
        except BaseException:
            self.abandon()
            raise
        self._copier.shutdown()
        self._target.finish()

    def abandon(self) -> None:
        """Ends without a change that readers see."""
        self._copier.shutdown(wait=True, cancel_futures=True)
        self._target.abandon()


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
        try:
            with np.load(path, allow_pickle=False) as arrays:
                uncertainty = float(arrays[UNCERTAINTY]) if UNCERTAINTY in arrays else 1.0
        except Exception as error:  # a damaged zip raises whatever its reader stumbles over
            raise SuperPointError(f"{path}: {UNCERTAINTY} is no number ({one_line(error)}).") from error
        return StoredFeatures(found.xy, found.scores, found.descriptors, found.image_size, uncertainty)

    def description(self) -> str | None:
        path = self._folder / _DESCRIPTION_FILE
        return read_bytes(path, "description").decode("utf-8", "replace") if path.is_file() else None

    def close(self) -> None: ...


class _NewNpzFolder:
    """A folder that gets one .npz for each image."""

    def __init__(self, folder: Path, dtype: np.dtype[Any]) -> None:
        self._folder, self._dtype = make_folder(folder), dtype

    def write(self, name: str, keypoints: Keypoints, image_size: tuple[int, int], uncertainty: float) -> None:
        path = _npz_path(self._folder, name)
        make_folder(path.parent)
        arrays = {
            "keypoints": np.ascontiguousarray(keypoints.xy, dtype=np.float32),
            "scores": np.ascontiguousarray(keypoints.scores, dtype=np.float32),
            # In C order, which every reader of .npz knows.
            "descriptors": np.ascontiguousarray(keypoints.descriptors, dtype=self._dtype),
            "image_size": np.asarray(image_size, dtype=np.int64),
            UNCERTAINTY: np.array(uncertainty),
        }
        write_npz(path, arrays)

    def add_packed(self, path: Path) -> int:
        raise SuperPointError(f"{self._folder} is a folder of .npz; packed entries are added to an .h5 only.")

    def describe(self, text: str) -> None:
        write_atomically(self._folder / _DESCRIPTION_FILE, text.encode())

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


def remove_entries(folder: Path) -> None:
    """Removes all entries of a folder of .npz, and in the end its description.

    Raises:
        SuperPointError: one cannot be removed.
    """
    with FeatureFile(folder) as features:
        paths = [_npz_path(folder, name) for name in features.names()]
    for path in [*paths, folder / _DESCRIPTION_FILE]:
        try:
            path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            raise SuperPointError(f"{path} cannot be removed: {error.strerror}.") from error


def _npz_path(folder: Path, name: str) -> Path:
    return folder / PurePosixPath(f"{name}.npz")


def _is_entry(file: str) -> bool:
    return file.endswith(".npz") and not file.startswith(".")
