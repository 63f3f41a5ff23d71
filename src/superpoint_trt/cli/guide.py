"""The published guide's commands and inference class, on this package's functions; the scripts at the root call these.

The guide: huluoboge/SuperPoint, TENSORRT_CONVERSION_GUIDE.md. Names and defaults of its options are the guide's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Optional

import click
import numpy as np
from numpy.typing import NDArray

from superpoint_trt.cli.build import build_engine, parse_targets
from superpoint_trt.cli.options import WEIGHTS, ExtractArgs, GraphArgs, OptionGroup, option
from superpoint_trt.cli.progress import progress_bar
from superpoint_trt.cli.prove import print_bench
from superpoint_trt.cli.quantize import CalibrationFlags
from superpoint_trt.cli.terminal import (
    check_outputs,
    open_model,
    print_found,
    print_info,
    save_drawing,
)
from superpoint_trt.core.contract import check_finite
from superpoint_trt.core.files import PathLike, check_writable
from superpoint_trt.core.image import load_image, to_gray
from superpoint_trt.core.types import CELL_PX, DecodeOptions, OutputType, Precision, SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor
from superpoint_trt.prove.agreement import FOUND_WITHIN_PX, nearest, within
from superpoint_trt.prove.benchmark import BenchOptions, bench
from superpoint_trt.run.backends import open_backend
from superpoint_trt.run.decode import sample_descriptors, select

if TYPE_CHECKING:
    import onnx
    import torch

    from superpoint_trt.convert.engine import BuildOptions

GUIDE_OPSET = 11
GUIDE_MAX_KEYPOINTS = 1000
"""The guide's default of --top-k."""
BENCHMARK_ITERATIONS = 100
"""What --benchmark times without a number."""

Size = Optional[tuple[int, int]]

_DECODE = DecodeOptions()


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
        """Runs the model on one image.

        Args:
            image: (H, W) gray or (H, W, 3) BGR as OpenCV reads it, uint8 or float in [0, 1]; H and W as the
                model takes them.

        Returns:
            The model's outputs by name, with the batch axis (`core.types.OUTPUT_NAMES`).

        Raises:
            SuperPointError: the image does not fit the model, the run failed, or an output is not finite.
        """
        if image.ndim == 3 and image.shape[2] == 3:
            image = image[..., ::-1]
        # A gray uint8 image is not converted here: an engine divides by 255 on the GPU.
        pixels = image if image.ndim == 2 and image.dtype == np.uint8 else to_gray(image)
        outputs = self._backend.infer(pixels[None, None])
        check_finite(outputs)
        return dict(outputs)

    def extract_keypoints_from_dense(
        self,
        scores: NDArray[Any],
        descriptors: NDArray[Any],
        threshold: float = _DECODE.threshold,
        top_k: int | None = None,
        stride: int = CELL_PX,
        nms_radius: int = _DECODE.nms_radius_px,
    ) -> list[dict[str, NDArray[Any]]]:
        """Decodes the outputs of a dense model.

        Unlike the guide's own function, it samples descriptors between cells as the network was trained to, and
        removes the border.

        Args:
            scores: (B, H, W) float32.
            descriptors: (B, D, H/8, W/8) float32.
            threshold: scores must be greater.
            top_k: keep at most so many keypoints of each image; None: all.
            stride: pixels along one side of a cell.
            nms_radius: in pixels.

        Returns:
            For each image `keypoints` (N, 2), `scores` (N,) and `descriptors` (N, D).
        """
        options = DecodeOptions(
            nms_radius_px=nms_radius, threshold=threshold, max_keypoints=top_k, subpixel=self.description.subpixel
        )
        results = []
        for image_scores, image_descriptors in zip(scores, descriptors):
            xy, found = select(image_scores, options)
            sampled = sample_descriptors(xy, image_descriptors, stride, self.description.sampling)
            results.append({"keypoints": xy, "scores": found, "descriptors": sampled})
        return results

    def compare(self, pytorch_out: Mapping[str, Sequence[torch.Tensor]], trt_out: Mapping[str, NDArray[Any]]) -> str:
        """Tells whether PyTorch and the model find the same points and describe them alike.

        The guide's comparison leaves this step to the reader.

        Args:
            pytorch_out: from `superpoint_pytorch.SuperPoint`: lists of keypoints, keypoint_scores, descriptors.
            trt_out: from `infer`.

        Returns:
            A few lines to print.
        """
        names = ("keypoints", "keypoint_scores", "descriptors")
        xy, scores, descriptors = (np.asarray(pytorch_out[name][0].cpu()) for name in names)
        if self.description.type is OutputType.KEYPOINTS:
            rows = trt_out["scores"][0] > 0  # not the rows behind the last keypoint
            found = {name: trt_out[name][0][rows] for name in ("keypoints", "scores", "descriptors")}
        else:
            (found,) = self.extract_keypoints_from_dense(
                trt_out["scores"][:1],
                trt_out["descriptors"][:1],
                top_k=max(1, len(xy)),
                stride=self.description.stride_px,
            )
        counts = f"keypoints     {len(xy)} in PyTorch, {len(found['keypoints'])} in the engine"
        if not len(xy) or not len(found["keypoints"]):
            return counts
        rows, distance = nearest(xy, found["keypoints"])
        near = distance <= FOUND_WITHIN_PX
        back = within(found["keypoints"], xy).mean()
        same = (
            f"the same      {near.mean():.2%} of PyTorch's and {back:.2%} of the engine's within {FOUND_WITHIN_PX:g} px"
        )
        if not near.any():
            return f"{counts}\n{same}"
        pairs = rows[near]
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
@GraphArgs.declare("arguments", opset={"default": GUIDE_OPSET})
def convert_to_onnx(weights: str, output: str, arguments: GraphArgs) -> None:
    """Convert SuperPoint to ONNX, as the guide does it: batch, height and width are free."""
    from superpoint_trt.convert.export import export

    print_info(export(weights, output, replace(arguments.options(), dynamic=True)))


