"""The command export: checkpoint -> .onnx."""

from __future__ import annotations

import click

from superpoint_trt.cli.options import DECODE_FIELDS, SAMPLING, WEIGHTS, ExportArgs, chosen_sampling, given_flags
from superpoint_trt.cli.terminal import print_aside, print_info
from superpoint_trt.core.types import TENSORRT_MAX_TOPK, OutputType


@click.command()
@WEIGHTS
@click.option("--output", required=True, help="The .onnx to write.")
@ExportArgs.declare("arguments")
@SAMPLING
def export(weights: str, output: str, arguments: ExportArgs, sampling: str | None) -> None:
    """Convert a checkpoint to one .onnx file."""
    from superpoint_trt.convert.export import export as convert

    written = convert(weights, output, arguments.options(), chosen_sampling(sampling))
    _print_notes(arguments)
    print_info(written)


def _print_notes(arguments: ExportArgs) -> None:
    """Says which options have no effect, and which model TensorRT will not take."""
    if arguments.kind != OutputType.KEYPOINTS.value:
        useless = given_flags(DECODE_FIELDS)
        if useless:
            why = f"a {arguments.kind} model decodes at run time"
            print_aside("note", f"{', '.join(useless)} changes nothing: {why}")
    elif arguments.max_keypoints > TENSORRT_MAX_TOPK:
        print_aside("note", f"TensorRT takes at most {TENSORRT_MAX_TOPK} keypoints in a graph")
