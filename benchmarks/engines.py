"""Times engines on the GPU at hand: the bare network, with its copies, and what `infer` of a host image adds.

    python benchmarks/engines.py --weights CHECKPOINT --engines FOLDER [--batch 1 --batch 8] [--precision fp16 ...]

All engines in one run, taken in turn; medians over --calls calls each. The bare network is the same plan's CUDA graph:
launch and wait. "With copies" adds one copy each way from and to page-locked memory. `infer` starts from an ordinary
array and ends with arrays the caller keeps.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import click
import numpy as np
from common import weights_option

from superpoint_trt.convert import engine
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.image import synthetic_photograph
from superpoint_trt.core.types import OutputType, Precision
from superpoint_trt.gpu import cuda
from superpoint_trt.run.backends.tensorrt import TensorRTBackend

SIZE_HW = (480, 640)
CALLS_PER_TURN = 50


class Timed:
    """One engine and its figures in ms."""

    def __init__(self, path: Path, batch: int) -> None:
        self.name = path.stem
        self.backend = TensorRTBackend(path)
        picture = synthetic_photograph(*SIZE_HW)
        pictures = np.stack([np.roll(picture, 8 * index, axis=1) for index in range(batch)])[:, None]
        self.uint8 = np.ascontiguousarray(pictures)
        self.image = pictures.astype(np.float32) / np.float32(255)
        self.pinned = cuda.pinned_array(self.image.shape, np.float32)
        self.pinned[:] = self.image
        for _ in range(20):
            self.backend.infer(self.image)
        self.runner = self.backend.runners[-1]
        if self.runner.graph is None:
            raise click.ClickException(f"{path} runs without a CUDA graph")
        self.out = cuda.PinnedMemory(self.runner.execution.memory.nbytes)
        self.times: dict[str, list[float]] = {}

    def _network(self) -> None:
        self.runner.graph.launch(self.backend.stream)
        self.backend.stream.synchronize()

    def _with_copies(self) -> None:
        runner, stream = self.runner, self.backend.stream
        source = self.pinned.__array_interface__["data"][0]
        cuda.copy(runner.input_address, source, self.pinned.nbytes, cuda.TO_DEVICE, stream)
        runner.graph.launch(stream)
        cuda.copy(self.out.address, runner.execution.memory.address, self.out.nbytes, cuda.TO_HOST, stream)
        stream.synchronize()

    def turn(self) -> None:
        """Some calls of each way."""
        steps = {
            "network": self._network,
            "with copies": self._with_copies,
            "infer uint8": lambda: self.backend.infer(self.uint8),
            "infer float32": lambda: self.backend.infer(self.image),
            "infer pinned": lambda: self.backend.infer(self.pinned),
        }
        for name, step in steps.items():
            for _ in range(3):
                step()
            for _ in range(CALLS_PER_TURN):
                started = time.perf_counter()
                step()
                self.times.setdefault(name, []).append((time.perf_counter() - started) * 1e3)

    def figures(self) -> dict[str, float]:
        """Medians."""
        return {name: round(statistics.median(times), 4) for name, times in self.times.items()}


@click.command()
@weights_option
@click.option("--engines", "folder", required=True, help="Folder for engines and the timing cache; kept.")
@click.option("--type", "kinds", multiple=True, default=[kind.value for kind in OutputType])
@click.option("--precision", "precisions", multiple=True, default=["fp32", "tf32", "fp16"])
@click.option("--batch", "batches", type=int, multiple=True, default=[1])
@click.option("--calls", default=300, show_default=True)
@click.option("--json", "json_path")
def main(weights, folder, kinds, precisions, batches, calls, json_path) -> None:
    """Builds what is not there yet, then times all of it."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True, parents=True)
    timed = []
    for kind in kinds:
        for precision in precisions:
            for batch in batches:
                path = folder / f"bench-{Path(weights).stem}-{kind}-{precision}-{batch}.engine"
                if not path.exists():
                    settings = ExportOptions(OutputType(kind), *SIZE_HW, max_batch_size=batch)
                    model = export(weights, path.with_suffix(".onnx"), settings)
                    options = engine.BuildOptions(
                        Precision(precision), workspace_gib=4.0, timing_cache=folder / "timing.cache"
                    )
                    built = engine.build(model, path, options)
                    print(f"built {path.name} in {built.build['seconds']} s", flush=True)
                timed.append(Timed(path, batch))
    for _ in range(-(-calls // CALLS_PER_TURN)):
        for one in timed:
            one.turn()
    print(f"{timed[0].backend.runtime}; median of {calls} calls, ms; {SIZE_HW[1]}x{SIZE_HW[0]}")
    columns = list(timed[0].figures())
    print(f"{'engine':<46}" + "".join(f"{column:>15}" for column in columns))
    for one in timed:
        print(f"{one.name:<46}" + "".join(f"{value:>15.4f}" for value in one.figures().values()))
    if json_path:
        Path(json_path).write_text(json.dumps({one.name: one.figures() for one in timed}, indent=1))


if __name__ == "__main__":
    main()
