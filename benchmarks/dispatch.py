"""What a version-compatible engine costs: in the TensorRT that built it, and in the dispatch or lean runtime.

    python benchmarks/dispatch.py build --engines FOLDER     # in the full TensorRT, 8.6 say, with its lean runtime
    python benchmarks/dispatch.py run --engines FOLDER       # in tensorrt_dispatch or tensorrt_lean, on the same GPU

`build` makes each engine twice, as usual and version-compatible, runs both, and keeps outputs and figures beside them.
`run` opens the version-compatible ones, compares their outputs with the kept ones bit for bit, and prints the table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from common import verdict, weights_option

from superpoint_trt.core.image import synthetic_photograph
from superpoint_trt.prove.benchmark import BenchOptions, bench
from superpoint_trt.run.backends import Outputs, open_backend

SIZE_HW = (480, 640)
ENGINES = (("heads", "fp16"), ("heads", "fp32"), ("dense", "fp16"), ("keypoints", "fp16"))
IMAGES = 4


@click.group()
def main() -> None:
    """Version-compatible engines."""


@main.command()
@click.option("--engines", required=True, help="Folder for engines, outputs and figures.")
@click.option("--level", type=int, default=3, show_default=True, help="Optimization level; 1 builds in seconds.")
@weights_option
def build(engines: str, level: int, weights: str) -> None:
    """Build, run and keep, in the full TensorRT."""
    from superpoint_trt.convert.engine import BuildOptions
    from superpoint_trt.convert.engine import build as build_engine
    from superpoint_trt.convert.export import ExportOptions, export
    from superpoint_trt.core.types import OutputType, Precision

    folder = Path(engines)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, precision in ENGINES:
        onnx = export(weights, folder / f"{kind}.onnx", ExportOptions(OutputType(kind), *SIZE_HW))
        figures = {}
        for name, compatible in (("usual", False), ("compatible", True)):
            engine = folder / f"{kind}-{precision}.{name}.engine"
            options = BuildOptions(
                Precision(precision),
                workspace_gib=4.0,
                timing_cache=folder / "timing.cache",
                optimization_level=level,
                version_compatible=compatible,
            )
            built = build_engine(onnx, engine, options)
            print(
                f"{engine.name}: {engine.stat().st_size / 1e6:.1f} MB, built in {built.build['seconds']} s", flush=True
            )
            figures[name] = _timed(engine)
        np.savez(folder / f"{kind}-{precision}.npz", **_kept(folder / f"{kind}-{precision}.compatible.engine"))
        (folder / f"{kind}-{precision}.json").write_text(json.dumps(figures, indent=1))


@main.command()
@click.option("--engines", required=True, help="The folder that `build` filled.")
def run(engines: str) -> None:
    """Run and compare, in the dispatch or lean runtime."""
    folder, failed = Path(engines), []
    columns = ("engine", "MB", "as usual", "version-compatible", "here", "opens here, s", "outputs")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    notes = []
    for kind, precision in ENGINES:
        name = f"{kind}-{precision}"
        engine = folder / f"{name}.compatible.engine"
        figures = json.loads((folder / f"{name}.json").read_text())
        here, kept = _timed(engine), np.load(folder / f"{name}.npz")
        found = _kept(engine)
        differ = [key for key in kept.files if not np.array_equal(kept[key], found[key])]
        failed += [f"{name}: {key} differs" for key in differ]
        times = [f"{one['network_ms']:.3f} / {one['wall_ms']:.3f}" for one in (*figures.values(), here)]
        outputs = f"differ: {', '.join(differ)}" if differ else "equal to the bit"
        cells = (name, f"{engine.stat().st_size / 1e6:.1f}", *times, f"{here['open_s']:.2f}", outputs)
        print(f"| {' | '.join(cells)} |", flush=True)
        notes += [f"{name}: plan begins with {engine.read_bytes()[:4]!r}; {text}" for text in _formats(engine)]
        notes.append(f"{name}: {figures['compatible']['runtime']} -> {here['runtime']}")
    print("network / image to keypoints, ms, median of 200 calls, one 640x480 image")
    print("\n".join(notes))
    verdict(failed)


def _timed(engine: Path) -> dict[str, object]:
    """Medians of the network and of image -> keypoints, and how long the engine takes to open."""
    started = time.perf_counter()
    with open_backend(engine, allow_host_code=True):
        open_s = time.perf_counter() - started
    (times,) = bench([engine], BenchOptions(iterations=200, warm_up=20), allow_host_code=True).models
    network, wall = (float(np.median(times.times_ms[stage])) for stage in ("network", "wall"))
    return {"network_ms": network, "wall_ms": wall, "open_s": open_s, "runtime": str(times.runtime)}


def _outputs(engine: Path) -> Iterator[Outputs]:
    picture = synthetic_photograph(*SIZE_HW)
    with open_backend(engine, allow_host_code=True) as backend:
        for index in range(IMAGES):
            yield dict(backend.infer(np.roll(picture, 40 * index, axis=1)[None, None]))


def _kept(engine: Path) -> dict[str, np.ndarray]:
    """All outputs of all images, by name and number."""
    return {f"{name}{i}": np.array(value) for i, out in enumerate(_outputs(engine)) for name, value in out.items()}


def _formats(engine: Path) -> Iterator[str]:
    """What this runtime tells of each tensor's format, in words."""
    with open_backend(engine, allow_host_code=True) as backend:
        opened = backend.engine._shared.engine  # type: ignore[attr-defined]
        for index in range(opened.num_io_tensors):
            name = opened.get_tensor_name(index)
            yield f"{name}: {opened.get_tensor_format_desc(name)!r}"


if __name__ == "__main__":
    main()
