"""Feature files of many images: hloc's HDF5 layout, or a folder of .npz.

A feature file has one entry for each image, under the image's name: its path below the image folder, with "/". In HDF5
an entry is a group with the datasets `keypoints` (N, 2) float32, `scores` (N,) float32, `descriptors` (D, N) float16 or
float32 and `image_size` (2,) int64 (width, height); `keypoints` has the attribute `uncertainty` in px. Coordinates are
pixels of the image file as stored (before EXIF rotation), pixel centres at integers.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import ModuleType, TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from superpoint_trt.core.files import (
    PathLike,
    check_writable,
    make_folder,
    one_line,
    read_bytes,
    write_atomically,
    write_npz,
)
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import Float32, Keypoints, SuperPointError
from superpoint_trt.pipeline.journal import JournaledFile, recover
from superpoint_trt.run.store import load_features

HDF5_SUFFIXES = (".h5", ".hdf5")
DETECTION_NOISE_PX = 2.0
"""Uncertainty of a SuperPoint keypoint in the pixels it was found in, as hloc gives it."""

DTYPES = ("float16", "float32")
"""Types in which descriptors are stored."""

_UNCERTAINTY = "uncertainty"
DESCRIPTION = "superpoint_trt"
"""Attribute of an .h5's root."""
_DESCRIPTION_FILE = "superpoint_trt.json"
"""In a folder of .npz."""
_DATASETS = ("keypoints", "scores", "descriptors", "image_size")
_MOST_PACKED = 1100
"""How many times smaller than its content an HDF5 file can be; deflate packs zeros 1,032-fold."""
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

    @property
    def hdf5(self) -> _Hdf5File:
        """The .h5 below.

        Raises:
            SuperPointError: this is a folder of .npz.
        """
        if not isinstance(self._source, _Hdf5File):
            raise SuperPointError(f"{self.path} is a folder of .npz; expected an .h5.")
        return self._source

    @property
    def description(self) -> str | None:
        """The text that `FeatureWriter.describe` has kept in the file."""
        return self._source.description()

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
        self._target: _Target
        if not is_hdf5_name(path):
            self._target = _NewNpzFolder(self.path)
        elif append and self.path.exists():
            self._target = GrowingHdf5(self.path)
        else:
            self._target = NewHdf5(self.path, scratch)

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

    def copy_entries(self, source: PathLike) -> int:
        """Copies all entries of another .h5 into this one.

        Returns:
            How many there were.

        Raises:
            SuperPointError: this is a folder, the source cannot be read, or the file has one of the entries already.
        """
        with FeatureFile(source) as features:
            names = features.names()
            self._target.copy(features, names)
        return len(names)

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
    try:
        name.encode()
        is_text = "\0" not in name
    except UnicodeEncodeError:  # bytes of a file name that are no UTF-8
        is_text = False
    if not is_text:
        raise SuperPointError(f"{name!r} cannot name an image in a feature file: it is no UTF-8 text; rename the file.")
    if any(part in ("", ".", "..") for part in parts):
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
            uncertainty = float(group["keypoints"].attrs.get(_UNCERTAINTY, 1.0))
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

    def copy_to(self, target: Any, names: Sequence[str]) -> None:
        """Copies entries to another open file, as they lie on disk."""
        links = _new_links(self._h5py)
        for name in names:
            place = name.encode()
            self._h5py.h5o.copy(self._file.id, place, target.id, place, lcpl=links)

    def description(self) -> str | None:
        text = self._file.attrs.get(DESCRIPTION)
        return text if isinstance(text, str) else None

    def close(self) -> None:
        self._file.close()


def _new_links(h5py: ModuleType) -> Any:
    """How entries are linked into a file: with the groups above them, and names in UTF-8."""
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return links


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
        recover(path)
        return h5py.File(path, "r")
    except OSError as error:
        raise SuperPointError(f"{path} cannot be read as HDF5: {one_line(error)}; make it again.") from error


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

    def write(self, name: str, arrays: dict[str, NDArray[Any]], uncertainty: float) -> None: ...

    def copy(self, features: FeatureFile, names: Sequence[str]) -> None: ...

    def describe(self, text: str) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


