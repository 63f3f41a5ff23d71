"""The published guide's commands, flag for flag, on this package's functions; the scripts at the root call these."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from superpoint_trt.cli.build import build_engine, parse_targets
from superpoint_trt.cli.quantize import CalibrationFlags
from superpoint_trt.cli.terminal import WEIGHTS, print_found, print_info, save_drawing
from superpoint_trt.core import image as images
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, read_bytes
from superpoint_trt.core.types import DecodeOptions, Keypoints, OutputType, Precision, SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor
from superpoint_trt.run import decode
from superpoint_trt.run.backends import open_backend

GUIDE_OPSET = 11
SAME_WITHIN_PX = 1.0


class SuperPointTRT:
    """The guide's inference class.

    Args:
        engine_path: the model file. An .onnx runs in onnxruntime, and `runtime` says so.
        output_type: "dense" or "keypoints", as the model was exported.

    Raises:
        SuperPointError: unusable file, or a model of another type.
    """

    def __init__(self, engine_path: PathLike, output_type: str = "dense") -> None:
        self._backend = open_backend(engine_path)
        self.runtime = self._backend.runtime
        self.description = self._backend.description
        if self.description.type.value != output_type:
            raise SuperPointError(
                f"{engine_path} is a {self.description.type.value} model, but {output_type} was asked for; "
                f"use --type {self.description.type.value}."
            )

    def infer(self, image: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The model's outputs by name, with the batch axis (spec.OUTPUT_NAMES).

        Args:
            image: (H, W) gray or (H, W, 3) BGR as OpenCV reads it, uint8 or float in [0, 1]; H and W as the
                model takes them.
        """
        if image.ndim == 3 and image.shape[2] == 3:
            image = image[..., ::-1]
        # A gray uint8 image goes as it is: an engine divides by 255 on the GPU.
        pixels = image if image.ndim == 2 and image.dtype == np.uint8 else images.to_gray(image)
        return dict(self._backend.infer(pixels[None, None]))

    def extract_keypoints_from_dense(
        self,
        scores: NDArray[Any],
        descriptors: NDArray[Any],
        threshold: float = 0.005,
        top_k: int | None = None,
        stride: int = 8,
        nms_radius: int = 4,
    ) -> list[dict[str, NDArray[Any]]]:
        """Dense outputs -> keypoints (N, 2), scores (N,), descriptors (N, D) of each image of the batch.

        Unlike the guide's own function, it samples descriptors between cells as the network was trained to, and
        removes the border.
        """
        options = DecodeOptions(nms_radius_px=nms_radius, threshold=threshold, max_keypoints=top_k)
        results = []
        for image_scores, image_descriptors in zip(scores, descriptors):
            xy, found = decode.select(image_scores, options)
            sampled = decode.sample_descriptors(xy, image_descriptors, stride, self.description.sampling)
            results.append({"keypoints": xy, "scores": found, "descriptors": sampled})
        return results

    def compare(self, pytorch_out: Mapping[str, Any], trt_out: Mapping[str, NDArray[Any]]) -> str:
        """What the guide's comparison leaves to the reader: do both find the same points, and describe them alike?

        Args:
            pytorch_out: of `superpoint_pytorch.SuperPoint`: lists of keypoints, keypoint_scores, descriptors.
            trt_out: of `infer`, a dense model's.

        Returns:
            A few lines to print.
        """
        names = ("keypoints", "keypoint_scores", "descriptors")
        xy, scores, descriptors = (np.asarray(pytorch_out[name][0].cpu()) for name in names)
        (found,) = self.extract_keypoints_from_dense(
            trt_out["scores"][:1], trt_out["descriptors"][:1], top_k=max(1, len(xy)), stride=self.description.stride_px
        )
        counts = f"keypoints     {len(xy)} in PyTorch, {len(found['keypoints'])} in the engine"
        if not len(xy) or not len(found["keypoints"]):
            return counts
        distance = np.linalg.norm(xy[:, None] - found["keypoints"][None], axis=2)
        near, nearest = distance.min(axis=1) <= SAME_WITHIN_PX, distance.argmin(axis=1)
        there, back = near.mean(), (distance.min(axis=0) <= SAME_WITHIN_PX).mean()
        same = f"the same      {there:.2%} of PyTorch's and {back:.2%} of the engine's within {SAME_WITHIN_PX:g} px"
        if not near.any():
            return f"{counts}\n{same}"
        pairs = nearest[near]
        cosine = (descriptors[near] * found["descriptors"][pairs]).sum(axis=1)
        apart = np.abs(scores[near] - found["scores"][pairs]).max()
        return "\n".join(
            (
                counts,
                same,
                f"scores        largest difference {apart:.2g}",
                f"descriptors   cosine {np.median(cosine):.6f} in median, {cosine.min():.6f} at worst",
            )
        )


@click.command()
@WEIGHTS
@click.option("--output", default="superpoint.onnx", show_default=True, help="The .onnx to write.")
@click.option("--height", type=int, default=480, show_default=True, help="Usual input height in px.")
@click.option("--width", type=int, default=640, show_default=True, help="Usual input width in px.")
@click.option("--type", "kind", type=click.Choice([t.value for t in OutputType]), default="dense", show_default=True)
@click.option("--max-keypoints", type=int, default=1024, show_default=True, help="N of a keypoints model.")
@click.option("--opset", type=int, default=GUIDE_OPSET, show_default=True, help="ONNX opset.")
def convert_to_onnx(
    weights: str, output: str, height: int, width: int, kind: str, max_keypoints: int, opset: int
) -> None:
    """Convert SuperPoint to ONNX, as the guide does it: batch, height and width are free."""
    from superpoint_trt.convert.export import ExportOptions, export

    options = ExportOptions(
        OutputType(kind), height_px=height, width_px=width, dynamic=True, max_keypoints=max_keypoints, opset=opset
    )
    print_info(export(weights, output, options))


