"""The commands that prove and measure: verify, evaluate, bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import click
from rich.table import Table

from superpoint_trt import packaged
from superpoint_trt.cli.matcher import NEAREST, MatcherArgs
from superpoint_trt.cli.options import (
    JSON,
    NETWORKS,
    SUBPIXEL,
    WEIGHTS,
    ImageArgs,
    OptionGroup,
    RuntimeArgs,
    given_flags,
    option,
)
from superpoint_trt.cli.poses import PoseArgs, run_poses
from superpoint_trt.cli.progress import progress_bar
from superpoint_trt.cli.stress import StressArgs, run_stress
from superpoint_trt.cli.terminal import (
    check_outputs,
    console,
    print_aside,
    print_row,
    write_json,
)
from superpoint_trt.core.image import find_images, load_image, parse_size
from superpoint_trt.match.geometry import Estimator
from superpoint_trt.prove.benchmark import METHOD, STAGES, BenchOptions, BenchReport
from superpoint_trt.prove.gates import parse_limits
from superpoint_trt.prove.protocol import Protocol, Resize

if TYPE_CHECKING:
    from superpoint_trt.prove.evaluate import Evaluation, Summary
    from superpoint_trt.prove.verify import Verification

GATE_FAILED = 1
"""Exit code."""

_PROTOCOL = Protocol()
_BENCH = BenchOptions()


# --------------------------------------------------------------------------------------------------------------- verify


@click.command()
@click.option("--model", required=True, help="The model to prove.")
@WEIGHTS
@click.option("--images", required=True, help="Folder of real images.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many images.")
@click.option("--gate", "gates", multiple=True, metavar="NAME=LIMIT", help="Another limit than the precision's own.")
@click.option("--report", "report_path", help="HTML report to write.")
@SUBPIXEL
@JSON
@RuntimeArgs.declare("runtime")
def verify(
    model: str,
    weights: str,
    images: str,
    limit: int | None,
    gates: tuple[str, ...],
    report_path: str | None,
    subpixel: bool | None,
    json_path: str | None,
    runtime: RuntimeArgs,
) -> None:
    """Prove that a converted model finds the points of its fp32 reference; exit code 1 if a gate fails.

    The reference is the checkpoint that --weights names, or an fp32 dense or heads .onnx.
    """
    from superpoint_trt.prove.report import check_report, write_report
    from superpoint_trt.prove.verify import verify as run_verify

    limits = parse_limits(gates)
    check_outputs((report_path, json_path), (model, weights, *find_images(images)))
    if report_path:
        check_report()
    with progress_bar("verifying") as progress:
        found = run_verify(model, weights, images, limits, runtime.device, progress, limit, runtime.threads, subpixel)
    print_verification(found)
    if json_path:
        write_json(json_path, found.to_json())
    if report_path:
        print_row("report", write_report(report_path, found))
    if not found.passed:
        raise click.exceptions.Exit(GATE_FAILED)


def print_verification(found: Verification) -> None:
    """Prints the gates, what else was noticed, and the verdict."""
    print_row("model", found.model)
    print_row("ran on", found.model_runtime)
    print_row("reference", found.reference)
    print_row("images", len(found.images))
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
        print_aside("left out", problem)
    click.echo("PASSED" if found.passed else "FAILED: " + ", ".join(gate.name for gate in found.failed))


# ------------------------------------------------------------------------------------------------------------- evaluate


def _size(size_hw: tuple[int, int]) -> str:
    return f"{size_hw[0]}x{size_hw[1]}"


@dataclass(frozen=True)
class ProtocolArgs(OptionGroup):
    """The evaluation protocol."""

    resize: str = option("--resize", type=click.Choice([rule.value for rule in Resize]), default=_PROTOCOL.resize.value)
    detector_size: str = option(
        "--detector-size", default=_size(_PROTOCOL.detector_size_hw), help="HxW for repeatability."
    )
    descriptor_size: str = option(
        "--descriptor-size", default=_size(_PROTOCOL.descriptor_size_hw), help="HxW for everything that matches."
    )
    detector_keypoints: int = option(
        "--detector-keypoints", type=click.IntRange(1), default=_PROTOCOL.detector_keypoints
    )
    descriptor_keypoints: int = option(
        "--descriptor-keypoints", type=click.IntRange(1), default=_PROTOCOL.descriptor_keypoints
    )
    detector_nms_radius: int = option(
        "--detector-nms-radius", type=click.IntRange(0), default=_PROTOCOL.detector_nms_radius_px, help="px"
    )
    descriptor_nms_radius: int = option(
        "--descriptor-nms-radius", type=click.IntRange(0), default=_PROTOCOL.descriptor_nms_radius_px, help="px"
    )
    threshold: float = option("--threshold", type=float, default=_PROTOCOL.threshold, help="Detection threshold.")
    matching_px: float = option(
        "--matching-px", type=float, default=_PROTOCOL.matching_px, help="For repeatability, matching score, NN mAP."
    )
    subpixel: bool | None = option(
        "--subpixel/--no-subpixel",
        default=None,
        help="Keypoints between pixels, or on whole ones.  [default: the model's own]",
    )
    estimator: str = option(
        "--estimator", type=click.Choice([name.value for name in Estimator]), default=_PROTOCOL.estimator.value
    )
    inlier_px: float = option(
        "--inlier-px", type=float, default=_PROTOCOL.ransac_px, help="How far an inlier of the estimator may lie."
    )
    ransac_orders: int = option(
        "--ransac-orders",
        type=int,
        default=_PROTOCOL.ransac_orders,
        help="Average homography correctness over so many orders of the matches.",
    )

    def protocol(self) -> Protocol:
        """The protocol that the options describe."""
        return Protocol(
            resize=Resize(self.resize),
            detector_size_hw=parse_size(self.detector_size),
            detector_nms_radius_px=self.detector_nms_radius,
            detector_keypoints=self.detector_keypoints,
            repeatability_px=self.matching_px,
            descriptor_size_hw=parse_size(self.descriptor_size),
            descriptor_nms_radius_px=self.descriptor_nms_radius,
            descriptor_keypoints=self.descriptor_keypoints,
            matching_px=self.matching_px,
            threshold=self.threshold,
            subpixel=self.subpixel,
            estimator=Estimator(self.estimator),
            ransac_px=self.inlier_px,
            ransac_orders=self.ransac_orders,
        )


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=(packaged.DEFAULT,),
    show_default=True,
    help=f"A model file; a packaged network: {NETWORKS}; or sift, rootsift or orb. --stress takes several.",
)
@click.option("--dataset", help="Folder of HPatches or Oxford sequences.")
@click.option(
    "--stress",
    "photos",
    multiple=True,
    metavar="PHOTOS",
    help="Instead of a dataset: folders of photographs, or single ones, to turn, shrink and blur.",
)
@click.option(
    "--poses", "scene", help="Instead of a dataset: a folder of posed images (cameras.json), or a list of posed pairs."
)
@click.option(
    "--baselines/--no-baselines",
    default=True,
    show_default=True,
    help="SIFT and ORB for comparison; with --stress RootSIFT.",
)
@ProtocolArgs.declare("arguments")
@StressArgs.declare("stress_arguments")
@PoseArgs.declare("pose_arguments")
@MatcherArgs.declare("matcher_arguments")
@JSON
@RuntimeArgs.declare("runtime")
def evaluate(
    models: tuple[str, ...],
    dataset: str | None,
    photos: tuple[str, ...],
    scene: str | None,
    baselines: bool,
    arguments: ProtocolArgs,
    stress_arguments: StressArgs,
    pose_arguments: PoseArgs,
    matcher_arguments: MatcherArgs,
    json_path: str | None,
    runtime: RuntimeArgs,
) -> None:
    """Repeatability, homographies and matching on pairs with known homographies, as the literature defines them.

    With --stress: right matches over rotation, zoom and blur of photographs. With --poses: relative poses.
    """
    _check_evaluate(models, dataset, photos, scene)
    if scene:
        run_poses(scene, models[0], pose_arguments, matcher_arguments, arguments.subpixel, json_path, runtime)
        return
    if photos:
        run_stress(photos, models, stress_arguments, arguments.subpixel, baselines, json_path, runtime)
        return
    from superpoint_trt.prove.datasets import input_files
    from superpoint_trt.prove.evaluate import BASELINES, report_with_baselines
    from superpoint_trt.prove.evaluate import evaluate as run_evaluate

    (model,), protocol = models, arguments.protocol()
    check_outputs((json_path,), (model, *input_files(str(dataset))))
    evaluations = []
    with matcher_arguments.opened(runtime) as matcher:
        if matcher:
            with progress_bar(f"evaluating {model} with {matcher_arguments.matcher}") as progress:
                settings = (protocol, runtime.device, runtime.threads, progress)
                evaluations.append(run_evaluate(model, str(dataset), *settings, matcher))
    for name in (model, *(name for name in BASELINES if baselines and name != model)):
        with progress_bar(f"evaluating {name}") as progress:
            evaluations.append(run_evaluate(name, str(dataset), protocol, runtime.device, runtime.threads, progress))
    print_evaluations(evaluations)
    if json_path:
        write_json(json_path, report_with_baselines(*evaluations))


def _check_evaluate(models: Sequence[str], dataset: str | None, photos: Sequence[str], scene: str | None) -> None:
    """Checks that the options of `evaluate` go together.

    Raises:
        click.UsageError: saying which do not.
    """
    ways = {"--dataset": bool(dataset), "--stress": bool(photos), "--poses": bool(scene)}
    if sum(ways.values()) != 1:
        raise click.UsageError("evaluate takes one of --dataset FOLDER, --stress PHOTOS or --poses SCENE.")
    way = next(name for name, given in ways.items() if given)
    if way != "--stress" and len(models) > 1:
        raise click.UsageError(f"{len(models)} models were given; with {way} evaluate takes one at a time.")
    groups = {"--dataset": (ProtocolArgs, MatcherArgs), "--stress": (StressArgs,), "--poses": (PoseArgs, MatcherArgs)}
    every = {ProtocolArgs, StressArgs, PoseArgs, MatcherArgs}
    others = [entry.name for group in every - set(groups[way]) for entry in fields(group)]
    lost = given_flags(tuple(sorted(name for name in others if name != "subpixel")))
    if lost:
        raise click.UsageError(f"{', '.join(lost)} has no effect with {way}.")


def print_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """Prints one table per model: its sequences, kinds of sequences, and the total."""
    for problem in dict.fromkeys(problem for evaluation in evaluations for problem in evaluation.problems):
        print_aside("left out", problem)
    columns = ("rep.", "loc. px", "MMA@1", "MMA@3", "MMA@10", "H@1", "H@3", "H@5", "M.score", "NN mAP", "right")
    for evaluation in evaluations:
        name = evaluation.model
        if evaluation.matcher != NEAREST:
            name += f", {evaluation.matcher} matcher"
        table = Table(name, "pairs", *columns, caption=evaluation.runtime, caption_justify="left")
        # In sections of their own, because a sequence may have the name of a kind.
        for section in (evaluation.sequences, evaluation.kinds, {"total": evaluation.total}):
            for name, row in section.items():
                table.add_row(name, str(row.pairs), *map(_text, _figures(row)))
            table.add_section()
        console().print(table)


def _text(figure: float | None) -> str:
    """A share with three digits after the point, a number of matches with none."""
    return "-" if figure is None else f"{figure:.0f}" if figure > 20 else f"{figure:.3f}"


def _figures(row: Summary) -> list[float | None]:
    """The figures of one row in the order of the table's columns."""
    return [
        row.repeatability,
        row.localization_error_px,
        *(row.mma.get(px) for px in (1, 3, 10)),
        *(row.homography.get(px) for px in (1, 3, 5)),
        row.matching_score,
        row.nn_map,
        row.right_matches,
    ]


