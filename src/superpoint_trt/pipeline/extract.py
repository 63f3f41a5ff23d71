"""Many images to one feature file, in a run that can be killed, started again, and shared by several processes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from superpoint_trt.core.files import PathLike, check_distinct, check_writable
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.feature_files import DTYPES, FeatureFile, is_hdf5_name, remove_entries
from superpoint_trt.pipeline.hdf5_files import import_h5py
from superpoint_trt.pipeline.inputs import InputOptions, Item, find_items
from superpoint_trt.pipeline.locks import RangeLock
from superpoint_trt.pipeline.merge import MadeBy, failures_path, merge_if_complete, write_failures
from superpoint_trt.pipeline.pairs import with_spaces
from superpoint_trt.pipeline.shards import (
    MERGE_LOCK,
    Manifest,
    Settings,
    Shard,
    ShardFolder,
    difference,
    digest_names,
    range_of,
)
from superpoint_trt.pipeline.workers import Launcher, LocalLauncher, RayOptions, WorkOptions

MOST_SHARD_SIZE = 1 << 20


@dataclass(frozen=True)
class ExtractOptions:
    """How `extract` works."""

    model: PathLike | None = None
    """As `SuperPoint` takes it; None: the default packaged network."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `SuperPoint`: threshold, max_keypoints, device, ..."""
    inputs: InputOptions = field(default_factory=InputOptions)
    """Root of the names, and which frames of videos."""
    dtype: str = "float16"
    """Type of the stored descriptors: "float16" or "float32"."""
    batch_size: int | None = None
    """Images in a run; None: the model's largest batch."""
    loaders: int | None = None
    """Threads that read files; None: one for each CPU."""
    part: int = 1
    """Which part of the work this process does, from 1 on."""
    parts: int = 1
    """How many processes share the work."""
    shard_size: int = 64
    """Images that are finished together. After a kill at most so many are done again."""
    overwrite: bool = False
    """Replace an output, or an unfinished run, that is there."""
    ray: RayOptions | None = None
    """Share the work among the machines of a Ray cluster; None: work in this process."""

    def check(self) -> None:
        """Refuses values out of range.

        Raises:
            SuperPointError: naming the value and its range.
        """
        if self.dtype not in DTYPES:
            raise SuperPointError(f"the type of descriptors is {self.dtype}; expected {' or '.join(DTYPES)}.")
        if not 1 <= self.part <= self.parts:
            raise SuperPointError(f"--shard is {self.part}/{self.parts}; expected i/n with i from 1 to n.")
        if not 1 <= self.shard_size <= MOST_SHARD_SIZE:
            raise SuperPointError(f"--shard-size is {self.shard_size}; expected 1 to {MOST_SHARD_SIZE}.")
        if self.overwrite and self.parts > 1:
            raise SuperPointError("--overwrite with --shard would remove the others' work; remove the output first.")

    def work(self) -> WorkOptions:
        """What a worker needs of these options."""
        return WorkOptions(self.model, dict(self.settings), self.dtype, self.batch_size, self.loaders)


@dataclass(frozen=True)
class ExtractSummary:
    """What a call of `extract` did."""

    output: Path
    images: int
    """Images of this process's part."""
    done: int
    """Images whose entries this call has made."""
    skipped: int
    """Images that had an entry before."""
    failed: tuple[tuple[str, str], ...]
    """(name, reason) of the images that have none."""
    unfinished_shards: int
    """Shards that other processes still have to finish; 0: the output is complete."""
    ran_on: str
    """Backend, device and precision; empty if nothing was to be done."""
    seconds: float
    """From the first image to the last."""
    notes: tuple[str, ...] = ()
    """What a user should know."""

    @property
    def failures_file(self) -> Path | None:
        """The .tsv of names and reasons beside a complete output; None: no image failed."""
        return failures_path(self.output) if self.failed and not self.unfinished_shards else None