@dataclass(frozen=True)
class EngineArgs(OptionGroup):
    """What engine to build, in the guide's options."""

    fp16: bool = option("--fp16", is_flag=True, help="FP16 precision.")
    int8: bool = option("--int8", is_flag=True, help="INT8 precision (needs --calib-images).")
    calib_images: str | None = option("--calib-images", help="With --int8: folder of photographs like those to come.")
    max_batch_size: int = option("--max-batch-size", type=int, default=1)
    workspace: float = option("--workspace", type=float, default=1.0, help="Builder's workspace in GiB.")
    dynamic_shapes: bool = option("--dynamic-shapes", is_flag=True, help="Sizes from min to max, tuned for opt.")
    min_height: int = option("--min-height", type=int, default=240)
    min_width: int = option("--min-width", type=int, default=320)
    opt_height: int = option("--opt-height", type=int, default=480)
    opt_width: int = option("--opt-width", type=int, default=640)
    max_height: int = option("--max-height", type=int, default=960)
    max_width: int = option("--max-width", type=int, default=1280)
    target: str | None = option(
        "--target", help="Not in the guide: GPUs to build for with TensorRT-RTX, for example sm86,sm89; needs no GPU."
    )

    def options(self, model: onnx.ModelProto) -> BuildOptions:
        """The options of `build` for an .onnx.

        Raises:
            SuperPointError: int8 without images to calibrate on, or such images without int8.
        """
        from superpoint_trt.convert.engine import BuildOptions

        if self.int8 and not self.calib_images:
            raise SuperPointError(
                "--int8 needs calibration: --calib-images FOLDER, 100 or more photographs like those to come (or, only "
                "to try it out, --calib-images synthetic)."
            )
        if self.calib_images and not self.int8:
            raise SuperPointError("--calib-images is for --int8.")
        smallest, usual, largest = self._sizes_hw(model)
        return BuildOptions(
            Precision.INT8 if self.int8 else Precision.FP16 if self.fp16 else Precision.FP32,
            self.workspace,
            smallest,
            usual,
            largest,
            self.max_batch_size,
            runtime=Flavor.RTX if self.target else None,
            targets=parse_targets(self.target),
        )

    def _sizes_hw(self, model: onnx.ModelProto) -> tuple[Size, Size, Size]:
        """The smallest, usual and largest (height, width) of the engine; None: the one size of a static .onnx.

        Without --dynamic-shapes the guide's engine takes one size: the one that a dynamic .onnx was exported for.
        """
        from superpoint_trt.convert.engine import is_dynamic, usual_size

        usual = (self.opt_height, self.opt_width)
        if self.dynamic_shapes:
            return (self.min_height, self.min_width), usual, (self.max_height, self.max_width)
        one = (usual_size(model) or usual) if is_dynamic(model) else None
        return one, one, one


@click.command()
@click.option("--onnx", required=True, help="The .onnx to convert.")
@click.option("--engine", default="superpoint.trt", show_default=True, help="The engine to write.")
@EngineArgs.declare("arguments")
@click.option("--test", is_flag=True, help="Run the engine once after building.")
def convert_to_tensorrt(onnx: str, engine: str, arguments: EngineArgs, test: bool) -> None:
    """Convert ONNX to a TensorRT engine."""
    from superpoint_trt.convert.onnx_file import read_onnx

    check_writable(engine)
    source = read_onnx(onnx)
    flags = CalibrationFlags(images=arguments.calib_images)
    build_engine(source, engine, arguments.options(source.model), test, flags)


@click.command()
@click.option("--engine", required=True, help="The model to run.")
@click.option("--image", "image_path", required=True, help="Input image.")
@click.option("--output", default="output_keypoints.jpg", show_default=True, help="Picture to write.")
@click.option("--type", "kind", type=click.Choice(["dense", "keypoints"]), default="dense", show_default=True)
@ExtractArgs.declare("extract", max_keypoints={"default": GUIDE_MAX_KEYPOINTS, "show_default": True})
@click.option(
    "--benchmark", type=int, is_flag=False, flag_value=BENCHMARK_ITERATIONS, metavar="[N]", help="Time N calls (100)."
)
def tensorrt_inference(
    engine: str, image_path: str, output: str, kind: str, extract: ExtractArgs, benchmark: int | None
) -> None:
    """Find keypoints with a converted model and draw them."""
    from superpoint_trt.run.draw import check_picture_name

    check_outputs((output,), (image_path, engine))
    check_picture_name(output)
    timed = None if benchmark is None else BenchOptions(iterations=benchmark)
    pixels = load_image(image_path, extract.reading())
    with open_model(engine, extract=extract) as superpoint:
        _check_type(engine, superpoint.description.type.value, kind)
        started = time.perf_counter()
        keypoints = superpoint.extract(pixels)
        elapsed_ms = (time.perf_counter() - started) * 1e3
    print_found(keypoints, elapsed_ms)
    save_drawing(pixels, keypoints, output)
    if timed:
        with progress_bar("timing") as progress:
            report = bench([engine], timed, pixels, progress=progress)
        print_bench(report)


def _check_type(engine: str, found: str, asked: str) -> None:
    if found != asked:
        raise SuperPointError(
            f"{engine} is a {found} model, but --type {asked} was asked for; give its own type, or use superpoint "
            "infer, which finds it out."
        )
