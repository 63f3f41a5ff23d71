"""Matches the features of many pairs of images: feature file and pairs file -> match file.

A run writes parts of `PART_PAIRS` pairs into a folder beside the output, each whole or not at all, and joins them at
the end. So a run that was killed goes on where it was when it is started again; and an output that exists is kept and
gets the pairs that it lacks.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, check_writable, make_folder, one_line, write_atomically, write_npz
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.matcher import Matcher, Prepared, open_matcher
from superpoint_trt.match.nearest import Matches, MatchOptions
from superpoint_trt.pipeline.feature_files import FeatureFile
from superpoint_trt.pipeline.match_files import MatchFile, MatchWriter, StoredMatches, check_group_names, to_stored
from superpoint_trt.pipeline.pairs import Pair, read_pairs

PART_PAIRS = 1000
"""Pairs of a part: what a killed run may do twice."""


@dataclass(frozen=True)
class PairMatchOptions:
    """How pairs are matched."""

    matching: MatchOptions = field(default_factory=MatchOptions)
    device: str = "auto"
    """"auto": a GPU if there is one that works; "cpu", "cuda" or "cuda:N"."""
    cache_mib: int = 4096
    """Most memory, of the device that matches, for descriptors that are kept for later pairs."""
    overwrite: bool = False
    """Whether an output that is there is made anew."""


@dataclass(frozen=True)
class PairMatchSummary:
    """What a run did."""

    output: Path
    pairs: int
    """Pairs in the pairs file."""
    done_before: int
    """Pairs that earlier runs had matched."""
    matches: int
    """Matches of the pairs that this run matched."""
    seconds: float
    """That this run matched for, without joining the parts."""
    runs_on: str
    """What computed."""

    @property
    def pairs_per_second(self) -> float:
        """Of the pairs that this run matched."""
        return (self.pairs - self.done_before) / max(self.seconds, 1e-9)


def match_pairs(
    features: PathLike,
    pairs: PathLike | Sequence[Pair],
    output: PathLike,
    options: PairMatchOptions | None = None,
    progress: PhaseProgress | None = None,
) -> PairMatchSummary:
    """Matches the descriptors of each pair of images.

    Args:
        features: feature file.
        pairs: pairs file, or the pairs.
        output: match file (.h5) to write.
        options: which neighbors are matches, and where they are found.
        progress: is told the phase, with its pairs/s, and how many pairs are done.

    Raises:
        SuperPointError: a file is missing or damaged, the output was made of other features or with other options, or
            it cannot be written; what was finished stays.
    """
    options = options or PairMatchOptions()
    check_writable(output)
    with FeatureFile(features) as stored:
        wanted = (
            list(pairs) if isinstance(pairs, Sequence) and not isinstance(pairs, str) else read_pairs(pairs, stored)
        )
        check_group_names(name for pair in wanted for name in pair)
        made_of = _made_of(Path(features), options.matching)
        with _old_output(Path(output), made_of, options.overwrite) as old:
            left = [pair for pair in wanted if old is None or pair not in old]
            if old is not None and not left:
                return PairMatchSummary(Path(output), len(wanted), len(wanted), 0, 0.0, "nothing was left to do")
            parts = _Parts(Path(output), made_of, left)
            started = time.monotonic()
            with open_matcher(options.matching, options.device) as matcher:
                matched, found = _match(parts, _Cache(stored, matcher, options.cache_mib << 20), len(wanted), progress)
            seconds = time.monotonic() - started
            _join(Path(output), made_of, old, parts, progress)
    parts.remove()
    return PairMatchSummary(Path(output), len(wanted), len(wanted) - matched, found, seconds, matcher.runs_on)


def _match(parts: _Parts, cache: _Cache, total: int, progress: PhaseProgress | None) -> tuple[int, int]:
    """Matches and writes each part that is not there. Returns the numbers of pairs and of matches."""
    todo = [index for index in range(len(parts)) if not parts.is_done(index)]
    done = total - sum(len(parts.pairs(index)) for index in todo)
    started, matched, found = time.monotonic(), 0, 0
    for index in todo:
        entries: list[_Entry] = []
        for group in _groups(parts.pairs(index), cache.matcher.pairs_at_once):
            entries += _match_group(group, cache)
            matched += len(group)
            if progress:
                rate = matched / max(time.monotonic() - started, 1e-9)
                progress(f"matching, {rate:.3g} pairs/s", done + matched, total)
        parts.write(index, entries)
        found += sum(len(entry.matches) for entry in entries)
    return matched, found


def _groups(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


def _match_group(group: Sequence[Pair], cache: _Cache) -> list[_Entry]:
    held = [(cache[first], cache[second]) for first, second in group]
    return [_Entry(found, a.count, b.count) for found, (a, b) in zip(cache.matcher.match(held), held)]


class _Cache:
    """The prepared descriptors of the images used last."""

    def __init__(self, features: FeatureFile, matcher: Matcher, most_nbytes: int) -> None:
        self.matcher, self._features, self._most_nbytes = matcher, features, most_nbytes
        self._held: OrderedDict[str, Prepared] = OrderedDict()
        self._nbytes = 0

    def __getitem__(self, name: str) -> Prepared:
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        try:
            prepared = self.matcher.prepare(self._features[name].descriptors)
        except SuperPointError as error:
            raise SuperPointError(f"{self._features.path}, {name!r}: {error}") from error
        self._held[name] = prepared
        self._nbytes += prepared.nbytes
        while self._nbytes > self._most_nbytes and len(self._held) > 1:
            self._nbytes -= self._held.popitem(last=False)[1].nbytes
        return prepared


# --------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Entry:
    """The matches of one pair."""

    matches: Matches
    first_count: int
    second_count: int


class _Parts:
    """The parts of a match file: a folder beside it, whose files are each written whole.

    A part's name has a hash of its pairs, so that a part of another pairs file is not taken for it.

    Args:
        output: the match file.
        made_of: what the matches are made of; parts that were made of something else are removed.
        pairs: to match.
    """

    def __init__(self, output: Path, made_of: str, pairs: Sequence[Pair]) -> None:
        self._folder = output.with_name(f"{output.name}.parts")
        self._pairs = pairs
        manifest = self._folder / "made_of.json"
        if self._folder.is_dir() and (not manifest.is_file() or manifest.read_text(encoding="utf-8") != made_of):
            shutil.rmtree(self._folder)
        make_folder(self._folder)
        write_atomically(manifest, made_of.encode())

    def __len__(self) -> int:
        return -(-len(self._pairs) // PART_PAIRS)

    def pairs(self, index: int) -> Sequence[Pair]:
        """The pairs of a part."""
        return self._pairs[index * PART_PAIRS : (index + 1) * PART_PAIRS]

    def _path(self, index: int) -> Path:
        text = json.dumps(self.pairs(index)).encode()
        return self._folder / f"{index:06}_{hashlib.sha256(text).hexdigest()[:16]}.npz"

    def is_done(self, index: int) -> bool:
        """Whether a part is written."""
        return self._path(index).is_file()

    def write(self, index: int, entries: Sequence[_Entry]) -> None:
        """Writes a part.

        Raises:
            SuperPointError: it cannot be written (a full disk).
        """
        rows = [entry.matches.rows.astype(np.int32) for entry in entries]
        counts = [(len(entry.matches), entry.first_count, entry.second_count) for entry in entries]
        arrays: dict[str, NDArray[Any]] = {
            "rows": np.concatenate([*rows, np.zeros((0, 2), np.int32)]),
            "distances": np.concatenate([*(entry.matches.distances for entry in entries), np.zeros(0, np.float32)]),
            "counts": np.array(counts, np.int64).reshape(-1, 3),
        }
        write_npz(self._path(index), arrays)

    def read(self) -> Iterator[tuple[Pair, StoredMatches]]:
        """Reads all parts.

        Raises:
            SuperPointError: a part is damaged.
        """
        for index in range(len(self)):
            path = self._path(index)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    rows, distances, counts = arrays["rows"], arrays["distances"], arrays["counts"]
                ends = np.cumsum(counts[:, 0])
                if len(counts) != len(self.pairs(index)) or len(rows) != len(distances) or len(rows) != ends[-1]:
                    raise ValueError("the numbers of its pairs and matches do not agree")
            except Exception as error:  # a damaged zip raises whatever its reader stumbles over
                raise SuperPointError(
                    f"{path} is damaged ({one_line(error)}); remove it and start the run again."
                ) from error
            for pair, (count, first, second), end in zip(self.pairs(index), counts.tolist(), ends.tolist()):
                found = Matches(rows[end - count : end], distances[end - count : end])
                yield pair, to_stored(found, first, second)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


_MADE_OF = "superpoint_trt.made_of"
"""Attribute of a match file."""
_ENDS_NBYTES = 1 << 20


def _made_of(features: Path, options: MatchOptions) -> str:
    """What matches are made of, as JSON: the features and the options. Equal texts, equal matches."""
    return json.dumps({"format": 1, "features": _fingerprint(features), "matching": asdict(options)}, sort_keys=True)


def _fingerprint(features: Path) -> str:
    """Tells feature files apart without reading gigabytes: by size, first and last bytes; folders by all sizes."""
    digest = hashlib.sha256()
    if features.is_dir():
        for path in sorted(features.rglob("*.npz")):
            digest.update(f"{path.relative_to(features).as_posix()}\0{path.stat().st_size}\0".encode())
        return digest.hexdigest()
    size = features.stat().st_size
    with open(features, "rb") as file:
        digest.update(f"{size}\0".encode() + file.read(_ENDS_NBYTES))
        file.seek(max(0, size - _ENDS_NBYTES))
        digest.update(file.read())
    return digest.hexdigest()


@contextmanager
def _old_output(output: Path, made_of: str, overwrite: bool) -> Iterator[MatchFile | None]:
    """The output of an earlier run of the same features and options, if there is one.

    Raises:
        SuperPointError: there is an output of something else, and it may not be overwritten.
    """
    if overwrite or not output.exists():
        yield None
        return
    with MatchFile(output) as old:
        if old.attribute(_MADE_OF) != made_of:
            raise SuperPointError(
                f"{output} was made of other features or with other options; give --overwrite, or another output."
            )
        yield old


def _join(output: Path, made_of: str, old: MatchFile | None, parts: _Parts, progress: PhaseProgress | None) -> None:
    """Writes the match file: what the old one has, and the parts."""
    with MatchWriter(output) as writer:
        writer.set_attribute(_MADE_OF, made_of)
        count = 0
        for entries in (old.entries() if old else (), parts.read()):
            for group, matches in entries:
                writer.write(group, matches)
                count += 1
                if progress and not count % 100:
                    progress("writing matches", count, 0)
