"""Times models in one way for every backend: the stages and the wall time of image -> keypoints, models in turn."""

from __future__ import annotations

import io
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt._version import __version__
from superpoint_trt.core.device import ALL_DEVICES
from superpoint_trt.core.files import PathLike, write_atomically
from superpoint_trt.core.image import synthetic_photograph
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.progress import Progress
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.run.backends import RuntimeInfo, devices_for
from superpoint_trt.run.extractor import SuperPoint

STAGES = ("preprocess", "host_to_device", "network", "decode", "device_to_host", "other", "wall")

REST_S = 0.2
"""Pause before a model's turn: the threads of another session spin for a while after its last run and take CPU time."""

CALLS_PER_TURN = 5

METHOD = (
    f"Models take turns of {CALLS_PER_TURN} calls after {REST_S} s of rest, warm-up calls first and left out. "
    "Each call is made twice: once as a whole (wall: image arrays in memory -> Keypoints) and once step by step "
    "(preprocess, the copies to and from a device, network, decode; on a device each is waited for; other: what that "
    "call takes besides, to free memory and in Python). Times by time.perf_counter; a transfer that does not exist is "
    "null, not 0."
)

MOST_BATCH, MOST_ITERATIONS = 1024, 1_000_000


@dataclass(frozen=True)
class BenchOptions:
    """What is timed, and how often."""

    batch: int = 1
    """Images per call."""
    size_hw: tuple[int, int] | None = None
    """(height, width) of the image in px; None: the size that the model was exported for."""
    iterations: int = 100
    """Timed calls of each model."""
    warm_up: int = 5
    """Calls before those, which are not timed."""

    def __post_init__(self) -> None:
        for name, value, most in (("batch", self.batch, MOST_BATCH), ("iterations", self.iterations, MOST_ITERATIONS)):
            if not 1 <= value <= most:
                raise SuperPointError(f"{name} is {value}; expected 1 to {most}.")


@dataclass(frozen=True)
class StageTimes:
    """Times of one stage in ms."""

    median: float
    p95: float
    p99: float


@dataclass
class ModelTimes:
    """One model's figures."""

    model: str
    runtime: RuntimeInfo
    description: dict[str, str]
    """The model's metadata, as `ModelDescription.to_metadata` writes it."""
    size_hw: tuple[int, int]
    """(height, width) of the image in px."""
    keypoints: int
    """Found in one image."""
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES}, repr=False)
    """Stage -> time of every timed call; empty if the model has no such stage."""

    def summary(self, stage: str) -> StageTimes | None:
        """Median, p95 and p99 of a stage; None if the model has no such stage."""
        times = self.times_ms[stage]
        if not times:
            return None
        median, p95, p99 = np.percentile(times, [50, 95, 99])
        return StageTimes(float(median), float(p95), float(p99))


@dataclass(frozen=True)
class Machine:
    """What the figures were taken on."""

    cpu: str
    cores: int | None
    gpu: str | None
    """Name and driver version by nvidia-smi; None without it."""
    system: str
    python: str
    versions: dict[str, str]
    """Package -> version, of the packages that matter and are installed."""
    threads: int | None
    """CPU threads asked for; None: the runtime's own choice."""
    time: str
    """ISO 8601, UTC."""


