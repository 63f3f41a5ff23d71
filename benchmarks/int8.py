"""int8 against fp16 on the GPU at hand: speed, accuracy, and what TensorRT made of the Q/DQ graph.

    python benchmarks/int8.py --weights CHECKPOINT --calibration FILE --engines FOLDER [--photos FOLDER]
        [--dataset FOLDER] [--fold-batchnorm] [--variant int8-coarse --variant int8 ...] [--batch 1 --batch 8]
        [--only speed|accuracy] [--json FILE]

Static `heads` engines are timed in turn. Each call launches the plan's CUDA graph and waits for it. --calibration is
the file that `superpoint build` or `quantize` wrote beside an .onnx of the same checkpoint. Accuracy compares the
engines of batch 1 with fp32 in onnxruntime: with --photos by the gates of `superpoint verify`, with --dataset by the
rows of benchmarks/precision_accuracy.py. With --fold-batchnorm a v6 checkpoint is folded, and still compared with its
exact network. Engines and timing cache stay in FOLDER. Results are printed as they come.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import click
import numpy as np
from engines import SIZE_HW, Timed
from precision_accuracy import measure, print_row

from superpoint_trt.checkpoint.layouts import load as load_checkpoint
from superpoint_trt.convert.engine import BuildOptions
from superpoint_trt.convert.engine import build as build_engine
from superpoint_trt.convert.export import export, exported_description
from superpoint_trt.convert.export_options import ExportOptions
from superpoint_trt.convert.onnx_file import load_onnx
from superpoint_trt.convert.quantize.options import COARSE, FirstConvolution, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import quantize
from superpoint_trt.convert.quantize.ranges_file import check_same_network, load_calibration
from superpoint_trt.core.types import OutputType, Precision

CALLS_PER_TURN = 50
TARGETS = {1: 1.3, 8: 1.4}
"""Batch -> smallest time in fp16 divided by time in int8."""

VARIANTS = {
    "int8": QuantizeOptions(),
    "int8-fp16-first": QuantizeOptions(first_convolution=FirstConvolution.FP16),
    "int8-fp16-outputs": QuantizeOptions(keep_fp16=("conv[PD]b",)),
    "int8-coarse": QuantizeOptions(keep_fp16=(COARSE,)),
    "int8-fp16-detector": QuantizeOptions(keep_fp16=("convP*",)),
    "int8-fp16-conv4-detector": QuantizeOptions(keep_fp16=("conv4*", "convP*")),
}


def build(folder: Path, weights: str, fold: bool, ranges, variant: str, batch: int, level: int | None) -> Path:
    """Path of a variant's engine, built if it is not there."""
    path = folder / f"{Path(weights).stem}{'-folded' if fold else ''}-heads-{variant}-{batch}.engine"
    if not path.exists():
        model = path.with_suffix(".onnx")
        shape = ExportOptions(OutputType.HEADS, *SIZE_HW, max_batch_size=batch, fold_batchnorm=fold)
        export(weights, model, shape)
        if batch > 1:
            fix_batch(model, batch)
        precision = Precision.FP16
        if variant != "fp16":
            precision = Precision.INT8
            model.write_bytes(quantize(load_onnx(model), ranges, VARIANTS[variant]).SerializeToString())
        options = BuildOptions(
            precision, workspace_gib=4.0, timing_cache=folder / "timing.cache", optimization_level=level
        )
        metadata = build_engine(model, path, options)
        print(f"built {path.name} in {metadata.build['seconds']} s", flush=True)
    return path


def network(weights: str, fold: bool):
    """The description of an .onnx of these weights."""
    return exported_description(
        load_checkpoint(weights), ExportOptions(OutputType.HEADS, *SIZE_HW, fold_batchnorm=fold)
    )


