"""The finished shards of a run become one feature file."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from superpoint_trt._version import __version__
from superpoint_trt.core.files import PathLike, file_sha256, write_atomically
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.typed_json import JsonError, mapping, member, parse, text
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.feature_files import FeatureFile, FeatureWriter, is_hdf5_name
from superpoint_trt.pipeline.locks import RangeLock
from superpoint_trt.pipeline.shards import MERGE_LOCK, Manifest, Settings, ShardFolder, ShardReport

_MOST_CHARS = 1 << 20
_LOOKED_AT_AHEAD = 4
"""Shards whose hashes are computed while others are copied."""
_SHOWN_SHARDS = 8
"""Numbers of missing shards that an error lists."""


@dataclass(frozen=True)
class MadeBy:
    """What an output says of the run that made it."""

    run_id: str
    settings: Settings

    def to_json(self) -> str:
        """The text that is kept in the output."""
        return json.dumps({"run_id": self.run_id, "settings": self.settings, "superpoint_trt_version": __version__})

    @classmethod
    def read(cls, output: Path) -> MadeBy | None:
        """What an output says; None: it does not exist, or another tool made it."""
        if not output.exists():
            return None
        try:
            with FeatureFile(output) as features:
                return cls.parse(features.description)
        except SuperPointError:
            return None

    @classmethod
    def parse(cls, description: str | None) -> MadeBy | None:
        """Reads what `to_json` wrote; None: it is something else."""
        try:
            flat = mapping(parse(description or "", _MOST_CHARS), "the description")
            return cls(text(member(flat, "run_id"), "run_id"), mapping(member(flat, "settings"), "settings"))
        except JsonError:
            return None


@dataclass(frozen=True)
class MergeSummary:
    """What `merge` did."""

    output: Path
    images: int
    """Entries that came from the shards."""
    failed: tuple[tuple[str, str], ...]
    """(name, reason) of the images that have none; the .tsv beside the output lists them, too."""
    unfinished_shards: int
    """Shards whose images were not extracted yet; more than 0 with `unfinished` only."""


def merge(output: PathLike, unfinished: bool = False, progress: PhaseProgress | None = None) -> MergeSummary:
    """Merges the shards of a run. `extract` does so itself when the last shard is finished.

    Args:
        output: the feature file whose run is kept beside it.
        unfinished: merge although shards are missing; their images can be extracted later.
        progress: is called with ("merging", shards done, shards in all).

    Raises:
        SuperPointError: there is no run, shards are missing or damaged, another process works on them, or the output
            cannot be written.
    """
    folder = ShardFolder(Path(output).resolve() if Path(output).is_symlink() else Path(output))
    manifest = folder.manifest()
    if manifest is None:
        raise SuperPointError(f"{folder.folder} keeps no run; there is nothing to merge into {output}.")
    if "dtype" not in manifest.settings:
        raise SuperPointError(f"{folder.folder} keeps a run of superpoint match-pairs; run that command again.")
    missing = folder.unfinished(manifest)
    if missing and not unfinished:
        shown = ", ".join(map(str, missing[:_SHOWN_SHARDS]))
        more = f" and {len(missing) - _SHOWN_SHARDS} more" if len(missing) > _SHOWN_SHARDS else ""
        raise SuperPointError(
            f"{len(missing)} of {manifest.shards} shards of {output} are not finished ({shown}{more}); run superpoint "
            "extract again as before, or merge what there is with --unfinished."
        )
    with RangeLock(folder.lock_path) as lock:
        if not lock.take(0, manifest.shards) or not lock.take(MERGE_LOCK, 1):
            raise SuperPointError(f"another process works on {output} (its lock is {folder.lock_path}).")
        reports = _reports(folder, manifest)
        _merge(folder, manifest, reports, progress)
    failed = tuple(row for report in reports.values() for row in report.failed)
    return MergeSummary(folder.output, sum(report.done for report in reports.values()), failed, len(missing))


def merge_if_complete(
    folder: ShardFolder, manifest: Manifest, lock: RangeLock, progress: PhaseProgress | None = None
) -> int:
    """Merges a run if all its shards are finished and no other process does so.

    Args:
        folder: of the run.
        manifest: the run.
        lock: the open lock of the folder.
        progress: is called with ("merging", shards done, shards in all).

    Returns:
        How many shards are not finished.
    """
    missing = len(folder.unfinished(manifest))
    if folder.manifest() != manifest:
        return 0  # another process has merged it meanwhile
    if not missing and lock.take(MERGE_LOCK, 1) and folder.manifest() == manifest:
        _merge(folder, manifest, _reports(folder, manifest), progress)
    return missing


def failures_path(output: Path) -> Path:
    """The file of images that failed, with their reasons: the output's name and .failed.tsv."""
    return Path(f"{output}.failed.tsv")


