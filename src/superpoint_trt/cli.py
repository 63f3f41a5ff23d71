"""The command `superpoint`: parses, calls one function, prints, sets the exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import click
from rich.console import Console
from rich.table import Table

from superpoint_trt._version import __version__
from superpoint_trt.spec import (
    ENGINE_SUFFIXES,
    TENSORRT_MAX_TOPK,
    DecodeOptions,
    OutputType,
    Precision,
    Sampling,
    SuperPointError,
)
from superpoint_trt.trt import Flavour

GATE_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
_WIDE = 160
"""Columns when the output is no terminal and so has no width."""

_DECODE = DecodeOptions()


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="superpoint")
@click.pass_context
def cli(context: click.Context) -> None:
    """SuperPoint keypoints and descriptors: checkpoint -> ONNX -> TensorRT -> keypoints."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


# ------------------------------------------------------------------------------------------------------------- export


@cli.command()
@click.option("--weights", required=True, help="Checkpoint: .pth (needs torch) or .safetensors.")
@click.option("--output", required=True, help="The .onnx to write.")
@click.option("--type", "kind", type=click.Choice([t.value for t in OutputType]), default="dense", show_default=True)
@click.option("--height", type=int, default=480, show_default=True, help="Input height in px, a multiple of 8.")
@click.option("--width", type=int, default=640, show_default=True, help="Input width in px, a multiple of 8.")
@click.option("--dynamic", is_flag=True, help="Free height, width and batch; --height and --width are the usual size.")
@click.option("--max-batch-size", type=int, default=1, show_default=True, help="Above 1 the batch size is free.")
@click.option("--max-keypoints", type=int, default=1024, show_default=True, help="N of a keypoints model.")
@click.option("--nms-radius", type=int, default=_DECODE.nms_radius_px, show_default=True, help="px; keypoints models.")
@click.option("--threshold", type=float, default=_DECODE.threshold, show_default=True, help="Keypoints models.")
@click.option(
    "--remove-borders", type=int, default=_DECODE.remove_borders_px, show_default=True, help="px; keypoints models."
)
@click.option("--opset", type=int, default=17, show_default=True, help="11 to the newest that onnx has.")
@click.option("--sampling", type=click.Choice([s.value for s in Sampling]), help="Overrides the checkpoint family's.")
def export(
    weights: str,
    output: str,
    kind: str,
    height: int,
    width: int,
    dynamic: bool,
    max_batch_size: int,
    max_keypoints: int,
    nms_radius: int,
    threshold: float,
    remove_borders: int,
    opset: int,
    sampling: str | None,
) -> None:
    """Convert a checkpoint to one .onnx file."""
    from superpoint_trt.export import ExportOptions
    from superpoint_trt.export import export as convert

    options = ExportOptions(
        type=OutputType(kind),
        height_px=height,
        width_px=width,
        dynamic=dynamic,
        max_batch_size=max_batch_size,
        max_keypoints=max_keypoints,
        decode=DecodeOptions(nms_radius, remove_borders, threshold),
        opset=opset,
    )
    written = convert(weights, output, options, Sampling(sampling) if sampling else None)
    if kind != OutputType.KEYPOINTS.value:
        _note_unused(f"a {kind} model decodes at run time")
    elif max_keypoints > TENSORRT_MAX_TOPK:
        click.echo(f"note: TensorRT takes at most {TENSORRT_MAX_TOPK} keypoints in a graph", err=True)
    print_info(written)


_DECODE_FLAGS = ("max_keypoints", "nms_radius", "threshold", "remove_borders")


