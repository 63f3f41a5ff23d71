"""Raw heads in GPU memory -> keypoints in GPU memory or in page-locked host memory. The kernels are in decode.cu.

They do what run/decode.py does in numpy; tests hold them against it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.contract import not_finite
from superpoint_trt.core.types import DecodeOptions, Sampling, SuperPointError
from superpoint_trt.gpu import arrays, cuda
from superpoint_trt.gpu.arrays import BFLOAT16, DeviceArray
from superpoint_trt.gpu.cuda import DeviceMemory
from superpoint_trt.gpu.kernels import Argument, address, blocks, function, launch

LARGEST_TILE_PX = 88
"""Largest side of a tile with its surroundings that fits into the 48 KB of shared memory that every GPU has."""

MOST_DIM = 1024
LARGEST_STRIDE_PX = 32

USUAL_ROWS = 4096
"""Rows for an image when all keypoints are wanted. If more are found, the run is repeated with enough rows."""

_TILE_PX = 32  # decode.cu: TILE
_WIDE_BYTES = 16  # decode.cu: load_wide
_ALL = 0xFFFFFFFF
_BLOCKS_A_PROCESSOR = 4  # kernel `describe`: one wave; on 132 multiprocessors 4000 survivors get a warp each
_DETECT_THREADS = 384  # decode.cu: DETECT_THREADS
TARGET_NBYTES = 32
"""Size of decode.cu's Target."""

_HEAD_CODES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, BFLOAT16: 2}


@dataclass(frozen=True)
class Head:
    """One head's tensor [B, C, H/8, W/8] in GPU memory, either NCHW or NHWC."""

    address: int
    shape: tuple[int, int, int, int]
    dtype: np.dtype[Any]
    """float32, float16 or arrays.BFLOAT16."""
    pixel_pitch: int = 0
    """Values from one cell to the next if the channels of a cell lie together (NHWC); 0 for NCHW."""

    @property
    def pitches(self) -> tuple[int, int]:
        """Values from one cell to the next, and from one channel to the next."""
        cells = self.shape[2] * self.shape[3]
        if cells == 1:  # both layouts are the same then; the kernels expect NHWC's channel pitch of 1
            return (self.pixel_pitch or self.shape[1], 1)
        return (self.pixel_pitch, 1) if self.pixel_pitch else (1, cells)

    @property
    def is_wide(self) -> bool:
        """Whether every cell's channels can be read 16 bytes at a time."""
        cell_pitch, channel_pitch = self.pitches
        apart = cell_pitch * self.dtype.itemsize
        return channel_pitch == 1 and self.address % _WIDE_BYTES == 0 and apart % _WIDE_BYTES == 0


@dataclass(frozen=True)
class Rows:
    """Room for the keypoints of B images, on the GPU or in page-locked memory: one block."""

    batch: int
    capacity: int
    """Rows for each image."""
    dim: int
    half: bool
    """Whether descriptors are float16 instead of float32."""

    @functools.cached_property
    def places(self) -> dict[str, tuple[int, tuple[int, ...], np.dtype[Any]]]:
        """Name of each part -> its offset in bytes, shape and type."""
        rows, descriptors = (self.batch, self.capacity), np.dtype(np.float16 if self.half else np.float32)
        wanted: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            "num_keypoints": ((self.batch,), np.dtype(np.int32)),
            "keypoints": ((*rows, 2), np.dtype(np.float32)),
            "scores": (rows, np.dtype(np.float32)),
            "descriptors": ((*rows, self.dim), descriptors),
        }
        found, offset = {}, 0
        for name, (shape, dtype) in wanted.items():
            found[name] = (offset, shape, dtype)
            offset += cuda.aligned(int(np.prod(shape)) * dtype.itemsize)
        return found

    @property
    def nbytes(self) -> int:
        """Size of the whole block."""
        offset, shape, dtype = self.places["descriptors"]
        return offset + cuda.aligned(int(np.prod(shape)) * dtype.itemsize)

    def job(self, start: int, placed_wh: Sequence[tuple[int, int]]) -> bytes:
        """The bytes that a run reads first: the addresses of the parts, and the size of the image in each input.

        Args:
            start: address of the block.
            placed_wh: (width, height) in px of the image at the top left of each input.
        """
        return self.target(start).tobytes() + np.asarray(placed_wh, np.int32).tobytes()

    def target(self, start: int) -> NDArray[np.uint64]:
        """The first part of a job, decode.cu's Target: the addresses of the parts of the block at `start`."""
        names = ("keypoints", "scores", "descriptors", "num_keypoints")
        return np.array([start + self.places[name][0] for name in names], np.uint64)

    @property
    def job_nbytes(self) -> int:
        """Size of a job."""
        return TARGET_NBYTES + 8 * self.batch


