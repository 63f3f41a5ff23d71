"""Image to keypoints on the GPU in one CUDA graph: a `heads` engine, and the kernels that decode its heads.

A slot has a stream and, for each input shape, a lane. A lane takes one batch at a time: it copies the images from
page-locked memory to the GPU, runs the network, decodes the heads, and writes the rows of the points found straight
to page-locked host memory. Lanes of different slots run side by side.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.image import Placement, PreparedImage, pad_into
from superpoint_trt.core.types import DecodeOptions, Float32, Keypoints, Sampling, SuperPointError
from superpoint_trt.gpu import cuda, kernels
from superpoint_trt.gpu.arrays import BFLOAT16, DeviceArray
from superpoint_trt.gpu.cuda import DeviceMemory, PinnedMemory, PinnedPool
from superpoint_trt.gpu.engine import Engine, Execution
from superpoint_trt.gpu.kernels.decode import (
    TARGET_NBYTES,
    Decoder,
    DeviceKeypoints,
    Head,
    Rows,
    check_counts,
    device_keypoints,
)

MOST_LANES = 8
"""Input shapes whose buffers and graphs each slot keeps; beyond, the one used longest ago is freed."""

MOST_LOANS = 4
"""Results of one lane that may lie in page-locked memory at a time; further ones are copied to ordinary memory."""


class Found(NamedTuple):
    """One image's keypoints, as the GPU gave them."""

    xy: Float32
    """(N, 2) pixels of the network's input."""
    scores: Float32
    """(N,)."""
    descriptors: NDArray[Any]
    """(N, D) float32 or float16."""


class Lanes:
    """All slots of one opened engine. One instance belongs to one thread at a time, like its engine.

    Args:
        engine: a `heads` engine.
        options: how to decode.
        half: descriptors as float16.

    Raises:
        SuperPointError: the kernels cannot be compiled here.
    """

    def __init__(self, engine: Engine, options: DecodeOptions, half: bool) -> None:
        kernels.function("preprocess.cu", "receive")  # fails here, not at the first image
        self._engine = engine
        self.options, self.half = options, half
        self._slots: list[Slot] = []
        self._free: list[Slot] = []

    def borrow(self, count: int) -> BorrowedSlots:
        """Slots for one caller, as a context manager that takes them back at its end."""
        return BorrowedSlots(self, count)

    def _take(self, count: int) -> list[Slot]:
        """Takes slots out of the free ones, and makes those that are missing."""
        while len(self._free) < count:
            with self._engine.on_gpu:
                self._slots.append(Slot(self._engine, self.options, self.half))
            self._free.append(self._slots[-1])
        return [self._free.pop(0) for _ in range(count)]

    def _give_back(self, slots: Sequence[Slot]) -> None:
        """Returns slots, in which no run may be under way."""
        self._free[:0] = slots

    def close(self) -> None:
        """Frees everything but results still in use."""
        with self._engine.on_gpu:
            for slot in self._slots:
                slot.close()
        self._slots, self._free = [], []


class BorrowedSlots:
    """Slots that one caller has until the end of its `with`."""

    def __init__(self, lanes: Lanes, count: int) -> None:
        self._lanes, self._count = lanes, count
        self._slots: list[Slot] = []

    def __enter__(self) -> list[Slot]:
        self._slots = self._lanes._take(self._count)
        return self._slots

    def __exit__(self, *_: object) -> None:
        self._lanes._give_back(self._slots)


