"""What the CUDA decode and the one-graph pipeline take, on the GPU at hand.

    python benchmarks/decode_gpu.py --weights CONV_RELU.safetensors --v6 V6.safetensors --engines DIR
        [--only build|latency|throughput] [--budget SECONDS] [--torch-python PYTHON] [--json OUT.json]

1. decode alone: events around replays of a graph of it, singly and 20 in a row, rows to the GPU and to the host, in
   five rounds with the other parts of the graph
2. one image, host uint8 -> host keypoints and float16 descriptors, N = 1024, and the parts of that way; then from an
   engine whose heads are NCHW ("linear heads"), not channels-last as by default
3. the same in PyTorch, by benchmarks/torch_decode.py in a process of its own
4. images/s of `extract_many` from arrays in memory, by batch, size and N, as far as --budget goes

Medians and p95. Images are rotated, so that no run sees the one before.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from superpoint_trt import SuperPoint
from superpoint_trt.convert import engine
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.image import synthetic_photograph
from superpoint_trt.core.types import OutputType, Precision
from superpoint_trt.gpu import cuda
from superpoint_trt.run.lanes import Slot

N = 1024
IN_A_ROW = 20
ROUNDS = 5
DIFFERENT = 8
SHIFTS = (("conv1a",), ("conv1a", "conv1b", "conv2a", "conv2b", "conv3a", "conv3b", "conv4a", "conv4b"))
NUMBERS = (512, 1024, 2048, 4096)
VGA = (480, 640)
TABLE: list[tuple[tuple[int, int], int, Any, Any, Any, float]] = [
    # (size, largest batch of the engine, batches, N, runs in flight, seconds to build it), what matters most first
    (VGA, 1, (1,), (N,), (1, 2, 3, 4), 0),
    (VGA, 8, (8,), (N,), (2, 3), 45),
    (VGA, 8, (1, 2, 4), (N,), (3,), 0),
    (VGA, 32, (16, 32), (N,), (2, 3), 80),
    (VGA, 8, (8,), (512, 2048, 4096), (3,), 0),
    (VGA, 1, (1,), (512, 2048, 4096), (3,), 0),
    ((1080, 1920), 1, (1,), (N, 4096), (3,), 35),
    ((240, 320), 8, (1, 8), (512, N), (3,), 35),
    ((720, 1280), 1, (1,), (N, 4096), (3,), 35),
    ((240, 320), 32, (16, 32), (512, N, 2048, 4096), (3,), 60),
    ((720, 1280), 8, (1, 2, 4, 8), NUMBERS, (3,), 90),
    ((1080, 1920), 4, (1, 2, 4), NUMBERS, (3,), 90),
    (VGA, 32, (16, 32), (512, 2048, 4096), (3,), 80),
]
"""Of throughput."""


def figures(times_ms: Any) -> dict[str, float]:
    """Median and p95."""
    median, p95 = np.percentile(times_ms, [50, 95])
    return {"median": round(float(median), 4), "p95": round(float(p95), 4)}


def pictures(height: int, width: int) -> list[np.ndarray]:
    """Different images of one size, uint8."""
    picture = synthetic_photograph(height, width)
    return [np.ascontiguousarray(np.roll(picture, 24 * index, axis=1)) for index in range(DIFFERENT)]


class Builder:
    """Engines by name, built once and kept with the timing cache."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, weights: str, size_hw: tuple[int, int], batch: int, linear: bool = False, **folding: Any) -> Path:
        """Where an engine is, or will be."""
        told = "".join(f"+{'+'.join(value) if isinstance(value, tuple) else name}" for name, value in folding.items())
        stem = Path(weights).stem + told + ("" if linear else "+channels_last")
        return self._folder / f"decode-{stem}-{size_hw[0]}x{size_hw[1]}-{batch}.engine"

    def heads(
        self, weights: str, size_hw: tuple[int, int] = VGA, batch: int = 1, linear: bool = False, **folding: Any
    ) -> Path:
        """A static fp16 heads engine of one size, for batches up to `batch`; `linear`: its heads as NCHW.

        `folding`: what becomes of BatchNorm, as ExportOptions has it.
        """
        path = self.path(weights, size_hw, batch, linear, **folding)
        if not path.exists():
            model = export(
                weights,
                path.with_suffix(".onnx"),
                ExportOptions(OutputType.HEADS, *size_hw, max_batch_size=batch, **folding),
            )
            options = engine.BuildOptions(
                Precision.FP16,
                workspace_gib=8.0,
                max_batch_size=batch,
                timing_cache=self._folder / "timing.cache",
                linear_heads=linear,
            )
            built = engine.build(model, path, options)
            print(f"built {path.name} in {built.build['seconds']} s", flush=True)
        return path