class Hdf5Target:
    """An .h5 that is written.

    Args:
        path: its name, for messages.
        place: the file that is written to.
        kept: length in bytes of the part of it that readers see until the end.

    Raises:
        SuperPointError: it cannot be written, or is no HDF5.

    Attributes:
        file: the open h5py.File.
    """

    def __init__(self, path: Path, place: Path, kept: int) -> None:
        self._h5py, self._path, self._grows = import_h5py(), path, kept > 0
        h5p, h5t = self._h5py.h5p, self._h5py.h5t
        self._links = _new_links(self._h5py)
        self._layout = h5p.create(h5p.DATASET_CREATE)
        self._layout.set_obj_track_times(False)  # equal bytes for equal entries
        self._types = {np.dtype(kind): h5t.py_create(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i8")}
        with Reported(path):
            self._disk = JournaledFile(place, kept)
            self.file = self._h5py.File(self._disk, "r+" if kept else "w", libver=_HDF5_FORMATS)

    def write(self, name: str, arrays: dict[str, NDArray[Any]], uncertainty: float) -> None:
        """Writes one image's arrays."""
        with self.reported():
            try:
                # By h5py's lower layer, which takes half the time for small parts.
                group = self._h5py.h5g.create(self.file.id, name.encode(), lcpl=self._links)
            except ValueError:
                self._check_new(name)
                raise
            for key, array in arrays.items():
                stored = np.ascontiguousarray(array.T if key == "descriptors" else array)
                dataset = self._create(self._h5py.h5d, group, key, stored.dtype, stored.shape, dcpl=self._layout)
                if stored.size:
                    dataset.write(self._h5py.h5s.ALL, self._h5py.h5s.ALL, stored)
                if key == "keypoints":
                    noise = np.array(uncertainty, dtype=np.float64)
                    self._create(self._h5py.h5a, dataset, _UNCERTAINTY, noise.dtype, ()).write(noise)

    def _create(
        self, module: Any, place: Any, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], **how: Any
    ) -> Any:
        """Creates a dataset (h5py's module h5d) or an attribute (h5a)."""
        h5s = self._h5py.h5s
        space = h5s.create_simple(shape) if shape else h5s.create(h5s.SCALAR)
        return module.create(place, name.encode(), self._types[dtype], space, **how)

    def copy(self, features: FeatureFile, names: Sequence[str]) -> None:
        """Copies entries of another file."""
        for name in names if self._grows else ():
            self._check_new(name)
        with self.reported():
            features.hdf5.copy_to(self.file, names)

    def _check_new(self, name: str) -> None:
        if name in self.file:
            raise SuperPointError(f"{self._path} has an entry {name!r} already; two images have the same name.")

    def describe(self, text: str) -> None:
        """Keeps a text in the file."""
        with self.reported():
            self.file.attrs[DESCRIPTION] = text

    def reported(self) -> Reported:
        """A context that turns errors of writing into one line."""
        return Reported(self._path, self._disk)

    def finish(self) -> None:
        """Completes the file; from then on readers see it."""
        try:
            with self.reported():
                self.file.close()
                self._disk.commit()
                self._disk.close()
                self._take_place()
        except BaseException:
            self.abandon()
            raise

    def _take_place(self) -> None:
        """Gives a file that was written beside its place its name."""

    def abandon(self) -> None:
        """Ends without a change that readers see."""
        with suppress(Exception):
            self.file.close()
        self._disk.close()


class NewHdf5(Hdf5Target):
    """An .h5 that grows beside its place, and is renamed in the end."""

    def __init__(self, path: Path, scratch: Path | None = None) -> None:
        self._place = check_writable(path).resolve()
        self._beside = (scratch or self._place.parent) / f".{self._place.name}.{os.urandom(8).hex()}"
        with Reported(path):
            self._beside.touch(exist_ok=False)
        super().__init__(path, self._beside, 0)

    def _take_place(self) -> None:
        recover(self._place)  # so that no journal of the old file is taken for one of the new
        self._beside.replace(self._place)

    def abandon(self) -> None:
        """Ends without a change that readers see."""
        super().abandon()
        with suppress(OSError):
            self._beside.unlink()


class GrowingHdf5(Hdf5Target):
    """An .h5 to which entries are added; a journal makes the change whole."""

    def __init__(self, path: Path) -> None:
        place = check_writable(path).resolve()
        with open_hdf5(place):  # finishes what a killed process began, and checks that this is HDF5
            pass
        super().__init__(path, place, _used_bytes(place))


def _used_bytes(path: Path) -> int:
    """Where a file ends as its superblock has it (HDF5 file format, versions 2 and 3); behind it lies nothing of use.

    A process that was killed while it added entries leaves such bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(_SUPERBLOCK.size)
    if len(start) < _SUPERBLOCK.size:
        return size
    magic, version, offset_bytes, _, end = _SUPERBLOCK.unpack(start)
    return min(size, end) if magic == _HDF5_MAGIC and version in (2, 3) and offset_bytes == 8 else size


_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_SUPERBLOCK = struct.Struct("<8sBB18sQ")
"""Magic, version, bytes of an offset; lengths, flags and two addresses; end of the file."""


class Reported:
    """Turns errors of writing into one line.

    Args:
        path: the file, for the message.
        disk: where h5py writes, whose own error counts.
    """

    def __init__(self, path: Path, disk: JournaledFile | None = None) -> None:
        self._path, self._disk = path, disk

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        met = self._disk.error if self._disk is not None and self._disk.error is not None else error
        if isinstance(met, (OSError, RuntimeError, ValueError)):
            raise SuperPointError(f"{self._path} cannot be written: {_why(met)}.") from met


def _why(error: BaseException) -> str:
    """The operating system's words if it is the reason; else HDF5's."""
    told = re.search(r"errno = (\d+)", str(error))  # somewhere in HDF5's text, with the file's name and the time
    number = getattr(error, "errno", None) or (int(told[1]) if told else 0)
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
        try:
            with np.load(path, allow_pickle=False) as arrays:
                uncertainty = float(arrays[_UNCERTAINTY]) if _UNCERTAINTY in arrays else 1.0
        except Exception as error:  # a damaged zip raises whatever its reader stumbles over
            raise SuperPointError(f"{path}: {_UNCERTAINTY} is no number ({one_line(error)}).") from error
        return StoredFeatures(found.xy, found.scores, found.descriptors, found.image_size, uncertainty)

    def description(self) -> str | None:
        path = self._folder / _DESCRIPTION_FILE
        return read_bytes(path, "description").decode("utf-8", "replace") if path.is_file() else None

    def close(self) -> None: ...


class _NewNpzFolder:
    """A folder that gets one .npz for each image."""

    def __init__(self, folder: Path) -> None:
        self._folder = make_folder(folder)

    def write(self, name: str, arrays: dict[str, NDArray[Any]], uncertainty: float) -> None:
        path = _npz_path(self._folder, name)
        make_folder(path.parent)
        # In C order, which every reader of .npz knows.
        in_c_order = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        write_npz(path, {**in_c_order, _UNCERTAINTY: np.float64(uncertainty)})

    def copy(self, features: FeatureFile, names: Sequence[str]) -> None:
        raise SuperPointError(f"{self._folder} is a folder of .npz; entries are copied into an .h5 only.")

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
