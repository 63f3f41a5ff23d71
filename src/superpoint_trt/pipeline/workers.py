"""Extracts shards: reading, running and writing go on side by side, each with a limit to what waits."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, NamedTuple, Protocol

import numpy as np

from superpoint_trt.convert.default_model import model_path
from superpoint_trt.core.files import PathLike, file_sha256, one_line
from superpoint_trt.core.image import Placement, needed_side_px
from superpoint_trt.core.image_file import MOST_PIXELS, ReadOptions, opencv_on_one_thread, read_image_file
from superpoint_trt.core.memory import ran_out_of_memory
from superpoint_trt.core.orientation import UPRIGHT, stored_size, to_stored
from superpoint_trt.core.types import Keypoints, SuperPointError
from superpoint_trt.pipeline.contexts import Closes
from superpoint_trt.pipeline.feature_files import DETECTION_NOISE_PX, FeatureWriter, is_hdf5_name
from superpoint_trt.pipeline.inputs import Item
from superpoint_trt.pipeline.packed import PackedWriter
from superpoint_trt.pipeline.shards import CHECKPOINT, DESCRIPTORS_OF, Settings, Shard, ShardFolder, ShardReport
from superpoint_trt.pipeline.video import Frame, VideoReader
from superpoint_trt.run.extractor import SuperPoint
from superpoint_trt.run.runner import run_key
from superpoint_trt.run.stream import MOST_LOADERS, PreparedOrError, StreamOptions

_MOST_WRITES_WAITING = 64
_MOST_SHARDS_FINISHING = 2
_WRITE_HELPERS = 4
_GROUPS_HELD = 4
"""Full batches of images that may wait for others of their size."""


@dataclass(frozen=True)
class WorkOptions:
    """What a worker needs to know; it can be sent to another machine."""

    model: PathLike | None
    """As `SuperPoint` takes it."""
    settings: Mapping[str, Any]
    """Keyword arguments of `SuperPoint`."""
    dtype: str = "float16"
    """Type of the stored descriptors."""
    batch_size: int | None = None
    """Images in a run; None: the model's largest batch."""
    loaders: int | None = None
    """Threads that read files; None: one for each CPU that this process may use."""

    def open(self) -> SuperPoint:
        """Opens the model.

        Raises:
            SuperPointError: the model or a setting cannot be used, or a number is out of range.
        """
        # Files are decoded and written on the CPUs that a network on a CPU would wait on.
        of_bulk = {"half_descriptors": self.dtype == "float16", "busy_wait": False}
        superpoint = SuperPoint(self.model, **{**of_bulk, **self.settings})
        most = superpoint.description.max_batch_size
        try:
            self.stream(most).check(most)
        except BaseException:
            superpoint.close()
            raise
        return superpoint

    def stream(self, most_batch: int) -> StreamOptions:
        """How many images are read and run at once.

        Args:
            most_batch: the model's largest batch.
        """
        return StreamOptions(
            batch_size=most_batch if self.batch_size is None else self.batch_size,
            loaders=min(usable_cpus(), MOST_LOADERS) if self.loaders is None else self.loaders,
        )

    def reading(self) -> ReadOptions:
        """Which image files are read."""
        return ReadOptions(
            self.settings.get("max_pixels", MOST_PIXELS), bool(self.settings.get("allow_damaged", False))
        )

    def settings_of(self, superpoint: SuperPoint) -> Settings:
        """What decides the content of an entry; equal settings give equal entries."""
        return {
            "model": file_sha256(model_path(self.model)),
            **{name: getattr(superpoint.options, name) for name in _DECODE_FIELDS},
            "max_side_px": self.settings.get("max_side_px"),
            "allow_damaged": bool(self.settings.get("allow_damaged", False)),
            "dtype": self.dtype,
            CHECKPOINT: superpoint.description.checkpoint_sha256,
            DESCRIPTORS_OF: superpoint.description.descriptors_of,
        }


@dataclass(frozen=True)
class RayOptions:
    """How the work is shared by Ray."""

    address: str | None = None
    """Of the cluster, as `ray.init` takes it; None: the one that this machine belongs to, or a new one on it."""
    actors: int | None = None
    """Processes that extract; None: one for each GPU of the cluster, without GPUs one for each four CPUs."""


