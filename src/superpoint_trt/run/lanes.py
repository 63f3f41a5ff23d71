"""Image to keypoints on the GPU in one CUDA graph: a `heads` engine and the kernels that decode what it gives.

A lane takes one batch at a time from a page-locked buffer: `receive` (or two copies) -> network -> decode -> rows
written straight to page-locked memory of the host, of the points found and no others. Lanes of different slots have
streams of their own and run side by side.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import INPUT_NAME, DecodeOptions, Float32, SuperPointError
from superpoint_trt.gpu import cuda, kernels
from superpoint_trt.gpu.arrays import BFLOAT16, DeviceArray
from superpoint_trt.gpu.cuda import DeviceMemory, PinnedMemory, PinnedPool
from superpoint_trt.gpu.kernels.decode import TARGET_NBYTES, Decoder, DeviceKeypoints, Head, Rows, device_keypoints

if TYPE_CHECKING:
    from superpoint_trt.run.backends.tensorrt import TensorRTBackend

MOST_LANES = 8
"""Input shapes whose buffers and graphs are kept in each slot; beyond, the one used longest ago goes."""

MOST_LOANS = 4
"""Results of one lane that may lie in page-locked memory at a time; further ones are copied to ordinary memory."""


class Found(NamedTuple):
    """One image's keypoints, as the GPU gave them."""

    xy: Float32
    """(N, 2) pixels of the network's input."""
    scores: Float32
    descriptors: NDArray[Any]
    """(N, D) float32 or float16."""


class Lanes:
    """All lanes of one opened engine. One instance belongs to one thread at a time, like its engine.

    Args:
        backend: a `heads` engine.
        options: how to decode.
        half: descriptors as float16.

    Raises:
        SuperPointError: the kernels cannot be compiled here.
    """

    def __init__(self, backend: TensorRTBackend, options: DecodeOptions, half: bool) -> None:
        kernels.function("preprocess.cu", "receive")  # before anything is promised
        self._backend = backend
        self.options, self.half = options, half
        self._slots: list[_Slot] = []
        self._free: list[_Slot] = []

    def take(self, count: int) -> list[_Slot]:
        """That many slots, for one caller until it gives them back."""
        while len(self._free) < count:
            self._slots.append(_Slot(self._backend, self.options, self.half))
            self._free.append(self._slots[-1])
        return [self._free.pop(0) for _ in range(count)]

    def give_back(self, slots: Sequence[_Slot]) -> None:
        """Slots with nothing under way."""
        self._free[:0] = slots

    def close(self) -> None:
        """Frees all but results still in use."""
        for slot in self._slots:
            slot.close()
        self._slots, self._free = [], []


class _Slot:
    """A stream, scratch memory, and the lanes that run on them one after the other."""

    def __init__(self, backend: TensorRTBackend, options: DecodeOptions, half: bool) -> None:
        self._backend, self._options, self._half = backend, options, half
        self.stream = cuda.Stream()
        self._scratch = backend.new_scratch()
        self._lanes: OrderedDict[tuple[Any, ...], Lane] = OrderedDict()

    def lane(self, shape: tuple[int, int, int, int], dtype: np.dtype[Any]) -> Lane:
        """The lane for inputs (B, 1, H, W) of uint8 or float32.

        Raises:
            SuperPointError: the engine does not take that shape.
        """
        key = (shape, dtype)
        found = self._lanes.get(key)
        if found is None:
            self._backend.check(shape)
            while len(self._lanes) >= MOST_LANES:
                self._lanes.popitem(last=False)[1].close()
            context, tensors = self._backend.new_context(shape, self.stream, self._scratch)
            found = Lane(self._backend, context, tensors, self.stream, shape, dtype, self._options, self._half)
            self._lanes[key] = found
        elif len(self._lanes) > 1:
            self._lanes.move_to_end(key)
        return found

    def close(self) -> None:
        self.stream.synchronize()
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
        self.stream.close()


class _Sheet:
    """Page-locked memory that one run writes its results to, and the arrays on it."""

    def __init__(self, rows: Rows, address: int, block: NDArray[np.uint8]) -> None:
        self.block = block
        self.target = rows.target(address)
        self.xy, self.scores, self.descriptors, self.counts = parts_of(
            rows, block, ("keypoints", "scores", "descriptors", "num_keypoints")
        )


def parts_of(rows: Rows, block: NDArray[np.uint8], names: Sequence[str]) -> list[NDArray[Any]]:
    """The parts of a block, as `Rows` lays them out."""
    places = rows.places
    return [np.ndarray(places[name][1], places[name][2], block, places[name][0]) for name in names]


