"""What an exception says of the memory, what a limit leaves, and that freed memory is kept for the next image."""

from __future__ import annotations

import ast
import platform
import resource
import subprocess
import sys

import pytest

from superpoint_trt.core.memory import address_space_left, ran_out_of_memory, reached_limit


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch.so: failed to map segment from shared object"),
        ImportError("ITopKLayer: PyType_Ready failed: MemoryError: <EMPTY MESSAGE>"),
        SystemError("<built-in function compile> returned NULL without setting an exception"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_ran_out(error):
    assert ran_out_of_memory(error)
    outer = ValueError("the file cannot be read")
    outer.__cause__ = error
    assert ran_out_of_memory(outer)


@pytest.mark.parametrize("error", [ValueError("no such layer"), RuntimeError("CUDA: bad_alloc"), OSError(2, "no file")])
def test_memory_did_not_run_out(error):
    assert not ran_out_of_memory(error)


def test_what_a_limit_leaves():
    """A child may take 3 GB: a GB of zeros that are never touched takes 1 GB of them."""
    code = """
from superpoint_trt.core.memory import address_space_left, reached_limit
before = address_space_left()
kept = bytearray(1 << 30)
print(before, address_space_left(), reached_limit())
kept = None
kept = bytearray(address_space_left() - (16 << 20))
kept = None
print(address_space_left() > 1 << 30, reached_limit())
"""
    limit = 3 << 30
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    first, second = done.stdout.decode().splitlines()
    assert second == "True True"
    before, after, reached = map(ast.literal_eval, first.split())
    assert not reached
    assert 2 << 30 < before < limit
    assert abs(before - after - (1 << 30)) < 16 << 20


def test_nothing_limits_it():
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("this shell limits the address space")
    assert address_space_left() is None
    assert not reached_limit()


NEW_PAGES = """
import resource
import numpy as np
from superpoint_trt.core.memory import keep_freed_memory

{first}
def one_image():
    return [np.ones((480, 640), np.float32) for _ in range(6)]

for _ in range(3):
    one_image()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
one_image()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory by rules of their own")
def test_an_image_takes_no_new_pages_from_the_system():
    """In a process of its own: what was freed before in this one would count, too."""
    without, kept = (
        int(subprocess.check_output([sys.executable, "-c", NEW_PAGES.format(first=first)]))
        for first in ("", "keep_freed_memory()")
    )
    assert kept < 20 < without
