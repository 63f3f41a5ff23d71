"""int8 against fp16 on the GPU at hand: speed, accuracy, and what TensorRT made of the Q/DQ graph.

    python benchmarks/int8.py --weights CHECKPOINT --calibration FILE --engines FOLDER [--photos FOLDER]
        [--dataset FOLDER] [--variant fp16 --variant int8 ...] [--batch 1 --batch 8] [--quick] [--json FILE]

`heads` engines, static, taken in turn; each call is the plan's CUDA graph, launched and waited for. --calibration is
what `superpoint build` or `quantize` wrote beside an .onnx of the same checkpoint. --photos: each variant of batch 1
against fp32 in onnxruntime, by the gates of `superpoint verify`. --dataset: fp32 in onnxruntime and each variant
through `superpoint evaluate`. Engines and timing cache stay in FOLDER. Results are printed as they come.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import click
import numpy as np
from engines import SIZE_HW, Timed

from superpoint_trt import calibration as calibrations
from superpoint_trt import engine as engines
from superpoint_trt.export import ExportOptions, export
from superpoint_trt.precision import load_onnx
from superpoint_trt.quantize import COARSE, FirstConvolution, quantize
from superpoint_trt.spec import OutputType, Precision, SuperPointError

CALLS_PER_TURN = 50
TARGETS = {1: 1.3, 8: 1.4}
"""fp16 time over int8 time, by batch."""

VARIANTS = {
    # name: what to do with the fp32 graph and its ranges
    "int8": lambda model, ranges: quantize(model, ranges),
    "int8-fp16-first": lambda model, ranges: quantize(model, ranges, first=FirstConvolution.FP16),
    "int8-fp16-outputs": lambda model, ranges: quantize(model, ranges, keep=("conv[PD]b",)),
    "int8-coarse": lambda model, ranges: quantize(model, ranges, keep=(COARSE,)),
    "int8-fp16-detector": lambda model, ranges: quantize(model, ranges, keep=("convP*",)),
    "int8-fp16-conv4-detector": lambda model, ranges: quantize(model, ranges, keep=("conv4*", "convP*")),
}


def build(folder: Path, weights: str, ranges, variant: str, batch: int, level: int | None) -> Path:
    """The engine of a variant, built if it is not there."""
    path = folder / f"{Path(weights).stem}-heads-{variant}-{batch}.engine"
    if not path.exists():
        model = path.with_suffix(".onnx")
        export(weights, model, ExportOptions(OutputType.HEADS, *SIZE_HW, max_batch_size=batch))
        if batch > 1:
            fix_batch(model, batch)
        precision = Precision.FP16
        if variant in VARIANTS:
            precision = Precision.INT8
            model.write_bytes(VARIANTS[variant](load_onnx(model), ranges).SerializeToString())
        options = engines.BuildOptions(
            precision, workspace_gib=4.0, timing_cache=folder / "timing.cache", optimization_level=level
        )
        try:
            metadata = engines.build(model, path, options)
        except SuperPointError as error:
            if precision is not Precision.INT8:
                raise
            print(f"{path.name}: {error}\n{path.name}: tried again without layer constraints", flush=True)
            constrain, engines._constrain_types = engines._constrain_types, lambda *_: None
            metadata = engines.build(model, path, options)
            engines._constrain_types = constrain
        print(f"built {path.name} in {metadata.build['seconds']} s", flush=True)
    return path


def fix_batch(path: Path, batch: int) -> None:
    """A static batch: no profile, kernels for just this size."""
    model = load_onnx(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    path.write_bytes(model.SerializeToString())


class Runner:
    """One engine and the ms of its network."""

    def __init__(self, path: Path, batch: int) -> None:
        self.name, self.path, self.batch = path.stem, path, batch
        self.timed = Timed(path, batch)
        self.times: list[float] = []

    def turn(self) -> None:
        """Some calls."""
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
        """What the inspector says of each layer."""
        inspector = self.timed.backend._shared.engine.create_engine_inspector()
        text = inspector.get_engine_information(self.timed.backend._tensorrt.module.LayerInformationFormat.JSON)
        return [layer for layer in json.loads(text, strict=False)["Layers"] if isinstance(layer, dict)]

    def profile(self, runs: int = 20) -> dict[str, float]:
        """Mean microseconds of each layer, one after the other; their sum is more than the graph takes."""
        trt, backend = self.timed.backend._tensorrt.module, self.timed.backend
        sums: dict[str, float] = {}

        class Profiler(trt.IProfiler):
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, name: str, ms: float) -> None:
                sums[name] = sums.get(name, 0.0) + ms * 1e3 / runs

        context = self.timed.shape._context
        context.profiler = profiler = Profiler()
        for _ in range(runs):
            context.execute_async_v3(backend._stream.address)
            backend._stream.synchronise()
        del profiler
        return sums


def kind(layer: dict) -> str:
    """Types and formats in and out: Int8 NC/32HW32 -> Half NHWC8, say."""

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
    """Each layer: microseconds, type, kernel, types in and out."""
    try:
        times = runner.profile()
    except Exception as error:  # the profile is a bonus: whatever fails there, the timings stand
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


def print_agreement(runner: Runner, reference: Path, photos: str) -> dict:
    """The gates of `verify` on photographs."""
    from superpoint_trt.verify import verify

    found = verify(runner.path, reference, photos, most_images=12)
    gates = {gate.name: gate.value for gate in found.gates}
    verdict = "PASSED" if found.passed else "FAILED " + ", ".join(g.name for g in found.gates if not g.passed)
    print(
        f"{runner.name}: {verdict} " + ", ".join(f"{k} {v:.4f}" for k, v in gates.items() if v is not None), flush=True
    )
    return gates


def print_evaluation(name: str, model: Path, dataset: str) -> dict:
    """Total row of `evaluate`."""
    from superpoint_trt.evaluate import evaluate

    total = evaluate(model, dataset).to_json()["total"]
    print(
        f"{name}: rep. {total['repeatability']:.3f}, MMA@1 {total['mma']['1']:.3f}, MMA@3 {total['mma']['3']:.3f}, "
        f"H@1 {total['homography']['1']:.3f}, H@3 {total['homography']['3']:.3f}, H@5 {total['homography']['5']:.3f}",
        flush=True,
    )
    return total


@click.command()
@click.option("--weights", required=True)
@click.option("--calibration", required=True)
@click.option("--engines", "folder", required=True)
@click.option("--photos", help="Photographs for verify.")
@click.option("--dataset", help="Pairs with known homographies for evaluate.")
@click.option("--variant", "variants", multiple=True, default=["int8-coarse", "int8", "int8-fp16-first"])
@click.option("--batch", "batches", type=int, multiple=True, default=[1, 8])
@click.option("--batch8-variant", "larger", multiple=True, help="Variants of batch 8.  [default: the fastest at 1]")
@click.option("--calls", default=300, show_default=True)
@click.option("--level", type=int, help="Builder's optimisation level.")
@click.option("--budget", default=240.0, show_default=True, help="Seconds after which no other engine is built.")
@click.option("--quick", is_flag=True, help="Batch 1, fp16 and int8 only, no evaluation.")
@click.option("--json", "json_path")
def main(
    weights, calibration, folder, photos, dataset, variants, batches, larger, calls, level, budget, quick, json_path
):
    """Builds, times, inspects, then measures accuracy."""
    started = time.monotonic()
    folder = Path(folder)
    folder.mkdir(exist_ok=True, parents=True)
    ranges = calibrations.load(calibration)
    if quick:
        variants, batches, dataset = variants[:1], batches[:1], None
    report: dict = {"timings": {}, "layers": {}, "gates": {}, "evaluation": {}, "calibration": ranges.summary()}
    passed = True
    runners: dict[tuple[str, int], Runner] = {}
    for batch in batches:
        chosen = ["fp16", *variants]
        if batch > 1 and len(runners) > 1:
            best = min((r.median, name) for (name, b), r in runners.items() if name != "fp16" and b == 1)[1]
            chosen = ["fp16", *(larger or [best])]
        here: list[Runner] = []
        for variant in chosen:
            if time.monotonic() - started > budget and here:
                print(f"no time left for {variant}, batch {batch}")
                continue
            try:
                runner = Runner(build(folder, weights, ranges, variant, batch, level), batch)
            except Exception as error:  # one variant that fails must not cost the others their turn on the machine
                print(f"{variant}, batch {batch} failed: {error}", flush=True)
                continue
            here.append(runner)
            runners[variant, batch] = runner
        for _ in range(-(-calls // CALLS_PER_TURN)):
            for runner in here:
                runner.turn()
        if not here:
            continue
        print(f"\n{here[0].timed.backend.runtime}; batch {batch}; ms of {len(here[0].times)} calls in turn")
        for runner in here:
            ratio = here[0].median / runner.median
            print(
                f"{runner.name:<60} median {runner.median:.4f}  p95 {runner.p95:.4f}  fp16 / this {ratio:.3f}",
                flush=True,
            )
            report["timings"][runner.name] = {
                "batch": batch,
                "median": runner.median,
                "p95": runner.p95,
                "ratio": ratio,
            }
        best_ratio = max(here[0].median / runner.median for runner in here)
        passed &= best_ratio >= TARGETS.get(batch, 0)
        for runner in here:
            report["layers"][runner.name] = print_layers(runner)
    print(f"\n{time.monotonic() - started:.0f} s so far")
    single = [runner for (_, batch), runner in runners.items() if batch == 1]
    reference = folder / "reference.onnx"
    if photos or dataset:
        export(weights, reference, ExportOptions(OutputType.HEADS, *SIZE_HW))
    if photos:
        for runner in single:
            report["gates"][runner.name] = print_agreement(runner, reference, photos)
    if dataset:
        report["evaluation"]["fp32"] = print_evaluation("fp32, onnxruntime", reference, dataset)
        for runner in single:
            report["evaluation"][runner.name] = print_evaluation(runner.name, runner.path, dataset)
    if json_path:
        Path(json_path).write_text(json.dumps(report, indent=1))
    print(f"{time.monotonic() - started:.0f} s; speed targets {TARGETS}: {'met' if passed else 'MISSED'}")


if __name__ == "__main__":
    main()
