"""Matches the features of many pairs of images: feature file and pairs file -> match file.

A run is kept on disk as an extraction is (`shards`): cut into shards of pairs, each finished as a whole, which are
joined in the end. So it can be killed, started again, and shared by several processes. An output that is there is kept
and gets the pairs that it lacks.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import (
    PathLike,
    check_distinct,
    check_writable,
    file_sha256,
    one_line,
    read_bytes,
    sha256,
    write_npz,
)
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.match.learned import LearnedMatcher
from superpoint_trt.match.matcher import Matcher, NetworkMatcher, Prepared, open_matcher
from superpoint_trt.match.nearest import Matches, MatchOptions
from superpoint_trt.pipeline.extract import remove_run, take_part
from superpoint_trt.pipeline.feature_files import FeatureFile
from superpoint_trt.pipeline.locks import RangeLock
from superpoint_trt.pipeline.match_files import MatchFile, MatchWriter, check_group_names, to_stored
from superpoint_trt.pipeline.merge import MadeBy
from superpoint_trt.pipeline.pairs import Pair, read_pairs
from superpoint_trt.pipeline.shards import (
    CHECKPOINT,
    DESCRIPTORS_OF,
    MERGE_LOCK,
    Manifest,
    Settings,
    ShardFolder,
    ShardReport,
    difference,
    digest_names,
    range_of,
)

SHARD_PAIRS = 1000
"""Pairs of a shard: what a killed run may do twice."""


@dataclass(frozen=True)
class PairMatchOptions:
    """How pairs are matched."""

    matching: MatchOptions = field(default_factory=MatchOptions)
    """Of nearest neighbors."""
    device: str = "auto"
    """"auto": a GPU if there is one that works; "cpu", "cuda" or "cuda:N"."""
    cache_mib: int = 4096
    """Most memory, of the device that matches, for descriptors that are kept for later pairs."""
    part: int = 1
    """Which part of the work this process does, from 1 on."""
    parts: int = 1
    """How many processes share the work."""
    overwrite: bool = False
    """Whether an output, or an unfinished run, that is there is replaced."""
    matcher: PathLike | None = None
    """File of a learned matcher, in the place of nearest neighbors."""
    min_score: float | None = None
    """Of a learned matcher; None: the file's own."""

    def __post_init__(self) -> None:
        if not 1 <= self.part <= self.parts:
            raise SuperPointError(f"--shard is {self.part}/{self.parts}; expected i/n with i from 1 to n.")
        if self.overwrite and self.parts > 1:
            raise SuperPointError("--overwrite with --shard would remove the others' work; remove the output first.")


