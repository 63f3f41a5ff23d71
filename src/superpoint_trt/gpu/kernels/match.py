"""Nearest neighbors of descriptors on the GPU, for many pairs of images at once. The kernel is in match.cu.

It finds what match/nearest.py finds in numpy, from descriptors rounded to float16; tests hold them against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.cuda import DeviceMemory
from superpoint_trt.gpu.kernels import address, function, launch

_TILE = 128  # match.cu: TILE
_CHUNK = 32  # match.cu: CHUNK
_PAIR = np.dtype([("first", "<u8"), ("second", "<u8"), ("first_count", "<i4"), ("second_count", "<i4")])
"""match.cu's Pair."""
_ITEMSIZES = {"columns": 8, "nearest": 4, "distances": 4, "seconds": 4}
"""Results of match.cu -> bytes of a value, in the order in which they lie in memory."""

_Number = TypeVar("_Number", bound="np.generic[Any]")


@dataclass(frozen=True)
class DeviceDescriptors:
    """The descriptors of one image in GPU memory, as match.cu reads them."""

    memory: DeviceMemory | None
    """None if there are no descriptors."""
    count: int
    dim: int
    """Numbers of a descriptor in GPU memory: with the zeros behind it, a multiple of 32."""

    @property
    def nbytes(self) -> int:
        """Size in GPU memory."""
        return self.memory.nbytes if self.memory else 0


def upload(descriptors: NDArray[Any]) -> DeviceDescriptors:
    """Copies the descriptors (N, D) of an image to the current GPU, rounded to float16.

    Raises:
        SuperPointError: a number is not finite in float16; or the GPU's memory is full.
    """
    count, dim = len(descriptors), _rounded_up(descriptors.shape[1], _CHUNK)
    if not count:
        return DeviceDescriptors(None, 0, dim)
    rows = np.zeros((_rounded_up(count, _TILE), dim), np.float16)
    with np.errstate(over="ignore"):  # reported below
        rows[:count, : descriptors.shape[1]] = descriptors
    if not np.isfinite(rows).all():
        raise SuperPointError("descriptors hold numbers that are not finite in float16; match them on the CPU.")
    half_squares = np.full(len(rows), np.inf, np.float32)  # nothing is near the rows that fill the last tile
    values = rows[:count].astype(np.float32)
    half_squares[:count] = np.einsum("nd,nd->n", values, values) / 2
    memory = DeviceMemory(rows.nbytes + half_squares.nbytes)
    _copy_to_device(memory.address, rows)
    _copy_to_device(memory.address + rows.nbytes, half_squares)
    # A copy from ordinary memory may be in flight when it returns, and the kernel's stream does not wait for it.
    cuda.call("cudaStreamSynchronize", cuda.LEGACY_STREAM)
    return DeviceDescriptors(memory, count, dim)


@dataclass(frozen=True)
class NearestRows:
    """Nearest neighbors of one pair."""

    nearest: NDArray[np.int32]
    """(N,) row of the second image nearest to each row of the first; of equally near ones the lowest."""
    distances: Float32
    """(N,) distance to it."""
    seconds: Float32
    """(N,) distance to the second nearest; infinite if there is none."""
    back: NDArray[np.uint32]
    """(M,) row of the first image nearest to each row of the second."""


