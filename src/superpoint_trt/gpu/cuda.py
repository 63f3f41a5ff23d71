"""The CUDA calls of this package, each checked for errors: devices, memory, streams and graphs.

Uses the runtime API of NVIDIA's `cuda.bindings`, which shares the device's primary context with torch and CuPy.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import SuperPointError

LEGACY_STREAM = 1
"""cudaStreamLegacy: the stream of libraries that name none."""

TO_DEVICE, TO_HOST = 1, 2
"""cudaMemcpyKind."""

_ALIGNMENT = 256
"""Bytes. cudaMalloc guarantees this alignment, and TensorRT asks for it."""

_log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def runtime() -> Any:
    """The module `cuda.bindings.runtime`.

    Raises:
        SuperPointError: it is not installed, or does not load.
    """
    try:
        from cuda.bindings import runtime as module
    except ImportError as error:
        raise SuperPointError(
            f"running engines needs NVIDIA's cuda-bindings ({error}): pip install cuda-bindings, version 12 for a CUDA "
            "12 driver, 13 for CUDA 13 (superpoint doctor says which this machine has)."
        ) from None
    return module


def call(function: str, *arguments: Any) -> Any:
    """Calls a function of the CUDA runtime.

    Returns:
        Its value, or the tuple of its values.

    Raises:
        SuperPointError: it failed; the text is CUDA's own, and what to do where that is known.
    """
    error, *values = getattr(runtime(), function)(*arguments)
    if int(error):
        raise _failed(function, error)
    return values[0] if len(values) == 1 else tuple(values)


def driver() -> ctypes.CDLL | None:
    """The library of the NVIDIA driver; None if this machine has none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _failed(function: str, error: Any) -> SuperPointError:
    name = runtime().cudaGetErrorName(error)[1].decode()
    if name == "cudaErrorInsufficientDriver" and driver() is None:
        return SuperPointError("this machine has no NVIDIA driver, so engines cannot run here; run the .onnx.")
    text = runtime().cudaGetErrorString(error)[1].decode()
    return SuperPointError(f"{function} failed: {text} ({name}){_ADVICE.get(name, '')}.")


_ADVICE = {
    "cudaErrorInsufficientDriver": "; the NVIDIA driver is older than this CUDA: nvidia-smi says which CUDA it takes; "
    "install a newer driver, or the cuda-bindings of that version",
    "cudaErrorNoDevice": "; no NVIDIA GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES",
    "cudaErrorMemoryAllocation": "; the GPU is out of memory: close what else runs on it (nvidia-smi), or use smaller "
    "images or batches",
    "cudaErrorIllegalAddress": "; the GPU's state is lost for this process: start it anew, and please report this",
}


@dataclass(frozen=True)
class Device:
    """One GPU."""

    index: int
    name: str
    capability: str
    """"sm90", "sm87", ..."""
    processors: int = 1
    """Number of multiprocessors."""


def current_device() -> Device:
    """The calling thread's current GPU.

    Raises:
        SuperPointError: no driver or no GPU.
    """
    return device(call("cudaGetDevice"))


def device(index: int) -> Device:
    """The GPU of that number.

    Raises:
        SuperPointError: no driver, or no such GPU; the text lists the GPUs there are.
    """
    count = call("cudaGetDeviceCount")
    if index >= count:
        raise SuperPointError(f"device cuda:{index} was asked for, but this machine has {gpu_list()}.")
    properties = call("cudaGetDeviceProperties", index)
    capability = f"sm{properties.major}{properties.minor}"
    return Device(index, properties.name.decode(), capability, int(properties.multiProcessorCount))


def gpu_list() -> str:
    """The GPUs that CUDA sees, for messages: "only cuda:0 (NVIDIA H200)"; or why none is seen."""
    try:
        found = [device(index) for index in range(call("cudaGetDeviceCount"))]
    except SuperPointError as error:
        return f"no usable GPU ({str(error).rstrip('.')})"
    return f"only {', '.join(f'cuda:{one.index} ({one.name})' for one in found)}" if found else "no GPU"


