"""The CUDA calls this package makes, each checked: memory, streams, graphs, arrays of other libraries.

On NVIDIA's own `cuda.bindings`, the runtime API, which shares the device's primary context with torch and CuPy.
"""

from __future__ import annotations

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
"""cudaStreamLegacy: what libraries that name no stream work on."""

TO_DEVICE, TO_HOST = 1, 2
"""cudaMemcpyKind."""

_ALIGNMENT = 256
"""Bytes; what cudaMalloc guarantees and TensorRT asks for."""

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
    """Calls one function of the CUDA runtime and hands back its value, or the tuple of its values.

    Raises:
        SuperPointError: it failed; the text is CUDA's own, with what to do where we know.
    """
    error, *values = getattr(runtime(), function)(*arguments)
    if int(error):
        raise _failed(function, error)
    return values[0] if len(values) == 1 else tuple(values)


def _failed(function: str, error: Any) -> SuperPointError:
    name = runtime().cudaGetErrorName(error)[1].decode()
    text = runtime().cudaGetErrorString(error)[1].decode()
    return SuperPointError(f"{function} failed: {text} ({name}){_ADVICE.get(name, '')}.")


_ADVICE = {
    "cudaErrorInsufficientDriver": "; the NVIDIA driver is missing or older than this CUDA: nvidia-smi says which CUDA "
    "it takes; install a newer driver, or the cuda-bindings of that version",
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
    """Multiprocessors."""


def current_device() -> Device:
    """The GPU that work of this thread goes to.

    Raises:
        SuperPointError: no driver or no GPU.
    """
    index = call("cudaGetDevice")
    properties = call("cudaGetDeviceProperties", index)
    capability = f"sm{properties.major}{properties.minor}"
    return Device(index, properties.name.decode(), capability, int(properties.multiProcessorCount))


class Stream:
    """An ordered queue of GPU work, independent of the default stream."""

    def __init__(self) -> None:
        self.handle: Any = call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking)
        self.address = int(self.handle)
        self._event = call("cudaEventCreateWithFlags", runtime().cudaEventDisableTiming)

    def wait_for(self, stream: int) -> None:
        """Whatever is queued here from now on runs after what is queued on another stream (a handle) by now."""
        call("cudaEventRecord", self._event, stream)
        call("cudaStreamWaitEvent", self.handle, self._event, 0)

    def signal(self, stream: int) -> None:
        """The other way round: the other stream's next work runs after what is queued here by now."""
        call("cudaEventRecord", self._event, self.handle)
        call("cudaStreamWaitEvent", stream, self._event, 0)

    def synchronize(self) -> None:
        """Waits until everything queued here is done; errors of that work come up here."""
        (error,) = runtime().cudaStreamSynchronize(self.handle)
        if error:
            raise _failed("cudaStreamSynchronize", error)

    def close(self) -> None:
        """Frees stream and event."""
        call("cudaEventDestroy", self._event)
        call("cudaStreamDestroy", self.handle)

    @contextmanager
    def capture(self) -> Iterator[Callable[[], Graph]]:
        """Records instead of running what is queued inside; the yielded function, called afterwards, gives the graph.

        Raises:
            SuperPointError: something inside cannot be recorded. The stream is usable again.
        """
        # Thread-local: another thread's allocation must not spoil it.
        call("cudaStreamBeginCapture", self.handle, runtime().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        recorded: list[Any] = []
        try:
            yield lambda: Graph(recorded[0])
        except BaseException:
            runtime().cudaStreamEndCapture(self.handle)  # its own error would hide the first
            raise
        recorded.append(call("cudaStreamEndCapture", self.handle))


class Graph:
    """Recorded GPU work, launched as one."""

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
    """Work that is queued over and over: plainly the first time, which readies it, then as one CUDA graph.

    Args:
        stream: where.
        may_capture: whether to record at all.
        name: of the work, for the log.
    """

    def __init__(self, stream: Stream, may_capture: bool, name: str) -> None:
        self._stream, self._may_capture, self._name = stream, may_capture, name
        self._ready = False
        self.graph: Graph | None = None

    def run(self, queue: Callable[[], None]) -> None:
        """Queues the work.

        Args:
            queue: queues it plainly; the same work each time. It is not kept, so it may belong to this object's owner.
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
    """Memory of CUDA's, freed with the object."""

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
    """On the GPU."""

    _allocate, _free = "cudaMalloc", "cudaFree"


class PinnedMemory(_Memory):
    """On the host and page-locked: copies to and from the GPU run at full speed."""

    _allocate, _free = "cudaMallocHost", "cudaFreeHost"


def _alive() -> bool:
    """Whether the interpreter still is: at its end its modules are gone, and the process's memory goes anyway."""
    return sys is not None and sys.meta_path is not None and not sys.is_finalizing()


class PinnedPool:
    """Page-locked blocks of one size, lent to arrays: a block comes back when the last array on it is gone."""

    def __init__(self, nbytes: int, most: int) -> None:
        self._nbytes = nbytes
        self._free = [PinnedMemory(nbytes)]
        self._unmade = most - 1

    def lend(self) -> _Loan | None:
        """A block as a uint8 array-like (`np.asarray`); None while all are lent."""
        if not self._free and self._unmade:
            self._unmade -= 1
            self._free.append(PinnedMemory(self._nbytes))
        return _Loan(self._free) if self._free else None


class _Loan:
    """Owns a block as numpy sees it, and so lives as long as any array on it."""

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
    """A host array in page-locked memory: the GPU reads it directly, three times as fast as any other.

    Fill it again and again (a camera's frames, say) and hand it to `infer`.
    """
    pool = PinnedPool(math.prod(shape) * np.dtype(dtype).itemsize, 1)
    array: NDArray[Any] = np.ndarray(shape, dtype, np.asarray(pool.lend()))
    return array


def aligned(nbytes: int) -> int:
    """Rounded up, so that what follows starts where the GPU wants it."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
