"""Arrays in GPU memory, shared without a copy with torch, CuPy, JAX and others (DLPack, CUDA array interface)."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu.cuda import LEGACY_STREAM, call

BFLOAT16 = np.dtype("V2")
"""numpy has no bfloat16; torch's CUDA array interface names it so."""


def channels_last(shape: tuple[int, ...], pixel_pitch: int, itemsize: int) -> tuple[int, ...]:
    """Strides in bytes that show memory [B, H, W, pixel_pitch] as an array [B, C, H, W].

    Args:
        shape: (B, C, H, W).
        pixel_pitch: values that a pixel has in memory; C, or more if it is padded.
        itemsize: bytes of a value.
    """
    _, _, rows, columns = shape
    pixel = pixel_pitch * itemsize
    return (rows * columns * pixel, itemsize, columns * pixel, pixel)


@dataclass(frozen=True)
class DeviceArray:
    """An array in GPU memory, for torch (`torch.as_tensor`, `torch.from_dlpack`), CuPy, JAX and others.

    It is a view; the function that returns it says how long the memory stays valid.
    """

    address: int
    """Of the first value."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int
    """Number of the GPU."""
    owner: Any
    """The object that keeps the memory alive."""
    strides: tuple[int, ...] | None = None
    """Bytes from one value to the next along each axis, as in numpy; None: contiguous."""

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # No stream: the work that fills the array is done, or the caller's own stream orders it.
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
    """Another library's array as a DeviceArray, without a copy.

    Args:
        source: anything with `__cuda_array_interface__` or a CUDA `__dlpack__`, not tracked by autograd.
        gaps: whether arrays that are not contiguous are taken, too; their `strides` say how they lie.

    Raises:
        SuperPointError: the array is not in GPU memory, or not contiguous.
    """
    try:
        interface = getattr(source, "__cuda_array_interface__", None)
    except (TypeError, KeyError):  # torch before 2.5: the interface has no name for bfloat16
        interface = None
    if interface is None:
        return _from_dlpack(source, gaps)
    dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
    strides = _strides(interface.get("strides"), shape, dtype.itemsize, gaps)
    return DeviceArray(int(interface["data"][0]), shape, dtype, call("cudaGetDevice"), source, strides)


def is_on_gpu(source: Any) -> bool:
    """Whether the array is in GPU memory, so that `view` takes it."""
    if isinstance(source, np.ndarray):
        return False
    if hasattr(type(source), "__dlpack_device__"):
        return bool(source.__dlpack_device__()[0] == _DLPACK_CUDA)
    return hasattr(source, "__cuda_array_interface__")


NOT_CONTIGUOUS = "the CUDA array is not contiguous; make it contiguous (torch: .contiguous())."


def _strides(strides: Any, shape: tuple[int, ...], itemsize: int, gaps: bool) -> tuple[int, ...] | None:
    """The strides of an array that is not contiguous; None for a contiguous one."""
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


# The structures of DLPack 0.8 (dlpack.h, github.com/dmlc/dlpack), which every library's __dlpack__ still supports.
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
"""Tensors that another library still holds: address of the managed tensor -> everything it points to."""


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
    # A capsule that nobody consumes stays until the process ends; every known library consumes it.
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