class Timer:
    """Events around work on one stream."""

    def __init__(self, stream: cuda.Stream) -> None:
        self.stream = stream
        self._events = [cuda.call("cudaEventCreate") for _ in range(2)]

    def ms(self, work: Callable[[], None]) -> float:
        """Of the GPU."""
        cuda.call("cudaEventRecord", self._events[0], self.stream.handle)
        work()
        cuda.call("cudaEventRecord", self._events[1], self.stream.handle)
        self.stream.synchronize()
        return float(cuda.call("cudaEventElapsedTime", *self._events))


def captured(stream: cuda.Stream, work: Callable[[], None], times: int = 1) -> cuda.Graph:
    """Some runs of the work as one graph."""
    with stream.capture() as recorded:
        for _ in range(times):
            work()
    return recorded()


def replayed(timer: Timer, graphs: dict[str, tuple[cuda.Graph, int]], calls: int) -> dict[str, dict[str, Any]]:
    """Name -> (graph, how many runs it holds) -> ms of a run, by events, in rounds that take the graphs in turn."""
    spans: dict[str, list[list[float]]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, (graph, times) in graphs.items():
            took = [
                timer.ms(lambda graph=graph: graph.launch(timer.stream)) / times for _ in range(10 + calls // ROUNDS)
            ]
            spans[name].append(took[10:])
    return {
        name: {**figures(np.concatenate(rounds)), "rounds": [round(float(np.median(one)), 4) for one in rounds]}
        for name, rounds in spans.items()
    }


def decode_alone(superpoint: SuperPoint, images: list[np.ndarray], calls: int) -> dict[str, Any]:
    """The decode of the last image's heads, and the other parts of the graph, by events."""
    for image in images:
        superpoint.extract(image)
    with superpoint._runner.lanes.borrow(1) as (slot,):
        return lane_alone(slot, images, calls)


def lane_alone(slot: Slot, images: list[np.ndarray], calls: int) -> dict[str, Any]:
    """The parts of the run of a slot's latest lane, by events."""
    lane = slot.lanes[-1]
    timer = Timer(slot.stream)
    lane.submit(lane.placed_wh)  # the job names a block of the host
    lane.collect()
    parts = {"receive": lane.queue_input, "network": lane.queue_network, "decode": lane.queue_decode}
    graphs = {
        name if times == 1 else f"{name}, {times} in a row": (captured(slot.stream, work, times), times)
        for name, work in parts.items()
        for times in (1, IN_A_ROW)
    }
    found = replayed(timer, {**graphs, "whole graph": (lane.graph, 1)}, calls)
    lane.on_device((images[0].shape[1], images[0].shape[0]), 0)  # the job names rows on the GPU
    decodes = {name: graph for name, graph in graphs.items() if name.startswith("decode")}
    for name, value in replayed(timer, decodes, calls).items():
        found[name.replace("decode", "decode, rows on the GPU")] = value
    for graph, _ in graphs.values():
        graph.close()
    return found


def end_to_end(superpoint: SuperPoint, images: list[np.ndarray], calls: int) -> dict[str, float]:
    """Wall time of `extract`."""
    times = []
    for index in range(calls + 50):
        started = time.perf_counter()
        superpoint.extract(images[index % len(images)])
        times.append((time.perf_counter() - started) * 1e3)
    return figures(times[50:])


def throughput(superpoint: SuperPoint, images: list[np.ndarray], batch: int, in_flight: int, seconds: float) -> float:
    """Images/s of `extract_many`, after a warm-up."""

    def stream(until: Callable[[], bool]) -> Iterator[np.ndarray]:
        while not until():
            yield from images

    warm = iter(range(batch * in_flight * 4 // len(images) + 2))
    for _ in superpoint.extract_many(stream(lambda: next(warm, None) is None), batch, in_flight):
        pass
    started, count = time.perf_counter(), 0
    for _ in superpoint.extract_many(stream(lambda: time.perf_counter() - started > seconds), batch, in_flight):
        count += 1
    return count / (time.perf_counter() - started)


def in_torch(python: str, weights: str, calls: int) -> str:
    """The PyTorch process's lines."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")}
    command = [python, str(Path(__file__).with_name("torch_decode.py")), "--weights", weights, "--calls", str(calls)]
    return subprocess.run(command, env=clean, capture_output=True, text=True).stdout


class Report:
    """What was measured, printed and written as it comes: an early end loses nothing, and a next run goes on."""

    def __init__(self, path: str | None, seconds: float | None) -> None:
        self._path = Path(path) if path else None
        self._end = time.monotonic() + seconds if seconds else float("inf")
        self.values: dict[str, Any] = json.loads(self._path.read_text()) if self._path and self._path.exists() else {}

    def add(self, group: str, name: str, value: Any) -> None:
        """One figure."""
        self.values.setdefault(group, {})[name] = value
        shown = f"{value['median']:9.4f} ms  p95 {value['p95']:9.4f}" if isinstance(value, dict) else value
        if isinstance(value, dict) and "rounds" in value:
            shown += f"  rounds {' '.join(f'{one:.4f}' for one in value['rounds'])}"
        print(f"  {group}: {name:<44} {shown}", flush=True)
        if self._path:
            self._path.write_text(json.dumps(self.values, indent=1))

    def has(self, seconds: float) -> bool:
        """Whether so much time is left."""
        return time.monotonic() + seconds < self._end


def latency(report: Report, builder: Builder, name: str, checkpoint: str, calls: int, **folding: Any) -> None:
    """One image of 640x480."""
    path, images = builder.heads(checkpoint, **folding), pictures(*VGA)
    with SuperPoint(path, max_keypoints=N, half_descriptors=True) as superpoint:
        print(f"{name}: {superpoint.runtime}; 640x480, N {N}, {len(superpoint.extract(images[0]))} found")
        report.add(name, "end to end", end_to_end(superpoint, images, calls))
        for part, value in decode_alone(superpoint, images, calls).items():
            report.add(name, part, value)
        report.add(name, "end to end, again", end_to_end(superpoint, images, calls))
    with SuperPoint(path, max_keypoints=N) as superpoint:
        report.add(name, "end to end, float32 descriptors", end_to_end(superpoint, images, calls))
    with SuperPoint(path, max_keypoints=N, half_descriptors=True, subpixel=not superpoint.options.subpixel) as other:
        places = "sub-pixel" if other.options.subpixel else "whole pixels"
        report.add(name, f"end to end, {places}", end_to_end(other, images, calls))
        for part, value in decode_alone(other, images, calls).items():
            if part.startswith("decode"):
                report.add(name, f"{part}, {places}", value)
    with SuperPoint(path, half_descriptors=True) as superpoint:
        report.add(name, "end to end, all keypoints", end_to_end(superpoint, images, calls // 2))
        report.add(name, "all keypoints", len(superpoint.extract(images[0])))


def linear_heads(report: Report, builder: Builder, name: str, checkpoint: str, calls: int) -> None:
    """What heads as NCHW take instead, for the comparison."""
    images = pictures(*VGA)
    with SuperPoint(builder.heads(checkpoint, linear=True), max_keypoints=N, half_descriptors=True) as superpoint:
        report.add(name, "end to end, linear heads", end_to_end(superpoint, images, calls))
        for part, value in decode_alone(superpoint, images, calls).items():
            report.add(name, f"{part}, linear heads", value)


def shift_channels(report: Report, builder: Builder, v6: str, shifts: tuple[str, ...], calls: int) -> None:
    """The network with BatchNorm in the next convolutions (ExportOptions.shift_channels)."""
    images = pictures(*VGA)
    with SuperPoint(builder.heads(v6, shift_channels=shifts), max_keypoints=N, half_descriptors=True) as superpoint:
        took = decode_alone(superpoint, images, calls)
        name = f"shift channels of {' '.join(shifts)}"
        report.add("v6", f"network, {name}", took["network"])
        report.add("v6", f"end to end, {name}", end_to_end(superpoint, images, calls))


def images_per_second(
    report: Report, path: Path, size_hw: tuple[int, int], batches: Any, numbers: Any, lanes: Any, seconds: float
) -> None:
    """A corner of the throughput table."""
    images = pictures(*size_hw)
    for number in numbers:
        with SuperPoint(path, max_keypoints=number, half_descriptors=True) as superpoint:
            for batch in batches:
                for in_flight in lanes:
                    name = f"{size_hw[1]}x{size_hw[0]}, N {number}, batch {batch}, {in_flight} in flight, engine up to "
                    name += path.stem.rsplit("-", 1)[1]
                    if name in report.values.get("images/s", {}):
                        continue
                    if not report.has(2 * seconds):
                        return
                    report.add("images/s", name, round(throughput(superpoint, images, batch, in_flight, seconds), 1))


@click.command()
@click.option("--weights", required=True, help="Checkpoint without BatchNorm.")
@click.option("--v6", help="Checkpoint of the v6 layout.")
@click.option("--engines", "folder", required=True, help="Folder for engines and the timing cache; kept.")
@click.option("--calls", default=500, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Of each entry of the throughput table.")
@click.option("--only", type=click.Choice(["build", "latency", "throughput"]), help="A part.")
@click.option("--budget", type=float, help="Seconds in all; what would not fit is left out.")
@click.option("--shifts", is_flag=True, help="v6 with shift channels, too.")
@click.option("--torch-python", help="A Python with torch, for the comparison.")
@click.option("--json", "json_path")
def main(weights, v6, folder, calls, seconds, only, budget, shifts, torch_python, json_path) -> None:
    """Builds what is not there yet, then times it, what matters most first."""
    if shifts and not v6:
        raise click.UsageError("--shifts is of --v6")
    builder, report = Builder(Path(folder)), Report(json_path, budget)
    if only == "build":
        for checkpoint in filter(None, (weights, v6)):
            builder.heads(checkpoint)
            builder.heads(checkpoint, linear=True)
        if v6:
            builder.heads(v6, fold_batchnorm=True)
        for carried in SHIFTS if shifts else ():
            builder.heads(v6, shift_channels=carried)
        for size, most, *_, build in TABLE:
            if report.has(build):
                builder.heads(weights, size, most)
        return
    if only != "throughput":
        for name, checkpoint in {"Conv+ReLU": weights, "v6": v6}.items():
            if checkpoint is not None:
                latency(report, builder, name, checkpoint, calls)
                linear_heads(report, builder, name, checkpoint, calls)
        if v6 and report.has(35):
            latency(report, builder, "v6, BatchNorm folded", v6, calls, fold_batchnorm=True)
        for carried in SHIFTS if shifts else ():
            if report.has(35):
                shift_channels(report, builder, v6, carried, calls // 2)
        if torch_python:
            report.add("torch", "lines", in_torch(torch_python, weights, calls))
    if only == "latency":
        return
    for size, most, batches, numbers, lanes, build in TABLE:
        if report.has(build if not builder.path(weights, size, most).exists() else 0):
            images_per_second(report, builder.heads(weights, size, most), size, batches, numbers, lanes, seconds)


if __name__ == "__main__":
    main()