def extract(
    inputs: Sequence[PathLike],
    output: PathLike,
    options: ExtractOptions | None = None,
    progress: PhaseProgress | None = None,
) -> ExtractSummary:
    """Extracts the keypoints of many images into one feature file.

        summary = extract(["photos"], "features.h5", ExtractOptions(settings={"max_keypoints": 2048}))

    An image that cannot be read is reported and does not stop the run. A run that was killed goes on where it was, if
    it is started again with the same inputs and options; images that have an entry already are skipped.

    Args:
        inputs: as `find_items` takes them: images, folders, globs, "@list.txt", videos.
        output: .h5, or a folder of .npz.
        options: model, names, and how the work is shared.
        progress: is called with ("extracting" or "merging", images done, images in all).

    Raises:
        SuperPointError: an input, option or model cannot be used; the output was made with another model or other
            options; another process does this part; or the output cannot be written.
    """
    options = options or ExtractOptions()
    options.check()
    path = _check_output(output, inputs)
    items = find_items(inputs, options.inputs)
    with _open_launcher(options) as launcher:
        run = _begin(path, items, launcher.settings, options)
        if run is None:
            write_failures(path, ())  # those of an earlier run are not among these images
            return ExtractSummary(path, len(items), 0, len(items), (), 0, "", 0.0, _notes(items))
        return _extract_part(run, launcher, options, progress)


def _open_launcher(options: ExtractOptions) -> AbstractContextManager[Launcher]:
    if options.ray is None:
        return LocalLauncher(options.work())
    from superpoint_trt.pipeline.ray_launcher import RayLauncher

    return RayLauncher(options.work(), options.ray)


def _check_output(output: PathLike, inputs: Sequence[PathLike]) -> Path:
    """Checks before the work that the output can be written.

    Raises:
        SuperPointError: it cannot, it is an input, or h5py is missing.
    """
    path = Path(output)
    if path.is_symlink():
        path = path.resolve()  # so that shards lie on the file system of the file
    check_distinct(path, *inputs)
    if is_hdf5_name(path):
        import_h5py()
        check_writable(path)
    elif path.exists() and not path.is_dir():
        raise SuperPointError(f"output {path} is a file; expected a name that ends in .h5, or a folder of .npz.")
    else:
        check_writable(path.parent / f"{path.name}.shards.json")
    return path


@dataclass(frozen=True)
class _Run:
    """A run that is kept on disk."""

    folder: ShardFolder
    manifest: Manifest
    items: Sequence[Item]
    """The images to be worked on: those without an entry in the output."""
    all_items: Sequence[Item]


def _begin(path: Path, items: Sequence[Item], settings: Settings, options: ExtractOptions) -> _Run | None:
    """Begins a run, or takes up one that is kept on disk; None: every image has an entry.

    Raises:
        SuperPointError: the output, or the run that is kept, was made with other settings or of other images.
    """
    folder = ShardFolder(path)
    if options.overwrite:
        _make_way(folder)
    names = digest_names(item.name for item in items)
    kept = _kept_run(folder, settings, names)
    if kept is None:
        to_do = list(range(len(items))) if options.overwrite else _without_entry(path, items, settings)
        if not to_do:
            folder.remove()  # what a kill at the end of a merge has left
            return None
        run_id = os.urandom(8).hex()
        manifest = Manifest(run_id, settings, names, len(to_do), options.shard_size, options.overwrite)
        kept = folder.begin(manifest, to_do)
        if not kept.fits(settings, names):
            raise SuperPointError(f"another process has just begun to make {path} of other images, or in another way.")
    return _Run(folder, kept, [items[at] for at in folder.to_do(kept, len(items))], items)


def _kept_run(folder: ShardFolder, settings: Settings, names: str) -> Manifest | None:
    """The unfinished run that is kept on disk, if it fits.

    One that does not fit is removed if it has no finished shard, and one that was merged already, too.

    Raises:
        SuperPointError: it does not fit, and it has finished shards, or another process works on it.
    """
    kept, made_by = folder.manifest(), MadeBy.read(folder.output)
    if kept is None:
        return None
    if made_by is not None and made_by.run_id == kept.run_id:
        folder.remove()  # a kill between the merge and its end
        return None
    if kept.fits(settings, names):
        return kept
    if len(folder.unfinished(kept)) == kept.shards:
        remove_run(folder)
        return None
    differs = difference(kept.settings, settings)
    if differs:
        raise SuperPointError(
            f"{folder.folder} keeps an unfinished run with {differs}; choose another --output, or start anew with "
            "--overwrite."
        )
    raise SuperPointError(
        f"{folder.folder} keeps an unfinished run over other images; finish it with the same inputs, keep what it has "
        f"(superpoint merge {folder.output} --unfinished), or start anew with --overwrite."
    )


