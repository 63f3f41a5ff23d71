"""What commands share: checks before the work, printed rows, and how a command ends."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from superpoint_trt.cli.options import ExtractArgs, RuntimeArgs
from superpoint_trt.cli.streams import Notes, StandardStreams
from superpoint_trt.core.memory import MAYBE_OUT_OF_MEMORY, OUT_OF_MEMORY, ran_out_of_memory, reached_limit
from superpoint_trt.core.types import SuperPointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from superpoint_trt.core.files import PathLike
    from superpoint_trt.core.types import Keypoints
    from superpoint_trt.prove.tables import Table as FigureTable
    from superpoint_trt.run.extractor import SuperPoint

BAD_INPUT = 2
INTERRUPTED = 130

LONGEST_MESSAGE = 900
"""Most characters of an error; a library's log may be long."""

_WIDE = 160
"""Columns of a table if the output is a file or a pipe, which has no width."""

_RUNTIME, _EXTRACT = RuntimeArgs(), ExtractArgs()


# ------------------------------------------------------------------------------------------------------ before the work


def check_outputs(outputs: Iterable[str | None], inputs: Iterable[PathLike | None]) -> None:
    """Checks before the work that its outputs can be written, and that none overwrites an input or another output.

    Args:
        outputs: files to write; None for those that were not asked for.
        inputs: files to read.

    Raises:
        SuperPointError: naming the file.
    """
    from superpoint_trt.core.files import check_distinct, check_writable

    inputs, wanted = list(inputs), [output for output in outputs if output]
    for index, output in enumerate(wanted):
        check_distinct(check_writable(output), *inputs, *wanted[index + 1 :])


def open_model(model: str, runtime: RuntimeArgs = _RUNTIME, extract: ExtractArgs = _EXTRACT) -> SuperPoint:
    """Opens a model file or a packaged network, and prints what it runs on."""
    from superpoint_trt.run.extractor import SuperPoint

    superpoint = SuperPoint(model, **runtime.settings(), **extract.settings())
    print_row("model", f"{model} ({superpoint.description.type.value})")
    print_row("ran on", superpoint.runtime)
    print_row("keypoints at", keypoints_at(superpoint.options.subpixel))
    return superpoint


# ------------------------------------------------------------------------------------------------------------- printing


def print_row(label: str, value: object) -> None:
    """Prints one line: a label, and what it is."""
    click.echo(f"{label:<14}{value}")


def keypoints_at(subpixel: bool | None) -> str:
    """In words, where keypoints lie."""
    return "sub-pixel places" if subpixel else "whole pixels"


def print_aside(kind: str, text: str) -> None:
    """Prints "warning: ...", "note: ..." or "left out: ..." to stderr, on one line."""
    click.echo(f"{kind}: {' '.join(text.split())}", err=True)


def print_info(file: PathLike) -> None:
    """Prints what a file of this project is."""
    from superpoint_trt.cli.info import facts

    for label, value in list(facts(file)):
        print_row(label, value)


def print_found(keypoints: Keypoints, elapsed_ms: float) -> None:
    """Prints what was found in one image."""
    print_row("image", f"{keypoints.image_size[0]}x{keypoints.image_size[1]} px")
    print_row("keypoints", f"{len(keypoints)} in {elapsed_ms:.1f} ms (first call, warm-up included)")
    if len(keypoints):
        print_row("scores", f"{keypoints.scores.min():.4f} to {keypoints.scores.max():.4f}")
    print_row("descriptors", f"{keypoints.descriptors.shape}, {keypoints.descriptors.dtype}")


def save_drawing(pixels: NDArray[Any], keypoints: Keypoints, output: str, model: str = "") -> None:
    """Writes the image, an array as `load_image` returns it, with its keypoints, and prints where.

    With a model's name there is a caption below the image.
    """
    from superpoint_trt.core.image import to_picture
    from superpoint_trt.run.draw import draw_keypoints, keypoints_caption, save_picture

    caption = keypoints_caption(keypoints, model) if model else ""
    picture = draw_keypoints(to_picture(pixels), keypoints, caption)
    print_row("picture", save_picture(output, picture))


def print_table(table: FigureTable) -> None:
    """Prints a table of several models."""
    from rich.table import Table

    from superpoint_trt.prove.tables import text_of

    printed = Table(*(column.name for column in table.columns))
    for row in table.rows:
        printed.add_row(*map(text_of, row))
    console().print(printed)


def write_json(path: str, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON, and prints where. A reader sees the old file or the whole new one."""
    import json

    from superpoint_trt.core.files import write_atomically

    print_row("figures", write_atomically(path, (json.dumps(report, indent=1) + "\n").encode()))


def console(stderr: bool = False) -> Console:
    """A rich console that does not squeeze tables when the output is a file or a pipe."""
    screen = Console(stderr=stderr, highlight=False, markup=False)
    return screen if screen.is_terminal else Console(stderr=stderr, highlight=False, markup=False, width=_WIDE)


# ----------------------------------------------------------------------------------------------------- running commands


def run(command: click.Command, arguments: Sequence[str] | None = None, name: str | None = None) -> int:
    """Runs a command. Bad input becomes one line on stderr and exit code 2, never a traceback.

    Args:
        command: a click command.
        arguments: its command line; None: the process's own.
        name: the program's name in usage lines.

    Returns:
        The exit code.
    """
    notes = Notes()
    with StandardStreams() as streams:
        with _noting_interrupts() as interrupts:
            code, message = _end(command, None if arguments is None else list(arguments), name, notes, interrupts)
        if code == INTERRUPTED:
            return code
        message = message or streams.problem()
        if message:
            click.echo(f"error: {_cut(message)}", err=True)
            return BAD_INPUT
        for note in notes:
            print_aside("note", note)
        return code


def _end(
    command: click.Command, arguments: list[str] | None, name: str | None, notes: Notes, interrupts: list[int]
) -> tuple[int, str | None]:
    """Runs a command; returns its exit code, and the message if it failed."""
    try:
        code = command.main(args=arguments, prog_name=name, standalone_mode=False, obj=notes)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED, None
    except Exception as error:
        if interrupts:  # a library whose import is interrupted may raise an ImportError
            return INTERRUPTED, None
        if isinstance(error, click.ClickException):
            return BAD_INPUT, error.format_message()
        if ran_out_of_memory(error):
            return BAD_INPUT, OUT_OF_MEMORY
        if isinstance(error, SuperPointError):
            return BAD_INPUT, f"{MAYBE_OUT_OF_MEMORY}: {error}" if reached_limit() else str(error)
        if reached_limit():
            return BAD_INPUT, OUT_OF_MEMORY
        raise
    return code if isinstance(code, int) else 0, None  # click returns the code of an Exit


@contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Collects interrupts while they raise KeyboardInterrupt as usual; nothing where something else handles them.

    One that arrives in the middle of an import waits for its end: extension modules crash if they are interrupted
    while they are set up.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        if not _is_importing(frame):
            raise KeyboardInterrupt
        again = threading.Timer(0.02, _thread.interrupt_main)
        again.daemon = True
        again.start()

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a command that runs in this frame is importing a module."""
    while frame is not None and frame.f_code is not _end.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _cut(message: str) -> str:
    """A message on one line. Of a long one the beginning and the end stay: what is wrong, and what to do."""
    line = " ".join(message.split())
    half = LONGEST_MESSAGE // 2
    return line if len(line) <= LONGEST_MESSAGE else f"{line[:half]} ... {line[-half:]}"
