"""A stream of images to a stream of Keypoints: files read ahead by threads, and several batches under way at once."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Union

from superpoint_trt.core.image import ImageLike, PreparedImage
from superpoint_trt.core.types import Keypoints, SuperPointError
from superpoint_trt.run.runner import BatchSlot, Runner, run_key

MOST_IN_FLIGHT = 64
MOST_LOADERS = 1024

PreparedOrError = Union[PreparedImage, SuperPointError]
"""A prepared image, or why the image could not be prepared."""


@dataclass(frozen=True)
class StreamOptions:
    """How a stream is run."""

    batch_size: int
    """Images in a run."""
    in_flight: int = 2
    """Batches under way at once."""
    loaders: int = 1
    """Threads that read files."""

    def check(self, most_batch: int) -> None:
        """Refuses numbers out of range.

        Args:
            most_batch: the model's largest batch.

        Raises:
            SuperPointError: naming the number and its range.
        """
        for name, value, most in (
            ("batch_size", self.batch_size, most_batch),
            ("in_flight", self.in_flight, MOST_IN_FLIGHT),
            ("loaders", self.loaders, MOST_LOADERS),
        ):
            if not 1 <= value <= most:
                raise SuperPointError(f"{name} is {value}; expected 1 to {most}.")


def stream_keypoints(
    runner: Runner, images: Iterable[ImageLike], options: StreamOptions
) -> Iterator[Keypoints | SuperPointError]:
    """The Keypoints of each image, in the stream's order.

    The stream is read on only as results are taken. Nothing is read before the first result is asked for.

    Args:
        runner: where the images run. Nothing else may use it from another thread meanwhile.
        images: paths or arrays, of one size or many; neighbors of one size share a run.
        options: batch size, batches under way, loading threads.

    Yields:
        For each image its Keypoints, or the SuperPointError that says why there are none.
    """
    pool = ThreadPoolExecutor(options.loaders, thread_name_prefix="superpoint-loader")
    try:
        prepared = _prepared(runner, images, pool, options.batch_size)
        with closing(run_groups(runner, grouped(prepared, options.batch_size), options)) as done:
            for results in done:
                yield from results
    finally:  # also when the caller stops early
        pool.shutdown(wait=True, cancel_futures=True)


def run_groups(
    runner: Runner, groups: Iterable[Sequence[PreparedOrError]], options: StreamOptions
) -> Generator[list[Keypoints | SuperPointError], None, None]:
    """Runs groups of prepared images, several at once.

    Args:
        runner: where the images run. Nothing else may use it from another thread meanwhile.
        groups: images that may share a run (`run_key`), at most `batch_size` in a group, and errors between them. The
            next group is asked for while earlier ones run.
        options: batch size, batches under way.

    Yields:
        For each group the Keypoints of each image, or the SuperPointError that says why there are none.
    """
    under_way: deque[_BatchUnderWay] = deque()
    with runner.slots(options.in_flight) as slots:
        try:
            for turn, group in enumerate(groups):
                if len(under_way) == options.in_flight:
                    yield list(under_way.popleft().results())
                slot = slots[turn % options.in_flight]
                under_way.append(_BatchUnderWay(runner, slot, group, options.batch_size))
            while under_way:
                yield list(under_way.popleft().results())
        finally:  # also when the caller stops early
            for batch in under_way:
                batch.abandon()


def _prepared(
    runner: Runner, images: Iterable[ImageLike], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[PreparedOrError]:
    """Prepares each image; files up to `ahead` images early."""
    waiting: deque[Future[PreparedOrError] | ImageLike] = deque()
    for image in images:
        # Only files gain from another thread; an array is in memory already.
        is_file = isinstance(image, (str, os.PathLike))
        waiting.append(pool.submit(prepare, runner, image) if is_file else image)
        if len(waiting) > ahead:
            yield _ready(runner, waiting.popleft())
    while waiting:
        yield _ready(runner, waiting.popleft())


def _ready(runner: Runner, item: Future[PreparedOrError] | ImageLike) -> PreparedOrError:
    return item.result() if isinstance(item, Future) else prepare(runner, item)


def prepare(runner: Runner, image: ImageLike) -> PreparedOrError:
    """An image ready for its run, or why it cannot be made so."""
    try:
        return runner.prepare(image)
    except SuperPointError as error:
        return error
    except MemoryError:
        return _out_of_memory("prepared")


def grouped(prepared: Iterable[PreparedOrError], batch_size: int) -> Iterator[list[PreparedOrError]]:
    """Groups neighbors that may share a run.

    Errors stay in their places and do not count as images. A group has at most 2 * batch_size entries, so that a long
    row of errors is passed on.
    """
    group: list[PreparedOrError] = []
    key, count = None, 0
    for one in prepared:
        if not isinstance(one, SuperPointError):
            if count == batch_size or (count and run_key(one) != key):
                yield group
                group, count = [], 0
            key, count = run_key(one), count + 1
        group.append(one)
        if len(group) >= 2 * batch_size:
            yield group
            group, count = [], 0
    if group:
        yield group


class _BatchUnderWay:
    """One group of images in its slot; the results come in the group's order, errors in their places."""

    def __init__(self, runner: Runner, slot: BatchSlot, group: Sequence[PreparedOrError], batch_size: int) -> None:
        self._runner, self._slot, self._group = runner, slot, group
        self._images = [one for one in group if not isinstance(one, SuperPointError)]
        self._is_submitted = False
        if self._images:
            # After an error the images are run one by one, which shows the one at fault.
            with suppress(SuperPointError, MemoryError):
                slot.submit(self._images, batch_size)
                self._is_submitted = True

    def results(self) -> Iterator[Keypoints | SuperPointError]:
        """The result of each entry of the group."""
        found = iter(self._found())
        for one in self._group:
            yield one if isinstance(one, SuperPointError) else next(found)

    def _found(self) -> Sequence[Keypoints | SuperPointError]:
        if self._is_submitted:
            self._is_submitted = False
            with suppress(SuperPointError, MemoryError):
                return self._slot.collect()
        return [self._alone(image) for image in self._images]

    def _alone(self, image: PreparedImage) -> Keypoints | SuperPointError:
        try:
            return self._runner.run([image])[0]
        except SuperPointError as error:
            return error
        except MemoryError:
            return _out_of_memory("run")

    def abandon(self) -> None:
        """Forgets the results; waits for the run if it is under way."""
        if self._is_submitted:
            self._slot.abandon()


def _out_of_memory(step: str) -> SuperPointError:
    return SuperPointError(f"memory ran out while the image was {step}; use smaller images (max_side_px) or batches.")