class Launcher(Protocol):
    """Extracts shards, here or elsewhere."""

    @property
    def settings(self) -> Settings:
        """What decides the content of an entry."""

    @property
    def ran_on(self) -> str:
        """Backend, device and precision."""

    def extract(self, shards: Sequence[Shard], folder: ShardFolder, advance: Callable[[int], None]) -> None:
        """Extracts shards; `advance` is called with the number of images that were done since the last call."""


class LocalLauncher(Closes):
    """Extracts in this process. A context manager."""

    def __init__(self, options: WorkOptions) -> None:
        self._options = options
        self._superpoint = options.open()
        self.settings = options.settings_of(self._superpoint)
        self.ran_on = str(self._superpoint.runtime)

    def extract(self, shards: Sequence[Shard], folder: ShardFolder, advance: Callable[[int], None]) -> None:
        """Extracts shards one after another."""
        extract_shards(self._superpoint, shards, folder, self._options, advance)

    def close(self) -> None:
        """Closes the model."""
        self._superpoint.close()


_DECODE_FIELDS = ("max_keypoints", "threshold", "nms_radius_px", "remove_borders_px", "subpixel")


def extract_shards(
    superpoint: SuperPoint,
    shards: Iterable[Shard],
    folder: ShardFolder,
    options: WorkOptions,
    advance: Callable[[int], None] | None = None,
) -> None:
    """Extracts shards one after another; each is finished (`ShardFolder.finish`) as soon as its last entry is on disk.

    Args:
        superpoint: the opened model.
        shards: with the lock on them held.
        folder: where they are kept.
        options: how to read and to write.
        advance: is called with the number of images that were done since the last call.

    Raises:
        SuperPointError: the shards cannot be written. An image that cannot be read or run is counted as failed.
    """
    stream = options.stream(superpoint.description.max_batch_size)
    batch_size = stream.batch_size
    waiting: deque[list[_Source]] = deque()
    """The groups that were given to the model and have not come back."""

    def groups(reader: _Reader) -> Iterator[list[PreparedOrError]]:
        for shard, images in reader.read(shards):
            for group in by_size(images, batch_size):
                waiting.append([_Source(shard, image.item, image.orientation, image.scale) for image in group])
                yield [image.prepared for image in group]

    with ExitStack() as stack:
        if stream.loaders > 1:
            stack.enter_context(opencv_on_one_thread())
        reader = stack.enter_context(_Reader(superpoint, options, stream))
        writer = stack.enter_context(_Writer(folder, options, superpoint))
        with closing(superpoint.extract_groups(groups(reader), batch_size)) as found:
            for results in found:
                writer.add(waiting.popleft(), results)
                if advance:
                    advance(len(results))
        writer.wait()


# -------------------------------------------------------------------------------------------------------------- reading


class _Loaded(NamedTuple):
    """An image that was read, or why it was not."""

    item: Item
    prepared: PreparedOrError
    orientation: int
    """EXIF's, 1 to 8."""

    @property
    def scale(self) -> float:
        """Pixels of the image for one pixel of the network's input."""
        if isinstance(self.prepared, SuperPointError):
            return 1.0
        placement: Placement = self.prepared.placement
        (width, height), (placed_width, placed_height) = placement.image_wh, placement.placed_wh
        return (width / placed_width + height / placed_height) / 2


class _Source(NamedTuple):
    """Where a result belongs, without the image's pixels."""

    shard: Shard
    item: Item
    orientation: int
    scale: float


def by_size(images: Iterable[_Loaded], batch_size: int) -> Iterator[list[_Loaded]]:
    """Groups images that may share a run, whatever their order. The same images give the same groups.

    Args:
        images: of one shard.
        batch_size: images in a full group. At most 4 full groups wait; then the largest runs as it is.
    """
    groups: dict[Any, list[_Loaded]] = {}
    held = 0
    for image in images:
        key = None if isinstance(image.prepared, SuperPointError) else run_key(image.prepared)
        groups.setdefault(key, []).append(image)
        held += 1
        if len(groups[key]) < batch_size and held < _GROUPS_HELD * batch_size:
            continue
        full = key if len(groups[key]) == batch_size else max(groups, key=lambda each: len(groups[each]))
        held -= len(groups[full])
        yield groups.pop(full)
    yield from groups.values()


