"""The command triton: a model -> a model repository of NVIDIA's inference server."""

from __future__ import annotations

import click

from superpoint_trt.cli.options import MODEL, ExtractArgs
from superpoint_trt.cli.terminal import print_row

_HOST_ONLY = ("max_pixels", "allow_damaged")
"""Settings of image files, which a server does not read."""


@click.command()
@MODEL
@click.option("--output", required=True, help="Model repository to write to; it may hold other models.")
@click.option("--name", default="superpoint", show_default=True, help="Name of the model on the server.")
@click.option("--instances", type=int, default=1, show_default=True, help="Copies that run at once, on each GPU.")
@ExtractArgs.declare("extract")
def triton(model: str, output: str, name: str, instances: int, extract: ExtractArgs) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    A keypoints model runs in Triton's onnxruntime or TensorRT backend, any other one in its Python backend, whose
    Python must have this package.
    """
    from superpoint_trt.pipeline.triton import TritonOptions, make_repository

    settings = {k: v for k, v in extract.settings().items() if v is not None and k not in _HOST_ONLY}
    served = make_repository(model, output, TritonOptions(name, instances, settings))
    print_row("model", served.folder)
    print_row("backend", served.backend)
    print_row("batches", f"up to {served.max_batch_size} images" if served.max_batch_size else "one image a request")
    print_row("start", f"tritonserver --model-repository {output}")