class Slot:
    """A stream, scratch memory, and the lanes that run on them one after the other. It holds one batch at a time."""

    def __init__(self, engine: Engine, options: DecodeOptions, half: bool) -> None:
        self._engine, self._options, self._half = engine, options, half
        self.stream = cuda.Stream()
        self._scratch = engine.new_scratch()
        self._lanes: OrderedDict[tuple[Any, ...], Lane] = OrderedDict()
        self._running: Lane | None = None
        self._placements: list[Placement] = []

    def submit(self, batch: Sequence[PreparedImage], batch_size: int) -> None:
        """Queues a run.

        Args:
            batch: images of one input size and type.
            batch_size: images that the run has room for; `len(batch)` or more. A smaller batch may use the lane of
                full ones, which is ready.

        Raises:
            SuperPointError: the engine does not take that shape, or the run failed.
        """
        with self._engine.on_gpu:
            lane = self._filled(batch, batch_size)
            self._placements = [image.placement for image in batch]
            lane.submit([placement.placed_wh for placement in self._placements])
        self._running = lane

    def collect(self) -> list[Keypoints]:
        """Waits for the run.

        Returns:
            The Keypoints of each image submitted.

        Raises:
            SuperPointError: the run failed.
        """
        lane, self._running = self._running, None
        assert lane is not None, "collect without submit"
        with self._engine.on_gpu:
            found = lane.collect()
        return [
            Keypoints(placement.to_image(one.xy), one.scores, one.descriptors, placement.image_wh)
            for one, placement in zip(found, self._placements)
        ]

    def abandon(self) -> None:
        """Waits for the run, and forgets its results and its errors."""
        with suppress(SuperPointError):
            self.collect()

    def timed(self, batch: Sequence[PreparedImage]) -> tuple[float, dict[str, float]]:
        """Runs a batch step by step, waiting for each.

        Returns:
            When the images were in the lane's buffer (`time.perf_counter`), and the seconds of each step.
        """
        with self._engine.on_gpu:
            lane = self._filled(batch, len(batch))
            filled = time.perf_counter()
            return filled, lane.timed([image.placement.placed_wh for image in batch])

    def on_device(self, image: PreparedImage) -> DeviceKeypoints:
        """Runs one image and waits; the results stay in GPU memory, valid until this slot's next run of that size."""
        with self._engine.on_gpu:
            return self._filled([image], 1).on_device(image.placement.placed_wh, self._engine.gpu.index)

    def _filled(self, batch: Sequence[PreparedImage], batch_size: int) -> Lane:
        """The lane for the batch, with the images in its buffer."""
        pixels, placement = batch[0]
        lane = self.lane((batch_size, 1, placement.input_height_px, placement.input_width_px), pixels.dtype)
        for place, image in zip(lane.image, batch):
            pad_into(place, *image)
        return lane

    def lane(self, shape: tuple[int, int, int, int], dtype: np.dtype[Any]) -> Lane:
        """The lane for inputs (B, 1, H, W) of uint8 or float32.

        Raises:
            SuperPointError: the engine does not take that shape.
        """
        key = (shape, dtype)
        found = self._lanes.get(key)
        if found is None:
            self._engine.fitting_profile(shape)
            while len(self._lanes) >= MOST_LANES:
                self._lanes.popitem(last=False)[1].close()
            execution = self._engine.prepare(shape, self.stream, self._scratch)
            sampling = self._engine.description.sampling
            found = Lane(execution, self.stream, shape, dtype, self._options, sampling, self._half)
            self._lanes[key] = found
        elif len(self._lanes) > 1:
            self._lanes.move_to_end(key)
        return found

    @property
    def lanes(self) -> list[Lane]:
        """The lanes made so far, the one used last at the end."""
        return list(self._lanes.values())

    def close(self) -> None:
        """Waits for what is queued, and frees all lanes."""
        self.stream.synchronize()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self.stream.close()


class ResultBlock:
    """Page-locked memory that one run writes its results to, and the arrays in it."""

    def __init__(self, rows: Rows, address: int, block: NDArray[np.uint8]) -> None:
        self.block = block
        self.target = rows.target(address)
        self.xy, self.scores, self.descriptors, self.counts = parts_of(
            rows, block, ("keypoints", "scores", "descriptors", "num_keypoints")
        )


def parts_of(rows: Rows, block: NDArray[np.uint8], names: Sequence[str]) -> list[NDArray[Any]]:
    """The named parts of a block of results, as arrays on it.

    Args:
        rows: how the block is laid out.
        block: (rows.nbytes,) uint8.
        names: of the parts wanted.
    """
    places = rows.places
    return [np.ndarray(places[name][1], places[name][2], block, places[name][0]) for name in names]