@click.command()
@click.option("--onnx", required=True, help="The .onnx to convert.")
@click.option("--engine", default="superpoint.trt", show_default=True, help="The engine to write.")
@click.option("--fp16", is_flag=True, help="FP16 precision.")
@click.option("--int8", is_flag=True, help="INT8 precision (needs --calib-images).")
@click.option("--calib-images", help="With --int8: folder of photographs like those to come.")
@click.option("--max-batch-size", type=int, default=1, show_default=True)
@click.option("--workspace", type=float, default=1.0, show_default=True, help="Builder's workspace in GiB.")
@click.option("--dynamic-shapes", is_flag=True, help="Sizes from min to max, tuned for opt.")
@click.option("--min-height", type=int, default=240, show_default=True)
@click.option("--min-width", type=int, default=320, show_default=True)
@click.option("--opt-height", type=int, default=480, show_default=True)
@click.option("--opt-width", type=int, default=640, show_default=True)
@click.option("--max-height", type=int, default=960, show_default=True)
@click.option("--max-width", type=int, default=1280, show_default=True)
@click.option("--test", is_flag=True, help="Run the engine once after building.")
@click.option("--target", help="Not the guide's: build with TensorRT-RTX for these GPUs, sm86,sm89 say; needs no GPU.")
def convert_to_tensorrt(
    onnx: str,
    engine: str,
    fp16: bool,
    int8: bool,
    calib_images: str | None,
    max_batch_size: int,
    workspace: float,
    dynamic_shapes: bool,
    test: bool,
    target: str | None,
    **sides: int,
) -> None:
    """Convert ONNX to a TensorRT engine."""
    from superpoint_trt.convert.engine import BuildOptions

    read_bytes(onnx, "model")
    check_writable(engine)
    if int8 and not calib_images:
        raise SuperPointError(
            "--int8 needs calibration: --calib-images FOLDER, 100 or more photographs like those to come (or, only to "
            "try it out, --calib-images synthetic)."
        )
    if calib_images and not int8:
        raise SuperPointError("--calib-images is for --int8.")
    least, usual, most = ((sides[f"{name}_height"], sides[f"{name}_width"]) for name in ("min", "opt", "max"))
    # Without --dynamic-shapes the guide's engine takes one size: the one that a dynamic .onnx is tuned for.
    shapes = (least, usual, most) if dynamic_shapes else _one_size(onnx, usual)
    low, opt, high = shapes
    options = BuildOptions(
        Precision.INT8 if int8 else Precision.FP16 if fp16 else Precision.FP32,  # int8 with fp16 beside it
        workspace,
        low,
        opt,
        high,
        max_batch_size,
        runtime=Flavor.RTX if target else None,
        targets=parse_targets(target),
    )
    build_engine(onnx, engine, options, test, CalibrationFlags(images=calib_images))


def _one_size(onnx: str, usual: tuple[int, int]) -> tuple[Any, ...]:
    """The one size of an engine that is not to be dynamic: the size exported for, which a static .onnx just has."""
    from superpoint_trt.convert.engine import is_dynamic, usual_size
    from superpoint_trt.convert.onnx_file import load_onnx

    model = load_onnx(onnx)
    return (usual_size(model) or usual,) * 3 if is_dynamic(model) else (None,) * 3


@click.command()
@click.option("--engine", required=True, help="The model to run.")
@click.option("--image", "image_path", required=True, help="Input image.")
@click.option("--output", default="output_keypoints.jpg", show_default=True, help="Picture to write.")
@click.option("--type", "kind", type=click.Choice(["dense", "keypoints"]), default="dense", show_default=True)
@click.option("--threshold", type=float, help="Scores must be greater.  [default: 0.005, or the model's own]")
@click.option("--top-k", type=int, default=1000, show_default=True, help="Keep the best K.")
@click.option("--benchmark", is_flag=True, help="Time the model.")
def tensorrt_inference(
    engine: str, image_path: str, output: str, kind: str, threshold: float | None, top_k: int, benchmark: bool
) -> None:
    """Find keypoints with a converted model and draw them."""
    from superpoint_trt.run.draw import check_picture_name
    from superpoint_trt.run.extractor import SuperPoint

    check_picture_name(check_writable(output))
    check_distinct(output, image_path, engine)
    pixels = images.load_image(image_path)
    with SuperPoint(engine, threshold=threshold, max_keypoints=top_k) as superpoint:
        if superpoint.description.type.value != kind:
            raise SuperPointError(
                f"{engine} is a {superpoint.description.type.value} model, but --type {kind} was asked for; give its "
                "own, or let superpoint infer find out."
            )
        started = time.perf_counter()
        keypoints: Keypoints = superpoint.extract(pixels)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        click.echo(f"{'ran on':<14}{superpoint.runtime}")
        print_found(keypoints, elapsed_ms)
        save_drawing(pixels, keypoints, output)
    if benchmark:
        _time(engine, pixels)


def _time(engine: str, pixels: NDArray[Any]) -> None:
    """The one timing method, on the guide's image."""
    from superpoint_trt.cli.prove import print_bench
    from superpoint_trt.cli.terminal import progress_bar
    from superpoint_trt.prove.benchmark import BenchOptions, bench

    with progress_bar("timing") as progress:
        print_bench(bench([engine], BenchOptions(), pixels, progress=progress))
