"""Shared by the benchmarks: a checkpoint, a photograph, and one way of timing."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import cv2
import numpy as np

from superpoint_trt.prove.benchmark import cpu_name

REST_S = 0.2
SHARED_WEIGHTS = Path(__file__).resolve().parents[2] / "shared/data/weights/superpoint_v6_int8deq.pth"


def weights_option(function: Callable) -> Callable:
    """`--weights`: speed does not depend on the values, but real ones find a real number of points."""
    default = str(SHARED_WEIGHTS) if SHARED_WEIGHTS.exists() else None
    return click.option("--weights", default=default, required=True, show_default=True, help="Checkpoint.")(function)


def photograph(height: int, width: int) -> np.ndarray:
    """scikit-image's astronaut, gray uint8."""
    from skimage import data

    gray = cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2GRAY)
    return cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA)


def alternate(runs: dict[str, Callable[[], object]], iterations: int, warm_up: int = 3) -> dict[str, np.ndarray]:
    """Milliseconds of each run, taken in turn so that drift of the machine hits all alike.

    Between two runs the machine rests: the threads of the last session spin for a while, at the next one's cost.
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