class _Reader:
    """Reads images ahead of their runs: files on several threads, the frames of videos on one.

    Args:
        superpoint: makes the network's inputs.
        options: how to read.
        stream: how many at once.
    """

    def __init__(self, superpoint: SuperPoint, options: WorkOptions, stream: StreamOptions) -> None:
        self._superpoint, self._reading = superpoint, options.reading()
        self._side_px = needed_side_px(superpoint.description, options.settings.get("max_side_px"))
        self._ahead = stream.loaders + stream.batch_size
        self._files = ThreadPoolExecutor(stream.loaders, thread_name_prefix="superpoint-reader")
        self._frames = ThreadPoolExecutor(1, thread_name_prefix="superpoint-video")
        self._video: VideoReader | None = None

    def read(self, shards: Iterable[Shard]) -> Iterator[tuple[Shard, Iterator[_Loaded]]]:
        """Each shard with its images, in their order. The images must be taken before the next shard is."""
        everything = ((shard, item) for shard in shards for item in shard.items)
        under_way: deque[tuple[Shard, Future[_Loaded]]] = deque()

        def refill() -> None:
            while len(under_way) < self._ahead:
                following = next(everything, None)
                if following is None:
                    return
                shard, item = following
                pool, load = (self._files, self._load_file) if item.frame is None else (self._frames, self._load_frame)
                under_way.append((shard, pool.submit(load, item)))

        def images_of(shard: Shard) -> Iterator[_Loaded]:
            while under_way and under_way[0][0] is shard:
                _, future = under_way.popleft()
                refill()
                yield future.result()

        refill()
        while under_way:
            shard = under_way[0][0]
            yield shard, images_of(shard)

    def _load_file(self, item: Item) -> _Loaded:
        try:
            image = read_image_file(item.path, self._reading, self._side_px)
            return _Loaded(item, self._superpoint.load(image), image.orientation)
        except Exception as error:
            return _Loaded(item, _as_reason(error), UPRIGHT)

    def _load_frame(self, item: Item) -> _Loaded:
        assert item.frame is not None
        try:
            return _Loaded(item, self._superpoint.load(self._read_frame(item.path, item.frame)), UPRIGHT)
        except Exception as error:
            return _Loaded(item, _as_reason(error), UPRIGHT)

    def _read_frame(self, path: str, frame: Frame) -> Any:
        if self._video is None or str(self._video.path) != str(Path(path)):
            self._close_video()
            self._video = VideoReader(path)
        return self._video.read(frame)

    def _close_video(self) -> None:
        video, self._video = self._video, None
        if video is not None:
            video.close()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._files, self._frames):
            pool.shutdown(wait=True, cancel_futures=True)
        self._close_video()


def _as_reason(error: Exception) -> SuperPointError:
    """Why an image could not be read. One image must not stop a run of days, whatever its decoder raises."""
    if isinstance(error, SuperPointError):
        return error
    if ran_out_of_memory(error):
        return SuperPointError("memory ran out while the image was read; see --max-side and --loaders.")
    return SuperPointError(f"the image cannot be read: {type(error).__name__}: {one_line(error)}.")


