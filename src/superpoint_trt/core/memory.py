"""Memory of the process: whether it ran out, which libraries say by many exceptions, and keeping what was freed."""

from __future__ import annotations

import errno
from pathlib import Path

OUT_OF_MEMORY = "memory ran out: close other programs, or give smaller images, a smaller batch or fewer --threads."

MAYBE_OUT_OF_MEMORY = "this shell limits memory (ulimit -v), and too little was left, which may be the reason"

NEARLY_NOTHING = 160 << 20
"""Bytes. A new thread asks for up to 128 MiB, its heap in glibc; what asks for more at once names the reason itself."""

_SIGNS = (
    "failed to map segment",
    "cannot allocate memory",
    "can't alloc",
    "unable to allocate",
    "failed to allocate memory",
    "insufficient memory",
    "bad_alloc",
    "bad allocation",
    "can't start new thread",
    "cannot create thread",
    "posixthread",
    "resource temporarily unavailable",
    "unable to create type object",
    "error return without exception set",
    "without setting an exception",
    "memoryerror",
)
"""What libraries, pybind11 and Python say in an ImportError, an OSError or another exception."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, means that the machine's memory ran out.

    The memory of a GPU does not count: what ran out there is said by the error itself.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, MemoryError) or getattr(cause, "errno", None) == errno.ENOMEM:
            return True
        text = str(cause).lower()
        if "cuda" not in text and any(sign in text for sign in _SIGNS):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def address_space_left(at_worst: bool = False) -> int | None:
    """Bytes of address space that this process may still take, or could have taken when it had most (`at_worst`).

    None where nothing limits it (`ulimit -v`) or tells.
    """
    try:
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most == resource.RLIM_INFINITY:
            return None
        field = b"VmPeak:" if at_worst else b"VmSize:"
        status = Path("/proc/self/status").read_bytes()
        return max(0, most - 1024 * int(status.split(field)[1].split()[0]))
    except (ImportError, OSError):  # Windows; a system without /proc
        return None


def reached_limit() -> bool:
    """Whether this process has had nearly all its address space, so that any error may come of it."""
    left = address_space_left(at_worst=True)
    return left is not None and left < NEARLY_NOTHING


_KEPT_MIB = 31


def keep_freed_memory() -> None:
    """Lets glibc keep the memory of freed arrays for the next image, up to 62 MiB. Without glibc nothing changes.

    At first glibc gives memory back whenever some 256 KiB are free. Each image then gets new pages from the system,
    about 1,500 at 640x480, which is up to a tenth of a small network's processor time. The largest block that was ever
    freed, up to 32 MiB, raises that limit (mallopt(3), M_MMAP_THRESHOLD). So one is freed here, untouched.
    """
    import numpy as np  # here: whether memory ran out must be known where numpy does not load

    np.empty(_KEPT_MIB << 20, np.uint8)