@dataclass(frozen=True)
class PairMatchSummary:
    """What a call of `match_pairs` did."""

    output: Path
    pairs: int
    """Pairs of this process's part."""
    done_before: int
    """Pairs that earlier calls had matched."""
    matches: int = 0
    """Matches of the pairs that this call matched."""
    seconds: float = 0.0
    """That this call matched for, without joining the shards."""
    runs_on: str = ""
    """What computed; empty if nothing was to be done."""
    unfinished_shards: int = 0
    """Shards that other processes still have to finish; 0: the output is complete."""

    @property
    def matched(self) -> int:
        """Pairs that this call matched."""
        return self.pairs - self.done_before


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
        progress: is called with ("matching" or "writing", pairs done, pairs in all).

    Raises:
        SuperPointError: a file is missing or damaged, the features say that they are of another network than the
            learned matcher's, the output was made of other features or with other options, another process does this
            part, or the output cannot be written; what was finished stays.
    """
    options, path = options or PairMatchOptions(), check_writable(output)
    if path.is_symlink():
        path = path.resolve()  # so that shards lie on the file system of the file
    check_distinct(path, features, pairs if isinstance(pairs, (str, Path)) else None)
    with FeatureFile(features) as stored:
        wanted = (
            list(pairs) if isinstance(pairs, Sequence) and not isinstance(pairs, str) else read_pairs(pairs, stored)
        )
        check_group_names(name for pair in wanted for name in pair)
        with _open(options) as matcher:  # what is wrong with it shows before anything is made
            _check_network(matcher, stored, options)
            run = _begin(path, wanted, _settings(Path(features), options), options.overwrite)
            if run is None:
                return PairMatchSummary(path, len(wanted), len(wanted))
            return _match_part(run, _Cache(stored, matcher, options.cache_mib << 20), options, progress)


def _settings(features: Path, options: PairMatchOptions) -> Settings:
    """What decides the content of a match file. The device is not among it, so that a run may go on elsewhere."""
    if options.matcher is None:
        return {"features": fingerprint(features), **asdict(options.matching)}
    weights = sha256(read_bytes(options.matcher, "matcher"))
    return {"features": fingerprint(features), "matcher": weights, "min_score": options.min_score}


def _open(options: PairMatchOptions) -> Matcher:
    if options.matcher is None:
        return open_matcher(options.matching, options.device)
    return NetworkMatcher(LearnedMatcher(options.matcher, options.device, min_score=options.min_score))


def _check_network(matcher: Matcher, features: FeatureFile, options: PairMatchOptions) -> None:
    """Checks that a learned matcher knows the features. Files of other tools do not say what found them, and pass.

    Raises:
        SuperPointError: they are of another network, perhaps as long.
    """
    made_by = MadeBy.parse(features.description)
    settings = made_by.settings if made_by else {}
    checkpoint = settings.get(DESCRIPTORS_OF) or settings.get(CHECKPOINT)
    if isinstance(checkpoint, str) and matcher.is_of_another(checkpoint):
        raise SuperPointError(
            f"{features.path} has features of another network than the one whose descriptors the matcher "
            f"{options.matcher} learned; extract them with that one, or take --matcher nearest."
        )


_ENDS_NBYTES = 1 << 20
_NPZ_ENDS_NBYTES = 1 << 12


def fingerprint(path: Path) -> str:
    """Tells files apart without reading gigabytes: by size, first and last bytes; folders of .npz by all of them.

    An .npz ends with the checksums of its arrays.
    """
    digest = hashlib.sha256()
    if not path.is_dir():
        _add_ends(digest, path, _ENDS_NBYTES)
        return digest.hexdigest()
    for entry in sorted(path.rglob("*.npz")):
        digest.update(f"{entry.relative_to(path).as_posix()}\0".encode("utf-8", "surrogateescape"))
        _add_ends(digest, entry, _NPZ_ENDS_NBYTES)
    return digest.hexdigest()


def _add_ends(digest: hashlib._Hash, path: Path, nbytes: int) -> None:
    """Adds a file's size and its first and last bytes to a digest."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest.update(f"{size}\0".encode() + file.read(nbytes))
        file.seek(max(0, size - nbytes))
        digest.update(file.read())