# ---------------------------------------------------------------------------------------------------------------- bench


@dataclass(frozen=True)
class BenchArgs(OptionGroup):
    """What is timed, and how often."""

    batch: int = option("--batch", type=int, default=_BENCH.batch, help="Images per call.")
    size: str | None = option("--size", help="HxW of the image.  [default: what the model was exported for]")
    iterations: int = option("--iterations", type=int, default=_BENCH.iterations)

    def options(self) -> BenchOptions:
        """The options of `bench`."""
        return BenchOptions(self.batch, parse_size(self.size) if self.size else None, self.iterations)


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=(packaged.DEFAULT,),
    show_default=True,
    help=f"A model file, or a packaged network: {NETWORKS}. May be repeated: models take turns.",
)
@BenchArgs.declare("arguments")
@click.option("--image", help="A photograph to find keypoints in.  [default: a synthetic one]")
@ImageArgs.declare("image_args")
@click.option("--plot", "plot_path", help="Picture to draw the stages to: .png, .jpg, .svg or .pdf.")
@JSON
@RuntimeArgs.declare("runtime")
def bench(
    models: tuple[str, ...],
    arguments: BenchArgs,
    image: str | None,
    image_args: ImageArgs,
    plot_path: str | None,
    json_path: str | None,
    runtime: RuntimeArgs,
) -> None:
    """Time models, stage by stage: median, p95 and p99."""
    from superpoint_trt.prove.benchmark import bench as run_bench
    from superpoint_trt.prove.benchmark import check_plot, plot

    check_outputs((plot_path, json_path), (*models, image))
    if plot_path:
        check_plot(plot_path)
    options, picture = arguments.options(), load_image(image, image_args.reading()) if image else None
    with progress_bar("timing") as progress:
        report = run_bench(models, options, picture, runtime.device, runtime.threads, progress)
    print_bench(report)
    if json_path:
        write_json(json_path, report.to_json())
    if plot_path:
        print_row("plot", plot(report, plot_path))


def print_bench(report: BenchReport) -> None:
    """Prints how the figures were taken, and one table per model."""
    machine = report.machine
    print_row("machine", f"{machine.cpu}, {machine.cores} cores, GPU {machine.gpu or 'none'}")
    print_row("method", METHOD)
    for times in report.models:
        found = f"{times.keypoints} keypoints, {report.images_per_s(times):.1f} images/s"
        print_row("model", times.model)
        print_row("ran on", times.runtime)
        print_row("image", f"{_size(times.size_hw)} (HxW), batch {report.options.batch}, {found}")
        table = Table(f"ms of {report.options.iterations} calls", "median", "p95", "p99")
        for stage in STAGES:
            summary = times.summary(stage)
            figures = (summary.median, summary.p95, summary.p99) if summary else ()
            table.add_row(stage, *(f"{ms:.2f}" for ms in figures) if figures else ("-", "-", "-"))
        console().print(table)
