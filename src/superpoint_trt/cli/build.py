"""The commands that make engines: build, cast."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from superpoint_trt.cli.prove import gate_limits
from superpoint_trt.cli.quantize import (
    CalibrationFlags,
    calibrated,
    calibration_options,
    check_flags,
    layers_to_keep,
    prove,
)
from superpoint_trt.cli.terminal import builder_progress, open_model, print_info
from superpoint_trt.core.types import ENGINE_SUFFIXES, Precision, SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor

_QUANTIZED = (Precision.INT8.value, Precision.FP8.value)


@click.command()
@click.option("--onnx", required=True, help="The .onnx: from superpoint export, or another tool's SuperPoint in fp32.")
@click.option("--engine", required=True, help="The engine to write; its description goes beside it, in ENGINE.json.")
@click.option("--precision", type=click.Choice([p.value for p in Precision]), default="fp32", show_default=True)
@click.option("--workspace", type=float, help="Most scratch memory in GiB.  [default: what the GPU has]")
@click.option("--min-shape", help="HxW, smallest; dynamic models.  [default: 240x320]")
@click.option("--opt-shape", help="HxW, the one to be fastest at.  [default: what the model was exported for]")
@click.option("--max-shape", help="HxW, largest.  [default: 960x1280]")
@click.option("--max-batch-size", type=int, help="Most images a call.  [default: the model's own]")
@click.option("--timing-cache", help="File of kernel timings, read and updated: later builds take seconds.")
@click.option("--optimization-level", type=int, help="0 (fast build) to 5 (fast engine).  [default: TensorRT's, 3]")
@click.option("--runtime", type=click.Choice(["auto", *(f.value for f in Flavor)]), default="auto", show_default=True)
@click.option("--target", help="GPUs to build for, sm86,sm89 say; rtx only, needs no GPU.  [default: the GPU here]")
@click.option("--linear-heads", is_flag=True, help="Raw fp16 heads as NCHW; for programs other than this one.")
@click.option("--test", is_flag=True, help="Run the engine once it is built.")
@calibration_options
def build(
    onnx: str,
    engine: str,
    precision: str,
    calibration: CalibrationFlags,
    workspace: float | None,
    min_shape: str | None,
    opt_shape: str | None,
    max_shape: str | None,
    max_batch_size: int | None,
    timing_cache: str | None,
    optimization_level: int | None,
    runtime: str,
    target: str | None,
    linear_heads: bool,
    test: bool,
) -> None:
    """Build a TensorRT engine."""
    from superpoint_trt.convert.engine import BuildOptions
    from superpoint_trt.core.image import parse_size

    options = BuildOptions(
        Precision(precision),
        workspace,
        min_shape_hw=parse_size(min_shape) if min_shape else None,
        opt_shape_hw=parse_size(opt_shape) if opt_shape else None,
        max_shape_hw=parse_size(max_shape) if max_shape else None,
        max_batch_size=max_batch_size,
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        runtime=None if runtime == "auto" else Flavor(runtime),
        targets=parse_targets(target),
        linear_heads=linear_heads,
    )
    build_engine(onnx, engine, options, test, calibration)


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Splits "sm86,sm89"."""
    return tuple(part.strip().lower() for part in text.split(",")) if text else ()


def build_engine(onnx: str, engine: str, options: Any, test: bool, flags: CalibrationFlags) -> None:
    """Builds, says what came out, runs it if asked, and proves an int8 or fp8 engine."""
    if Path(engine).suffix.lower() not in ENGINE_SUFFIXES:
        raise SuperPointError(f"{engine}: an engine's name ends in one of {', '.join(ENGINE_SUFFIXES)}.")
    if options.precision.value in _QUANTIZED:
        _build_quantized(onnx, engine, options, test, flags)
        return
    if flags.given:
        raise SuperPointError(
            "calibration, --rounding, --keep-fp16, --first-convolution, --auto, --gate are for int8 and fp8; "
            f"{options.precision.value} was asked for."
        )
    _build(onnx, engine, options, test)


def _build_quantized(onnx: str, engine: str, options: Any, test: bool, flags: CalibrationFlags) -> None:
    """Calibrates, builds, verifies on held-out images; an .onnx that is quantised already is taken as it is."""
    from superpoint_trt.convert import engine as engines
    from superpoint_trt.convert.cast import load_onnx, quantized_type
    from superpoint_trt.convert.quantize.qdq import quantize_file

    if quantized_type(load_onnx(onnx)):
        for option, asked in {"--auto": flags.auto, "--rounding": flags.rounding}.items():
            if asked:
                raise SuperPointError(f"{onnx} is quantised already, so {option} comes too late; use the fp32 .onnx.")
        given = replace(options, calibration=flags.file, keep_fp16=flags.kept_as_asked, first_convolution=flags.first)
        _build(onnx, engine, given, test)
        return
    check_flags(onnx, flags, options.precision.value)
    engines.check(onnx, engine, options)  # minutes of calibration should not end in "no GPU"
    ranges = calibrated(onnx, flags, options.precision.value)
    keep = layers_to_keep(onnx, flags, ranges, options.precision.value)
    options = replace(options, calibration=ranges.path, keep_fp16=keep, first_convolution=flags.first)
    _build(onnx, engine, options, test)
    if not flags.verify:
        return
    if not options.targets or not ranges.proof:
        prove(Path(engine), onnx, ranges.proof, gate_limits(flags.gates))
        return
    click.echo(f"{engine} is for another machine: its .onnx is verified here; verify the engine where it runs")
    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder) / f"{Path(engine).stem}.onnx"
        quantize_file(onnx, quantized, ranges.path, options.precision, keep, flags.first)
        prove(quantized, onnx, ranges.proof, gate_limits(flags.gates))


def _build(onnx: str, engine: str, options: Any, test: bool) -> None:
    from superpoint_trt.convert import engine as engines

    with builder_progress() as progress:
        metadata = engines.build(onnx, engine, options, progress)
    click.echo(f"{'built in':<14}{metadata.build['seconds']} s")
    print_info(engine)
    if test:
        _try_engine(engine)


def _try_engine(engine: str) -> None:
    """One picture through a fresh engine; the second call is timed."""
    from superpoint_trt.core.image import synthetic_photograph

    with open_model(engine) as superpoint:
        model = superpoint.description
        picture = synthetic_photograph(model.height_px or 480, model.width_px or 640)
        superpoint.extract(picture)
        started = time.perf_counter()
        keypoints = superpoint.extract(picture)
        click.echo(f"{'test':<14}{len(keypoints)} keypoints in {(time.perf_counter() - started) * 1e3:.1f} ms")


@click.command()
@click.option("--onnx", required=True, help="An fp32 SuperPoint .onnx.")
@click.option("--output", required=True, help="The typed .onnx to write.")
@click.option("--precision", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True)
def cast(onnx: str, output: str, precision: str) -> None:
    """Write the typed .onnx that build uses, for other builders (trtexec --stronglyTyped)."""
    from superpoint_trt.convert import cast as precisions

    print_info(precisions.cast(onnx, output, Precision(precision)))
