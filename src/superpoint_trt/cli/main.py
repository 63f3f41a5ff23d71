"""The command `superpoint`: assembles the commands, one module each."""

from __future__ import annotations

import click

from superpoint_trt._version import __version__
from superpoint_trt.cli.build import build, cast
from superpoint_trt.cli.colmap import colmap
from superpoint_trt.cli.demo import demo
from superpoint_trt.cli.doctor import doctor
from superpoint_trt.cli.export import export
from superpoint_trt.cli.extract import extract, merge
from superpoint_trt.cli.infer import infer
from superpoint_trt.cli.info import info
from superpoint_trt.cli.match import match
from superpoint_trt.cli.match_pairs import match_pairs
from superpoint_trt.cli.matcher import matcher
from superpoint_trt.cli.pairs import pairs
from superpoint_trt.cli.prove import bench, evaluate, verify
from superpoint_trt.cli.quantize import quantize
from superpoint_trt.cli.reconstruct import reconstruct
from superpoint_trt.cli.terminal import run
from superpoint_trt.cli.track import track
from superpoint_trt.cli.triton import triton
from superpoint_trt.cli.web import web
from superpoint_trt.cli.weights import weights

__all__ = ["cli", "run"]


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="superpoint")
@click.pass_context
def cli(context: click.Context) -> None:
    """SuperPoint keypoints and descriptors: checkpoint -> ONNX -> TensorRT -> keypoints."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


COMMANDS = (
    bench,
    build,
    cast,
    colmap,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    infer,
    info,
    match,
    match_pairs,
    matcher,
    merge,
    pairs,
    quantize,
    reconstruct,
    track,
    triton,
    verify,
    web,
    weights,
)
for command in COMMANDS:
    cli.add_command(command)
