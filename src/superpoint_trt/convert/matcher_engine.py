"""A matcher's .onnx -> TensorRT engine."""

from __future__ import annotations

from pathlib import Path

from superpoint_trt.convert.engine import BuildOptions, EngineBuilder, check_engine_name, targets_of
from superpoint_trt.convert.onnx_file import parse_onnx
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, read_bytes, write_atomically
from superpoint_trt.core.matcher import MatcherDescription
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import ShapeRange, SuperPointError
from superpoint_trt.gpu.tensorrt_api import Flavor, load


def build_matcher(
    model: PathLike,
    engine: PathLike,
    runtime: Flavor | None = None,
    targets: tuple[str, ...] = (),
    optimization_level: int | None = None,
    progress: PhaseProgress | None = None,
) -> MatcherDescription:
    """Builds an engine of a matcher, in the precision and with the number of keypoints that the .onnx has.

    Args:
        model: .onnx of `superpoint matcher export --keypoints N`.
        engine: the plan to write. Its description is in the plan; there is no .json beside it.
        runtime: TensorRT or TensorRT-RTX; None: the first that is installed.
        targets: compute capabilities to build for; TensorRT-RTX only. Empty: the GPU here.
        optimization_level: 0 to 5; None: TensorRT's default.
        progress: told how far the builder is.

    Returns:
        What was built.

    Raises:
        SuperPointError: there is no TensorRT, the .onnx is no matcher or takes any number of keypoints, or the build
            failed. Nothing is written then.
    """
    check_engine_name(engine)
    output = check_writable(engine)
    check_distinct(output, model)
    parsed = parse_onnx(read_bytes(model, "matcher"), model)
    description = MatcherDescription.from_metadata({p.key: p.value for p in parsed.metadata_props}, model)
    if description.rows is None:
        raise SuperPointError(
            f"{model} takes any number of keypoints, an engine only one: superpoint matcher export --keypoints 1024."
        )
    options = BuildOptions(
        description.precision, runtime=runtime, targets=targets, optimization_level=optimization_level
    )
    tensorrt = load(runtime)
    chosen, _ = targets_of(options, tensorrt)
    static = ShapeRange((1, 1, 1), (1, 1, 1), (1, 1, 1))  # every size is fixed
    with tensorrt.explaining(f"building {engine} of {model} failed") as log:
        plan = EngineBuilder(tensorrt, options, log).plan(parsed, static, chosen, progress)
    write_atomically(Path(output), plan)
    return description