class Lane:
    """Runs one input shape on the GPU: fill `image`, call `submit`, then `collect`, and fill `image` again.

    Work on the host that a run needs is done while the run before is under way. Between an image's arrival and the
    launch lie only its copy and a few words.

    Attributes:
        image: (B, H, W) uint8, or float32 in [0, 1], in page-locked memory.
    """

    def __init__(
        self,
        execution: Execution,
        stream: cuda.Stream,
        shape: tuple[int, int, int, int],
        dtype: np.dtype[Any],
        options: DecodeOptions,
        sampling: Sampling,
        half: bool,
    ) -> None:
        self._execution, self._stream, self._half = execution, stream, half
        self._count = math.prod(shape)
        self._unit = DeviceMemory(4 * self._count)
        heads = [
            Head(
                execution.memory.address + tensor.offset,
                (tensor.shape[0], tensor.shape[1], tensor.shape[2], tensor.shape[3]),
                BFLOAT16 if tensor.bfloat16 else tensor.dtype,
                tensor.pixel_pitch,
            )
            for tensor in execution.outputs
        ]
        execution.bind(self._unit.address)
        self._decoder = Decoder(heads[0], heads[1], options, sampling)
        self._set_rows(self._decoder.rows(half))
        self._job_nbytes = self._rows.job_nbytes
        self._job = DeviceMemory(self._job_nbytes)
        start = cuda.aligned(self._job_nbytes)
        self._staging = PinnedMemory(start + self._count * dtype.itemsize)
        staged = _as_bytes(self._staging)
        self._staged_target = staged[:TARGET_NBYTES].view(np.uint64)
        self._staged_sizes = staged[TARGET_NBYTES : self._job_nbytes].view(np.int32).reshape(-1, 2)
        self.image: NDArray[Any] = staged[start:].view(dtype).reshape(shape[0], *shape[2:])
        self._pixels = self._staging.address + start
        self._placed: list[tuple[int, int]] = []
        self._running: ResultBlock | None = None
        self._replay = execution.replay()

    @property
    def stream(self) -> cuda.Stream:
        """Where the lane runs."""
        return self._stream

    @property
    def placed_wh(self) -> list[tuple[int, int]]:
        """Sizes of the images of the last run."""
        return self._placed

    @property
    def graph(self) -> cuda.Graph | None:
        """The recorded run, from the second run on."""
        return self._replay.graph

    def _set_rows(self, rows: Rows) -> None:
        self._rows = rows
        self._loans = PinnedPool(rows.nbytes, MOST_LOANS)
        self._next: ResultBlock | None = None
        """Memory for the next run's results, borrowed ahead of it."""
        self._spare_memory: PinnedMemory | None = None
        self._spare: ResultBlock | None = None
        self._device_rows: DeviceMemory | None = None

    def submit(self, placed_wh: Sequence[tuple[int, int]]) -> None:
        """Queues the run of the images in `image`; results come to the host.

        Args:
            placed_wh: (width, height) of each image, which lies at the top left of its input. With fewer than B sizes
                the rest of the batch is not decoded.
        """
        results = self._next or self._borrow_block() or self._spare_block()
        self._next = None
        self._run(results.target, placed_wh)
        self._running = results
        self._next = self._borrow_block()

    def _borrow_block(self) -> ResultBlock | None:
        """Memory for one run's results, which the results' user keeps; None while all of it is in use."""
        loan = self._loans.lend()
        return None if loan is None else ResultBlock(self._rows, loan.address, np.asarray(loan))

    def _spare_block(self) -> ResultBlock:
        """Memory of this lane's own. Results are copied out of it."""
        if self._spare is None:
            self._spare_memory = PinnedMemory(self._rows.nbytes)
            self._spare = ResultBlock(self._rows, self._spare_memory.address, _as_bytes(self._spare_memory))
        return self._spare

    def collect(self) -> list[Found]:
        """Waits for the run; returns the keypoints of each image submitted."""
        self._stream.synchronize()
        results, self._running = self._running, None
        assert results is not None, "collect without submit"
        counts = results.counts.tolist()
        check_counts(counts[: len(self._placed)])
        if max(counts) > self._rows.capacity:
            self._grow(max(counts))
            return self.collect()
        if results is self._spare:
            results = ResultBlock(self._rows, 0, results.block.copy())
        xy, scores, descriptors = results.xy, results.scores, results.descriptors
        return [
            Found(xy[image, :count], scores[image, :count], descriptors[image, :count])
            for image, count in enumerate(counts[: len(self._placed)])
        ]

    def timed(self, placed_wh: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Runs the images in `image` step by step, waiting for each.

        Returns:
            Seconds of host_to_device, network and decode, which also writes the results to the host.
        """
        self.submit(placed_wh)  # a usual run first prepares everything
        self.collect()
        self.submit(placed_wh)
        self._stream.synchronize()
        spans = {}
        steps = {"host_to_device": self.queue_input, "network": self.queue_network, "decode": self.queue_decode}
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            self._stream.synchronize()
            spans[name] = time.perf_counter() - started
        self.collect()
        return spans

    def on_device(self, placed_wh: tuple[int, int], device_index: int) -> DeviceKeypoints:
        """Runs one image and waits; the results stay in this lane's GPU memory, valid until its next run."""
        while True:
            if self._device_rows is None:
                self._device_rows = DeviceMemory(self._rows.nbytes)
            block = self._device_rows
            self._run(self._rows.target(block.address), [placed_wh])
            counts = np.empty(len(self.image), np.int32)
            place = counts.__array_interface__["data"][0]
            cuda.copy(
                place, block.address + self._rows.places["num_keypoints"][0], counts.nbytes, cuda.TO_HOST, self._stream
            )
            self._stream.synchronize()
            check_counts(counts[:1].tolist())
            if counts.max() <= self._rows.capacity:
                break
            self._set_rows(self._decoder.rows(self._half, _power_of_two(int(counts.max()))))
            self._replay.forget()
        whole = device_keypoints(self._rows, block.address, device_index, block)
        found = int(counts[0])
        return DeviceKeypoints(
            whole.num_keypoints, *(_first(part, found) for part in (whole.keypoints, whole.scores, whole.descriptors))
        )

    def _grow(self, found: int) -> None:
        """Makes room for all keypoints found, and repeats the run; the images still lie in `image`."""
        self._set_rows(self._decoder.rows(self._half, _power_of_two(found)))
        self._replay.forget()
        self.submit(self._placed)

    def _run(self, target: NDArray[np.uint64], placed_wh: Sequence[tuple[int, int]]) -> None:
        self._staged_target[:] = target
        if placed_wh != self._placed:
            self._placed = list(placed_wh)
            self._staged_sizes[:] = [*placed_wh, *[(0, 0)] * (len(self.image) - len(placed_wh))]
        self._replay.run(self._queue)

    def _queue(self) -> None:
        self.queue_input()
        self.queue_network()
        self.queue_decode()

    def queue_input(self) -> None:
        """Queues a run's first step: the job and the pixels go to the GPU."""
        if self.image.dtype == np.uint8:
            words, vectors = self._job_nbytes // 4, self._count // 16
            places = map(kernels.address, (self._staging.address, self._job.address))
            pixels = map(kernels.address, (self._pixels, self._unit.address))
            kernel = kernels.function("preprocess.cu", "receive")
            kernels.launch(
                kernel, (kernels.blocks(max(words, vectors)),), self._stream, (*places, words, *pixels, vectors)
            )
        else:
            cuda.copy(self._job.address, self._staging.address, self._job_nbytes, cuda.TO_DEVICE, self._stream)
            cuda.copy(self._unit.address, self._pixels, self.image.nbytes, cuda.TO_DEVICE, self._stream)

    def queue_network(self) -> None:
        """Queues a run's second step: the network."""
        self._execution.queue()

    def queue_decode(self) -> None:
        """Queues a run's last step: the decode, which writes the results."""
        self._decoder.queue(self._job.address, self._rows, self._stream)

    def close(self) -> None:
        """Frees the graph and the context; memory is freed with its last user."""
        self._stream.synchronize()
        self._replay.forget()
        self._execution.close()


def _as_bytes(memory: PinnedMemory) -> NDArray[np.uint8]:
    """Page-locked memory as an array, which is valid as long as `memory` lives."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * memory.nbytes).from_address(memory.address))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _first(array: DeviceArray, rows: int) -> DeviceArray:
    """The first rows of the first image."""
    return DeviceArray(array.address, (rows, *array.shape[2:]), array.dtype, array.device, array.owner)