def _make_way(folder: ShardFolder) -> None:
    """Removes an unfinished run, and the entries of a folder of .npz; an .h5 stays until the merge replaces it.

    Raises:
        SuperPointError: the folder holds .npz of others, or another process works on the run.
    """
    path, ours = folder.output, folder.folder.is_dir() or MadeBy.read(folder.output) is not None
    if path.is_dir() and not ours:
        with FeatureFile(path) as features:
            if len(features):
                raise SuperPointError(
                    f"{path} holds .npz files that superpoint extract did not make; choose another --output, or remove "
                    "them."
                )
    remove_run(folder)
    if path.is_dir() and ours:
        remove_entries(path)


def remove_run(folder: ShardFolder) -> None:
    """Removes an unfinished run.

    Raises:
        SuperPointError: another process works on it.
    """
    if folder.folder.is_dir():
        with RangeLock(folder.lock_path) as lock:
            if not lock.take(0, MERGE_LOCK + 1):
                raise SuperPointError(f"another process works on {folder.output} (its lock is {folder.lock_path}).")
            folder.remove()


def _without_entry(path: Path, items: Sequence[Item], settings: Settings) -> list[int]:
    """Positions of the images that an output has no entry of.

    Raises:
        SuperPointError: the output was made with other settings, or by another tool.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return list(range(len(items)))
    made_by = MadeBy.read(path)
    if made_by is None:
        raise SuperPointError(
            f"{path} is there, and is damaged or was not made by superpoint extract; choose another --output, or "
            "--overwrite."
        )
    differs = difference(made_by.settings, settings)
    if differs:
        raise SuperPointError(f"{path} was made with {differs}; choose another --output, or --overwrite.")
    with FeatureFile(path) as features:
        return [at for at, item in enumerate(items) if item.name not in features]


def _extract_part(
    run: _Run, launcher: Launcher, options: ExtractOptions, progress: PhaseProgress | None
) -> ExtractSummary:
    """Works on this process's part of a run, and merges if nothing else is left to do."""
    folder, manifest = run.folder, run.manifest
    numbers = range_of(options.part, options.parts, manifest.shards)
    with RangeLock(folder.lock_path) as lock:
        take_part(lock, numbers, folder, manifest)
        unfinished = [number for number in folder.unfinished(manifest) if number in numbers]
        shards = [Shard(number, [run.items[at] for at in manifest.images_of(number)]) for number in unfinished]
        started = time.perf_counter()
        launcher.extract(shards, folder, _count(shards, progress))
        seconds = time.perf_counter() - started
        reports = {number: report for number in numbers if (report := folder.report(number))}
        left = merge_if_complete(folder, manifest, lock, progress)
    notes = _notes(run.all_items) + (() if lock.works else (f"the file system of {folder.folder} has no locks",))
    # Images that had an entry before the run are told once, by the first part.
    before = len(run.all_items) - len(run.items) if options.part == 1 else 0
    done = sum(reports[number].done for number in unfinished)
    return ExtractSummary(
        output=folder.output,
        images=before + sum(len(manifest.images_of(number)) for number in numbers),
        done=done,
        skipped=before + sum(report.done for report in reports.values()) - done,
        failed=tuple(row for report in reports.values() for row in report.failed),
        unfinished_shards=left,
        ran_on=launcher.ran_on,
        seconds=seconds,
        notes=notes,
    )


def take_part(lock: RangeLock, numbers: range, folder: ShardFolder, manifest: Manifest) -> None:
    """Locks shards of a run for this process.

    Raises:
        SuperPointError: another process works on one of them, or has completed the run meanwhile.
    """
    if numbers and not lock.take(numbers.start, len(numbers)):
        raise SuperPointError(
            f"another process works on this part of {folder.output} (its lock is {folder.lock_path}); wait for its end."
        )
    if folder.manifest() != manifest:
        raise SuperPointError(f"another process has just completed {folder.output}; run this command again.")


def _count(shards: Sequence[Shard], progress: PhaseProgress | None) -> Callable[[int], None]:
    """What to call with the number of images done since the last call."""
    total = sum(len(shard.items) for shard in shards)
    done = 0
    if progress:
        progress("extracting", done, total)  # the speed is counted from here on

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress("extracting", done, total)

    return advance


def _notes(items: Sequence[Item]) -> tuple[str, ...]:
    spaced = with_spaces([item.name for item in items])
    if not spaced:
        return ()
    return (f"{len(spaced)} names have spaces ({spaced[0]!r}); superpoint reads pairs files with them, hloc does not",)
