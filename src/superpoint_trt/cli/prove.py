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
    SeveralDevicesArgs,
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
    print_table,
    write_json,
)
from superpoint_trt.core.files import write_atomically
from superpoint_trt.core.image import find_images, load_image, parse_size
from superpoint_trt.match.geometry import Estimator
from superpoint_trt.prove.benchmark import METHOD, STAGES, BenchOptions, BenchReport, to_markdown
from superpoint_trt.prove.gates import parse_limits
from superpoint_trt.prove.protocol import Protocol, Resize
from superpoint_trt.prove.tables import Column, check_table_name, write_table
from superpoint_trt.prove.tables import Table as FigureTable

if TYPE_CHECKING:
    from superpoint_trt.match.learned import LearnedMatcher
    from superpoint_trt.prove.evaluate import Evaluation, Summary
    from superpoint_trt.prove.verify import Verification
    from superpoint_trt.prove.worst_pairs import WorstPairs

GATE_FAILED = 1
"""Exit code."""

TABLE = click.option("--table", help="One table of all models to write: .md, .csv or .tex (LaTeX).")
_PROTOCOL = Protocol()
_BENCH = BenchOptions()


# --------------------------------------------------------------------------------------------------------------- verify


@click.command()
@click.option("--model", "models", required=True, multiple=True, help="The model to prove. May be repeated.")
@WEIGHTS
@click.option("--images", required=True, help="Folder of real images.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many images.")
@click.option("--gate", "gates", multiple=True, metavar="NAME=LIMIT", help="Another limit than the precision's own.")
@click.option("--report", "report_path", help="HTML report to write.")
@SUBPIXEL
@TABLE
@JSON
@RuntimeArgs.declare("runtime")
def verify(
    models: tuple[str, ...],
    weights: str,
    images: str,
    limit: int | None,
    gates: tuple[str, ...],
    report_path: str | None,
    subpixel: bool | None,
    table: str | None,
    json_path: str | None,
    runtime: RuntimeArgs,
) -> None:
    """Prove that a converted model finds the points of its fp32 reference; exit code 1 if a gate fails.

    The reference is the checkpoint that --weights names, or an fp32 dense or heads .onnx.
    """
    from superpoint_trt.prove.report import check_report, write_report
    from superpoint_trt.prove.verify import report_of, verification_table
    from superpoint_trt.prove.verify import verify as run_verify

    limits = parse_limits(gates)
    check_outputs((report_path, table, json_path), (*models, weights, *find_images(images)))
    if report_path:
        check_report()
    if table:
        check_table_name(table)
    found = []
    for model in dict.fromkeys(models):
        with progress_bar(f"verifying {model}") as progress:
            settings = (limits, runtime.device, progress, limit, runtime.threads, subpixel)
            found.append(run_verify(model, weights, images, *settings, runtime.allow_host_code))
        print_verification(found[-1])
    measured = verification_table(found)
    if len(found) > 1:
        print_table(measured)
    if table:
        print_row("table", write_table(table, measured))
    if json_path:
        write_json(json_path, report_of(found))
    if report_path:
        print_row("report", write_report(report_path, *found))
    if not all(one.passed for one in found):
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


@dataclass(frozen=True)
class WorstArgs(OptionGroup):
    """Which failures are drawn."""

    pictures: str | None = option(
        "--pictures", metavar="FOLDER", help="Draw the pairs with the worst homographies to this folder."
    )
    worst: int = option("--worst", type=click.IntRange(1), default=10, help="--pictures: so many of each evaluation.")

    def check(self) -> None:
        """Makes the folder before the work.

        Raises:
            SuperPointError: it cannot be written.
        """
        from superpoint_trt.core.files import make_folder

        if self.pictures is not None:
            make_folder(self.pictures)

    def keeper(self) -> WorstPairs | None:
        """What keeps the worst pairs of one evaluation; None: nothing is drawn."""
        from superpoint_trt.prove.worst_pairs import WorstPairs

        return None if self.pictures is None else WorstPairs(self.worst)

    def draw(self, evaluation: Evaluation, worst: WorstPairs, is_alone: bool) -> None:
        """Draws them; of several evaluations each into a folder of its own."""
        from superpoint_trt.prove.worst_pairs import draw_worst_pairs, folder_of

        folder = str(self.pictures) if is_alone else folder_of(str(self.pictures), evaluation.name)
        print_row("pictures", f"{len(draw_worst_pairs(evaluation, worst, folder))} in {folder}")


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=(packaged.DEFAULT,),
    show_default=True,
    help=f"A model file; a packaged network: {NETWORKS}; or sift, rootsift or orb. May be repeated.",
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
@WorstArgs.declare("worst_arguments")
@MatcherArgs.declare("matcher_arguments")
@TABLE
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
    worst_arguments: WorstArgs,
    matcher_arguments: MatcherArgs,
    table: str | None,
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
        run_stress(photos, models, stress_arguments, arguments.subpixel, baselines, table, json_path, runtime)
        return
    from superpoint_trt.prove.datasets import input_files
    from superpoint_trt.prove.evaluate import BASELINES, report_with_baselines
    from superpoint_trt.prove.evaluate import evaluate as run_evaluate

    protocol, folder = arguments.protocol(), str(dataset)
    check_outputs((table, json_path), (*models, *input_files(folder)))
    if table:
        check_table_name(table)
    worst_arguments.check()
    evaluations = []

    def run(name: str, what: str, matcher: LearnedMatcher | None, worst: WorstPairs | None) -> None:
        with progress_bar(f"evaluating {what}") as progress:
            settings = (protocol, runtime.device, runtime.threads, progress, runtime.allow_host_code)
            evaluations.append(run_evaluate(name, folder, *settings, worst, matcher))
        if worst is not None:
            worst_arguments.draw(evaluations[-1], worst, is_alone=len(set(models)) == 1 and learned is None)

    with matcher_arguments.opened(runtime) as learned:
        for name in dict.fromkeys(models if learned else ()):
            run(name, f"{name} with {matcher_arguments.matcher}", learned, worst_arguments.keeper())
        for name in dict.fromkeys((*models, *(BASELINES if baselines else ()))):
            run(name, name, None, worst_arguments.keeper() if name in models else None)
    print_evaluations(evaluations)
    if table:
        print_row("table", write_table(table, comparison(evaluations)))
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
    if way == "--poses" and len(models) > 1:
        raise click.UsageError(f"{len(models)} models were given; with --poses evaluate takes one at a time.")
    groups = {
        "--dataset": (ProtocolArgs, WorstArgs, MatcherArgs),
        "--stress": (StressArgs,),
        "--poses": (PoseArgs, MatcherArgs),
    }
    every = {ProtocolArgs, WorstArgs, StressArgs, PoseArgs, MatcherArgs}
    others = [entry.name for group in every - set(groups[way]) for entry in fields(group)]
    names = sorted(name for name in others if name != "subpixel")
    lost = given_flags((*names, *(("table",) if scene else ())))
    if lost:
        raise click.UsageError(f"{', '.join(lost)} has no effect with {way}.")