class NearestFinder:
    """Finds the nearest neighbors of pairs of images on the current GPU.

    Raises:
        SuperPointError: NVRTC is missing.
    """

    def __init__(self) -> None:
        self._stream = cuda.Stream()
        self._room: _Room | None = None

    def find(self, pairs: Sequence[tuple[DeviceDescriptors, DeviceDescriptors]]) -> list[NearestRows]:
        """Finds the neighbors of each pair.

        Args:
            pairs: images with at least one descriptor each, all of one length.

        Returns:
            The neighbors, in the order of the pairs.

        Raises:
            SuperPointError: descriptors have different lengths, or the GPU failed.
        """
        if not pairs:
            return []
        dims = {image.dim for pair in pairs for image in pair}
        if len(dims) > 1:
            raise SuperPointError(f"descriptors have lengths {sorted(dims)}; expected one length in all images.")
        capacity = _rounded_up(max(image.count for pair in pairs for image in pair), _TILE)
        room = self._room_for(len(pairs), capacity)
        jobs = np.zeros(len(pairs), _PAIR)
        for job, (first, second) in zip(jobs, pairs):
            assert first.memory and second.memory
            job["first"], job["second"] = first.memory.address, second.memory.address
            job["first_count"], job["second_count"] = first.count, second.count
        room.jobs[: len(pairs)] = jobs
        kernel = function("match.cu", "nearest", (f"DIM={dims.pop()}",))
        grid = (max(-(-first.count // _TILE) for first, _ in pairs), len(pairs))
        self._queue(kernel, grid, room)
        self._stream.synchronize()
        return [room.rows(index, first.count, second.count) for index, (first, second) in enumerate(pairs)]

    def _room_for(self, pairs: int, capacity: int) -> _Room:
        if self._room is None or pairs > self._room.pairs or capacity > self._room.capacity:
            self._room = None  # freed before the next is made
            self._room = _Room(pairs, capacity)
        return self._room

    def _queue(self, kernel: Any, grid: tuple[int, int], room: _Room) -> None:
        stream, start = self._stream, room.on_gpu.address
        cuda.copy(start, room.on_host, room.jobs_nbytes, cuda.TO_DEVICE, stream)
        columns = start + room.offset("columns")
        cuda.call("cudaMemsetAsync", columns, 0, room.part_nbytes("columns"), stream.handle)
        names = ("nearest", "distances", "seconds", "columns")
        places = [address(start), *(address(start + room.offset(name)) for name in names)]
        launch(kernel, grid, stream, (*places, room.capacity))
        results = room.jobs_nbytes
        cuda.copy(room.on_host + results, start + results, room.nbytes - results, cuda.TO_HOST, stream)

    def close(self) -> None:
        """Frees the stream and the memory for results."""
        self._room = None
        self._stream.close()


class _Room:
    """Memory for the jobs and results of one launch, laid out equally on the GPU and on the host.

    Args:
        pairs: most pairs.
        capacity: most rows of an image.
    """

    def __init__(self, pairs: int, capacity: int) -> None:
        self.pairs, self.capacity = pairs, capacity
        self.jobs_nbytes = cuda.aligned(pairs * _PAIR.itemsize)
        self.nbytes = self.jobs_nbytes + sum(self.part_nbytes(name) for name in _ITEMSIZES)
        self.on_gpu = DeviceMemory(self.nbytes)
        self._host = cuda.pinned_array((self.nbytes,), np.uint8)
        self.on_host = int(self._host.__array_interface__["data"][0])
        self.jobs = self._host[: pairs * _PAIR.itemsize].view(_PAIR)

    def part_nbytes(self, name: str) -> int:
        """Size of a part."""
        return cuda.aligned(self.pairs * self.capacity * _ITEMSIZES[name])

    def offset(self, name: str) -> int:
        """Where a part begins, in bytes."""
        before = list(_ITEMSIZES)[: list(_ITEMSIZES).index(name)]
        return self.jobs_nbytes + sum(self.part_nbytes(one) for one in before)

    def rows(self, pair: int, first_count: int, second_count: int) -> NearestRows:
        """A copy of one pair's results."""

        def part(name: str, count: int, dtype: type[_Number]) -> NDArray[_Number]:
            start = self.offset(name) + pair * self.capacity * _ITEMSIZES[name]
            copied: NDArray[_Number] = self._host[start : start + count * _ITEMSIZES[name]].view(dtype).copy()
            return copied

        keys = part("columns", second_count, np.uint32)[::2]  # the low half of a key holds the inverted row
        return NearestRows(
            part("nearest", first_count, np.int32),
            part("distances", first_count, np.float32),
            part("seconds", first_count, np.float32),
            ~keys,
        )


def _copy_to_device(to: int, values: NDArray[Any]) -> None:
    source = values.__array_interface__["data"][0]
    cuda.call("cudaMemcpy", to, source, values.nbytes, cuda.runtime().cudaMemcpyKind(cuda.TO_DEVICE))


def _rounded_up(count: int, step: int) -> int:
    return -(-count // step) * step
