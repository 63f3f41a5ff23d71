"""The command quantize, and the options and printing for int8 and fp8 that it shares with build."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Callable

import click
from rich.table import Table

from superpoint_trt.cli.options import JSON
from superpoint_trt.cli.progress import phase_bar
from superpoint_trt.cli.prove import GATE_FAILED, print_verification
from superpoint_trt.cli.terminal import console, print_aside, print_info, write_json
from superpoint_trt.convert.quantize.options import (
    COARSE,
    CalibrationOptions,
    FirstConvolution,
    Method,
    QuantizeOptions,
    Rounding,
)
from superpoint_trt.core.types import Precision, SuperPointError
from superpoint_trt.prove.gates import parse_limits

if TYPE_CHECKING:
    from superpoint_trt.int8 import LowPrecisionOptions, LowPrecisionResult

_MEASURED = CalibrationOptions()
NO_LAYER = "none"
"""What --keep-fp16 takes for no layer at all."""


@dataclass(frozen=True)
class CalibrationFlags:
    """The command line's options for int8 and fp8, as they were given."""

    images: str | None = None
    """A folder, or "synthetic"."""
    method: str = _MEASURED.method.value
    count: int = _MEASURED.count
    rounding: str | None = None
    """None: "feedback", or as `ranges` says."""
    ranges: str | None = None
    """The ranges file of an earlier run."""
    keep_fp16: tuple[str, ...] = ()
    """Name patterns, "coarse" or "none". Empty: not given."""
    first_convolution: str | None = None
    auto: bool = False
    """Finds out which layers to keep in fp16."""
    gates: tuple[str, ...] = ()
    """NAME=LIMIT."""
    verify: bool = True

    @property
    def given(self) -> bool:
        """Whether any option was given that only int8 and fp8 have."""
        flags = (self.images, self.ranges, self.rounding, self.keep_fp16, self.first_convolution, self.auto, self.gates)
        return any(flags)

    def quantize_options(self, precision: Precision) -> QuantizeOptions:
        """Precision and layers exactly as given: no layer in fp16 unless --keep-fp16 names it."""
        first = FirstConvolution(self.first_convolution) if self.first_convolution else None
        return QuantizeOptions(precision, tuple(name for name in self.keep_fp16 if name != NO_LAYER), first)

    def options(self, precision: Precision, rank_layers: bool = False) -> LowPrecisionOptions:
        """What the workflow takes. Without --keep-fp16 the coarse layers stay in fp16; with --auto none to start from.

        Raises:
            SuperPointError: a gate is not NAME=LIMIT, or unknown.
        """
        from superpoint_trt.int8 import LowPrecisionOptions

        quantize = self.quantize_options(precision)
        if not self.keep_fp16 and not self.auto:
            quantize = replace(quantize, keep_fp16=(COARSE,))
        return LowPrecisionOptions(
            images=self.images,
            ranges=self.ranges,
            calibration=CalibrationOptions(Method(self.method), self.count),
            rounding=Rounding(self.rounding) if self.rounding else None,
            quantize=quantize,
            rank_layers=rank_layers,
            choose_layers=self.auto,
            gates=parse_limits(self.gates),
            verify=self.verify,
        )


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options for int8 and fp8 to a command, which gets them as one `CalibrationFlags`, `calibration`."""

    @functools.wraps(command)
    def with_flags(
        calibration_images: str | None,
        calibration_method: str,
        calibration_count: int,
        rounding: str | None,
        calibration: str | None,
        keep_fp16: tuple[str, ...],
        first_convolution: str | None,
        auto: bool,
        gates: tuple[str, ...],
        verify: bool,
        **others: Any,
    ) -> Any:
        flags = CalibrationFlags(
            calibration_images,
            calibration_method,
            calibration_count,
            rounding,
            calibration,
            keep_fp16,
            first_convolution,
            auto,
            gates,
            verify,
        )
        return command(calibration=flags, **others)

    methods = click.Choice(sorted(method.value for method in Method))
    options = (
        click.option("--calibration-images", help="int8, fp8: folder of photographs like those to come, or synthetic."),
        click.option(
            "--calibration-method",
            type=methods,
            default=_MEASURED.method.value,
            show_default=True,
            help="How a range is read off the values.",
        ),
        click.option(
            "--calibration-count", type=int, default=_MEASURED.count, show_default=True, help="Most images to measure."
        ),
        click.option(
            "--rounding",
            type=click.Choice([rounding.value for rounding in Rounding]),
            show_default=Rounding.FEEDBACK.value,
            help="int8 weights: feedback lets errors cancel, measured on the images; nearest rounds each alone.",
        ),
        click.option("--calibration", help="Ranges of an earlier run (.calibration.json) instead of measuring them."),
        click.option(
            "--keep-fp16",
            multiple=True,
            metavar="PATTERN",
            show_default=f"{COARSE}; --auto: {NO_LAYER}",
            help=f"Convolutions to keep in fp16: a pattern (conv4*), {COARSE} (behind the last change of scale; in the "
            f"full network all at 1/8 of the size) or {NO_LAYER}.",
        ),
        click.option(
            "--first-convolution",
            type=click.Choice([FirstConvolution.FP16.value, FirstConvolution.PARTS.value]),
            show_default="parts; fp8: fp16",
            help="parts: int8, the image split into 4 int8 channels; exact except for the value 255.",
        ),
        click.option("--auto", is_flag=True, help="int8, fp8: keep the fewest layers in fp16 that meet the gates."),
        click.option("--gate", "gates", multiple=True, metavar="NAME=LIMIT", help="A limit in place of the default."),
        click.option("--verify/--no-verify", default=True, show_default=True, help="int8, fp8: verify the result."),
    )
    decorated: Callable[..., Any] = with_flags
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


@click.command()
@click.option("--onnx", required=True, help="An fp32 SuperPoint .onnx.")
@click.option("--output", help="The quantized .onnx to write: Q/DQ pairs, float32 elsewhere.")
@click.option("--precision", type=click.Choice(["int8", "fp8"]), default="int8", show_default=True)
@click.option("--sensitivity", is_flag=True, help="Rank the layers by what quantizing each alone costs.")
@JSON
@calibration_options
def quantize(
    onnx: str,
    output: str | None,
    precision: str,
    sensitivity: bool,
    json_path: str | None,
    calibration: CalibrationFlags,
) -> None:
    """Write an .onnx with int8 or fp8 convolutions and verify it, or only rank its layers."""
    from superpoint_trt.int8 import quantize_and_verify

    options = calibration.options(Precision(precision), sensitivity)
    if json_path:
        _check_json(json_path, onnx, output, options)
    with phase_bar() as progress:
        result = quantize_and_verify(onnx, options, output, progress=progress, notify=print_warning)
    print_layers(result, options)
    if json_path and result.chosen:
        write_json(json_path, _figures(result))
    if result.onnx:
        print_info(result.onnx)
        print_verdict(result, options)
    end(result)


def _check_json(json_path: str, onnx: str, output: str | None, options: LowPrecisionOptions) -> None:
    """Refuses --json where there are no figures, or over a file that is read or written."""
    from superpoint_trt.convert.quantize.ranges_file import rounded_weights_path
    from superpoint_trt.core.files import check_distinct, check_writable

    if not (options.rank_layers or options.choose_layers):
        raise SuperPointError("--json holds the figures of --sensitivity or --auto; give one of them.")
    weights = rounded_weights_path(options.ranges) if options.ranges else None
    check_distinct(check_writable(json_path), onnx, output, options.ranges, weights)


def _figures(result: LowPrecisionResult) -> dict[str, Any]:
    """The report that --json writes."""
    figures: dict[str, Any] = {"precision": result.quantize.precision.value}
    figures["layers"] = [asdict(cost) for cost in result.layer_costs]
    if result.choice:
        figures["auto"] = result.choice.to_json()
    return figures


# ------------------------------------------------------------------------------------------------- shared with build


def print_warning(warning: str) -> None:
    """Prints a warning to stderr."""
    print_aside("warning", warning)


def print_layers(result: LowPrecisionResult, options: LowPrecisionOptions) -> None:
    """Prints where the ranges come from, what each layer costs, and which layers were tried in fp16."""
    if options.ranges is None:
        click.echo(f"{'calibration':<14}{result.ranges} ({result.calibration.summary()})")
    elif result.quantize.precision is Precision.INT8 and not result.calibration.weights:
        click.echo(f"{'weights':<14}to the nearest step: {result.ranges} has none rounded with feedback")
    if result.layer_costs:
        _print_costs(result)
    if result.choice is None:
        return
    for step in result.choice.steps:
        failed = ", ".join(f"{g.name} {g.value:.4g} (limit {g.limit:g})" for g in step.failed if g.value is not None)
        verdict = f"fails {failed}" if failed else "meets every gate"
        click.echo(f"{'tried':<14}{' '.join(step.kept) or 'nothing'} in fp16 ({step.because}): {verdict}")
    if result.choice.passed:
        click.echo(f"{'kept in fp16':<14}{' '.join(result.choice.kept) or 'nothing'}")


def _print_costs(result: LowPrecisionResult) -> None:
    precision = result.quantize.precision.value
    how = "its image in parts; fp16 with --first-convolution fp16" if precision == "int8" else "stays fp16"
    table = Table(f"only this layer in {precision}", "points within 1 px", "descriptor cosine", "")
    for cost in result.layer_costs:
        note = how if cost.layer in result.first_convolutions else ""
        table.add_row(cost.layer, f"{cost.keypoints_found_share:.4f}", f"{cost.descriptor_cosine_median:.4f}", note)
    console().print(table)


def print_verdict(result: LowPrecisionResult, options: LowPrecisionOptions) -> None:
    """Prints the verification, or how to have one."""
    model = result.engine or result.onnx
    if result.verification:
        print_verification(result.verification)
    elif options.verify:
        click.echo(f"not verified: superpoint verify --model {model} --weights CHECKPOINT --images FOLDER does it")


def end(result: LowPrecisionResult) -> None:
    """Says what to do if a gate failed.

    Raises:
        click.exceptions.Exit: with exit code 1, if a gate failed.
    """
    if result.passed:
        return
    if not result.chosen:
        click.echo(
            "no choice of layers meets the gates: none of the layers still in "
            f"{result.quantize.precision.value} costs anything alone; use --precision fp16, or a looser --gate",
            err=True,
        )
    else:
        click.echo(
            "the model is written, but loses more than the gates allow: keep layers in fp16 (--keep-fp16), let "
            "superpoint quantize --auto find which, or calibrate on more images like these",
            err=True,
        )
    raise click.exceptions.Exit(GATE_FAILED)
