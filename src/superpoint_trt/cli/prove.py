"""The commands that prove and measure: verify, evaluate, bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table

from superpoint_trt import packaged
from superpoint_trt.cli.terminal import DEVICE, JSON, console, or_default, progress_bar, write_json
from superpoint_trt.core.types import SuperPointError

GATE_FAILED = 1


@click.command()
@click.option("--model", required=True, help="The model to prove.")
@click.option(
    "--weights",
    default=str(packaged.WEIGHTS),
    show_default="the packaged ones",
    help="Its checkpoint, or an fp32 dense or heads .onnx, as the reference.",
)
@click.option("--images", required=True, help="Folder of real images.")
@click.option("--limit", type=click.IntRange(min=1), help="Use only the first so many images.")
@click.option("--gate", "gates", multiple=True, metavar="NAME=LIMIT", help="Another limit than the precision's own.")
@click.option("--report", "report_path", help="HTML report to write.")
@JSON
@DEVICE
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
    from superpoint_trt.core.files import check_distinct, check_writable
    from superpoint_trt.core.image import find_images
    from superpoint_trt.prove.verify import verify

    for path, other in ((report_path, json_path), (json_path, None)):
        if path:
            check_distinct(check_writable(path), model, weights, other, *find_images(images))
    if report_path:
        from superpoint_trt.prove.report import check_report

        check_report()
    with progress_bar("verifying") as progress:
        found = verify(model, weights, images, gate_limits(gates), device, progress, limit)
    print_verification(found)
    if json_path:
        write_json(json_path, found.to_json())
    if report_path:
        from superpoint_trt.prove.report import write_report

        click.echo(f"{'report':<14}{write_report(report_path, found)}")
    if not found.passed:
        raise click.exceptions.Exit(GATE_FAILED)


def gate_limits(gates: Sequence[str]) -> dict[str, float]:
    """Splits NAME=NUMBER of each --gate.

    Raises:
        SuperPointError: not of that form, or no gate is called so.
    """
    from superpoint_trt.prove.verify import GATE_NAMES, check_limits

    limits = {}
    for text in gates:
        name, _, value = text.partition("=")
        try:
            limits[name] = float(value)
        except ValueError:
            names = ", ".join(GATE_NAMES)
            raise SuperPointError(f"--gate {text}: expected NAME=NUMBER; gates are: {names}.") from None
    check_limits(limits)
    return limits


def print_verification(found: Any) -> None:
    """Prints the gates, what else was noticed, and the verdict."""
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


@click.command()
@click.option("--model", help="A model file, or sift or orb.  [default: the packaged weights]")
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
@click.option(
    "--ransac-orders",
    type=int,
    default=1,
    show_default=True,
    help="Average homography correctness over so many orders of the matches.",
)
@JSON
@DEVICE
def evaluate(
    model: str | None,
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
    ransac_orders: int,
    json_path: str | None,
    device: str,
) -> None:
    """Repeatability, homographies and matching on pairs with known homographies, as the literature defines them."""
    from superpoint_trt.core.files import check_distinct, check_writable
    from superpoint_trt.core.image import parse_size
    from superpoint_trt.match.geometry import Estimator
    from superpoint_trt.prove.datasets import input_files
    from superpoint_trt.prove.evaluate import BASELINES, Protocol, Resize, evaluate

    model = or_default(model)
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
        ransac_orders=ransac_orders,
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


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    help="May be repeated: models are taken in turn.  [default: the packaged weights]",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Images per call.")
@click.option("--size", help="HxW of the image.  [default: what the model was exported for]")
@click.option("--iterations", type=int, default=100, show_default=True)
@click.option("--image", help="A photograph to find keypoints in.  [default: a synthetic one]")
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--plot", "plot_path", help="Picture to draw the stages to: .png, .jpg, .svg or .pdf.")
@JSON
@DEVICE
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
    from superpoint_trt.core.files import check_distinct, check_writable
    from superpoint_trt.core.image import load_image, parse_size
    from superpoint_trt.prove.benchmark import BenchOptions, bench, check_plot, plot

    models = models or (or_default(None),)
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
    from superpoint_trt.prove.benchmark import METHOD, STAGES

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
