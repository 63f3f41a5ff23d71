"""The commands that make engines: build, cast."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from superpoint_trt.cli.options import RuntimeArgs
from superpoint_trt.cli.progress import phase_bar
from superpoint_trt.cli.quantize import (
    CalibrationFlags,
    calibration_options,
    end,
    print_layers,
    print_verdict,
    print_warning,
)
from superpoint_trt.cli.terminal import open_model, print_info
from superpoint_trt.core.progress import BUILDING
from superpoint_trt.core.types import Precision, SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor

if TYPE_CHECKING:
    from superpoint_trt.convert.engine import BuildOptions
    from superpoint_trt.convert.onnx_file import OnnxFile, OnnxSource
    from superpoint_trt.gpu.engine_file import EngineMetadata


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
@click.option(
    "--version-compatible",
    is_flag=True,
    help="Runs in newer TensorRTs and the lean and dispatch runtimes, too. It carries host code: see docs/tensorrt.md.",
)
@click.option(
    "--exclude-lean-runtime", is_flag=True, help="Version-compatible without host code; TensorRT 10 and newer."
)
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
    version_compatible: bool,
    exclude_lean_runtime: bool,
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
        version_compatible=version_compatible,
        exclude_lean_runtime=exclude_lean_runtime,
    )
    build_engine(onnx, engine, options, test, calibration)


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Splits "sm86,sm89"."""
    return tuple(part.strip().lower() for part in text.split(",")) if text else ()


def build_engine(onnx: OnnxSource, engine: str, options: BuildOptions, test: bool, flags: CalibrationFlags) -> None:
    """Builds an engine, prints what came out, runs it if asked, and verifies it if it is int8 or fp8."""
    from superpoint_trt.convert.engine import build, check_engine_name
    from superpoint_trt.convert.onnx_file import QUANTIZED_TYPES, quantized_type, read_onnx

    check_engine_name(engine)
    low = options.precision in QUANTIZED_TYPES
    if flags.given and not low:
        raise SuperPointError(
            "calibration, --rounding, --keep-fp16, --first-convolution, --auto, --gate are for int8 and fp8; "
            f"{options.precision.value} was asked for."
        )
    source = read_onnx(onnx)
    if low and not quantized_type(source.model):
        _build_quantized(source, engine, options, test, flags)
        return
    for option, given in {"--auto": flags.auto, "--rounding": flags.rounding}.items():
        if given:
            raise SuperPointError(
                f"{source.path} is quantized already, so {option} comes too late; use the fp32 .onnx."
            )
    options = options.with_quantization(flags.quantize_options(options.precision), flags.ranges)
    with phase_bar(BUILDING) as progress:
        metadata = build(
            source, engine, options, lambda phase, done, total: progress(f"building: {phase}", done, total)
        )
    _print_engine(engine, metadata, test)


def _build_quantized(source: OnnxFile, engine: str, options: BuildOptions, test: bool, flags: CalibrationFlags) -> None:
    """Runs the int8 workflow for an fp32 .onnx and prints its evidence."""
    from superpoint_trt.int8 import quantize_and_verify

    workflow = flags.options(options.precision)
    with phase_bar() as progress:
        result = quantize_and_verify(
            source, workflow, engine=engine, build=options, progress=progress, notify=print_warning
        )
    print_layers(result, workflow)
    if result.engine_metadata:
        _print_engine(engine, result.engine_metadata, test)
        if options.targets and result.verification:
            click.echo(f"{engine} is for another machine: its .onnx is verified here; verify the engine where it runs")
        print_verdict(result, workflow)
    end(result)


def _print_engine(engine: str, metadata: EngineMetadata, test: bool) -> None:
    click.echo(f"{'built in':<14}{metadata.build['seconds']} s")
    print_info(engine)
    if test:
        _try_engine(engine)


def _try_engine(engine: str) -> None:
    """One picture through a fresh engine; the second call is timed."""
    from superpoint_trt.core.image import synthetic_photograph

    with open_model(engine, RuntimeArgs(allow_host_code=True)) as superpoint:  # built here just now
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
    from superpoint_trt.convert.cast import cast as cast_file

    print_info(cast_file(onnx, output, Precision(precision)))