@dataclass
class BenchReport:
    """Figures and what they were taken on."""

    machine: Machine
    options: BenchOptions
    models: list[ModelTimes]
    left_out: list[str] = field(default_factory=list)
    """One line for each model and device of "all" that do not go together, with the reason."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "machine": asdict(self.machine),
            "method": METHOD,
            "options": asdict(self.options),
            "models": [self._model_to_json(times) for times in self.models],
        }

    def _model_to_json(self, times: ModelTimes) -> dict[str, Any]:
        summaries = {stage: times.summary(stage) for stage in STAGES}
        return {
            "model": times.model,
            "runtime": str(times.runtime),
            "description": times.description,
            "size_hw": list(times.size_hw),
            "keypoints": times.keypoints,
            "stages_ms": {stage: asdict(summary) if summary else None for stage, summary in summaries.items()},
            "images_per_s": self.images_per_s(times),
        }

    def images_per_s(self, times: ModelTimes) -> float:
        """Images per second, from the median wall time."""
        return self.options.batch * 1e3 / float(np.median(times.times_ms["wall"]))


def bench(
    models: Sequence[PathLike],
    options: BenchOptions | None = None,
    image: NDArray[Any] | None = None,
    device: str | Sequence[str] = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    allow_host_code: bool = False,
) -> BenchReport:
    """Times one or more models.

    Args:
        models: model files that `SuperPoint` opens.
        options: batch, size, iterations.
        image: (H, W) or (H, W, 3) uint8 to find keypoints in, scaled to the size; None: `synthetic_photograph`.
        device: where the models run, as `SuperPoint` takes it. Of several, each model runs on each. `ALL_DEVICES`: on
            each device of this machine that takes it; what does not go together is left out and named.
        threads: CPU threads of each model; None: the runtime's own choice.
        progress: called with (calls done, all calls).
        allow_host_code: run the code that version-compatible engines carry.

    Raises:
        SuperPointError: there is no model, or one cannot take the batch or size. Raised before anything is timed.
    """
    options = options or BenchOptions()
    if not models:
        raise SuperPointError("there is no model to time; give at least one.")
    with ExitStack() as stack:
        opened, left_out = _opened(models, [device] if isinstance(device, str) else device, threads, allow_host_code)
        for _, superpoint in opened:
            stack.enter_context(superpoint)
        runs = [_Run(superpoint, name, options, image) for name, superpoint in opened]
        total = (options.warm_up + options.iterations) * len(runs)
        for start in range(0, options.warm_up + options.iterations, CALLS_PER_TURN):
            calls = range(start, min(start + CALLS_PER_TURN, options.warm_up + options.iterations))
            for turn, run in enumerate(runs):
                time.sleep(REST_S)
                for call in calls:
                    run.call(measured=call >= options.warm_up)
                if progress:
                    progress(start * len(runs) + len(calls) * (turn + 1), total)
        return BenchReport(_machine(threads), options, [run.times for run in runs], left_out)


def _opened(
    models: Sequence[PathLike], devices: Sequence[str], threads: int | None, allow_host_code: bool
) -> tuple[list[tuple[str, SuperPoint]], list[str]]:
    """Opens each model on each of its devices.

    Returns:
        Names and models; and a line for each device of "all" that does not take a model that another device takes.
    """
    opened: list[tuple[str, SuperPoint]] = []
    left_out: list[str] = []
    for model in models:
        refused: list[SuperPointError] = []
        asked = [(there, device == ALL_DEVICES) for device in devices for there in _devices(model, device)]
        for where, may_refuse in asked:
            try:
                opened.append((str(model), _open(model, where, threads, allow_host_code)))
            except SuperPointError as error:
                refused.append(error)
                if not may_refuse or len(refused) == len(asked):
                    for _, superpoint in opened:
                        superpoint.close()
                    raise refused[0] from error
                left_out.append(f"{where}: {error}")
    return opened, left_out


def _devices(model: PathLike, device: str) -> list[str]:
    return devices_for(model) if device == ALL_DEVICES else [device]


class _Run:
    """One opened model and the images it is timed on."""

    def __init__(self, superpoint: SuperPoint, name: str, options: BenchOptions, image: NDArray[Any] | None) -> None:
        import cv2

        model = superpoint.description
        own = (model.height_px, model.width_px)
        size = options.size_hw or ((own[0], own[1]) if own[0] and own[1] else (480, 640))
        if not model.dynamic and size != own:
            raise SuperPointError(
                f"{name} takes {own[0]}x{own[1]} only, not {size[0]}x{size[1]}; export it with --dynamic."
            )
        if options.batch > model.max_batch_size:
            raise SuperPointError(
                f"{name} takes batches up to {model.max_batch_size}, not {options.batch}; export it with "
                f"--max-batch-size {options.batch}."
            )
        picture = synthetic_photograph(*size) if image is None else cv2.resize(image, (size[1], size[0]))
        # Each image is shifted: the same image many times would come from the caches.
        self._images = [np.ascontiguousarray(np.roll(picture, 8 * index, axis=1)) for index in range(options.batch)]
        self._superpoint = superpoint
        found = len(superpoint.extract(self._images[0]))
        self.times = ModelTimes(name, superpoint.runtime, model.to_metadata(), size, found)

    def call(self, measured: bool) -> None:
        """Makes the call twice, as a whole and step by step; keeps the times if measured."""
        started = time.perf_counter()
        self._superpoint.extract_batch(self._images)
        between = time.perf_counter()
        steps_s = self._superpoint.extract_timed(self._images)
        other_s = time.perf_counter() - between - sum(steps_s.values())
        if measured:
            for stage, seconds in {**steps_s, "other": other_s, "wall": between - started}.items():
                self.times.times_ms[stage].append(seconds * 1e3)


def _open(model: PathLike, device: str, threads: int | None, allow_host_code: bool) -> SuperPoint:
    try:
        return SuperPoint(model, device=device, threads=threads, allow_host_code=allow_host_code)
    except SuperPointError as error:
        raise SuperPointError(f"{model}: {error}") from error


def to_markdown(report: BenchReport) -> str:
    """The report as a Markdown table, one row for each model and device, and a line that says how it was measured."""
    columns = ["model", "runs on", "computed in", "network, ms", "image to keypoints, ms", "images/s", "keypoints"]
    rows = [columns, ["---"] * len(columns)]
    for times in report.models:
        info = times.runtime
        rows.append(
            [
                Path(times.model).name,
                f"{info.backend}, {info.device.split(' (')[0]}",
                info.precision,
                *(f"{np.median(ms):.1f} ({min(ms):.1f})" for ms in map(times.times_ms.get, ("network", "wall")) if ms),
                f"{report.images_per_s(times):.1f}",
                str(times.keypoints),
            ]
        )
    table = "\n".join(f"| {' | '.join(_cell(value) for value in row)} |" for row in rows)
    return f"{table}\n\n{_conditions(report)}\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _conditions(report: BenchReport) -> str:
    """In a sentence, what the figures were taken on."""
    machine, options = report.machine, report.options
    sizes = dict.fromkeys(f"{times.size_hw[1]}x{times.size_hw[0]}" for times in report.models)
    threads = f"{machine.threads} threads" if machine.threads else "each runtime's own number of threads"
    where = f"{machine.cpu} ({machine.cores} cores)" + (f", {machine.gpu}" if machine.gpu else "")
    return (
        f"{', '.join(sizes)}, batch {options.batch}; median (fastest) of {options.iterations} calls in turn; {where}, "
        f"{threads}; "
        f"superpoint-trt {machine.versions['superpoint-trt']}, {machine.time[:10]}."
    )


PLOT_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".pdf")


def check_plot(path: PathLike) -> None:
    """Checks before the timing that the plot can be written after it.

    Raises:
        SuperPointError: matplotlib is not installed, or cannot write files of that ending.
    """
    if Path(path).suffix.lower() not in PLOT_SUFFIXES:
        raise SuperPointError(f"{path}: a plot's name ends in {', '.join(PLOT_SUFFIXES)}.")
    if not util.find_spec("matplotlib"):
        raise SuperPointError(f"the plot needs matplotlib: {install_hint('report')}.")


def plot(report: BenchReport, path: PathLike) -> Path:
    """Draws the medians of the stages as bars, one line per model, and the median wall time as a mark.

    Raises:
        SuperPointError: matplotlib is not installed, cannot write files of that ending, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.6 * len(report.models)), layout="constrained")
    axes: Any = figure.subplots()
    names = [
        f"{Path(times.model).name}, {times.runtime.device.split(' (')[0]}\n{report.images_per_s(times):.1f} images/s"
        for times in report.models
    ]
    lines = np.arange(len(names))
    left = np.zeros(len(names))
    for stage in STAGES[:-1]:
        summaries = [times.summary(stage) for times in report.models]
        widths = np.array([summary.median if summary else 0.0 for summary in summaries])
        if widths.any():
            axes.barh(lines, widths, left=left, label=stage.replace("_", " "))
            left += widths
    walls = [float(np.median(times.times_ms["wall"])) for times in report.models]
    axes.plot(walls, lines, "k|", markersize=22, label="wall")
    axes.set_yticks(lines, names)
    axes.set_xlabel(f"ms per call, batch {report.options.batch}, median of {report.options.iterations}")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=6, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:].lower(), dpi=130, bbox_inches="tight")
    return write_atomically(path, buffer.getvalue())


def _machine(threads: int | None) -> Machine:
    versions = {"superpoint-trt": __version__}
    for name in ("numpy", "opencv-python-headless", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "tensorrt"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count(),
        gpu=_gpu_name(),
        system=platform.platform(),
        python=platform.python_version(),
        versions=versions,
        threads=threads,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _gpu_name() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None


def cpu_name() -> str:
    """The processor's model name where Linux tells it; otherwise what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
