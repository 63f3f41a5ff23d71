"""The CUDA calls this package makes, each checked: memory, streams, graphs, arrays of other libraries.

On NVIDIA's own `cuda.bindings`, the runtime API, which shares the device's primary context with torch and CuPy.
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
"""cudaStreamLegacy: what libraries that name no stream work on."""

TO_DEVICE, TO_HOST = 1, 2
"""cudaMemcpyKind."""

BFLOAT16 = np.dtype("V2")
"""numpy has no bfloat16; this is what torch's CUDA interface calls it."""

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


def channels_last(shape: tuple[int, ...], pixel_pitch: int, itemsize: int) -> tuple[int, ...]:
    """Strides in bytes that show memory [B, H, W, pixel_pitch] as [B, C, H, W], what is behind the C channels left out.

    Args:
        shape: (B, C, H, W).
        pixel_pitch: values a pixel has in memory, C or more.
        itemsize: bytes of a value.
    """
    _, _, rows, columns = shape
    pixel = pixel_pitch * itemsize
    return (rows * columns * pixel, itemsize, columns * pixel, pixel)


# --------------------------------------------------------------------------------------------- other libraries' arrays


@dataclass(frozen=True)
class DeviceArray:
    """An array in GPU memory, for torch (`torch.as_tensor`, `torch.from_dlpack`), CuPy, JAX and the like.

    It is a view: what it shows is documented where it is made.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int
    owner: Any
    """Keeps the memory alive."""
    strides: tuple[int, ...] | None = None
    """Bytes from one value to the next along each axis, as numpy's; None: contiguous."""

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # No stream: the work behind it is done, or ordered by the caller's own stream.
        return {
            "data": (self.address, False),
            "shape": self.shape,
            "typestr": self.dtype.str,
            "strides": self.strides,
            "version": 3,
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_DLPACK_CUDA, self.device)

    def __dlpack__(self, *, stream: Any = None, **_: Any) -> Any:
        return _dlpack_capsule(self)


def view(source: Any, gaps: bool = False) -> DeviceArray:
    """An array of another library as a DeviceArray, without a copy.

    Args:
        source: anything with `__cuda_array_interface__` or a CUDA `__dlpack__`, not tracked by autograd.
        gaps: take what is not contiguous, too, and say how it lies (`strides`).

    Raises:
        SuperPointError: not in GPU memory, or with gaps between its values.
    """
    try:
        interface = getattr(source, "__cuda_array_interface__", None)
    except (TypeError, KeyError):  # torch: a type the interface has no name for, bfloat16 before 2.5
        interface = None
    if interface is None:
        return _from_dlpack(source, gaps)
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    strides = _strides(interface.get("strides"), shape, dtype.itemsize, gaps)
    return DeviceArray(int(interface["data"][0]), shape, dtype, call("cudaGetDevice"), source, strides)


def is_on_gpu(source: Any) -> bool:
    """Whether `view` is for it."""
    if isinstance(source, np.ndarray):
        return False
    if hasattr(type(source), "__dlpack_device__"):
        return bool(source.__dlpack_device__()[0] == _DLPACK_CUDA)
    return hasattr(source, "__cuda_array_interface__")


NOT_CONTIGUOUS = "the CUDA array is not contiguous; make it so (torch: .contiguous())."


def _strides(strides: Any, shape: tuple[int, ...], itemsize: int, gaps: bool) -> tuple[int, ...] | None:
    """Those of an array with gaps, where such are taken; None of a contiguous one."""
    if _contiguous(strides, shape, itemsize):
        return None
    if not gaps:
        raise SuperPointError(NOT_CONTIGUOUS)
    return tuple(strides)


def _contiguous(strides: Any, shape: tuple[int, ...], itemsize: int) -> bool:
    if strides is None:
        return True
    expected = itemsize
    for size, stride in reversed(list(zip(shape, strides))):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


# The structures of DLPack 0.8 (dlpack.h, github.com/dmlc/dlpack), which every library's __dlpack__ still speaks.
_DLPACK_CUDA = 2
_DLPACK_NAME = b"dltensor"
_DLPACK_KINDS = {"i": 0, "u": 1, "f": 2, "b": 6}
_DLPACK_BFLOAT = 4


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManagedTensor))
_DLManagedTensor._fields_ = [("tensor", _DLTensor), ("context", ctypes.c_void_p), ("deleter", _Deleter)]

_capsule_new = ctypes.pythonapi.PyCapsule_New
_capsule_new.restype, _capsule_new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

_exported: dict[int, Any] = {}
"""What a consumer still holds: address of the managed tensor -> everything it points to."""


def _release(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


_deleter = _Deleter(_release)


def _dlpack_capsule(array: DeviceArray) -> Any:
    if array.dtype.kind not in _DLPACK_KINDS:
        raise BufferError(f"DLPack has no {array.dtype}")
    sizes = (ctypes.c_int64 * len(array.shape))(*array.shape)
    code, itemsize = _DLPACK_KINDS[array.dtype.kind], array.dtype.itemsize
    steps = [stride // itemsize for stride in array.strides] if array.strides else None  # DLPack counts values
    strides = (ctypes.c_int64 * len(steps))(*steps) if steps else None
    tensor = _DLTensor(
        array.address, _DLPACK_CUDA, array.device, len(array.shape), code, 8 * itemsize, 1, sizes, strides, 0
    )
    managed = _DLManagedTensor(tensor, None, _deleter)
    _exported[ctypes.addressof(managed)] = (managed, sizes, array, strides)
    # Nobody took it: then it stays until the process ends, which no library known to us does.
    return _capsule_new(ctypes.addressof(managed), _DLPACK_NAME, None)


def _from_dlpack(source: Any, gaps: bool) -> DeviceArray:
    if not hasattr(type(source), "__dlpack__") or source.__dlpack_device__()[0] != _DLPACK_CUDA:
        raise SuperPointError(f"expected an array in GPU memory, got {type(source).__name__}.")
    capsule = source.__dlpack__(stream=LEGACY_STREAM)
    address = _capsule_pointer(capsule, _DLPACK_NAME)
    tensor = ctypes.cast(address, ctypes.POINTER(_DLManagedTensor)).contents.tensor
    kinds = {code: kind for kind, code in _DLPACK_KINDS.items()}
    is_bfloat16 = (tensor.code, tensor.bits) == (_DLPACK_BFLOAT, 16)
    if (tensor.code not in kinds and not is_bfloat16) or tensor.lanes != 1:
        raise SuperPointError("the CUDA array's type is unknown here; expected a float type or uint8.")
    dtype = BFLOAT16 if is_bfloat16 else np.dtype(f"{kinds[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[axis] for axis in range(tensor.ndim))
    steps = [tensor.strides[axis] * dtype.itemsize for axis in range(tensor.ndim)] if tensor.strides else None
    strides = _strides(steps, shape, dtype.itemsize, gaps)
    data = int(tensor.data or 0) + tensor.byte_offset
    return DeviceArray(data, shape, dtype, tensor.device_id, (source, capsule), strides)