class Decoder:
    """The kernels that decode one pair of heads, and their scratch memory. Queue one run at a time.

    Args:
        logits: [B, S*S + 1, H/S, W/S].
        descriptors: [B, D, H/S, W/S], of the logits' type.
        options: radius, border, threshold, number.
        sampling: the checkpoint's convention.

    Raises:
        SuperPointError: shapes or types are not those of heads, or NVRTC is missing.
    """

    def __init__(self, logits: Head, descriptors: Head, options: DecodeOptions, sampling: Sampling) -> None:
        self.stride_px = _stride(logits, descriptors)
        self.batch, self.dim = logits.shape[0], descriptors.shape[1]
        self._logits, self._descriptors = logits, descriptors
        self._options, self._sampling = options, sampling
        self._tiled = is_tiled(options.nms_radius_px, self.stride_px)
        pixels = self.batch * self.height_px * self.width_px
        self._keys = DeviceMemory(8 * pixels)
        self._counters = _zeros(12 * self.batch)  # counts, tickets, broken
        self._maps = [] if self._tiled else [DeviceMemory(4 * pixels) for _ in range(5)]
        defines = (
            f"STRIDE={self.stride_px}",
            f"DIM={self.dim}",
            f"RADIUS={options.nms_radius_px if self._tiled else 0}",
            f"HEAD={_HEAD_CODES[logits.dtype]}",
            f"WIDE_LOGITS={int(logits.is_wide)}",
            f"WIDE_DESCRIPTORS={int(descriptors.is_wide)}",
            f"SUBPIXEL={int(bool(options.subpixel))}",
        )
        names = ["describe", "score_map"] + (
            ["detect"] if self._tiled else ["window", "mark", "remove_near", "collect"]
        )
        self._kernels = {name: function("decode.cu", name, defines) for name in names}
        self._most_blocks = _BLOCKS_A_PROCESSOR * cuda.current_device().processors

    @property
    def height_px(self) -> int:
        """Height of the network's input."""
        return self._logits.shape[2] * self.stride_px

    @property
    def width_px(self) -> int:
        """Width of the network's input."""
        return self._logits.shape[3] * self.stride_px

    def rows(self, half: bool, least: int = 0) -> Rows:
        """Makes the layout of the results.

        Args:
            half: descriptors as float16.
            least: rows for each image, at least, when all keypoints are wanted.
        """
        most = self.height_px * self.width_px
        wanted = self._options.max_keypoints or max(USUAL_ROWS, least)
        return Rows(self.batch, min(most, wanted), self.dim, half)

    def queue(self, job: int, rows: Rows, stream: cuda.Stream | int) -> None:
        """Queues the kernels.

        Args:
            job: address on the GPU of a job made by `rows.job`.
            rows: layout of the results that the job names.
            stream: the stream to queue on.
        """
        placed = job + TARGET_NBYTES
        if self._tiled:
            self._detect(placed, stream)
        else:
            self._suppress(placed, stream)
        most_groups = blocks(32 * self.height_px * self.width_px)
        grid = (min(most_groups, self._most_blocks), self.batch)
        counts = self._counters.address
        tickets, broken = counts + 4 * self.batch, counts + 8 * self.batch
        places = (self._descriptors.address, self._keys.address, counts, tickets, broken, job)
        numbers: tuple[Argument, ...] = (
            *self._grid(self._descriptors),
            ctypes.c_uint32(self._options.max_keypoints or _ALL),
            ctypes.c_uint32(rows.capacity),
            int(self._sampling is Sampling.LEGACY),
            int(rows.half),
            address(self._logits.address),
            address(placed),
            *self._logits.pitches,
        )
        launch(self._kernels["describe"], grid, stream, (*map(address, places), *numbers))

    def score_map(self, placed: int, scores: int, threshold: float, stream: cuda.Stream | int) -> None:
        """Queues the softmax alone.

        Args:
            placed: address of (B, 2) int32 on the GPU, width and height of each image.
            scores: address of the (B, H, W) float32 results on the GPU; 0 where a score is not above the threshold.
            threshold: scores must be strictly greater.
            stream: the stream to queue on.
        """
        grid = (blocks(self._logits.shape[2] * self._logits.shape[3] * self.stride_px), self.batch)
        places = map(address, (self._logits.address, placed, scores, self._counters.address + 8 * self.batch))
        launch(self._kernels["score_map"], grid, stream, (*places, *self._grid(self._logits), float(threshold)))

    def _grid(self, head: Head) -> tuple[int, int, int, int]:
        """Rows and columns of cells, and the pitches of cells and channels."""
        return (head.shape[2], head.shape[3], *head.pitches)

    def _detect(self, placed: int, stream: cuda.Stream | int) -> None:
        options = self._options
        shift = -5 * options.nms_radius_px % self.stride_px  # decode.cu: SHIFT
        across, down = (-(-(side + shift) // _TILE_PX) for side in (self.width_px, self.height_px))
        counts = self._counters.address
        places = map(address, (self._logits.address, placed, self._keys.address, counts, counts + 8 * self.batch))
        numbers: tuple[Argument, ...] = (
            *self._grid(self._logits),
            options.remove_borders_px,
            float(options.threshold),
        )
        launch(self._kernels["detect"], (across, down, self.batch), stream, (*places, *numbers), _DETECT_THREADS)

    def _suppress(self, placed: int, stream: cuda.Stream | int) -> None:
        scores, kept, rest, half, largest = (memory.address for memory in self._maps)
        pixels = self.height_px * self.width_px
        count = ctypes.c_int64(self.batch * pixels)
        size, over_all = (self.height_px, self.width_px), (blocks(self.batch * pixels),)
        images = (blocks(pixels), self.batch)

        def window(values: int) -> None:
            for source, to, vertical in ((values, half, 0), (half, largest, 1)):
                arguments = (address(source), address(to), *size, self._options.nms_radius_px, vertical)
                launch(self._kernels["window"], images, stream, arguments)

        self.score_map(placed, scores, self._options.threshold, stream)
        for turn in range(3):
            left = rest if turn else scores
            window(left)
            marked: list[Argument] = [*map(address, (left, largest, kept)), count, int(turn == 0)]
            launch(self._kernels["mark"], over_all, stream, marked)
            if turn < 2:
                window(kept)
                launch(self._kernels["remove_near"], over_all, stream, (*map(address, (scores, largest, rest)), count))
        places = map(address, (scores, kept, placed, self._keys.address, self._counters.address))
        launch(self._kernels["collect"], images, stream, (*places, *size, self._options.remove_borders_px))


@dataclass(frozen=True)
class DeviceKeypoints:
    """Keypoints of B images that stayed on the GPU; the arrays are for torch, CuPy, JAX (DLPack, CUDA interface).

    Rows from an image's `num_keypoints` on are undefined.
    """

    num_keypoints: DeviceArray
    """(B,) int32: keypoints found. If more than the other arrays' N, only the best N are in them. Negative: the heads
    hold values that are not finite (`check_counts` says which)."""
    keypoints: DeviceArray
    """(B, N, 2) float32: x, y in pixels of the network's input."""
    scores: DeviceArray
    """(B, N) float32, falling."""
    descriptors: DeviceArray
    """(B, N, D) float32 or float16, unit length."""


def decode_heads(
    logits: Any,
    coarse_descriptors: Any,
    options: DecodeOptions | None = None,
    *,
    sampling: Sampling = Sampling.HALF_PIXEL,
    placed_wh: Sequence[tuple[int, int]] | None = None,
    half: bool = False,
    stream: int | None = None,
) -> DeviceKeypoints:
    """Decodes raw heads in GPU memory, of torch, CuPy or an engine, without copying them.

    Args:
        logits: (B, S*S + 1, H/S, W/S) float32, float16 or bfloat16, contiguous or channels-last (torch's too).
        coarse_descriptors: (B, D, H/S, W/S), of the logits' type.
        options: radius, border, threshold, number; without a number each image keeps its best `USUAL_ROWS`.
        sampling: the checkpoint's convention.
        placed_wh: (width, height) in px of the image at the top left of each input; default: the whole input.
        half: descriptors as float16.
        stream: handle of the CUDA stream that made the heads and will use the results (torch:
            `torch.cuda.current_stream().cuda_stream`); the call returns at once. None: the legacy default stream, and
            the call waits for the results.

    Raises:
        SuperPointError: not in GPU memory, shapes or types are not those of heads, or NVRTC is missing.
    """
    first, second = arrays.view(logits, gaps=True), arrays.view(coarse_descriptors, gaps=True)
    decoder = Decoder(_head(first), _head(second), options or DecodeOptions(), sampling)
    rows = decoder.rows(half)
    placed = placed_wh or [(decoder.width_px, decoder.height_px)] * decoder.batch
    words = np.frombuffer(rows.job(0, placed), np.uint8)
    if len(words) != rows.job_nbytes:
        raise SuperPointError(f"placed_wh has {len(placed)} sizes; expected one for each of {decoder.batch} images.")
    block, job = DeviceMemory(rows.nbytes), DeviceMemory(rows.job_nbytes)
    words = np.frombuffer(rows.job(block.address, placed), np.uint8)
    handle = cuda.LEGACY_STREAM if stream is None else stream
    to_device = cuda.runtime().cudaMemcpyKind(cuda.TO_DEVICE)
    cuda.call("cudaMemcpyAsync", job.address, words.__array_interface__["data"][0], len(words), to_device, handle)
    decoder.queue(job.address, rows, handle)
    if stream is None:
        cuda.call("cudaStreamSynchronize", handle)
    # The results keep everything alive that the kernels still use.
    return device_keypoints(rows, block.address, first.device, (block, job, decoder, first, second))


def check_counts(counts: Sequence[int]) -> None:
    """Refuses the results of heads that are not finite.

    Args:
        counts: `num_keypoints` of each image.

    Raises:
        SuperPointError: naming the head.
    """
    if min(counts) < 0:
        faults = {-1: "logits", -2: "coarse_descriptors"}
        raise not_finite(next(faults[count] for count in counts if count < 0))


def is_tiled(radius_px: int, stride_px: int) -> bool:
    """Whether one block decodes a tile in shared memory (radius up to 5); if not, each step is a kernel of its own."""
    whole_cells = -(-(_TILE_PX + 2 * 5 * radius_px) // stride_px)
    return whole_cells * stride_px <= LARGEST_TILE_PX


def device_keypoints(rows: Rows, start: int, device: int, owner: Any) -> DeviceKeypoints:
    """The parts of a block of results on the GPU, as arrays.

    Args:
        rows: layout of the block.
        start: its address.
        device: number of the GPU.
        owner: keeps the memory alive.
    """
    arrays = {
        name: DeviceArray(start + offset, shape, dtype, device, owner)
        for name, (offset, shape, dtype) in rows.places.items()
    }
    return DeviceKeypoints(**arrays)


def _head(array: DeviceArray) -> Head:
    if len(array.shape) != 4:
        raise SuperPointError(f"a head has shape {array.shape}; expected (B, C, H/S, W/S).")
    batch, channels, rows, columns = array.shape
    head = Head(array.address, (batch, channels, rows, columns), array.dtype)
    if array.strides is None:
        return head
    pitch = array.strides[3] // array.dtype.itemsize
    wanted = arrays.channels_last(array.shape, pitch, array.dtype.itemsize)
    differs = any(size > 1 and a != b for size, a, b in zip(array.shape, array.strides, wanted))
    if pitch < channels or differs:
        raise SuperPointError(f"a head is neither contiguous nor channels-last: {arrays.NOT_CONTIGUOUS}")
    return replace(head, pixel_pitch=pitch)


def _stride(logits: Head, descriptors: Head) -> int:
    """Pixels along a cell; checks that the two heads belong together."""
    stride = math.isqrt(max(logits.shape[1] - 1, 0))
    same = (logits.shape[0], *logits.shape[2:]) == (descriptors.shape[0], *descriptors.shape[2:])
    known = stride in (1, 2, 4, 8, 16, LARGEST_STRIDE_PX) and logits.shape[1] == stride * stride + 1
    if not (known and same and 1 <= descriptors.shape[1] <= MOST_DIM and 0 not in logits.shape):
        raise SuperPointError(
            f"heads have shapes {logits.shape} and {descriptors.shape}; expected (B, S*S + 1, H/S, W/S) with S a power "
            f"of two up to {LARGEST_STRIDE_PX}, and (B, D, H/S, W/S) with D up to {MOST_DIM}."
        )
    if logits.dtype not in _HEAD_CODES or logits.dtype != descriptors.dtype:
        raise SuperPointError(
            f"heads are {logits.dtype} and {descriptors.dtype}; expected both float32, float16 or bfloat16."
        )
    return stride


def _zeros(nbytes: int) -> DeviceMemory:
    memory = DeviceMemory(nbytes)
    cuda.call("cudaMemset", memory.address, 0, nbytes)
    cuda.call("cudaDeviceSynchronize")  # a memset may be in flight when it returns, and streams do not wait for it
    return memory