def _note_unused(why: str) -> None:
    """Says which decode options were given in vain."""
    context = click.get_current_context()
    given = [n for n in _DECODE_FLAGS if context.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        click.echo(f"note: {flags} changes nothing: {why}", err=True)


@cli.command()
@click.argument("file")
def info(file: str) -> None:
    """Say what a checkpoint, an .onnx or a feature file is."""
    print_info(file)


def print_info(file: Any) -> None:
    """Prints `info.describe` as two columns."""
    from superpoint_trt.info import describe

    for label, value in list(describe(file)):
        click.echo(f"{label:<14}{value}")


# -------------------------------------------------------------------------------------------------------- build, cast

_PRECISIONS = [p.value for p in (Precision.FP32, Precision.TF32, Precision.FP16, Precision.BF16)]


@cli.command()
@click.option("--onnx", required=True, help="The .onnx: from superpoint export, or another tool's SuperPoint in fp32.")
@click.option("--engine", required=True, help="The engine to write; its description goes beside it, in ENGINE.json.")
@click.option("--precision", type=click.Choice(_PRECISIONS), default="fp32", show_default=True)
@click.option("--workspace", type=float, help="Most scratch memory in GiB.  [default: what the GPU has]")
@click.option("--min-shape", help="HxW, smallest; dynamic models.  [default: 240x320]")
@click.option("--opt-shape", help="HxW, the one to be fastest at.  [default: what the model was exported for]")
@click.option("--max-shape", help="HxW, largest.  [default: 960x1280]")
@click.option("--max-batch-size", type=int, help="Most images a call.  [default: the model's own]")
@click.option("--timing-cache", help="File of kernel timings, read and updated: later builds take seconds.")
@click.option("--optimization-level", type=int, help="0 (fast build) to 5 (fast engine).  [default: TensorRT's, 3]")
@click.option("--runtime", type=click.Choice(["auto", *(f.value for f in Flavour)]), default="auto", show_default=True)
@click.option("--target", help="GPUs to build for, sm86,sm89 say; rtx only, needs no GPU.  [default: the GPU here]")
@click.option("--test", is_flag=True, help="Run the engine once it is built.")
def build(
    onnx: str,
    engine: str,
    precision: str,
    workspace: float | None,
    min_shape: str | None,
    opt_shape: str | None,
    max_shape: str | None,
    max_batch_size: int | None,
    timing_cache: str | None,
    optimization_level: int | None,
    runtime: str,
    target: str | None,
    test: bool,
) -> None:
    """Build a TensorRT engine."""
    from superpoint_trt.engine import BuildOptions
    from superpoint_trt.image import parse_size

    options = BuildOptions(
        Precision(precision),
        workspace,
        min_shape_hw=parse_size(min_shape) if min_shape else None,
        opt_shape_hw=parse_size(opt_shape) if opt_shape else None,
        max_shape_hw=parse_size(max_shape) if max_shape else None,
        max_batch_size=max_batch_size,
        timing_cache=timing_cache,
        optimization_level=optimization_level,
        runtime=None if runtime == "auto" else Flavour(runtime),
        targets=parse_targets(target),
    )
    build_engine(onnx, engine, options, test)


def parse_targets(text: str | None) -> tuple[str, ...]:
    """Splits "sm86,sm89"."""
    return tuple(part.strip().lower() for part in text.split(",")) if text else ()


def build_engine(onnx: str, engine: str, options: Any, test: bool) -> None:
    """Builds, says what came out, and runs it if asked."""
    from superpoint_trt import engine as engines

    if Path(engine).suffix.lower() not in ENGINE_SUFFIXES:
        raise SuperPointError(f"{engine}: an engine's name ends in one of {', '.join(ENGINE_SUFFIXES)}.")
    with builder_progress() as progress:
        metadata = engines.build(onnx, engine, options, progress)
    click.echo(f"{'built in':<14}{metadata.build['seconds']} s")
    print_info(engine)
    if test:
        _try_engine(engine)


def _try_engine(engine: str) -> None:
    """One picture through a fresh engine; the second call is timed."""
    from superpoint_trt.benchmark import synthetic_photograph

    with _open(engine) as superpoint:
        model = superpoint.description
        picture = synthetic_photograph(model.height_px, model.width_px)
        superpoint.extract(picture)
        started = time.perf_counter()
        keypoints = superpoint.extract(picture)
        click.echo(f"{'test':<14}{len(keypoints)} keypoints in {(time.perf_counter() - started) * 1e3:.1f} ms")


@contextmanager
def builder_progress() -> Iterator[Callable[[str, int, int], None]]:
    """The builder's phase and steps on stderr; where TensorRT does not tell (8.6), the time that passes."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    screen = console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("building: {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bar:
        task = bar.add_task("kernels are timed, this can take minutes", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total or None)


@cli.command()
@click.option("--onnx", required=True, help="An fp32 SuperPoint .onnx.")
@click.option("--output", required=True, help="The typed .onnx to write.")
@click.option("--precision", type=click.Choice(["fp16", "bf16"]), default="fp16", show_default=True)
def cast(onnx: str, output: str, precision: str) -> None:
    """Write the typed .onnx that build uses, for other builders (trtexec --stronglyTyped)."""
    from superpoint_trt import precision as precisions

    print_info(precisions.cast(onnx, output, Precision(precision)))


# -------------------------------------------------------------------------------------------------------------- infer


@cli.command()
@click.option("--model", required=True, help=".onnx, engine, or a checkpoint (runs in PyTorch).")
@click.option("--image", required=True, help="Any image OpenCV reads, of any size from 8x8 px.")
@click.option("--output", help="Picture to write: the image with its keypoints.")
@click.option("--save", help="Features to write: .npz with keypoints, scores, descriptors, image_size.")
@click.option("--threshold", type=float, help="Scores must be greater.  [default: 0.005, or the model's own]")
@click.option("--top-k", type=int, help="Keep the best K.  [default: all]")
@click.option("--max-side", type=int, help="Shrink larger images to this many px first.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
def infer(
    model: str,
    image: str,
    output: str | None,
    save: str | None,
    threshold: float | None,
    top_k: int | None,
    max_side: int | None,
    device: str,
    threads: int | None,
) -> None:
    """Find the keypoints of an image; draw and save them."""
    from superpoint_trt.files import check_distinct, check_writable
    from superpoint_trt.image import load_image
    from superpoint_trt.store import check_npz, save_features

    if output:
        from superpoint_trt.draw import check_picture_name

        check_picture_name(check_writable(output))
        check_distinct(output, image, model, save)
    if save:
        check_npz(check_writable(save))
        check_distinct(save, image, model)
    pixels = load_image(image)
    options: dict[str, Any] = {"threshold": threshold, "max_keypoints": top_k, "max_side_px": max_side}
    with _open(model, device=device, threads=threads, **options) as superpoint:
        started = time.perf_counter()
        keypoints = superpoint.extract(pixels)
        elapsed_ms = (time.perf_counter() - started) * 1e3
    print_found(keypoints, elapsed_ms)
    if save:
        click.echo(f"{'features':<14}{save_features(save, keypoints)}")
    if output:
        save_drawing(pixels, keypoints, output)


def print_found(keypoints: Any, elapsed_ms: float) -> None:
    """Prints what was found in an image."""
    click.echo(f"{'image':<14}{keypoints.image_size[0]}x{keypoints.image_size[1]} px")
    click.echo(f"{'keypoints':<14}{len(keypoints)} in {elapsed_ms:.1f} ms (first call, warm-up included)")
    if len(keypoints):
        click.echo(f"{'scores':<14}{keypoints.scores.min():.4f} to {keypoints.scores.max():.4f}")
    click.echo(f"{'descriptors':<14}{keypoints.descriptors.shape}, {keypoints.descriptors.dtype}")


def save_drawing(pixels: Any, keypoints: Any, output: str) -> None:
    """Writes the image with its keypoints and says so."""
    from superpoint_trt.draw import draw_keypoints, save_picture
    from superpoint_trt.image import to_picture

    picture = save_picture(output, draw_keypoints(to_picture(pixels), keypoints))
    click.echo(f"{'picture':<14}{picture}")


# -------------------------------------------------------------------------------------- match, verify, evaluate, bench

_DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
_JSON = click.option("--json", "json_path", help="File to write the figures to.")


@cli.command()
@click.option("--model", required=True, help=".onnx, engine, or a checkpoint (runs in PyTorch).")
@click.argument("first")
@click.argument("second")
@click.option("--output", help="Picture to write: both images, inliers green, outliers red.")
@click.option("--save", help="Matches to write: .npz with both feature sets, matches, distances, inliers, geometry.")
@click.option("--geometry", type=click.Choice(["homography", "fundamental"]), default="homography", show_default=True)
@click.option("--estimator", type=click.Choice(["magsac", "ransac"]), default="magsac", show_default=True)
@click.option("--inlier-px", type=float, default=3.0, show_default=True, help="How far an inlier may lie.")
@click.option("--ratio", type=float, help="Nearest over second nearest distance must be smaller.  [default: no test]")
@click.option("--max-distance", type=float, help="Descriptor distance must not be greater.  [default: no limit]")
@click.option("--top-k", type=int, default=2048, show_default=True, help="Keep the best K keypoints of each image.")
@click.option("--max-side", type=int, help="Shrink larger images to this many px first.")
@_DEVICE
def match(
    model: str,
    first: str,
    second: str,
    output: str | None,
    save: str | None,
    geometry: str,
    estimator: str,
    inlier_px: float,
    ratio: float | None,
    max_distance: float | None,
    top_k: int,
    max_side: int | None,
    device: str,
) -> None:
    """Match two images and draw the inliers of one geometry."""
    from superpoint_trt.draw import check_picture_name, draw_matches, save_picture
    from superpoint_trt.files import check_distinct, check_writable
    from superpoint_trt.image import load_image, to_picture
    from superpoint_trt.matching import Estimator, MatchOptions, Model, match_images
    from superpoint_trt.store import check_npz, save_matches

    if output:
        check_picture_name(check_writable(output))
        check_distinct(output, first, second, model, save)
    if save:
        check_npz(check_writable(save))
        check_distinct(save, first, second, model)
    options = MatchOptions(max_ratio=ratio, max_distance=max_distance)
    with _open(model, device=device, max_keypoints=top_k, max_side_px=max_side) as superpoint:
        found = match_images(
            superpoint.extract(first),
            superpoint.extract(second),
            options,
            Model(geometry),
            Estimator(estimator),
            inlier_px,
        )
    kind = "homography" if geometry == Model.HOMOGRAPHY.value else "fundamental matrix"
    click.echo(f"{'keypoints':<14}{len(found.first)} and {len(found.second)}")
    click.echo(f"{'matches':<14}{len(found.matches)}, {int(found.geometry.inliers.sum())} inliers of one {kind}")
    if found.geometry.matrix is None:
        click.echo(f"{'geometry':<14}none: the matches support no {kind}")
    if output:
        pixels = (to_picture(load_image(first)), to_picture(load_image(second)))
        click.echo(
            f"{'picture':<14}{save_picture(output, draw_matches(*pixels, *found.places(), found.geometry.inliers))}"
        )
    if save:
        click.echo(f"{'saved':<14}{save_matches(save, found)}")


@cli.command()
@click.option("--model", required=True, help="The model to prove.")
@click.option("--weights", required=True, help="Its checkpoint, or an fp32 dense or heads .onnx, as the reference.")
@click.option("--images", required=True, help="Folder of real images.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many images.")
@click.option("--gate", "gates", multiple=True, metavar="NAME=LIMIT", help="Another limit than the precision's own.")
@click.option("--report", "report_path", help="HTML report to write.")
@_JSON
@_DEVICE
def verify(
    model: str,
    weights: str,
    images: str,
    limit: int | None,
    gates: tuple[str, ...],
    report_path: str | None,
    json_path: str | None,
    device: str,
) -> None:
    """Prove that a converted model finds the points of its fp32 reference; exit code 1 if a gate fails."""
    from superpoint_trt.files import check_distinct, check_writable
    from superpoint_trt.verify import find_images, verify

    for path, other in ((report_path, json_path), (json_path, None)):
        if path:
            check_distinct(check_writable(path), model, weights, other, *find_images(images))
    if report_path:
        from superpoint_trt.report import check_report

        check_report()
    with progress_bar("verifying") as progress:
        found = verify(model, weights, images, _limits(gates), device, progress, limit)
    _print_verification(found)
    if json_path:
        write_json(json_path, found.to_json())
    if report_path:
        from superpoint_trt.report import write_report

        click.echo(f"{'report':<14}{write_report(report_path, found)}")
    if not found.passed:
        raise click.exceptions.Exit(GATE_FAILED)


def _limits(gates: Sequence[str]) -> dict[str, float]:
    from superpoint_trt.verify import GATE_NAMES

    limits = {}
    for text in gates:
        name, _, value = text.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            names = ", ".join(GATE_NAMES)
            raise SuperPointError(f"--gate {text}: expected NAME=NUMBER; gates are: {names}.") from None
    return limits


def _print_verification(found: Any) -> None:
    click.echo(f"{'model':<14}{found.model}\n{'ran on':<14}{found.model_runtime}\n{'reference':<14}{found.reference}")
    click.echo(f"{'images':<14}{len(found.images)}")
    table = Table(f"gate ({found.precision.value})", "measured", "limit", "")
    for gate in found.gates:
        value = "-" if gate.value is None else f"{gate.value:.6g}"
        bound = f"{'>=' if gate.at_least else '<='} {gate.limit:g}"
        table.add_row(gate.name, value, bound, "passed" if gate.passed else "FAILED")
    console().print(table)
    for finding in found.findings:
        click.echo(f"finding: {finding.name}: {finding.detail}")
    for note in found.notes:
        click.echo(f"note: {note}")
    for problem in found.problems:
        click.echo(f"left out: {problem}", err=True)
    click.echo("PASSED" if found.passed else "FAILED: " + ", ".join(g.name for g in found.gates if not g.passed))


@cli.command()
@click.option("--model", required=True, help="A model file, or sift or orb.")
@click.option("--dataset", required=True, help="Folder of HPatches or Oxford sequences.")
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="SIFT and ORB beside it, for scale.")
@click.option("--resize", type=click.Choice(["crop", "fit", "none"]), default="crop", show_default=True)
@click.option("--detector-size", default="240x320", show_default=True, help="HxW for repeatability.")
@click.option("--descriptor-size", default="480x640", show_default=True, help="HxW for everything that matches.")
@click.option("--detector-keypoints", type=click.IntRange(1), default=300, show_default=True)
@click.option("--descriptor-keypoints", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--detector-nms-radius", type=click.IntRange(0), default=4, show_default=True, help="px")
@click.option("--descriptor-nms-radius", type=click.IntRange(0), default=8, show_default=True, help="px")
@click.option("--threshold", type=float, default=0.001, show_default=True, help="Detection threshold.")
@click.option(
    "--matching-px", type=float, default=3.0, show_default=True, help="Repeatability, matching score, NN mAP."
)
@click.option("--estimator", type=click.Choice(["ransac", "magsac"]), default="ransac", show_default=True)
@click.option("--inlier-px", type=float, default=3.0, show_default=True, help="Of the estimator.")
@_JSON
@_DEVICE
def evaluate(
    model: str,
    dataset: str,
    baselines: bool,
    resize: str,
    detector_size: str,
    descriptor_size: str,
    detector_keypoints: int,
    descriptor_keypoints: int,
    detector_nms_radius: int,
    descriptor_nms_radius: int,
    threshold: float,
    matching_px: float,
    estimator: str,
    inlier_px: float,
    json_path: str | None,
    device: str,
) -> None:
    """Repeatability, homographies and matching on pairs with known homographies, as the literature defines them."""
    from superpoint_trt.datasets import input_files
    from superpoint_trt.evaluate import BASELINES, Protocol, Resize, evaluate
    from superpoint_trt.files import check_distinct, check_writable
    from superpoint_trt.image import parse_size
    from superpoint_trt.matching import Estimator

    if json_path:
        check_distinct(check_writable(json_path), model, *input_files(dataset))
    protocol = Protocol(
        resize=Resize(resize),
        detector_size_hw=parse_size(detector_size),
        detector_nms_radius_px=detector_nms_radius,
        detector_keypoints=detector_keypoints,
        repeatability_px=matching_px,
        descriptor_size_hw=parse_size(descriptor_size),
        descriptor_nms_radius_px=descriptor_nms_radius,
        descriptor_keypoints=descriptor_keypoints,
        matching_px=matching_px,
        threshold=threshold,
        estimator=Estimator(estimator),
        ransac_px=inlier_px,
    )
    names = [model, *(name for name in BASELINES if baselines and name != model)]
    reports = []
    for name in names:
        with progress_bar(f"evaluating {name}") as progress:
            reports.append(evaluate(name, dataset, protocol, device, progress=progress).to_json())
    _print_evaluation(reports)
    if json_path:
        others = {report["model"]: report for report in reports[1:]}
        write_json(json_path, {**reports[0], "baselines": others} if others else reports[0])


def _print_evaluation(reports: Sequence[dict[str, Any]]) -> None:
    for problem in dict.fromkeys(problem for report in reports for problem in report["problems"]):
        click.echo(f"left out: {problem}", err=True)
    columns = ("rep.", "loc. px", "MMA@1", "MMA@3", "MMA@10", "H@1", "H@3", "H@5", "M.score", "NN mAP")
    for report in reports:
        table = Table(report["model"], "pairs", *columns, caption=report["runtime"], caption_justify="left")
        # One after the other, not merged: a sequence may be called as a kind is.
        for section in (report["sequences"], report["kinds"], {"total": report["total"]}):
            for name, row in section.items():
                table.add_row(name, str(row["pairs"]), *("-" if f is None else f"{f:.3f}" for f in _figures(row)))
            table.add_section()
        console().print(table)


def _figures(row: dict[str, Any]) -> list[float | None]:
    mma, homography = row["mma"], row["homography"]
    figures = [row["repeatability"], row["localisation_error_px"], *(mma.get(px) for px in ("1", "3", "10"))]
    return [*figures, *(homography.get(px) for px in ("1", "3", "5")), row["matching_score"], row["nn_map"]]


@cli.command()
@click.option("--model", "models", multiple=True, required=True, help="May be repeated: models are taken in turn.")
@click.option("--batch", type=int, default=1, show_default=True, help="Images per call.")
@click.option("--size", help="HxW of the image.  [default: what the model was exported for]")
@click.option("--iterations", type=int, default=100, show_default=True)
@click.option("--image", help="A photograph to find keypoints in.  [default: a synthetic one]")
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--plot", "plot_path", help="Picture to draw the stages to: .png, .jpg, .svg or .pdf.")
@_JSON
@_DEVICE
def bench(
    models: tuple[str, ...],
    batch: int,
    size: str | None,
    iterations: int,
    image: str | None,
    threads: int | None,
    plot_path: str | None,
    json_path: str | None,
    device: str,
) -> None:
    """Time models, stage by stage: median, p95 and p99."""
    from superpoint_trt.benchmark import BenchOptions, bench, check_plot, plot
    from superpoint_trt.files import check_distinct, check_writable
    from superpoint_trt.image import load_image, parse_size

    for path, other in ((plot_path, json_path), (json_path, None)):
        if path:
            check_distinct(check_writable(path), *models, image, other)
    if plot_path:
        check_plot(plot_path)
    options = BenchOptions(batch, parse_size(size) if size else None, iterations)
    with progress_bar("timing") as progress:
        report = bench(models, options, load_image(image) if image else None, device, threads, progress)
    print_bench(report)
    if json_path:
        write_json(json_path, report.to_json())
    if plot_path:
        click.echo(f"{'plot':<14}{plot(report, plot_path)}")


def print_bench(report: Any) -> None:
    """Prints the figures of a bench, one table a model, and how they were taken."""
    from superpoint_trt.benchmark import METHOD, STAGES

    machine = report.machine
    click.echo(f"{'machine':<14}{machine['cpu']}, {machine['cores']} cores, GPU {machine['gpu'] or 'none'}")
    click.echo(f"{'method':<14}{METHOD}")
    for times in report.models:
        height, width = times.size_hw
        click.echo(f"{'model':<14}{times.model}\n{'ran on':<14}{times.runtime}")
        found = f"{times.keypoints} keypoints, {report.images_per_s(times):.1f} images/s"
        click.echo(f"{'image':<14}{height}x{width} (HxW), batch {report.options.batch}, {found}")
        table = Table(f"ms of {report.options.iterations} calls", "median", "p95", "p99")
        for stage in STAGES:
            summary = times.summary(stage)
            table.add_row(stage, *(f"{value:.2f}" for value in summary.values()) if summary else ("-", "-", "-"))
        console().print(table)


# ------------------------------------------------------------------------------------------------------------ weights


@cli.group(no_args_is_help=False)
def weights() -> None:
    """The public checkpoints: list, fetch, convert."""


@weights.command("list")
def weights_list() -> None:
    """The public checkpoints, their licences, and where they are."""
    from superpoint_trt.weights import PUBLIC

    for entry in PUBLIC:
        click.echo(f"{entry.name}: {entry.about}")
        rows = {"licence": entry.licence, "layout": entry.family.value, "git blob": entry.git_blob, "url": entry.url}
        for label, value in rows.items():
            click.echo(f"  {label:<10}{value}")


@weights.command("fetch")
@click.argument("name")
@click.option("--output", help="File to write.  [default: weights/ and the name it has at its source]")
def weights_fetch(name: str, output: str | None) -> None:
    """Download a public checkpoint and verify its content."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from superpoint_trt.weights import fetch, find

    entry = find(name)
    path = Path(output) if output else Path("weights") / entry.filename
    click.echo(f"{entry.name}: {entry.about}. Licence: {entry.licence}.")
    if not entry.commercial_use:
        click.echo("NON-COMMERCIAL: by using these weights you accept that licence; v6 is free for any use.")
    if not output and not path.parent.is_dir():
        if path.parent.exists():
            raise SuperPointError(f"{path.parent} is a file, not a folder; say where to: --output FILE.")
        path.parent.mkdir()
    screen = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task(entry.filename, total=None)
        fetch(entry, path, lambda done, total: bar.update(task, completed=done, total=total))
    click.echo(f"{path}: verified, git blob {entry.git_blob}")


@weights.command("convert")
@click.argument("checkpoint")
@click.argument("output")
@click.option("--half", is_flag=True, help="Store float16: half the size.")
@click.option("--sampling", type=click.Choice([s.value for s in Sampling]), help="Overrides the checkpoint family's.")
def weights_convert(checkpoint: str, output: str, half: bool, sampling: str | None) -> None:
    """Rewrite any checkpoint as this project's .safetensors, which needs no torch to read."""
    from superpoint_trt import checkpoint as checkpoints
    from superpoint_trt.files import check_distinct

    if not output.endswith(".safetensors"):
        raise SuperPointError(f"{output}: expected a name that ends in .safetensors.")
    check_distinct(output, checkpoint)
    loaded = checkpoints.load(checkpoint, Sampling(sampling) if sampling else None)
    print_info(checkpoints.save(loaded, output, half))


# ------------------------------------------------------------------------------------------------------------- doctor


@cli.command()
def doctor() -> None:
    """Say what this machine can do, and the command that adds what it cannot."""
    from superpoint_trt.doctor import abilities, examine

    for title, findings in (("this machine", examine()), ("what you can do", abilities())):
        table = Table(title, "", "version, or how to add it")
        for finding in findings:
            table.add_row(finding.name, "yes" if finding.present else "no", finding.detail)
        console().print(table, markup=False)


# ------------------------------------------------------------------------------------------------------------- frame


def _open(model: str, **options: Any) -> Any:
    """Opens a model and says what it runs on."""
    from superpoint_trt.extractor import SuperPoint

    superpoint = SuperPoint(model, **options)
    click.echo(f"{'model':<14}{model} ({superpoint.description.type.value})")
    click.echo(f"{'ran on':<14}{superpoint.runtime}")
    return superpoint


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for work that reports (done, in all); nothing when that is no terminal."""
    from rich.progress import Progress

    screen = console(stderr=True)
    with Progress(console=screen, disable=not screen.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_json(path: str, report: Any) -> None:
    """Writes figures as JSON; beside, then renamed."""
    import json

    from superpoint_trt.files import write_atomically

    click.echo(f"{'figures':<14}{write_atomically(path, (json.dumps(report, indent=1) + chr(10)).encode())}")


def console(stderr: bool = False) -> Console:
    """A rich console that does not squeeze tables when the output is a file or a pipe."""
    screen = Console(stderr=stderr, highlight=False, markup=False)
    return screen if screen.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=_WIDE)


def run(command: click.Command, arguments: Sequence[str] | None = None, name: str | None = None) -> int:
    """Runs a command; bad input becomes one line on stderr and exit code 2, never a traceback."""
    try:
        code = command.main(args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
    except SuperPointError as error:
        return _complain(str(error))
    except click.ClickException as error:
        return _complain(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:  # the reader, head say, has seen enough
        return 0
    return code if isinstance(code, int) else 0  # click hands back the code of an Exit


def _complain(message: str) -> int:
    click.echo("error: " + " ".join(message.split()), err=True)
    return BAD_INPUT


def script(command: click.Command) -> Callable[[], None]:
    """A command as the `main` of a script."""
    return lambda: sys.exit(run(command))


main = script(cli)


if __name__ == "__main__":
    main()
