"""Match files in hloc's HDF5 layout.

A match file has a group `name0/name1` for each pair of images, where each name has "-" for "/". Its datasets are
`matches0` (N0,), the row of the second image that each keypoint of the first matches or -1, int16 where that holds all
rows and else int32; and `matching_scores0` (N0,) float16, in [0, 1], 0 where there is no match.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, one_line
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.nearest import Matches
from superpoint_trt.pipeline.contexts import Closes, WritesWhole
from superpoint_trt.pipeline.hdf5_files import description_of, import_h5py, open_hdf5, open_target
from superpoint_trt.pipeline.pairs import Pair

MATCHES, SCORES = "matches0", "matching_scores0"
_MOST_COMPACT_NBYTES = 60_000
"""HDF5 takes at most 64 KB in a dataset's header."""


@dataclass(frozen=True, eq=False)
class StoredMatches:
    """One entry of a match file."""

    matches0: NDArray[np.signedinteger[Any]]
    """(N0,) int16 or int32: for each keypoint of the first image its match in the second, -1 if there is none."""
    scores0: NDArray[np.float16]
    """(N0,) float16: 1 for equal descriptors, 0 for opposite ones and where there is no match."""

    @property
    def rows(self) -> NDArray[np.int64]:
        """(M, 2): the matches as rows of both images."""
        first = np.flatnonzero(self.matches0 >= 0)
        return np.stack([first, self.matches0[first]], axis=1).astype(np.int64)


def to_stored(found: Matches, first_count: int, second_count: int) -> StoredMatches:
    """Matches of unit descriptors as they are stored.

    The score is hloc's, (1 + s) / 2 for a cosine s. Of unit descriptors at the distance d it is 1 - d^2 / 4.

    Args:
        found: each row of the first image at most once.
        first_count: number of keypoints of the first image.
        second_count: number of keypoints of the second image.
    """
    dtype = np.int16 if second_count <= np.iinfo(np.int16).max + 1 else np.int32
    matches0, scores0 = np.full(first_count, -1, dtype), np.zeros(first_count, np.float16)
    matches0[found.rows[:, 0]] = found.rows[:, 1]
    scores0[found.rows[:, 0]] = np.clip(1 - found.distances**2 / 4, 0, 1)
    return StoredMatches(matches0, scores0)


def group_name(first: str, second: str) -> str:
    """The group of a pair: both names with "-" for "/", as hloc writes them."""
    return f"{first.replace('/', '-')}/{second.replace('/', '-')}"


