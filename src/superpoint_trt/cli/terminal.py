"""What every command shares with the terminal: options, progress, what it prints, and how errors end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Callable

import click
from rich.console import Console

from superpoint_trt import packaged
from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.types import SuperPointError

BAD_INPUT = 2
INTERRUPTED = 130
_WIDE = 160
"""Columns when the output is no terminal and so has no width."""

WEIGHTS = click.option(
    "--weights",
    default=str(packaged.WEIGHTS),
    show_default="the packaged ones",
    help="Checkpoint: .pth (needs torch) or .safetensors.",
)
MODEL = click.option(
    "--model", help=".onnx, engine, or a checkpoint (runs in PyTorch).  [default: the packaged weights]"
)


def _device_name(_: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        return str(DeviceChoice.parse(value))
    except SuperPointError as error:
        raise click.BadParameter(str(error), param=parameter) from error


DEVICE = click.option(
    "--device", default="auto", show_default=True, callback=_device_name, help="auto, cpu, cuda or cuda:N."
)
JSON = click.option("--json", "json_path", help="File to write the figures to.")


def print_info(file: Any) -> None:
    """Prints `info.describe` as two columns."""
    from superpoint_trt.cli.info import describe

    for label, value in list(describe(file)):
        click.echo(f"{label:<14}{value}")


def print_found(keypoints: Any, elapsed_ms: float) -> None:
    """Prints what was found in an image."""
    click.echo(f"{'image':<14}{keypoints.image_size[0]}x{keypoints.image_size[1]} px")
    click.echo(f"{'keypoints':<14}{len(keypoints)} in {elapsed_ms:.1f} ms (first call, warm-up included)")
    if len(keypoints):
        click.echo(f"{'scores':<14}{keypoints.scores.min():.4f} to {keypoints.scores.max():.4f}")
    click.echo(f"{'descriptors':<14}{keypoints.descriptors.shape}, {keypoints.descriptors.dtype}")


def save_drawing(pixels: Any, keypoints: Any, output: str) -> None:
    """Writes the image with its keypoints and says so."""
    from superpoint_trt.core.image import to_picture
    from superpoint_trt.run.draw import draw_keypoints, save_picture

    picture = save_picture(output, draw_keypoints(to_picture(pixels), keypoints))
    click.echo(f"{'picture':<14}{picture}")


def or_default(model: str | None) -> str:
    """A model that was named, or the packaged weights as one."""
    if model is not None:
        return model
    from superpoint_trt.convert.default_model import default_model

    return str(default_model())


def open_model(model: str | None, **options: Any) -> Any:
    """Opens a model and says what it runs on."""
    from superpoint_trt.run.extractor import SuperPoint

    superpoint = SuperPoint(or_default(model), **options)
    named = "the packaged weights" if model is None else model
    click.echo(f"{'model':<14}{named} ({superpoint.description.type.value})")
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

    from superpoint_trt.core.files import write_atomically

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


@contextmanager
def builder_progress() -> Iterator[Callable[[str, int, int], None]]:
    """The builder's phase and steps on stderr; where TensorRT does not tell (8.6), the time that passes."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    screen = console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("building: {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, disable=not screen.is_terminal, transient=True) as bar:
        task = bar.add_task("kernels are timed, this can take minutes", total=None)
        yield lambda phase, done, total: bar.update(task, description=phase, completed=done, total=total or None)
