"""CUDA C++ kernels, compiled at first use for the GPU at hand by NVRTC: no nvcc, no torch."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from superpoint_trt import cuda
from superpoint_trt.spec import SuperPointError

_THREADS = 256


def unit_range(pixels: int, unit: int, count: int, stream: cuda.Stream) -> None:
    """Queues the division of uint8 pixels by 255, in IEEE float32.

    Args:
        pixels: address of `count` uint8 on the GPU.
        unit: address of `count` float32.
        count: a multiple of 4.
        stream: where to queue.

    Raises:
        SuperPointError: NVRTC is missing, or the launch failed.
    """
    quads = count // 4
    launch(function("preprocess.cu", "unit_range"), -(-quads // _THREADS), stream, (pixels, unit), (quads,))


def launch(kernel: Any, blocks: int, stream: cuda.Stream, addresses: tuple[int, ...], numbers: tuple[int, ...]) -> None:
    """Queues one kernel that takes addresses, then 32-bit integers."""
    from cuda.bindings import driver

    values = (*addresses, *numbers)
    types = (*[ctypes.c_void_p] * len(addresses), *[ctypes.c_int] * len(numbers))
    shape = (blocks, 1, 1, _THREADS, 1, 1)
    _check(driver.cuLaunchKernel(kernel, *shape, 0, stream.address, (values, types), 0), "cuLaunchKernel")


def function(file: str, name: str) -> Any:
    """A kernel of one of this folder's files, for the current GPU; compiled once a process and GPU.

    Raises:
        SuperPointError: NVRTC is missing, or the source does not compile.
    """
    return _function(file, name, cuda.call("cudaGetDevice"))


@functools.lru_cache(maxsize=64)
def _function(file: str, name: str, device: int) -> Any:
    from cuda.bindings import driver

    image = _compile((Path(__file__).parent / file).read_bytes(), file, cuda.current_device().capability)
    cuda.call("cudaFree", 0)  # makes the runtime's context this thread's, if nothing has yet
    module = _check(driver.cuModuleLoadData(image), "cuModuleLoadData")
    return _check(driver.cuModuleGetFunction(module, name.encode()), "cuModuleGetFunction")


def _compile(source: bytes, file: str, capability: str) -> bytes:
    try:
        from cuda.bindings import nvrtc

        program = _check(nvrtc.nvrtcCreateProgram(source, file.encode(), 0, [], []), "nvrtcCreateProgram")
    except (ImportError, RuntimeError, OSError) as error:
        raise SuperPointError(
            f"compiling kernels needs NVRTC ({' '.join(str(error).split())}): pip install nvidia-cuda-nvrtc, of the "
            "driver's CUDA version (superpoint doctor says which)."
        ) from error
    options = [f"--gpu-architecture=sm_{capability[len('sm') :]}".encode()]
    (failed,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(failed):
        log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise SuperPointError(f"NVRTC does not compile {file} for {capability}: {log.decode(errors='replace')}")
    image = b" " * int(_check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize"))
    _check(nvrtc.nvrtcGetCUBIN(program, image), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(program)
    return image


def _check(result: Any, what: str) -> Any:
    error, *values = result
    if int(error):
        raise SuperPointError(f"{what} failed: {error}.")
    return values[0] if values else None