def check_group_names(names: Iterable[str]) -> None:
    """Checks that no two images get the same name in a match file.

    Raises:
        SuperPointError: two do: "a/b.jpg" and "a-b.jpg".
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.replace("/", "-"), name)
        if other != name:
            raise SuperPointError(
                f"images {other!r} and {name!r} have the same name in a match file, where '/' becomes '-'; rename one, "
                "or give another --root."
            )


class MatchFile(Closes):
    """Reads a match file. A context manager.

        with MatchFile("matches.h5") as matches:
            rows = matches["a/1.jpg", "a/2.jpg"].rows

    Raises:
        SuperPointError: the file is missing or no HDF5, or h5py is missing.
    """

    def __init__(self, path: PathLike) -> None:
        self._h5py, self.path = import_h5py(), Path(path)
        self._file = open_hdf5(self.path, "match file")

    def pairs(self, names: Iterable[str]) -> Iterator[Pair]:
        """The pairs that the file has, with the names that the images have elsewhere.

        Args:
            names: of all images.

        Raises:
            SuperPointError: two images have the same name in the file, or it has a pair of other images.
        """
        names = list(names)
        check_group_names(names)
        known = {name.replace("/", "-"): name for name in names}
        for first, second in self._groups():
            if first not in known or second not in known:
                missing = first if first not in known else second
                raise SuperPointError(
                    f"{self.path} has matches of {missing!r}, which is not among the {len(names)} images with "
                    "features; the two files were made of other images."
                )
            yield known[first], known[second]

    def entries(self) -> Iterator[tuple[Pair, StoredMatches]]:
        """All entries, under the names that the images have in this file."""
        for pair in self._groups():
            yield pair, self[pair]

    def _groups(self) -> Iterator[Pair]:
        """The two names of each group.

        Raises:
            SuperPointError: the file holds something else.
        """
        try:
            for first, group in self._file.items():
                if not isinstance(group, self._h5py.Group):
                    raise ValueError(f"{first!r} is no group of an image")
                yield from ((first, second) for second in list(group))
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise SuperPointError(f"{self.path} is no match file ({one_line(error)}); make it again.") from error

    @property
    def description(self) -> str | None:
        """The text that `MatchWriter.describe` has kept in the file."""
        return description_of(self._file)

    def __contains__(self, pair: Pair) -> bool:
        try:
            return f"{group_name(*pair)}/{MATCHES}" in self._file
        except (KeyError, OSError, RuntimeError, ValueError):  # a damaged group
            return False

    def __getitem__(self, pair: Pair) -> StoredMatches:
        """Reads the matches of a pair, in the order of its names.

        Raises:
            SuperPointError: the file does not have the pair in this order, or the entry is damaged.
        """
        if pair not in self:
            raise SuperPointError(f"{self.path} has no matches of {pair[0]!r} with {pair[1]!r}.")
        try:
            group = self._file[group_name(*pair)]
            matches0 = group[MATCHES][()]
            scores0 = group[SCORES][()] if SCORES in group else (matches0 >= 0).astype(np.float16)
            if matches0.ndim != 1 or scores0.shape != matches0.shape or matches0.dtype.kind != "i":
                raise ValueError(f"{matches0.dtype} {matches0.shape} and scores {scores0.shape}")
        except (KeyError, OSError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise SuperPointError(
                f"{self.path}: the matches of {pair[0]!r} with {pair[1]!r} cannot be read ({one_line(error)}); make "
                "the file again."
            ) from error
        return StoredMatches(matches0, scores0)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MatchWriter(WritesWhole):
    """Writes a match file. A context manager.

        with MatchWriter("matches.h5") as writer:
            writer.write(("a/1.jpg", "a/2.jpg"), matches)

    The file changes when the context ends without an error; a process that is killed before leaves the old file, or
    none. HDF5's own functions are called, which takes a third of the time of h5py's.

    Args:
        path: .h5.
        append: keep the entries of a file that is there, and add to them.
        scratch: folder that a new file grows in, on the same file system; default that of the file.

    Raises:
        SuperPointError: the place cannot be written to, the file to be kept is no HDF5, or h5py is missing.
    """

    def __init__(self, path: PathLike, append: bool = False, scratch: Path | None = None) -> None:
        self._h5py, self.path = import_h5py(), Path(path)
        self._target = open_target(self.path, append, scratch)
        self._open: tuple[str, Any] | None = None
        # Values that lie in a dataset's own header need one write to the disk instead of two.
        self._compact = self._h5py.h5p.create(self._h5py.h5p.DATASET_CREATE)
        self._compact.set_layout(self._h5py.h5d.COMPACT)

    def write(self, pair: Pair, matches: StoredMatches) -> None:
        """Writes the matches of a pair. Pairs with the same first image are fastest one after another.

        Raises:
            SuperPointError: the file has the pair already, or it cannot be written (a full disk).
        """
        first, second = group_name(*pair).split("/")
        with self._target.reported():
            inside = self._group(first)
            if inside.links.exists(second.encode()):
                raise SuperPointError(f"{self.path} has the pair {pair[0]!r} and {pair[1]!r} already.")
            group = self._h5py.h5g.create(inside, second.encode())
            self._dataset(group, MATCHES, matches.matches0)
            self._dataset(group, SCORES, matches.scores0)

    def describe(self, text: str) -> None:
        """Keeps a text in the file that readers of entries do not see; `MatchFile.description` returns it."""
        self._target.describe(text)

    def _group(self, first: str) -> Any:
        """The group of a first image, which stays open until another is wanted."""
        if self._open is None or self._open[0] != first:
            self._open = (first, self._target.file.require_group(first).id)
        return self._open[1]

    def _dataset(self, group: Any, name: str, values: NDArray[Any]) -> None:
        low, values = self._h5py, np.ascontiguousarray(values)
        kind, space = low.h5t.py_create(values.dtype), low.h5s.create_simple(values.shape)
        layout = self._compact if values.nbytes <= _MOST_COMPACT_NBYTES else None
        low.h5d.create(group, name.encode(), kind, space, layout).write(low.h5s.ALL, low.h5s.ALL, values)

    def close(self) -> None:
        """Completes the file.

        Raises:
            SuperPointError: it cannot be written; a file that was there is unchanged.
        """
        self._open = None
        self._target.finish()

    def abandon(self) -> None:
        """Ends without a change of the file."""
        self._open = None
        self._target.abandon()