def fix_batch(path: Path, batch: int) -> None:
    """Makes a model's batch static: the engine then needs no profile and has kernels for just this size."""
    model = load_onnx(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    path.write_bytes(model.SerializeToString())


class Runner:
    """One engine, and the times of its network in ms."""

    def __init__(self, path: Path, batch: int) -> None:
        self.name, self.path, self.batch = path.stem, path, batch
        self.timed = Timed(path, batch)
        self.times: list[float] = []

    def turn(self) -> None:
        """Times some calls."""
        for _ in range(5):
            self.timed._network()
        for _ in range(CALLS_PER_TURN):
            started = time.perf_counter()
            self.timed._network()
            self.times.append((time.perf_counter() - started) * 1e3)

    @property
    def median(self) -> float:
        """In ms."""
        return float(np.median(self.times))

    @property
    def p95(self) -> float:
        """In ms."""
        return float(np.percentile(self.times, 95))

    def layers(self) -> list[dict]:
        """What TensorRT's inspector says of each layer."""
        return self.timed.backend.engine.layers()

    def profile(self, runs: int = 20) -> dict[str, float]:
        """Mean microseconds of each layer, run one after the other; together they take longer than the graph."""
        trt, backend = self.timed.backend.engine.tensorrt.module, self.timed.backend
        sums: dict[str, float] = {}

        class Profiler(trt.IProfiler):
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, name: str, ms: float) -> None:
                sums[name] = sums.get(name, 0.0) + ms * 1e3 / runs

        context = self.timed.runner.execution.context
        context.profiler = profiler = Profiler()
        for _ in range(runs):
            context.execute_async_v3(backend.stream.address)
            backend.stream.synchronize()
        del profiler
        return sums


def kind(layer: dict) -> str:
    """A layer's types and formats in and out, "Int8 NC/32HW32 -> Half NHWC8"."""

    def of(tensors: list[dict]) -> str:
        return " + ".join(
            re.sub(
                r"(row major|format|Channel major|Thirty-two wide channel vectorized)",
                "",
                t.get("Format/Datatype", "?"),
            ).strip()
            for t in tensors
        )

    return f"{of(layer.get('Inputs', []))} -> {of(layer.get('Outputs', []))}"


def print_layers(runner: Runner) -> list[dict]:
    """Prints each layer: microseconds, type, types in and out, kernel."""
    try:
        times = runner.profile()
    except Exception as error:  # the timings stand without the profile
        print(f"no profile: {error}")
        times = {}
    found = []
    print(f"\n{runner.name}: layers as TensorRT built them, microseconds each alone")
    for layer in runner.layers():
        name = " ".join(str(layer["Name"]).split())
        microseconds = times.get(layer["Name"])
        found.append(
            {
                "name": name,
                "type": layer["LayerType"],
                "us": microseconds,
                "kind": kind(layer),
                "tactic": layer.get("TacticName", ""),
            }
        )
        one = found[-1]
        shown = "-" if microseconds is None else f"{microseconds:.1f}"
        print(f"{shown:>7} {one['type']:<22}{name[:70]:<71}{one['kind']:<60} {one['tactic'][:70]}")
    return found


def print_agreement(engine: Path, reference: Path, photos: str) -> dict:
    """Prints the gates of `verify` on photographs."""
    from superpoint_trt.prove.verify import verify

    found = verify(engine, reference, photos, most_images=12)
    gates = {gate.name: gate.value for gate in found.gates}
    verdict = "PASSED" if found.passed else "FAILED " + ", ".join(g.name for g in found.gates if not g.passed)
    print(
        f"{engine.stem}: {verdict} " + ", ".join(f"{k} {v:.4f}" for k, v in gates.items() if v is not None), flush=True
    )
    return gates


