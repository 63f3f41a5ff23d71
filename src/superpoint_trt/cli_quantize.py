"""What int8 and fp8 need on the command line: the command quantize, and its options and steps shared with build."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import click

from superpoint_trt.cli_proof import GATE_FAILED, print_verification
from superpoint_trt.spec import Precision, SuperPointError
from superpoint_trt.terminal import print_info, progress_bar

if TYPE_CHECKING:
    from superpoint_trt.calibration import Given

METHODS = ["entropy", "max", "percentile"]
DEFAULT_METHOD = "percentile"
DEFAULT_COUNT = 200


@dataclass(frozen=True)
class CalibrationFlags:
    """What the command line says of calibration."""

    images: str | None = None
    """A folder, or "synthetic"."""
    method: str = DEFAULT_METHOD
    count: int = DEFAULT_COUNT
    file: str | None = None
    """Ranges of an earlier run."""
    keep_fp16: tuple[str, ...] = ()
    verify: bool = True


def calibration_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that make a `CalibrationFlags`; the command gets it as `calibration`."""

    @functools.wraps(command)
    def with_flags(
        calibration_images: str | None,
        calibration_method: str,
        calibration_count: int,
        calibration: str | None,
        keep_fp16: tuple[str, ...],
        verify: bool,
        **others: Any,
    ) -> Any:
        flags = CalibrationFlags(
            calibration_images, calibration_method, calibration_count, calibration, keep_fp16, verify
        )
        return command(calibration=flags, **others)

    method = click.Choice(METHODS)
    options = (
        click.option("--calibration-images", help="int8, fp8: folder of photographs like those to come, or synthetic."),
        click.option("--calibration-method", type=method, default=DEFAULT_METHOD, show_default=True),
        click.option("--calibration-count", type=int, default=DEFAULT_COUNT, show_default=True, help="Most images."),
        click.option("--calibration", help="Ranges of an earlier run (.calibration.json) instead of measuring them."),
        click.option("--keep-fp16", multiple=True, metavar="PATTERN", help="Convolutions to leave alone: conv4*, say."),
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


def check_ranges_given(flags: CalibrationFlags, precision: str) -> None:
    """Refuses to guess ranges.

    Raises:
        SuperPointError: neither images nor ranges.
    """
    from superpoint_trt.calibration import SYNTHETIC

    if flags.images is None and flags.file is None:
        raise SuperPointError(
            f"precision {precision} needs ranges measured on images: give --calibration-images FOLDER (100 or more "
            "photographs like those to come), --calibration FILE of an earlier run, or, only to try it out, "
            f"--calibration-images {SYNTHETIC}."
        )


def calibrated(onnx: str, flags: CalibrationFlags, precision: str) -> Calibrated:
    """Measures ranges and writes them beside the .onnx, or takes those of an earlier run.

    Raises:
        SuperPointError: neither images nor ranges, or none that can be used.
    """
    from superpoint_trt import calibration as calibrations

    given, proof = _images(onnx, flags)
    if flags.file is not None:
        return Calibrated(Path(flags.file), proof)
    options = calibrations.CalibrationOptions(calibrations.Method(flags.method), flags.count)
    with progress_bar("calibrating") as progress:
        found = calibrations.calibrate(onnx, given, options, progress)
    for note in found.notes:
        click.echo(f"warning: {note}", err=True)
    path = calibrations.save(found, calibrations.beside(onnx))
    click.echo(f"{'calibration':<14}{path} ({found.summary()})")
    return Calibrated(path, proof)


def _images(onnx: str, flags: CalibrationFlags) -> tuple[Sequence[Given], Sequence[Path]]:
    """What to calibrate on, and what to prove on."""
    from superpoint_trt import calibration as calibrations
    from superpoint_trt.precision import described, load_onnx

    if flags.images is None:
        return [], []
    if flags.images == calibrations.SYNTHETIC:
        model = described(load_onnx(onnx), onnx)
        click.echo("warning: synthetic pictures: the ranges of photographs differ; do not ship this model", err=True)
        size = (model.height_px or 480, model.width_px or 640)
        return calibrations.synthetic_images(min(flags.count, FEW_SYNTHETIC), size), []
    chosen = calibrations.split(flags.images, flags.count)
    return chosen.calibration, chosen.held_out or chosen.calibration[: calibrations.MOST_HELD_OUT]


FEW_SYNTHETIC = 32


def prove(model: Path, onnx: str, proof: Sequence[Path], gates: dict[str, float] | None = None) -> None:
    """Verifies a quantised model against the fp32 .onnx it was made from, and prints the verdict.

    Raises:
        click.exceptions.Exit: with exit code 1, if a gate fails.
    """
    from superpoint_trt.precision import load_onnx, raw_heads
    from superpoint_trt.verify import verify

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
@click.option("--output", required=True, help="The quantised .onnx to write: Q/DQ pairs, float32 elsewhere.")
@click.option("--precision", type=click.Choice(["int8", "fp8"]), default="int8", show_default=True)
@calibration_options
def quantize(onnx: str, output: str, precision: str, calibration: CalibrationFlags) -> None:
    """Write an .onnx with int8 or fp8 convolutions, and prove it."""
    from superpoint_trt import quantize as quantizing
    from superpoint_trt.calibration import check_quantisable
    from superpoint_trt.files import check_distinct, check_writable
    from superpoint_trt.precision import load_onnx

    if Path(output).suffix.lower() != ".onnx":
        raise SuperPointError(f"output {output}: a model's name ends in .onnx.")
    check_distinct(check_writable(output), onnx, calibration.file)
    check_ranges_given(calibration, precision)
    check_quantisable(load_onnx(onnx))
    ranges = calibrated(onnx, calibration, precision)
    written = quantizing.quantize_file(onnx, output, ranges.path, Precision(precision), calibration.keep_fp16)
    print_info(written)
    if calibration.verify:
        prove(written, onnx, ranges.proof)
