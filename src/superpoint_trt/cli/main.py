"""The command `superpoint`: each command parses, calls one function, prints, sets the exit code."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from superpoint_trt._version import __version__
from superpoint_trt.cli import build as cli_engine
from superpoint_trt.cli import prove as cli_proof
from superpoint_trt.cli import quantize as cli_quantize
from superpoint_trt.cli.terminal import (
    DEVICE,
    MODEL,
    WEIGHTS,
    console,
    open_model,
    print_found,
    print_info,
    run,
    save_drawing,
    script,
)
from superpoint_trt.core.types import TENSORRT_MAX_TOPK, DecodeOptions, OutputType, Sampling, SuperPointError

__all__ = ["cli", "main", "run", "script"]

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


for command in (cli_engine.build, cli_engine.cast, cli_quantize.quantize):
    cli.add_command(command)
for command in (cli_proof.verify, cli_proof.evaluate, cli_proof.bench):
    cli.add_command(command)


# ------------------------------------------------------------------------------------------------------------- export


@cli.command()
@WEIGHTS
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
@click.option(
    "--fold-batchnorm",
    is_flag=True,
    help="v6: BatchNorm after the ReLU into the next convolution. Faster; an approximation within 44 px of the border.",
)
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
    fold_batchnorm: bool,
) -> None:
    """Convert a checkpoint to one .onnx file."""
    from superpoint_trt.convert.export import ExportOptions
    from superpoint_trt.convert.export import export as convert

    options = ExportOptions(
        type=OutputType(kind),
        height_px=height,
        width_px=width,
        dynamic=dynamic,
        max_batch_size=max_batch_size,
        max_keypoints=max_keypoints,
        decode=DecodeOptions(nms_radius, remove_borders, threshold),
        opset=opset,
        fold_batchnorm=fold_batchnorm,
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


# -------------------------------------------------------------------------------------------------------------- infer


@cli.command()
@MODEL
@click.option("--image", required=True, help="Any image OpenCV reads, of any size from 8x8 px.")
@click.option("--output", help="Picture to write: the image with its keypoints.")
@click.option("--save", help="Features to write: .npz with keypoints, scores, descriptors, image_size.")
@click.option("--threshold", type=float, help="Scores must be greater.  [default: 0.005, or the model's own]")
@click.option("--top-k", type=int, help="Keep the best K.  [default: all]")
@click.option("--max-side", type=int, help="Shrink larger images to this many px first.")
@DEVICE
@click.option("--threads", type=int, help="CPU threads.")
def infer(
    model: str | None,
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
    from superpoint_trt.core.files import check_distinct, check_writable
    from superpoint_trt.core.image import load_image
    from superpoint_trt.run.store import check_npz, save_features

    if output:
        from superpoint_trt.run.draw import check_picture_name

        check_picture_name(check_writable(output))
        check_distinct(output, image, model, save)
    if save:
        check_npz(check_writable(save))
        check_distinct(save, image, model)
    pixels = load_image(image)
    options: dict[str, Any] = {"threshold": threshold, "max_keypoints": top_k, "max_side_px": max_side}
    with open_model(model, device=device, threads=threads, **options) as superpoint:
        started = time.perf_counter()
        keypoints = superpoint.extract(pixels)
        elapsed_ms = (time.perf_counter() - started) * 1e3
    print_found(keypoints, elapsed_ms)
    if save:
        click.echo(f"{'features':<14}{save_features(save, keypoints)}")
    if output:
        save_drawing(pixels, keypoints, output)


# -------------------------------------------------------------------------------------------------------------- match


@cli.command()
@MODEL
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
@DEVICE
def match(
    model: str | None,
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
    from superpoint_trt.core.files import check_distinct, check_writable
    from superpoint_trt.core.image import load_image, to_picture
    from superpoint_trt.match.geometry import Estimator, Model
    from superpoint_trt.match.images import match_images, save_matches
    from superpoint_trt.match.nearest import MatchOptions
    from superpoint_trt.run.draw import check_picture_name, draw_matches, save_picture
    from superpoint_trt.run.store import check_npz

    if output:
        check_picture_name(check_writable(output))
        check_distinct(output, first, second, model, save)
    if save:
        check_npz(check_writable(save))
        check_distinct(save, first, second, model)
    options = MatchOptions(max_ratio=ratio, max_distance=max_distance)
    with open_model(model, device=device, max_keypoints=top_k, max_side_px=max_side) as superpoint:
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


# --------------------------------------------------------------------------------------------------------------- demo


@cli.command()
@MODEL
@click.option("--output", default="demo", show_default=True, help="Folder for the two pictures.")
@DEVICE
def demo(model: str | None, output: str, device: str) -> None:
    """Match a photograph with a warped copy of it; offline, nothing needed."""
    from superpoint_trt.cli.demo import CORRECT_PX
    from superpoint_trt.cli.demo import demo as run_demo
    from superpoint_trt.core.files import make_folder

    with open_model(model, device=device) as superpoint:
        shown = run_demo(superpoint, make_folder(output))
    found = shown.found
    inliers = int(found.geometry.inliers.sum())
    click.echo(f"{'keypoints':<14}{len(found.first)} in the photograph, {len(found.second)} in its warped, darker copy")
    click.echo(f"{'matches':<14}{len(found.matches)}, {inliers} inliers of one homography")
    click.echo(
        f"{'correct':<14}{shown.correct:.1%} of the matches within {CORRECT_PX:g} px of where the true warp puts them"
    )
    click.echo(f"{'homography':<14}its corners are off by {shown.corner_error_px:.2f} px")
    for picture in shown.pictures:
        click.echo(f"{'look at':<14}{picture}")


# ------------------------------------------------------------------------------------------------------------ weights


@cli.group(no_args_is_help=False)
def weights() -> None:
    """The public checkpoints: list, fetch, convert."""


@weights.command("list")
def weights_list() -> None:
    """The public checkpoints, their licences, and where they are."""
    from superpoint_trt import packaged
    from superpoint_trt.checkpoint.public import PUBLIC
    from superpoint_trt.core.files import git_blob_id, read_bytes

    own = {
        "licence": "MIT",
        "layout": "superpoint-trt (Conv + ReLU, half-pixel sampling, float16)",
        "git blob": git_blob_id(read_bytes(packaged.WEIGHTS, "packaged checkpoint")),
        "file": packaged.WEIGHTS,
        "card": packaged.MODEL_CARD,
    }
    click.echo("packaged: this project's own, trained from nothing; the default of every command")
    for label, value in own.items():
        click.echo(f"  {label:<10}{value}")
    for entry in PUBLIC:
        click.echo(f"{entry.name}: {entry.about}")
        rows = {"licence": entry.license, "layout": entry.family.value, "git blob": entry.git_blob, "url": entry.url}
        for label, value in rows.items():
            click.echo(f"  {label:<10}{value}")


@weights.command("fetch")
@click.argument("name")
@click.option("--output", help="File to write.  [default: weights/ and the name it has at its source]")
def weights_fetch(name: str, output: str | None) -> None:
    """Download a public checkpoint and verify its content."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from superpoint_trt.checkpoint.public import fetch, find

    entry = find(name)
    path = Path(output) if output else Path("weights") / entry.filename
    click.echo(f"{entry.name}: {entry.about}. Licence: {entry.license}.")
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
    from superpoint_trt.checkpoint import layouts as checkpoints
    from superpoint_trt.core.files import check_distinct

    if not output.endswith(".safetensors"):
        raise SuperPointError(f"{output}: expected a name that ends in .safetensors.")
    check_distinct(output, checkpoint)
    loaded = checkpoints.load(checkpoint, Sampling(sampling) if sampling else None)
    print_info(checkpoints.save(loaded, output, half))


# ------------------------------------------------------------------------------------------------------------- doctor


@cli.command()
def doctor() -> None:
    """Say what this machine can do, and the command that adds what it cannot."""
    from superpoint_trt.cli.doctor import abilities, examine

    for title, findings in (("this machine", examine()), ("what you can do", abilities())):
        table = Table(title, "", "version, or how to add it")
        for finding in findings:
            table.add_row(finding.name, "yes" if finding.present else "no", finding.detail)
        console().print(table, markup=False)


main = script(cli)


if __name__ == "__main__":
    main()
