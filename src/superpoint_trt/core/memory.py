"""Tells whether an exception means that the machine's memory ran out. Libraries have many exceptions for it."""

from __future__ import annotations

import errno

OUT_OF_MEMORY = "memory ran out: close other programs, or give smaller images, a smaller batch or fewer --threads."

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
    "resource temporarily unavailable",
    "unable to create type object",
    "error return without exception set",
)
"""What libraries, pybind11 (the last but one) and Python itself (the last) say in an ImportError, an OSError or another
exception."""


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