def print_evaluations(evaluations: Sequence[Evaluation]) -> None:
    """Prints one table per model (its sequences, kinds of sequences, and the total), and one of all models' totals."""
    for problem in dict.fromkeys(problem for evaluation in evaluations for problem in evaluation.problems):
        print_aside("left out", problem)
    columns = [column.name for column in _COLUMNS]
    for evaluation in evaluations:
        table = Table(_name_of(evaluation), "pairs", *columns, caption=evaluation.runtime, caption_justify="left")
        # In sections of their own, because a sequence may have the name of a kind.
        for section in (evaluation.sequences, evaluation.kinds, {"total": evaluation.total}):
            for name, row in section.items():
                table.add_row(name, str(row.pairs), *map(_text, _figures(row)))
            table.add_section()
        console().print(table)
    if len(evaluations) > 1:
        print_table(comparison(evaluations))


_COLUMNS = (
    Column("rep.", "high"),
    Column("loc. px", "low"),
    *(Column(name, "high") for name in ("MMA@1", "MMA@3", "MMA@10", "H@1", "H@3", "H@5", "M.score", "NN mAP")),
    Column("right", "high"),
)


def comparison(evaluations: Sequence[Evaluation]) -> FigureTable:
    """The totals of several models, a row for each."""
    rows = []
    for one in evaluations:
        *shares, right = _figures(one.total)
        rows.append((_name_of(one), one.total.pairs, *shares, None if right is None else round(right)))
    return FigureTable((Column("model"), Column("pairs"), *_COLUMNS), rows)


def _name_of(evaluation: Evaluation) -> str:
    """The model, and its matcher if that is no nearest neighbor."""
    return evaluation.model + (f", {evaluation.matcher} matcher" if evaluation.matcher != NEAREST else "")


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
@click.option("--markdown", "markdown_path", help="File to write a table to, one row for each model and device.")
@JSON
@SeveralDevicesArgs.declare("runtime")
def bench(
    models: tuple[str, ...],
    arguments: BenchArgs,
    image: str | None,
    image_args: ImageArgs,
    plot_path: str | None,
    markdown_path: str | None,
    json_path: str | None,
    runtime: SeveralDevicesArgs,
) -> None:
    """Time models, stage by stage: median, p95 and p99."""
    from superpoint_trt.prove.benchmark import bench as run_bench
    from superpoint_trt.prove.benchmark import check_plot, plot

    check_outputs((plot_path, markdown_path, json_path), (*models, image))
    if plot_path:
        check_plot(plot_path)
    options, picture = arguments.options(), load_image(image, image_args.reading()) if image else None
    with progress_bar("timing") as progress:
        report = run_bench(
            models, options, picture, runtime.devices, runtime.threads, progress, runtime.allow_host_code
        )
    print_bench(report)
    if markdown_path:
        print_row("table", write_atomically(markdown_path, to_markdown(report).encode()))
    if json_path:
        write_json(json_path, report.to_json())
    if plot_path:
        print_row("plot", plot(report, plot_path))


def print_bench(report: BenchReport) -> None:
    """Prints how the figures were taken, and one table per model."""
    machine = report.machine
    print_row("machine", f"{machine.cpu}, {machine.cores} cores, GPU {machine.gpu or 'none'}")
    print_row("method", METHOD)
    for reason in report.left_out:
        print_aside("left out", reason)
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