def usable_cpus() -> int:
    """How many CPUs this process may use; a cluster gives a job some of a machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# -------------------------------------------------------------------------------------------------------------- writing


class _Writer:
    """Writes entries on one thread, and finishes shards; other threads bring entries into the form of the file.

    Args:
        folder: where shards are kept.
        options: type of the descriptors.
        superpoint: made the entries.
    """

    def __init__(self, folder: ShardFolder, options: WorkOptions, superpoint: SuperPoint) -> None:
        self._folder, self._dtype, self._ran_on = folder, np.dtype(options.dtype), str(superpoint.runtime)
        self._helpers = ThreadPoolExecutor(_WRITE_HELPERS, thread_name_prefix="superpoint-write-helper")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="superpoint-writer")
        self._writing: deque[tuple[int, Future[None]]] = deque()
        """(images, when they are written) of each group."""
        self._waiting = 0
        self._finishing: deque[Future[None]] = deque()
        self._open: _OpenShard | None = None
        self._is_broken = False

    def add(self, sources: Sequence[_Source], results: Sequence[Keypoints | SuperPointError]) -> None:
        """Writes the results of a group of one shard, later. A task for each image would cost more than its writing.

        Raises:
            SuperPointError: an earlier result could not be written.
        """
        while self._waiting >= _MOST_WRITES_WAITING:
            self._finish_oldest()
        prepared = self._helpers.submit(self._as_stored, sources, results)
        self._writing.append((len(sources), self._thread.submit(self._write, sources, prepared)))
        self._waiting += len(sources)

    def _finish_oldest(self) -> None:
        count, written = self._writing.popleft()
        self._waiting -= count
        written.result()

    def _as_stored(
        self, sources: Sequence[_Source], results: Sequence[Keypoints | SuperPointError]
    ) -> list[Keypoints | SuperPointError]:
        return [as_stored(result, source.orientation, self._dtype) for source, result in zip(sources, results)]

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
            SuperPointError: a result could not be written.
        """
        while self._writing:
            self._finish_oldest()
        while self._finishing:
            self._finishing.popleft().result()

    def _write(self, sources: Sequence[_Source], prepared: Future[list[Keypoints | SuperPointError]]) -> None:
        if self._is_broken:
            return
        try:
            for source, result in zip(sources, prepared.result()):
                if self._open is None:
                    self._open = _OpenShard(source.shard, self._folder, self._dtype, self._ran_on)
                if self._open.add(source, result):
                    shard, self._open = self._open, None
                    while len(self._finishing) >= _MOST_SHARDS_FINISHING:
                        self._finishing.popleft().result()
                    self._finishing.append(self._helpers.submit(shard.finish))
        except BaseException:
            self._is_broken = True  # what waits is not written, either
            raise

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._helpers.shutdown(wait=True)  # a shard that is whole is finished, and nothing of it stays beside
        if self._open is not None:
            self._open.abandon()


def as_stored(
    result: Keypoints | SuperPointError, orientation: int, dtype: np.dtype[Any]
) -> Keypoints | SuperPointError:
    """A result in the pixels of its file, and with descriptors in the order of bytes in which HDF5 has them, (D, N)."""
    if isinstance(result, SuperPointError):
        return result
    stored = in_stored_pixels(result, orientation)
    return replace(stored, descriptors=np.asfortranarray(stored.descriptors.astype(dtype, copy=False)))


class _OpenShard:
    """The shard under way."""

    def __init__(self, shard: Shard, folder: ShardFolder, dtype: np.dtype[Any], ran_on: str) -> None:
        self._shard, self._folder, self._ran_on = shard, folder, ran_on
        self._failed: list[tuple[str, str]] = []
        self._done = 0
        folder.clean(f".{shard.number:05d}.*")
        self._features: PackedWriter | FeatureWriter = (
            PackedWriter(folder.packed(shard.number), dtype)
            if is_hdf5_name(folder.output)
            else FeatureWriter(folder.output, dtype)
        )

    def add(self, source: _Source, result: Keypoints | SuperPointError) -> bool:
        """Writes one result; whether it was the shard's last."""
        if isinstance(result, SuperPointError):
            self._failed.append((source.item.name, str(result)))
        else:
            self._features.write(source.item.name, result, result.image_size, DETECTION_NOISE_PX * source.scale)
            self._done += 1
        return self._done + len(self._failed) == len(self._shard.items)

    def finish(self) -> None:
        """Makes the shard finished."""
        self._features.close()
        number, is_packed = self._shard.number, isinstance(self._features, PackedWriter)
        digest = file_sha256(self._folder.packed(number)) if is_packed and self._done else None
        self._folder.finish(number, ShardReport(self._done, tuple(self._failed), digest, self._ran_on))

    def abandon(self) -> None:
        """Leaves nothing of the shard."""
        self._features.abandon()


def in_stored_pixels(keypoints: Keypoints, orientation: int) -> Keypoints:
    """Keypoints of an upright image, in the pixels of its file as stored."""
    size = stored_size(keypoints.image_size, orientation)
    return replace(keypoints, xy=to_stored(keypoints.xy, orientation, size), image_size=size)
