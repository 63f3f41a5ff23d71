"""Runs COLMAP's long steps, verification and mapping, in a process of their own.

COLMAP looks at no signal while it works; of a map of 11 photographs that is up to 23 s. A process can be ended at once:
by Ctrl-C, and when the process that began it has ended.
"""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from superpoint_trt.core.files import one_line
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import SuperPointError

SEED = 0
"""Of COLMAP's random sampling."""
FEWEST_IMAGES = 3
"""Images of a map that is kept beside a larger one."""


class MapKind(str, enum.Enum):
    """COLMAP's ways to make a map."""

    INCREMENTAL = "incremental"
    """Adds one image after another."""
    GLOBAL = "global"
    """Places all images at once (GLOMAP): faster for many images."""


@dataclass(frozen=True)
class ColmapSteps:
    """What is to be done; it is sent to the process as JSON."""

    database: str
    """File with keypoints and matches."""
    images: str
    """Folder of the images."""
    models: str
    """Folder that is there, for the maps."""
    count: int
    """Images in the database."""
    verify_px: float
    """Largest distance of a match from the geometry of its pair."""
    map: str | None
    """A `MapKind`; None: only verification."""
    refine_camera: bool
    """Whether focal length and distortion are changed."""


def run_steps(steps: ColmapSteps, tell: PhaseProgress) -> None:
    """Runs COLMAP in another process, and waits for its end. An exception, Ctrl-C for example, ends that process.

    Args:
        steps: what is to be done.
        tell: is told each phase.

    Raises:
        SuperPointError: COLMAP failed.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *sys.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # so that Ctrl-C reaches only this process, which then ends that one
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        try:
            with suppress(BrokenPipeError):  # it has ended; its exit code tells
                process.stdin.write(json.dumps(asdict(steps)) + "\n")
                process.stdin.flush()
            for message in map(json.loads, process.stdout):
                if "error" in message:
                    raise SuperPointError(message["error"])
                tell(message["phase"], message["done"], message["total"])
            code = process.wait()
        finally:
            process.kill()
    if code:
        killed = " (killed; is there too little memory?)" if code == -9 else ""
        raise SuperPointError(f"COLMAP ended with exit code {code}{killed}; SUPERPOINT_COLMAP_LOG=1 shows its log.")


_START = f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import main; main()"
"""The same modules as here, wherever they come from."""


def import_pycolmap() -> ModuleType:
    """The module pycolmap.

    Raises:
        SuperPointError: it is not installed, or too old.
    """
    try:
        import pycolmap
    except ImportError as error:
        raise SuperPointError(f"maps need pycolmap, on Python 3.10 or newer: {install_hint('colmap')}.") from error
    module: ModuleType = pycolmap
    if not hasattr(module, "geometric_verification"):
        version = getattr(module, "__version__", "")
        raise SuperPointError(f"pycolmap {version} is too old; expected 4 or newer: {install_hint('colmap')}.")
    return module


@contextmanager
def quiet(colmap: ModuleType) -> Iterator[None]:
    """Keeps COLMAP's log, hundreds of lines, off the terminal. SUPERPOINT_COLMAP_LOG=1 shows it."""
    level = colmap.logging.minloglevel
    if not os.environ.get("SUPERPOINT_COLMAP_LOG"):
        colmap.logging.minloglevel = int(colmap.logging.FATAL.value)  # its errors come as exceptions, too
    try:
        yield
    finally:
        colmap.logging.minloglevel = level


# ----------------------------------------------------------------------------------------------- in the other process


def main() -> None:
    """Reads steps from standard input, and runs them. Writes a line of JSON to standard output for each progress."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what COLMAP may print is no message

    def say(**message: object) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    line = sys.stdin.readline()
    if not line:  # the process that began this one was interrupted at once
        return
    steps = ColmapSteps(**json.loads(line))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        colmap = import_pycolmap()
        with quiet(colmap):
            tell = _told(say)
            _verify(colmap, steps, tell)
            if steps.map is not None:
                _map(colmap, steps, tell)
    except SuperPointError as error:
        say(error=str(error))


def _end_with_parent() -> None:
    """Ends this process when the one that began it has ended, and standard input with it."""
    sys.stdin.read()
    os._exit(1)


def _told(say: Any) -> PhaseProgress:
    return lambda phase, done, total: say(phase=phase, done=done, total=total)


def _verify(colmap: ModuleType, steps: ColmapSteps, tell: PhaseProgress) -> None:
    """Finds the geometry of every pair, which decides which matches are used."""
    tell("verifying geometry", 0, 0)
    geometry = colmap.TwoViewGeometryOptions()
    geometry.ransac.max_error = steps.verify_px
    geometry.ransac.random_seed = SEED
    colmap.set_random_seed(SEED)
    try:
        colmap.geometric_verification(steps.database, two_view_geometry_options=geometry)
    except (RuntimeError, ValueError) as error:
        raise SuperPointError(f"COLMAP's geometric verification failed: {one_line(error)}.") from error


def _map(colmap: ModuleType, steps: ColmapSteps, tell: PhaseProgress) -> None:
    """Runs COLMAP's mapper, which writes its models."""
    tell("mapping", 0, steps.count)
    colmap.set_random_seed(SEED)
    try:
        if steps.map == MapKind.GLOBAL:
            colmap.global_mapping(steps.database, steps.images, steps.models, _global(colmap, steps.refine_camera))
            return
        placed = iter(range(1, 1 << 62))
        colmap.incremental_mapping(
            steps.database,
            steps.images,
            steps.models,
            options=_incremental(colmap, steps.refine_camera),
            initial_image_pair_callback=lambda: tell("mapping", next(placed) + 1, steps.count),
            next_image_callback=lambda: tell("mapping", min(next(placed) + 1, steps.count), steps.count),
        )
    except (RuntimeError, ValueError) as error:
        raise SuperPointError(f"COLMAP's {steps.map} mapping failed: {one_line(error)}.") from error


def _incremental(colmap: ModuleType, refine: bool) -> Any:
    options = colmap.IncrementalPipelineOptions()
    options.random_seed = SEED
    options.min_model_size = FEWEST_IMAGES
    options.ba_refine_focal_length = options.ba_refine_extra_params = refine
    return options


def _global(colmap: ModuleType, refine: bool) -> Any:
    options = colmap.GlobalPipelineOptions()
    options.random_seed = SEED
    adjustment = options.mapper.bundle_adjustment
    adjustment.refine_focal_length = adjustment.refine_extra_params = refine
    return options