class Lane:
    """The way of one input shape through the GPU.

    What a run needs of the host is done while the run before is under way: between the image's arrival and the
    launch lie its copy and a few words.

    Attributes:
        image: (B, H, W) uint8, or float32 in [0, 1], page-locked: fill it, `submit`, `collect`; then fill it again.
    """

    def __init__(
        self,
        backend: TensorRTBackend,
        context: Any,
        tensors: Sequence[Any],
        stream: cuda.Stream,
        shape: tuple[int, int, int, int],
        dtype: np.dtype[Any],
        options: DecodeOptions,
        half: bool,
    ) -> None:
        self._backend, self._context, self._stream = backend, context, stream
        self._half = half
        self._count = math.prod(shape)
        self._unit = DeviceMemory(4 * self._count)
        self._outputs = DeviceMemory(sum(cuda.aligned(tensor.nbytes) for tensor in tensors))
        heads = [
            Head(
                self._outputs.address + tensor.offset,
                tensor.shape,
                BFLOAT16 if tensor.bfloat16 else tensor.dtype,
                tensor.pixel_pitch,
            )
            for tensor in tensors
        ]
        self._bind({INPUT_NAME: self._unit.address, **{t.name: h.address for t, h in zip(tensors, heads)}})
        self._decoder = Decoder(heads[0], heads[1], options, backend.description.sampling)
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
        self._flying: _Sheet | None = None
        self._replay = backend.replay(stream, f"batches of {shape[0]}")

    def _bind(self, places: dict[str, int]) -> None:
        for name, address in places.items():
            if not self._context.set_tensor_address(name, address):
                raise SuperPointError(f"TensorRT refused the memory for {name}.")

    def _set_rows(self, rows: Rows) -> None:
        self._rows = rows
        self._loans = PinnedPool(rows.nbytes, MOST_LOANS)
        self._next: _Sheet | None = None
        self._spare_memory: PinnedMemory | None = None
        self._spare: _Sheet | None = None
        self._device_rows: DeviceMemory | None = None

    def submit(self, placed_wh: Sequence[tuple[int, int]]) -> None:
        """Queues the run of what lies in `image`; results come to the host.

        Args:
            placed_wh: (width, height) of each image in the input, top left; for fewer than B images the rest of the
                batch is passed over.
        """
        sheet = self._next or self._lend() or self._spare_sheet()
        self._next = None
        self._run(sheet.target, placed_wh)
        self._flying = sheet
        self._next = self._lend()

    def _lend(self) -> _Sheet | None:
        """Memory for one run's results, which its user keeps; None while all is in use."""
        loan = self._loans.lend()
        return None if loan is None else _Sheet(self._rows, loan.address, np.asarray(loan))

    def _spare_sheet(self) -> _Sheet:
        """Memory whose results are copied away."""
        if self._spare is None:
            self._spare_memory = PinnedMemory(self._rows.nbytes)
            self._spare = _Sheet(self._rows, self._spare_memory.address, _as_bytes(self._spare_memory))
        return self._spare

    def collect(self) -> list[Found]:
        """Waits, and hands out the results of each image submitted."""
        self._stream.synchronize()
        sheet, self._flying = self._flying, None
        assert sheet is not None, "collect without submit"
        counts = sheet.counts.tolist()
        if max(counts) > self._rows.capacity:
            self._grow(max(counts))
            return self.collect()
        if sheet is self._spare:
            sheet = _Sheet(self._rows, 0, sheet.block.copy())
        xy, scores, descriptors = sheet.xy, sheet.scores, sheet.descriptors
        return [
            Found(xy[image, :count], scores[image, :count], descriptors[image, :count])
            for image, count in enumerate(counts[: len(self._placed)])
        ]

    def timed(self, placed_wh: Sequence[tuple[int, int]]) -> dict[str, float]:
        """Runs what lies in `image` step by step, each waited for: seconds of each. The decode brings results home."""
        self.submit(placed_wh)  # once as usual: all is ready then
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

    def on_device(self, placed_wh: tuple[int, int]) -> DeviceKeypoints:
        """Runs one image and waits; the results stay in this lane's own memory, valid until its next run."""
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
            if counts.max() <= self._rows.capacity:
                break
            self._set_rows(self._decoder.rows(self._half, _power_of_two(int(counts.max()))))
            self._replay.forget()
        whole = device_keypoints(self._rows, block.address, int(cuda.call("cudaGetDevice")), block)
        found = int(counts[0])
        return DeviceKeypoints(
            whole.num_keypoints, *(_first(part, found) for part in (whole.keypoints, whole.scores, whole.descriptors))
        )

    def _grow(self, found: int) -> None:
        """Room for all that were found, where all are wanted; the image is still there, and is run again."""
        self._set_rows(self._decoder.rows(self._half, _power_of_two(found)))
        self._replay.forget()
        self.submit(self._placed)

    def _run(self, target: NDArray[np.uint64], placed_wh: Sequence[tuple[int, int]]) -> None:
        self._staged_target[:] = target
        if placed_wh != self._placed:
            self._placed = list(placed_wh)
            self._staged_sizes[:] = [*placed_wh, *[(0, 0)] * (len(self.image) - len(placed_wh))]
        self._replay.run(self._enqueue)

    def _enqueue(self) -> None:
        self.queue_input()
        self.queue_network()
        self.queue_decode()

    def queue_input(self) -> None:
        """Queues the first third of a run: job and pixels to the GPU."""
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
        """The second."""
        self._backend.execute(self._context, self._stream)

    def queue_decode(self) -> None:
        """The last."""
        self._decoder.queue(self._job.address, self._rows, self._stream)

    def close(self) -> None:
        """Frees the graph; memory goes with its last user."""
        self._stream.synchronize()
        self._replay.forget()
        self._context = None


def _as_bytes(memory: PinnedMemory) -> NDArray[np.uint8]:
    """Page-locked memory as numpy sees it; valid as long as `memory`."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * memory.nbytes).from_address(memory.address))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _first(array: DeviceArray, rows: int) -> DeviceArray:
    """The first rows of the first image."""
    return DeviceArray(array.address, (rows, *array.shape[2:]), array.dtype, array.device, array.owner)