def _reports(folder: ShardFolder, manifest: Manifest) -> dict[int, ShardReport]:
    """The reports of the finished shards, by number.

    Raises:
        SuperPointError: one is damaged, or counts other images than its shard has.
    """
    reports = {}
    for number in range(manifest.shards):
        report = folder.report(number)
        if report is None:
            continue
        if report.done + len(report.failed) != len(manifest.images_of(number)):
            raise _spoiled(folder, number, f"counts {report.done + len(report.failed)} images")
        reports[number] = report
    return reports


def _merge(
    folder: ShardFolder, manifest: Manifest, reports: Mapping[int, ShardReport], progress: PhaseProgress | None
) -> None:
    folder.clean(f".{folder.output.name}.*")
    description = MadeBy(manifest.run_id, manifest.settings).to_json()
    dtype = str(manifest.settings["dtype"])
    # The file grows in the folder of the run, which goes in the end with all that a kill may have left there.
    with FeatureWriter(folder.output, dtype, append=not manifest.replaces, scratch=folder.folder) as writer:
        for count, number in enumerate(_sound_shards(folder, reports), start=1):
            done = reports[number].done
            if is_hdf5_name(folder.output) and done and writer.add_packed(folder.packed(number)) != done:
                raise _spoiled(folder, number, f"does not have {done} entries")
            if progress:
                progress("merging", count, len(reports))
        writer.describe(description)
    write_failures(folder.output, [row for report in reports.values() for row in report.failed])
    folder.remove()


def _sound_shards(folder: ShardFolder, reports: Mapping[int, ShardReport]) -> Iterator[int]:
    """The numbers of all shards, in order, after a look at their files. Some are looked at ahead, in other threads.

    Raises:
        SuperPointError: a file is not as its report has it.
    """
    with ThreadPoolExecutor(_LOOKED_AT_AHEAD, thread_name_prefix="superpoint-merge") as pool:
        under_way: deque[tuple[int, Future[None]]] = deque()
        for number, report in reports.items():
            under_way.append((number, pool.submit(_check_shard, folder, number, report)))
            if len(under_way) > _LOOKED_AT_AHEAD:
                first, looked = under_way.popleft()
                looked.result()
                yield first
        for number, looked in under_way:
            looked.result()
            yield number


def _check_shard(folder: ShardFolder, number: int, report: ShardReport) -> None:
    """Checks that the file of a shard is what was written.

    Raises:
        SuperPointError: they are not.
    """
    if not is_hdf5_name(folder.output) or not report.done:
        return
    path = folder.packed(number)
    if not path.is_file() or file_sha256(path) != report.sha256:
        raise _spoiled(folder, number, f"has another {path.name} than was written")


def _spoiled(folder: ShardFolder, number: int, what: str) -> SuperPointError:
    report = folder.report_path(number)
    return SuperPointError(
        f"shard {number} of {folder.output} {what}; remove {report} and run superpoint extract again."
    )


def write_failures(output: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Writes the file of images that failed, or removes that of an earlier run if none did.

    Args:
        output: the feature file.
        rows: (name, reason) of each image.
    """
    path = failures_path(output)
    if rows:
        lines = ["name\treason", *("\t".join(" ".join(cell.split()) for cell in row) for row in rows)]
        write_atomically(path, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
    else:
        with suppress(FileNotFoundError):
            path.unlink()
