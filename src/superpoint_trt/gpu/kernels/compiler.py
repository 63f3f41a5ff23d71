"""Compiles CUDA C++ with NVRTC, and keeps the machine code on disk for each source, GPU and version."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from superpoint_trt.core.files import cache_folder, write_atomically
from superpoint_trt.core.types import SuperPointError

_DIGEST_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


def cubin(
    source: bytes, file: str, capability: str, defines: Sequence[str] = (), driver: int = 0, fresh: bool = False
) -> bytes:
    """Compiles a source, or takes its machine code from the cache.

    Args:
        source: CUDA C++ that includes nothing.
        file: the source's name, for the compiler's messages.
        capability: of the GPU: "sm90", ...
        defines: macros, "NAME=VALUE" each.
        driver: version of the driver that will load the machine code.
        fresh: compile even if the cache has an entry, because the entry is unusable.

    Raises:
        SuperPointError: NVRTC is missing, or the source does not compile.
    """
    options = [f"--gpu-architecture=sm_{capability[len('sm') :]}", *(f"--define-macro={define}" for define in defines)]
    nvrtc = _nvrtc()
    versions = f"nvrtc {_check(nvrtc.nvrtcVersion(), 'nvrtcVersion')}, driver {driver}"
    entry = _entry(b"\0".join([source, *(text.encode() for text in (file, *options, versions))]))
    found = None if fresh or entry is None else _read(entry)
    if found is None:
        found = _compile(nvrtc, source, file, options)
        if entry is not None:
            _keep(entry, found)
    return found


def _entry(key: bytes) -> Path | None:
    try:
        return cache_folder() / f"{hashlib.sha256(key).hexdigest()}.cubin"
    except (SuperPointError, RuntimeError) as error:  # not writable, or no home
        _log.info("compiled kernels are not kept: %s", error)
        return None


def _read(entry: Path) -> bytes | None:
    """An entry's machine code; None if the entry is missing or damaged."""
    try:
        data = entry.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _keep(entry: Path, code: bytes) -> None:
    """Writes an entry. If that fails, logs why: every process then compiles again, which costs only time."""
    try:
        write_atomically(entry, hashlib.sha256(code).digest() + code)
    except (OSError, SuperPointError) as error:
        _log.info("compiled kernels are not kept: %s", error)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise SuperPointError(
            f"compiling kernels needs NVRTC ({' '.join(str(error).split())}): pip install nvidia-cuda-nvrtc, of the "
            "driver's CUDA version (superpoint doctor says which)."
        ) from error
    return nvrtc


def _compile(nvrtc: Any, source: bytes, file: str, options: Sequence[str]) -> bytes:
    program = _check(nvrtc.nvrtcCreateProgram(source, file.encode(), 0, [], []), "nvrtcCreateProgram")
    try:
        words = [option.encode() for option in options]
        (failed,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
        if int(failed):
            log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
            nvrtc.nvrtcGetProgramLog(program, log)
            said = log.decode(errors="replace").strip("\0 \n")
            raise SuperPointError(f"NVRTC does not compile {file} with {' '.join(options)}: {said}")
        code = b" " * int(_check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize"))
        _check(nvrtc.nvrtcGetCUBIN(program, code), "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


def _check(result: Any, what: str) -> Any:
    error, *values = result
    if int(error):
        raise SuperPointError(f"{what} failed: {error}.")
    return values[0] if len(values) == 1 else tuple(values)
