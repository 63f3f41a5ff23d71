"""The command `superpoint`: parses, calls one function, prints, sets the exit code."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import click
from rich.console import Console
from rich.table import Table

from superpoint_trt._version import __version__
from superpoint_trt.spec import DecodeOptions, OutputType, Sampling, SuperPointError

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
    print_info(convert(weights, output, options, Sampling(sampling) if sampling else None))


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


# -------------------------------------------------------------------------------------------------------------- infer


@cli.command()
@click.option("--model", required=True, help=".onnx, or a checkpoint (runs in PyTorch).")
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
    from superpoint_trt.extractor import SuperPoint
    from superpoint_trt.files import check_writable
    from superpoint_trt.image import load_image
    from superpoint_trt.store import save_features

    if output:
        from superpoint_trt.draw import check_picture_name

        check_picture_name(check_writable(output))
    if save:
        check_writable(save)
    pixels = load_image(image)
    options: dict[str, Any] = {"threshold": threshold, "max_keypoints": top_k, "max_side_px": max_side}
    with SuperPoint(model, device=device, threads=threads, **options) as superpoint:
        started = time.perf_counter()
        keypoints = superpoint.extract(pixels)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        click.echo(f"{'model':<14}{model} ({superpoint.description.type.value})")
        click.echo(f"{'ran on':<14}{superpoint.runtime}")
    print_found(keypoints, elapsed_ms)
    if output:
        save_drawing(image, keypoints, output)
    if save:
        click.echo(f"{'features':<14}{save_features(save, keypoints)}")


def print_found(keypoints: Any, elapsed_ms: float) -> None:
    """Prints what was found in an image."""
    click.echo(f"{'image':<14}{keypoints.image_size[0]}x{keypoints.image_size[1]} px")
    click.echo(f"{'keypoints':<14}{len(keypoints)} in {elapsed_ms:.1f} ms (first call, warm-up included)")
    if len(keypoints):
        click.echo(f"{'scores':<14}{keypoints.scores.min():.4f} to {keypoints.scores.max():.4f}")
    click.echo(f"{'descriptors':<14}{keypoints.descriptors.shape}, {keypoints.descriptors.dtype}")


def save_drawing(image: str, keypoints: Any, output: str) -> None:
    """Writes the image with its keypoints and says so."""
    from superpoint_trt.draw import draw_keypoints, save_picture
    from superpoint_trt.image import load_image

    picture = save_picture(output, draw_keypoints(load_image(image, color=True), keypoints))
    click.echo(f"{'picture':<14}{picture}")


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
    if not output:
        path.parent.mkdir(exist_ok=True)
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

    if not output.endswith(".safetensors"):
        raise SuperPointError(f"{output}: expected a name that ends in .safetensors.")
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


def console(stderr: bool = False) -> Console:
    """A rich console that does not squeeze tables when the output is a file or a pipe."""
    screen = Console(stderr=stderr, highlight=False, markup=False)
    return screen if screen.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=_WIDE)


def run(command: click.Command, arguments: Sequence[str] | None = None, name: str | None = None) -> int:
    """Runs a command; bad input becomes one line on stderr and exit code 2, never a traceback."""
    try:
        command.main(args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
    except SuperPointError as error:
        return _complain(str(error))
    except click.ClickException as error:
        return _complain(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:  # the reader, head say, has seen enough
        return 0
    return 0


def _complain(message: str) -> int:
    click.echo("error: " + " ".join(message.split()), err=True)
    return BAD_INPUT


def script(command: click.Command) -> Callable[[], None]:
    """A command as the `main` of a script."""
    return lambda: sys.exit(run(command))


main = script(cli)


if __name__ == "__main__":
    main()
