"""Memory that was freed is kept for the next image."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

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