# ----------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class _Run:
    """A run that is kept on disk."""

    folder: ShardFolder
    manifest: Manifest
    pairs: Sequence[Pair]
    """To be matched: those that the output does not have."""
    before: int
    """Pairs that the output has."""

    def pairs_of(self, number: int) -> Sequence[Pair]:
        """The pairs of a shard."""
        places = self.manifest.images_of(number)
        return self.pairs[places.start : places.stop]

    def path_of(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder.folder / f"{number:05d}.npz"


def _begin(path: Path, wanted: Sequence[Pair], settings: Settings, overwrite: bool) -> _Run | None:
    """Begins a run, or takes up one that is kept on disk; None: the output has every pair.

    Raises:
        SuperPointError: the output, or the run that is kept, was made of something else.
    """
    if not wanted:
        raise SuperPointError("there are no pairs to match.")
    folder, names = ShardFolder(path), digest_names(name for pair in wanted for name in pair)
    if overwrite:
        remove_run(folder)
    made_by = None if overwrite or not path.exists() else _made_by(path)
    if made_by is not None:
        _check_settings(path, made_by.settings, settings)
    kept = folder.manifest()
    if kept is not None and made_by is not None and made_by.run_id == kept.run_id:
        folder.remove()  # a kill between the joining of the shards and its end
        kept = None
    if kept is not None and not kept.fits(settings, names) and len(folder.unfinished(kept)) == kept.shards:
        remove_run(folder)  # nothing is lost
        kept = None
    if kept is None:
        to_do = list(range(len(wanted))) if made_by is None else _without_entry(path, wanted)
        if not to_do:
            return None
        kept = folder.begin(Manifest(os.urandom(8).hex(), settings, names, len(to_do), SHARD_PAIRS, overwrite), to_do)
    _check_settings(folder.folder, kept.settings, settings)
    if kept.names_sha256 != names:
        raise SuperPointError(
            f"{folder.folder} keeps an unfinished run over other pairs; finish it with its own pairs file first, or "
            "start anew with --overwrite."
        )
    left = [wanted[at] for at in folder.to_do(kept, len(wanted))]
    return _Run(folder, kept, left, len(wanted) - len(left))


def _without_entry(path: Path, wanted: Sequence[Pair]) -> list[int]:
    with MatchFile(path) as old:
        return [at for at, pair in enumerate(wanted) if pair not in old]


def _made_by(path: Path) -> MadeBy:
    """What an output says of the run that made it.

    Raises:
        SuperPointError: it is of another tool, or no match file.
    """
    with MatchFile(path) as old:
        made_by = MadeBy.parse(old.description)
    if made_by is None:
        raise SuperPointError(
            f"{path} is there and was not made by superpoint match-pairs; choose another --output, or --overwrite."
        )
    return made_by


def _check_settings(path: Path, kept: Settings, asked: Settings) -> None:
    if kept.get("features") != asked["features"]:
        raise SuperPointError(f"{path} was made of other features; choose another --output, or --overwrite.")
    differs = difference(kept, asked)
    if differs:
        raise SuperPointError(f"{path} was made with {differs}; choose another --output, or --overwrite.")


def _match_part(
    run: _Run, cache: _Cache, options: PairMatchOptions, progress: PhaseProgress | None
) -> PairMatchSummary:
    """Matches this process's part of a run, and joins the shards if nothing else is left to do."""
    folder, manifest = run.folder, run.manifest
    numbers = range_of(options.part, options.parts, manifest.shards)
    with RangeLock(folder.lock_path) as lock:
        take_part(lock, numbers, folder, manifest)
        todo = [number for number in folder.unfinished(manifest) if number in numbers]
        started = time.monotonic()
        found = _match(run, todo, cache, progress)
        seconds = time.monotonic() - started
        left = _join_if_complete(run, lock, progress)
    before = run.before if options.part == 1 else 0  # told once, by the first part
    total = before + sum(len(run.pairs_of(number)) for number in numbers)
    matched = sum(len(run.pairs_of(number)) for number in todo)
    return PairMatchSummary(folder.output, total, total - matched, found, seconds, cache.matcher.runs_on, left)


def _match(run: _Run, todo: Sequence[int], cache: _Cache, progress: PhaseProgress | None) -> int:
    """Matches and finishes shards. Returns the number of matches."""
    total, done, found = sum(len(run.pairs_of(number)) for number in todo), 0, 0
    for number in todo:
        entries: list[_Entry] = []
        for group in _groups(run.pairs_of(number), cache.matcher.pairs_at_once):
            entries += _match_group(group, cache)
            done += len(group)
            if progress:
                progress("matching", done, total)
        _write_shard(run.path_of(number), entries)
        digest = file_sha256(run.path_of(number))
        run.folder.finish(number, ShardReport(len(entries), (), digest, cache.matcher.runs_on))
        found += sum(len(entry.matches) for entry in entries)
    return found


def _groups(pairs: Sequence[Pair], size: int) -> Iterator[Sequence[Pair]]:
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


def _match_group(group: Sequence[Pair], cache: _Cache) -> list[_Entry]:
    held = [(cache[first], cache[second]) for first, second in group]
    for (first, second), (a, b) in zip(group, held):
        if a.dim != b.dim:
            raise SuperPointError(
                f"{cache.path}: descriptors of {first!r} have {a.dim} numbers, those of {second!r} {b.dim}; extract "
                "all images with one model."
            )
    return [_Entry(found, a.count, b.count) for found, (a, b) in zip(cache.matcher.match(held), held)]


class _Cache:
    """The prepared descriptors of the images used last."""

    def __init__(self, features: FeatureFile, matcher: Matcher, most_nbytes: int) -> None:
        self.matcher, self.path, self._features, self._most_nbytes = matcher, features.path, features, most_nbytes
        self._held: OrderedDict[str, Prepared] = OrderedDict()
        self._nbytes = 0

    def __getitem__(self, name: str) -> Prepared:
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        stored = self._features[name]
        try:
            if self.matcher.needs_places:
                prepared = self.matcher.prepare_keypoints(stored.to_keypoints())
            else:
                prepared = self.matcher.prepare(stored.descriptors)
        except SuperPointError as error:
            raise SuperPointError(f"{self.path}, {name!r}: {error}") from error
        self._held[name] = prepared
        self._nbytes += prepared.nbytes
        while self._nbytes > self._most_nbytes and len(self._held) > 1:
            self._nbytes -= self._held.popitem(last=False)[1].nbytes
        return prepared


# -------------------------------------------------------------------------------------------------------------- shards


@dataclass(frozen=True)
class _Entry:
    """The matches of one pair."""

    matches: Matches
    first_count: int
    second_count: int


def _write_shard(path: Path, entries: Sequence[_Entry]) -> None:
    """Writes the matches of a shard's pairs.

    Raises:
        SuperPointError: it cannot be written (a full disk).
    """
    counts = [(len(entry.matches), entry.first_count, entry.second_count) for entry in entries]
    arrays: dict[str, NDArray[Any]] = {
        "rows": np.concatenate([entry.matches.rows for entry in entries]).astype(np.int32),
        "distances": np.concatenate([entry.matches.distances for entry in entries]),
        "counts": np.array(counts, np.int64),
    }
    write_npz(path, arrays)


def _read_shard(path: Path) -> Iterator[_Entry]:
    """Reads what `_write_shard` wrote.

    Raises:
        SuperPointError: the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            rows, distances, counts = arrays["rows"], arrays["distances"], arrays["counts"]
    except Exception as error:  # a damaged zip raises whatever its reader stumbles over
        raise SuperPointError(f"{path} cannot be read ({one_line(error)}).") from error
    ends = np.cumsum(counts[:, 0])
    for (count, first, second), end in zip(counts.tolist(), ends.tolist()):
        yield _Entry(Matches(rows[end - count : end], distances[end - count : end]), first, second)


def _join_if_complete(run: _Run, lock: RangeLock, progress: PhaseProgress | None) -> int:
    """Writes the match file if all shards are finished and no other process does so.

    Returns:
        How many shards are not finished.
    """
    folder, manifest = run.folder, run.manifest
    missing = len(folder.unfinished(manifest))
    if folder.manifest() != manifest:
        return 0  # another process has joined them meanwhile
    if not missing and lock.take(MERGE_LOCK, 1) and folder.manifest() == manifest:
        _join(run, progress)
    return missing


def _join(run: _Run, progress: PhaseProgress | None) -> None:
    manifest, done = run.manifest, 0
    run.folder.clean(f".{run.folder.output.name}.*")
    # The file grows in the folder of the run, which goes in the end with all that a kill may have left there.
    with MatchWriter(run.folder.output, not manifest.replaces, run.folder.folder) as writer:
        for number in range(manifest.shards):
            report, path = run.folder.report(number), run.path_of(number)
            if report is None or not path.is_file() or file_sha256(path) != report.sha256:
                raise SuperPointError(
                    f"shard {number} of {run.folder.output} has another {path.name} than was written; remove "
                    f"{run.folder.report_path(number)} and run superpoint match-pairs again."
                )
            for pair, entry in zip(run.pairs_of(number), _read_shard(path)):
                writer.write(pair, to_stored(entry.matches, entry.first_count, entry.second_count))
                done += 1
                if progress:
                    progress("writing", done, manifest.images)
        writer.describe(MadeBy(manifest.run_id, manifest.settings).to_json())
    run.folder.remove()
