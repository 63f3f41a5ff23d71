"""CUDA C++ kernels. NVRTC compiles them for the current GPU at first use, without nvcc or torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.kernels.compiler import cubin

THREADS = 256
"""Usual number of threads in a block."""

Argument = Union[int, float, "ctypes._SimpleCData[Any]"]
"""A kernel's argument. A ctypes value is passed as it is, an int as a 32-bit int, a float as float32."""


def unit_range(pixels: int, unit: int, count: int, stream: cuda.Stream) -> None:
    """Queues the division of uint8 pixels by 255, in IEEE float32.

    Args:
        pixels: address of `count` uint8 values on the GPU.
        unit: address of the `count` float32 results on the GPU.
        count: number of pixels, a multiple of 4.
        stream: the stream to queue on.

    Raises:
        SuperPointError: NVRTC is missing, or the launch failed.
    """
    quads = count // 4
    launch(function("preprocess.cu", "unit_range"), (blocks(quads),), stream, (address(pixels), address(unit), quads))


def blocks(threads: int) -> int:
    """Number of blocks that hold that many threads."""
    return -(-threads // THREADS)


def address(place: int) -> ctypes.c_void_p:
    """A pointer argument."""
    return ctypes.c_void_p(place)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    stream: cuda.Stream | int,
    arguments: Sequence[Argument],
    threads: int = THREADS,
) -> None:
    """Queues one kernel.

    Args:
        kernel: from `function`.
        grid: blocks along x, y and z; missing ones are 1.
        stream: a Stream, or another library's handle.
        arguments: in the kernel's order.
        threads: threads in a block.

    Raises:
        SuperPointError: the launch failed.
    """
    from cuda.bindings import driver

    values = [_as_ctypes(argument) for argument in arguments]
    # The driver copies the values before it returns.
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    handle = stream.address if isinstance(stream, cuda.Stream) else stream
    sides = (*grid, 1, 1)[:3]
    result = driver.cuLaunchKernel(kernel, *sides, threads, 1, 1, 0, handle, ctypes.addressof(pointers), 0)
    _check(result, "cuLaunchKernel")


def _as_ctypes(argument: Argument) -> ctypes._SimpleCData[Any]:
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int(argument) if isinstance(argument, int) else argument


def function(file: str, name: str, defines: tuple[str, ...] = ()) -> Any:
    """A kernel for the current GPU, compiled or loaded once for each process and GPU.

    Args:
        file: name of a .cu file in this folder.
        name: the kernel's name.
        defines: macros to compile the file with, "NAME=VALUE" each.

    Raises:
        SuperPointError: NVRTC is missing, or the source does not compile.
    """
    module = _module(file, defines, cuda.call("cudaGetDevice"))
    from cuda.bindings import driver

    return _check(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction")


@functools.lru_cache(maxsize=64)
def _module(file: str, defines: tuple[str, ...], device: int) -> Any:
    from cuda.bindings import driver

    source, capability = (Path(__file__).parent / file).read_bytes(), cuda.current_device().capability
    version = int(cuda.call("cudaDriverGetVersion"))
    cuda.call("cudaFree", 0)  # makes the runtime's context this thread's, if nothing has yet
    error, module = driver.cuModuleLoadData(cubin(source, file, capability, defines, version))
    if int(error):  # the driver refuses the machine code from the cache
        image = cubin(source, file, capability, defines, version, fresh=True)
        module = _check(driver.cuModuleLoadData(image), "cuModuleLoadData")
    return module


def _check(result: Any, what: str) -> Any:
    error, *values = result
    if int(error):
        raise SuperPointError(f"{what} failed: {error}.")
    return values[0] if values else None
