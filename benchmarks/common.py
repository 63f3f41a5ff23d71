"""What the benchmarks share: the checkpoint option, a photograph, and a way of timing."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable

import click
import cv2
import numpy as np

from superpoint_trt import packaged
from superpoint_trt.prove.benchmark import cpu_name

REST_S = 0.2


def weights_option(function: Callable) -> Callable:
    """`--weights`, by default the packaged ones. Real weights find a usual number of points; speed depends on it."""
    text = "Checkpoint.  [default: the default network, full]"
    return click.option("--weights", default=str(packaged.WEIGHTS), help=text)(function)


def photograph(height: int, width: int) -> np.ndarray:
    """scikit-image's astronaut, gray uint8."""
    from skimage import data

    gray = cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2GRAY)
    return cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA)


def alternate(runs: dict[str, Callable[[], object]], iterations: int, warm_up: int = 3) -> dict[str, np.ndarray]:
    """Milliseconds of each run. The runs take turns, so that drift of the machine affects all of them.

    Between two runs the machine rests, because the threads of the last session keep spinning for a while.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for iteration in range(warm_up + iterations):
        for name, function in runs.items():
            time.sleep(REST_S)
            started = time.perf_counter()
            function()
            if iteration >= warm_up:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def machine() -> str:
    """The processor, its cores, and Python."""
    return f"{cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def verdict(failed: list[str]) -> None:
    """Exit code 1 when a target is missed."""
    print("targets missed: " + "; ".join(failed) if failed else "all targets met")
    sys.exit(bool(failed))
