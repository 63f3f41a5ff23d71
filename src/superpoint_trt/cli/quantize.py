"""What int8 and fp8 need on the command line: the command quantize, and its options and steps shared with build."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import click
from rich.table import Table

from superpoint_trt.cli.prove import GATE_FAILED, gate_limits, print_verification
from superpoint_trt.cli.terminal import JSON, console, print_info, progress_bar, write_json
from superpoint_trt.convert.quantize.options import SYNTHETIC, CalibrationOptions, Method
from superpoint_trt.convert.quantize.ranges_file import load_calibration, ranges_path, save_calibration
from superpoint_trt.core.types import Precision, SuperPointError

if TYPE_CHECKING:
    from onnx import ModelProto

    from superpoint_trt.convert.quantize.calibrate import CalibrationImage
    from superpoint_trt.convert.quantize.options import FirstConvolution
    from superpoint_trt.prove.sensitivity import Choice, LayerCost

METHODS = ["entropy", "max", "percentile"]
DEFAULT_METHOD = "percentile"
DEFAULT_COUNT = 200
ROUNDINGS = ["feedback", "nearest"]


@dataclass(frozen=True)
class CalibrationFlags:
    """What the command line says of calibration."""

    images: str | None = None
    """A folder, or "synthetic"."""
    method: str = DEFAULT_METHOD
    count: int = DEFAULT_COUNT
    rounding: str | None = None
    """Of int8's weights. None: "feedback", or as `file` has it."""
    file: str | None = None
    """Ranges of an earlier run."""
    keep_fp16: tuple[str, ...] = ()
    first_convolution: str | None = None
    """None: by precision and model."""
    auto: bool = False
    """Find out which layers to keep."""
    gates: tuple[str, ...] = ()
    """NAME=LIMIT."""
    verify: bool = True

    @property
    def given(self) -> bool:
        """Whether any of it was asked for."""
        asked = (self.images, self.file, self.rounding, self.keep_fp16, self.first_convolution, self.auto, self.gates)
        return any(asked)

    @property
    def kept_as_asked(self) -> tuple[str, ...]:
        """Name patterns that --keep-fp16 gives; "none" of them is no layer."""
        return tuple(pattern for pattern in self.keep_fp16 if pattern != "none")

    @property
    def keep(self) -> tuple[str, ...]:
        """As asked, or by default the coarse layers; --auto starts with none."""
        from superpoint_trt.convert.quantize.options import COARSE

        return self.kept_as_asked if self.keep_fp16 or self.auto else (COARSE,)

    @property
    def first(self) -> FirstConvolution | None:
        """How the convolution that reads the image is to run."""
        from superpoint_trt.convert.quantize.options import FirstConvolution

        return FirstConvolution(self.first_convolution) if self.first_convolution else None


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make a `CalibrationFlags`; the command gets it as `calibration`."""

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

    method = click.Choice(METHODS)
    options = (
        click.option("--calibration-images", help="int8, fp8: folder of photographs like those to come, or synthetic."),
        click.option("--calibration-method", type=method, default=DEFAULT_METHOD, show_default=True),
        click.option("--calibration-count", type=int, default=DEFAULT_COUNT, show_default=True, help="Most images."),
        click.option(
            "--rounding",
            type=click.Choice(ROUNDINGS),
            show_default="feedback",
            help="int8 weights: so that errors cancel, measured on the images, or each to its nearest step.",
        ),
        click.option("--calibration", help="Ranges of an earlier run (.calibration.json) instead of measuring them."),
        click.option(
            "--keep-fp16",
            multiple=True,
            metavar="PATTERN",
            show_default="coarse; --auto: none",
            help="Convolutions to leave alone: conv4*, say; coarse: all at 1/8 of the size; none.",
        ),
        click.option(
            "--first-convolution",
            type=click.Choice(["fp16", "parts"]),
            show_default="parts; fp8: fp16",
            help="parts: int8, the image as the sum of four, exact for 8-bit images but for white.",
        ),
        click.option("--auto", is_flag=True, help="int8, fp8: keep the fewest layers in fp16 that meet the gates."),
        click.option("--gate", "gates", multiple=True, metavar="NAME=LIMIT", help="Another limit than the table's."),
        click.option("--verify/--no-verify", default=True, show_default=True, help="int8, fp8: prove it afterwards."),
    )
    decorated: Callable[..., Any] = with_flags
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


@dataclass(frozen=True)
class Calibrated:
    """Ranges on disk, and images to prove the result on."""

    path: Path
    proof: Sequence[Path]


def check_flags(onnx: str, flags: CalibrationFlags, precision: str, ranking: bool = False) -> None:
    """Refuses, before minutes of work, what would be refused after them; and warns of what is not worth them.

    Raises:
        SuperPointError: neither images nor ranges, an unknown gate or layer, no fp32 network, or layers to be chosen
            without photographs.
    """
    from superpoint_trt.convert.onnx_file import check_quantizable, load_onnx
    from superpoint_trt.convert.quantize.options import SYNTHETIC
    from superpoint_trt.convert.quantize.qdq import kept_layers

    gate_limits(flags.gates)
    if flags.images is None and flags.file is None:
        raise SuperPointError(
            f"precision {precision} needs ranges measured on images: give --calibration-images FOLDER (100 or more "
            "photographs like those to come), --calibration FILE of an earlier run, or, only to try it out, "
            f"--calibration-images {SYNTHETIC}."
        )
    if (flags.auto or ranking) and flags.images in (None, SYNTHETIC):
        raise SuperPointError(
            f"{'--auto' if flags.auto else '--sensitivity'} tries layers on photographs: give --calibration-images "
            "FOLDER (with --calibration FILE the ranges are not measured again)."
        )
    if flags.file is not None and flags.rounding:
        raise SuperPointError(f"--rounding is for measuring anew: {flags.file} says how its weights are rounded.")
    model = load_onnx(onnx)
    check_quantizable(model)
    kept_layers(model, flags.keep, Precision(precision), flags.first)
    _warn_of_batch_norms(model, onnx, precision)


def _warn_of_batch_norms(model: ModelProto, onnx: str, precision: str) -> None:
    from superpoint_trt.convert.onnx_file import model_description
    from superpoint_trt.convert.quantize.qdq import normalizations_after_relu

    apart, source = normalizations_after_relu(model), model_description(model, onnx)
    if not apart:
        return
    # Not of another tool's graph, nor where they are folded as far as that goes.
    foldable = source.family is not None and not source.approximation
    remedy = "; superpoint export --fold-batchnorm folds them, as an approximation near the border" if foldable else ""
    click.echo(
        f"warning: {len(apart)} BatchNorms follow a ReLU ({apart[0]}, ...): no {precision} kernel takes them in; int8 "
        f"of the v6 layout, with eight, took 1.25 times as long as fp16 (TensorRT 8.6, H100){remedy}",
        err=True,
    )


def calibrated(onnx: str, flags: CalibrationFlags, precision: str) -> Calibrated:
    """Measures ranges and writes them beside the .onnx, or takes those of an earlier run.

    Raises:
        SuperPointError: neither images nor ranges, or none that can be used.
    """
    from superpoint_trt.convert.quantize import calibrate as calibrations
    from superpoint_trt.convert.quantize.gptq import round_weights

    given, proof = _images(onnx, flags)
    if flags.file is not None:
        if precision == "int8" and not load_calibration(flags.file).weights:
            click.echo(f"{'weights':<14}to the nearest step: {flags.file} has none rounded with feedback")
        return Calibrated(Path(flags.file), proof)
    options = CalibrationOptions(Method(flags.method), flags.count)
    with progress_bar("calibrating") as progress:
        found = calibrations.calibrate(onnx, given, options, progress)
    for note in found.notes:
        click.echo(f"warning: {note}", err=True)
    if flags.rounding != "nearest":  # of fp8, too: the file serves int8 as well
        with progress_bar("rounding weights") as progress:
            found = round_weights(onnx, found, given, progress)
    if proof and proof[0] in given:
        click.echo("warning: too few to hold any out: verified on the images of calibration", err=True)
    path = save_calibration(found, ranges_path(onnx))
    click.echo(f"{'calibration':<14}{path} ({found.summary()})")
    return Calibrated(path, proof)


def _images(onnx: str, flags: CalibrationFlags) -> tuple[Sequence[CalibrationImage], Sequence[Path]]:
    """What to calibrate on, and what to prove on."""
    from superpoint_trt.convert.onnx_file import load_onnx, model_description
    from superpoint_trt.convert.quantize import calibrate as calibrations

    if flags.images is None:
        return [], []
    if flags.images == SYNTHETIC:
        model = model_description(load_onnx(onnx), onnx)
        click.echo("warning: synthetic pictures: the ranges of photographs differ; do not ship this model", err=True)
        size = (model.height_px or 480, model.width_px or 640)
        return calibrations.synthetic_images(min(flags.count, FEW_SYNTHETIC), size), []
    chosen = calibrations.split_images(flags.images, flags.count)
    return chosen.calibration, chosen.held_out or chosen.calibration[: calibrations.MOST_HELD_OUT]


FEW_SYNTHETIC = 32


def ranked(onnx: str, ranges: Calibrated, precision: str) -> list[LayerCost]:
    """Ranks the layers on a few of the images, and prints them."""
    from superpoint_trt.convert.onnx_file import load_onnx
    from superpoint_trt.convert.quantize.qdq import first_convolutions
    from superpoint_trt.prove.sensitivity import FEW_IMAGES, rank

    few = ranges.proof[:FEW_IMAGES]
    with progress_bar("quantising one layer at a time") as progress:
        costs = rank(onnx, load_calibration(ranges.path), few, Precision(precision), progress)
    first = first_convolutions(load_onnx(onnx))
    how = "its image in parts; fp16 with --first-convolution fp16" if precision == "int8" else "stays fp16"
    table = Table(f"only this layer in {precision}", "points within 1 px", "descriptor cosine", "")
    for cost in costs:
        note = how if cost.layer in first else ""
        table.add_row(cost.layer, f"{cost.keypoints_found_share:.4f}", f"{cost.descriptor_cosine_median:.4f}", note)
    console().print(table)
    return costs


def chosen(onnx: str, flags: CalibrationFlags, ranges: Calibrated, precision: str, costs: list[LayerCost]) -> Choice:
    """Finds the fewest layers to keep in fp16, and says why each.

    Raises:
        click.exceptions.Exit: with exit code 1, if no choice meets the gates.
    """
    from superpoint_trt.prove.sensitivity import fewest_kept

    with progress_bar("verifying a choice of layers") as progress:
        found = fewest_kept(
            onnx,
            load_calibration(ranges.path),
            ranges.proof,
            costs,
            Precision(precision),
            flags.keep,
            gate_limits(flags.gates),
            progress,
            flags.first,
        )
    for step in found.steps:
        failed = ", ".join(f"{g.name} {g.value:.4g} (limit {g.limit:g})" for g in step.failed if g.value is not None)
        verdict = f"fails {failed}" if failed else "meets every gate"
        click.echo(f"{'tried':<14}{' '.join(step.kept) or 'nothing'} in fp16 ({step.because}): {verdict}")
    if not found.passed:
        click.echo(
            f"no choice of layers meets the gates: whatever is left in {precision} costs nothing alone; use "
            "--precision fp16, or a looser --gate",
            err=True,
        )
        raise click.exceptions.Exit(GATE_FAILED)
    click.echo(f"{'kept in fp16':<14}{' '.join(found.kept) or 'nothing'}")
    return found


def layers_to_keep(onnx: str, flags: CalibrationFlags, ranges: Calibrated, precision: str) -> tuple[str, ...]:
    """Name patterns: those asked for, or those that --auto finds."""
    if not flags.auto:
        return flags.keep
    costs = ranked(onnx, ranges, precision)
    return tuple(chosen(onnx, flags, ranges, precision, costs).patterns)


def prove(model: Path, onnx: str, proof: Sequence[Path], gates: dict[str, float] | None = None) -> None:
    """Verifies a quantised model against the fp32 .onnx it was made from, and prints the verdict.

    Raises:
        click.exceptions.Exit: with exit code 1, if a gate fails.
    """
    from superpoint_trt.convert.onnx_file import load_onnx, raw_heads
    from superpoint_trt.prove.verify import verify

    if not proof:
        click.echo(f"not verified: superpoint verify --model {model} --weights CHECKPOINT --images FOLDER does it")
        return
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.onnx"
        reference.write_bytes(raw_heads(load_onnx(onnx), onnx).SerializeToString())
        with progress_bar("verifying") as progress:
            found = verify(model, reference, proof, gates, progress=progress)
    found.reference = f"{onnx}, fp32"
    print_verification(found)
    if not found.passed:
        click.echo(
            "the model is written, but loses more than the gates allow: keep layers in fp16 (--keep-fp16), let "
            "superpoint quantize --auto find which, or calibrate on more images like these",
            err=True,
        )
        raise click.exceptions.Exit(GATE_FAILED)


@click.command()
@click.option("--onnx", required=True, help="An fp32 SuperPoint .onnx.")
@click.option("--output", help="The quantised .onnx to write: Q/DQ pairs, float32 elsewhere.")
@click.option("--precision", type=click.Choice(["int8", "fp8"]), default="int8", show_default=True)
@click.option("--sensitivity", is_flag=True, help="Rank the layers by what quantising each alone costs.")
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
    """Write an .onnx with int8 or fp8 convolutions, and prove it; or only rank its layers."""
    from superpoint_trt.convert.quantize import qdq as quantizing

    _check_outputs(onnx, output, json_path, sensitivity, calibration)
    check_flags(onnx, calibration, precision, sensitivity)
    ranges = calibrated(onnx, calibration, precision)
    keep = calibration.keep
    if sensitivity or calibration.auto:
        costs = ranked(onnx, ranges, precision)
        report: dict[str, Any] = {"precision": precision, "layers": [asdict(cost) for cost in costs]}
        if calibration.auto:
            choice = chosen(onnx, calibration, ranges, precision, costs)
            keep = tuple(choice.patterns)
            report["auto"] = choice.to_json()
        if json_path:
            write_json(json_path, report)
    if output is None:
        return
    written = quantizing.quantize_file(onnx, output, ranges.path, Precision(precision), keep, calibration.first)
    print_info(written)
    if calibration.verify:
        prove(written, onnx, ranges.proof, gate_limits(calibration.gates))


def _check_outputs(
    onnx: str, output: str | None, json_path: str | None, sensitivity: bool, flags: CalibrationFlags
) -> None:
    from superpoint_trt.convert.quantize.ranges_file import rounded_weights_path
    from superpoint_trt.core.files import check_distinct, check_writable

    if output is None and not (sensitivity or flags.auto):
        raise SuperPointError("nothing to do: give --output FILE.onnx to write, or --sensitivity to rank the layers.")
    if output is not None and Path(output).suffix.lower() != ".onnx":
        raise SuperPointError(f"output {output}: a model's name ends in .onnx.")
    if json_path and not (sensitivity or flags.auto):
        raise SuperPointError("--json holds the figures of --sensitivity or --auto; give one of them.")
    for path, other in ((output, json_path), (json_path, None)):
        if path is not None:
            weights = rounded_weights_path(flags.file) if flags.file else None
            check_distinct(check_writable(path), onnx, flags.file, weights, other)