def speed(built, batches, variants, calls: int, budget: float, report: dict) -> bool:
    """Times and inspects fp16 and each variant, in turn; returns whether the first variant meets the targets."""
    started, met = time.monotonic(), True
    for batch in batches:
        here: dict[str, Runner] = {}
        for variant in ("fp16", *variants):
            if time.monotonic() - started > budget and here:
                print(f"no time left for {variant}, batch {batch}")
                continue
            try:
                here[variant] = Runner(built(variant, batch), batch)
            except Exception as error:  # the other variants still get their turn on the machine
                print(f"{variant}, batch {batch} failed: {error}", flush=True)
        for _ in range(-(-calls // CALLS_PER_TURN)):
            for runner in here.values():
                runner.turn()
        for runner in here.values():
            full = here["fp16"].median if "fp16" in here else float("nan")
            found = {"batch": batch, "median": runner.median, "p95": runner.p95, "ratio": full / runner.median}
            report["timings"][runner.name] = found
            print(
                f"{runner.name:<60} batch {batch}, {len(runner.times)} calls in turn: median {runner.median:.4f} ms  "
                f"p95 {runner.p95:.4f}  fp16 / this {found['ratio']:.3f}",
                flush=True,
            )
        default = here.get(variants[0])
        met &= default is not None and report["timings"][default.name]["ratio"] >= TARGETS.get(batch, 0)
        for runner in here.values():
            report["layers"][runner.name] = print_layers(runner)
    return met


@click.command()
@click.option("--weights", required=True)
@click.option("--calibration", required=True)
@click.option("--engines", "folder", required=True)
@click.option("--photos", help="Photographs for verify.")
@click.option("--dataset", help="Pairs with known homographies.")
@click.option("--fold-batchnorm", "fold", is_flag=True)
@click.option("--ransac-orders", default=20, show_default=True)
@click.option(
    "--variant",
    "variants",
    multiple=True,
    type=click.Choice(["fp16", *VARIANTS]),
    default=["int8-coarse", "int8"],
    show_default=True,
)
@click.option("--batch", "batches", type=int, multiple=True, default=[1, 8])
@click.option("--calls", default=300, show_default=True)
@click.option("--level", type=int, help="Builder's optimisation level.")
@click.option("--budget", default=240.0, show_default=True, help="Seconds after which no other engine is built.")
@click.option("--only", type=click.Choice(["speed", "accuracy"]), help="A part.")
@click.option("--json", "json_path")
def main(
    weights,
    calibration,
    folder,
    photos,
    dataset,
    fold,
    ransac_orders,
    variants,
    batches,
    calls,
    level,
    budget,
    only,
    json_path,
):
    """Measures speed, then accuracy."""
    started = time.monotonic()
    folder = Path(folder)
    folder.mkdir(exist_ok=True, parents=True)
    ranges = load_calibration(calibration)
    check_same_network(ranges, network(weights, fold), weights)
    report: dict = {"timings": {}, "layers": {}, "gates": {}, "accuracy": {}, "calibration": ranges.summary()}

    def built(variant: str, batch: int) -> Path:
        return build(folder, weights, fold, ranges, variant, batch, level)

    def keep() -> None:
        if json_path:
            Path(json_path).write_text(json.dumps(report, indent=1))

    if only != "accuracy":
        met = speed(built, batches, variants, calls, budget, report)
        verdict = "met" if met else "MISSED"
        print(f"\n{time.monotonic() - started:.0f} s; speed targets of {variants[0]}, {TARGETS}: {verdict}", flush=True)
        keep()
    if only != "speed" and (photos or dataset):
        reference = folder / f"{Path(weights).stem}-fp32.onnx"
        if not reference.exists():
            export(weights, reference, ExportOptions(OutputType.HEADS, *SIZE_HW))
        for variant in variants:
            path = built(variant, 1)
            if photos:
                report["gates"][path.stem] = print_agreement(path, reference, photos)
            if dataset:
                row = measure(path, reference, dataset, ransac_orders, "cuda")
                report["accuracy"][path.stem] = row
                keep()
                print_row({"weights": Path(weights).stem, "precision": variant, **row}, first=False)
    keep()
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