class DeviceScope:
    """Makes one GPU the calling thread's current GPU inside `with`, and the caller's current again afterwards.

    On a machine with one GPU there is nothing to change, and nothing is done. One instance serves one thread at a
    time; it may be entered again inside itself.

    Args:
        index: number of the GPU.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self._is_only_gpu = call("cudaGetDeviceCount") == 1
        self._callers: list[int] = []

    def __enter__(self) -> None:
        if not self._is_only_gpu:
            self._callers.append(int(call("cudaGetDevice")))
            call("cudaSetDevice", self.index)

    def __exit__(self, *_: object) -> None:
        if not self._is_only_gpu:
            call("cudaSetDevice", self._callers.pop())


class Stream:
    """An ordered queue of GPU work, independent of the default stream."""

    def __init__(self) -> None:
        self.handle: Any = call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking)
        self.address = int(self.handle)
        self._event = call("cudaEventCreateWithFlags", runtime().cudaEventDisableTiming)

    def wait_for(self, stream: int) -> None:
        """Orders work queued here from now on after the work already queued on another stream.

        Args:
            stream: the other stream's handle.
        """
        call("cudaEventRecord", self._event, stream)
        call("cudaStreamWaitEvent", self.handle, self._event, 0)

    def signal(self, stream: int) -> None:
        """Orders work queued on another stream from now on after the work already queued here.

        Args:
            stream: the other stream's handle.
        """
        call("cudaEventRecord", self._event, self.handle)
        call("cudaStreamWaitEvent", stream, self._event, 0)

    def synchronize(self) -> None:
        """Waits until all queued work is done.

        Raises:
            SuperPointError: that work failed.
        """
        (error,) = runtime().cudaStreamSynchronize(self.handle)
        if error:
            raise _failed("cudaStreamSynchronize", error)

    def close(self) -> None:
        """Frees the stream."""
        call("cudaEventDestroy", self._event)
        call("cudaStreamDestroy", self.handle)

    @contextmanager
    def capture(self) -> Iterator[Callable[[], Graph]]:
        """Records the work queued inside `with` instead of running it.

        Yields:
            A function that gives the graph; call it after the `with`.

        Raises:
            SuperPointError: some of the work cannot be recorded. The stream stays usable.
        """
        # Thread-local: an allocation by another thread does not end the recording.
        call("cudaStreamBeginCapture", self.handle, runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        recorded: list[Any] = []
        try:
            yield lambda: Graph(recorded[0])
        except BaseException:
            runtime().cudaStreamEndCapture(self.handle)  # unchecked: its error would hide the first
            raise
        recorded.append(call("cudaStreamEndCapture", self.handle))


class Graph:
    """Recorded GPU work that is launched in one call."""

    def __init__(self, graph: Any) -> None:
        try:
            self._executable = call("cudaGraphInstantiate", graph, 0)
        finally:
            call("cudaGraphDestroy", graph)

    def launch(self, stream: Stream) -> None:
        """Queues the work."""
        (error,) = runtime().cudaGraphLaunch(self._executable, stream.handle)
        if error:
            raise _failed("cudaGraphLaunch", error)

    def close(self) -> None:
        """Frees the graph."""
        call("cudaGraphExecDestroy", self._executable)


class Replay:
    """Repeated GPU work. The first run queues it plainly, which prepares it; the second records it as a CUDA graph.

    Args:
        stream: the stream that the work is queued on.
        may_capture: whether the work may be recorded; if not, every run queues it plainly.
        name: of the work, for the log.
    """

    def __init__(self, stream: Stream, may_capture: bool, name: str) -> None:
        self._stream, self._may_capture, self._name = stream, may_capture, name
        self._ready = False
        self.graph: Graph | None = None

    def run(self, queue: Callable[[], None]) -> None:
        """Queues the work.

        Args:
            queue: queues the work plainly; the same work at each call. It is not kept after the call.
        """
        if self.graph is None and self._may_capture and self._ready:
            self._capture(queue)
        if self.graph:
            self.graph.launch(self._stream)
        else:
            queue()
        self._ready = True

    def _capture(self, queue: Callable[[], None]) -> None:
        try:
            with self._stream.capture() as recorded:
                queue()
            self.graph = recorded()
        except SuperPointError as error:
            self._may_capture = False
            _log.warning("no CUDA graph for %s, each run is queued anew: %s", self._name, error)

    def forget(self) -> None:
        """Frees the graph; the next run is plain."""
        if self.graph:
            self.graph.close()
        self.graph, self._ready = None, False


class _Memory:
    """Memory that CUDA allocates; freed with the object."""

    _allocate: str
    _free: str

    def __init__(self, nbytes: int) -> None:
        self.nbytes = max(nbytes, 1)
        self.address = int(call(self._allocate, self.nbytes))

    def __del__(self) -> None:
        address = getattr(self, "address", 0)
        if address and _alive():
            getattr(runtime(), self._free)(address)


class DeviceMemory(_Memory):
    """Memory on the GPU."""

    _allocate, _free = "cudaMalloc", "cudaFree"


class PinnedMemory(_Memory):
    """Page-locked memory on the host. The GPU copies to and from it at full speed."""

    _allocate, _free = "cudaMallocHost", "cudaFreeHost"


def _alive() -> bool:
    """Whether the interpreter is running. While it shuts down, modules are gone and memory is freed anyway."""
    return sys is not None and sys.meta_path is not None and not sys.is_finalizing()


class PinnedPool:
    """Page-locked blocks of one size that arrays borrow. A block returns when the last array on it is gone.

    Args:
        nbytes: size of a block.
        most: largest number of blocks.
    """

    def __init__(self, nbytes: int, most: int) -> None:
        self._nbytes = nbytes
        self._free = [PinnedMemory(nbytes)]
        self._left_to_make = most - 1

    def lend(self) -> _Loan | None:
        """A block, as something that `np.asarray` makes a uint8 array of; None while all blocks are lent."""
        if not self._free and self._left_to_make:
            self._left_to_make -= 1
            self._free.append(PinnedMemory(self._nbytes))
        return _Loan(self._free) if self._free else None


class _Loan:
    """Holds a block while arrays use it: every array on the block keeps this object alive."""

    def __init__(self, free: list[PinnedMemory]) -> None:
        self._free = free
        self._memory = free.pop()
        self.address = self._memory.address
        self.__array_interface__ = {
            "data": (self.address, False),
            "shape": (self._memory.nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        if hasattr(self, "_memory"):
            self._free.append(self._memory)


def copy(to: int, source: int, nbytes: int, kind: int, stream: Stream) -> None:
    """Queues a copy between two addresses; `kind` is TO_DEVICE or TO_HOST."""
    call("cudaMemcpyAsync", to, source, nbytes, runtime().cudaMemcpyKind(kind), stream.handle)


def pinned_array(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array in page-locked host memory, which the GPU reads three times as fast as ordinary memory.

    Use it for images that are filled in again and again, such as a camera's frames, and pass it to `infer`.
    """
    pool = PinnedPool(math.prod(shape) * np.dtype(dtype).itemsize, 1)
    array: NDArray[Any] = np.ndarray(shape, dtype, np.asarray(pool.lend()))
    return array


def aligned(nbytes: int) -> int:
    """Rounds a size up to a multiple of 256 bytes, so that data behind it is aligned for the GPU."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
