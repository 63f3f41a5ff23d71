"""The commands extract and merge: many images -> one feature file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from superpoint_trt.cli.options import MODEL, ExtractArgs, OptionGroup, RuntimeArgs, option
from superpoint_trt.cli.progress import rate_bar
from superpoint_trt.cli.terminal import print_aside, print_row

if TYPE_CHECKING:
    from superpoint_trt.pipeline.extract import ExtractOptions, ExtractSummary

SOME_FAILED = 1
_SHOWN = 10
"""Failed images that are listed."""


def _parse_shard(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", value)
    if not found:
        raise click.BadParameter(f"{value!r} is not i/n, 3/8 say: the third of eight processes.")
    return int(found[1]), int(found[2])


_SHARD: dict[str, Any] = {
    "default": "1/1",
    "callback": _parse_shard,
    "metavar": "I/N",
    "help": "Do the I-th of N parts; N processes share the work, and the last one merges.",
}
SHARD = click.option("--shard", **_SHARD)


@dataclass(frozen=True)
class BulkArgs(OptionGroup):
    """Which images, under which names, and how the work is shared."""

    root: str | None = option(
        "--root", help="Folder that names are relative to.  [default: the folder given, or what all inputs share]"
    )
    every: int = option("--every", type=int, default=1, help="Of a video, every N-th frame.")
    fps: float | None = option("--fps", type=float, help="Of a video, at most so many frames a second.")
    dtype: str = option(
        "--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="Type of stored descriptors."
    )
    batch_size: int | None = option("--batch-size", type=int, help="Images in a run.  [default: the model's largest]")
    loaders: int | None = option("--loaders", type=int, help="Threads that read files.  [default: one for each CPU]")
    shard: tuple[int, int] = option("--shard", **_SHARD)
    shard_size: int = option(
        "--shard-size", type=int, default=64, help="Images finished together; a kill loses no more."
    )
    launcher: str = option(
        "--launcher", type=click.Choice(["local", "ray"]), default="local", help="Work here, or on a Ray cluster."
    )
    ray_address: str | None = option("--ray-address", help="Of the cluster.  [default: this machine's]")
    actors: int | None = option(
        "--actors", type=int, help="Processes that Ray starts.  [default: one for each GPU, or for each four CPUs]"
    )
    overwrite: bool = option("--overwrite", is_flag=True, help="Replace an output or an unfinished run that is there.")

    def options(self, model: str, extract: ExtractArgs, runtime: RuntimeArgs) -> ExtractOptions:
        """The options of `pipeline.extract.extract`."""
        from superpoint_trt.pipeline.extract import ExtractOptions
        from superpoint_trt.pipeline.inputs import InputOptions
        from superpoint_trt.pipeline.workers import RayOptions

        return ExtractOptions(
            model=model,
            settings={**extract.settings(), **runtime.settings()},
            inputs=InputOptions(self.root, self.every, self.fps),
            dtype=self.dtype,
            batch_size=self.batch_size,
            loaders=self.loaders,
            part=self.shard[0],
            parts=self.shard[1],
            shard_size=self.shard_size,
            overwrite=self.overwrite,
            ray=RayOptions(self.ray_address, self.actors) if self.launcher == "ray" else None,
        )


@click.command()
@click.argument("inputs", nargs=-1, required=True)
@click.option("--output", required=True, help="Feature file: .h5 as hloc reads it, or a folder for one .npz each.")
@MODEL
@BulkArgs.declare("bulk")
@ExtractArgs.declare("decoding")
@RuntimeArgs.declare("runtime")
@click.pass_context
def extract(
    context: click.Context,
    inputs: tuple[str, ...],
    output: str,
    model: str,
    bulk: BulkArgs,
    decoding: ExtractArgs,
    runtime: RuntimeArgs,
) -> None:
    """Find the keypoints of many images: photographs, folders, globs, @list.txt, videos.

    Killed at any time, it goes on where it was when it is started again. Exit code 1: some images failed.
    """
    from superpoint_trt.pipeline.extract import extract as extract_images

    with rate_bar("images") as progress:
        summary = extract_images(inputs, output, bulk.options(model, decoding, runtime), progress)
    print_summary(summary)
    if summary.failed:
        context.exit(SOME_FAILED)


def print_summary(summary: ExtractSummary) -> None:
    """Prints what was done, what was skipped, and what failed and why."""
    _print_failed(summary.failed)
    for note in summary.notes:
        print_aside("note", note)
    if summary.ran_on:
        print_row("ran on", summary.ran_on)
    speed = f" in {summary.seconds:.1f} s, {summary.done / summary.seconds:.3g} images/s" if summary.done else ""
    print_row("done", f"{summary.done} of {summary.images}{speed}")
    print_row("skipped", f"{summary.skipped} that were done before")
    listed = f", listed in {summary.failures_file}" if summary.failures_file else ""
    print_row("failed", f"{len(summary.failed)}{listed}")
    left = summary.unfinished_shards
    print_row("features", f"not complete: shards left to other processes: {left}" if left else summary.output)


def _print_failed(failed: Sequence[tuple[str, str]]) -> None:
    """Prints which images have no entry, and why."""
    for name, reason in failed[:_SHOWN]:
        print_aside("left out", f"{name}: {reason}")
    if len(failed) > _SHOWN:
        print_aside("left out", f"{len(failed) - _SHOWN} more")


@click.command()
@click.argument("output")
@click.option("--unfinished", is_flag=True, help="Merge what is finished, although shards are missing.")
@click.pass_context
def merge(context: click.Context, output: str, unfinished: bool) -> None:
    """Merge the shards of an extraction into OUTPUT. The last process of an extraction does so by itself.

    Exit code 1: some images failed, as of extract.
    """
    from superpoint_trt.pipeline.merge import failures_path
    from superpoint_trt.pipeline.merge import merge as merge_shards

    with rate_bar("shards") as progress:
        summary = merge_shards(output, unfinished, progress)
    _print_failed(summary.failed)
    listed = f", listed in {failures_path(summary.output)}" if summary.failed else ""
    print_row("merged", f"{summary.images} images")
    print_row("failed", f"{len(summary.failed)}{listed}")
    if summary.unfinished_shards:
        print_row("missing", f"{summary.unfinished_shards} shards; superpoint extract does what is missing")
    print_row("features", summary.output)
    if summary.failed:
        context.exit(SOME_FAILED)
