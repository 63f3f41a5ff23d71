"""The whole int8 and fp8 workflow: calibrate, round, choose what stays in fp16, quantize, build, verify.

What `superpoint quantize` and `superpoint build --precision int8` do, in five lines:

    from superpoint_trt.int8 import LowPrecisionOptions, quantize_and_verify

    result = quantize_and_verify("superpoint.onnx", LowPrecisionOptions("photographs"), output="superpoint_int8.onnx")
    print(result.calibration.summary(), *result.warnings)
    assert result.passed, [gate for gate in result.verification.gates if not gate.passed]

For an engine, give `engine="superpoint.engine"` and, for sizes and TensorRT, `build=BuildOptions(...)`. The given .onnx
is read and parsed once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

from superpoint_trt.convert.engine import BuildOptions, check_build, check_engine_name
from superpoint_trt.convert.engine import build as build_engine
from superpoint_trt.convert.onnx_file import (
    OnnxFile,
    OnnxSource,
    check_quantizable,
    raw_heads,
    read_onnx,
)
from superpoint_trt.convert.quantize.calibrate import (
    MOST_HELD_OUT,
    CalibrationImage,
    calibrate,
    split_images,
    synthetic_images,
)
from superpoint_trt.convert.quantize.gptq import round_weights
from superpoint_trt.convert.quantize.options import (
    COARSE,
    SYNTHETIC,
    CalibrationOptions,
    FirstConvolution,
    Method,
    Placement,
    QuantizeOptions,
    Rounding,
)
from superpoint_trt.convert.quantize.qdq import (
    first_convolutions,
    kept_layers,
    normalizations_after_relu,
    quantize,
    quantize_file,
)
from superpoint_trt.convert.quantize.ranges_file import (
    Calibration,
    check_same_network,
    load_calibration,
    ranges_path,
    rounded_weights_path,
    save_calibration,
)
from superpoint_trt.core.files import PathLike, check_distinct, check_writable
from superpoint_trt.core.progress import BUILDING, PhaseProgress, Progress
from superpoint_trt.core.types import Precision, SuperPointError
from superpoint_trt.gpu.engine_file import EngineMetadata
from superpoint_trt.prove.gates import check_limits
from superpoint_trt.prove.sensitivity import FEW_IMAGES, Choice, LayerCost, fewest_kept, rank
from superpoint_trt.prove.verify import Verification, verify

__all__ = [
    "COARSE",
    "SYNTHETIC",
    "BuildOptions",
    "CalibrationOptions",
    "FirstConvolution",
    "LowPrecisionOptions",
    "LowPrecisionResult",
    "Method",
    "Placement",
    "Precision",
    "QuantizeOptions",
    "Rounding",
    "quantize_and_verify",
]

FEW_SYNTHETIC = 32
SYNTHETIC_SIZE_HW = (480, 640)
"""Size of synthetic pictures for a model of free size that names no usual one."""


@dataclass(frozen=True)
class LowPrecisionOptions:
    """How a network comes to int8 or fp8. Give `images`, `ranges` or both."""

    images: PathLike | None = None
    """A folder of photographs like those to come, 100 or more; or `SYNTHETIC`. With `ranges` they serve only to choose
    layers and to verify."""
    ranges: PathLike | None = None
    """A .calibration.json of an earlier run. None: ranges are measured and written beside the .onnx."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """How ranges are measured."""
    rounding: Rounding | None = None
    """How int8 weights are rounded. None: with feedback, or as `ranges` says."""
    quantize: QuantizeOptions | None = None
    """Precision, and which convolutions stay in fp16. None: int8 with the coarse layers in fp16; with `choose_layers`,
    int8 with none in fp16 to start from."""
    rank_layers: bool = False
    """Measures what quantizing each layer alone costs."""
    choose_layers: bool = False
    """Keeps the fewest layers in fp16, beyond those of `quantize`, that meet the gates."""
    gates: Mapping[str, float] = field(default_factory=dict)
    """Gate name -> limit, in place of the precision's own."""
    verify: bool = True
    """Verifies the result on images that calibration does not see."""

    @property
    def start(self) -> QuantizeOptions:
        """`quantize`, or its default."""
        if self.quantize is not None:
            return self.quantize
        return QuantizeOptions(keep_fp16=() if self.choose_layers else (COARSE,))


@dataclass(frozen=True)
class LowPrecisionResult:
    """What was measured, chosen and written, and the evidence."""

    ranges: Path
    """The ranges file, measured now or given."""
    calibration: Calibration
    """What the ranges file holds."""
    quantize: QuantizeOptions
    """The options the network was quantized with, chosen layers included."""
    kept_layers: tuple[str, ...] = ()
    """Names of the convolutions that stay in fp16."""
    first_convolutions: tuple[str, ...] = ()
    """Names of the convolutions that read the image."""
    layer_costs: tuple[LayerCost, ...] = ()
    """All convolutions, the costliest first; empty unless `rank_layers` or `choose_layers` asked for them."""
    choice: Choice | None = None
    """What `choose_layers` tried, and what it chose."""
    onnx: Path | None = None
    """The quantized .onnx; None: not asked for, or no choice of layers meets the gates."""
    engine: Path | None = None
    """The engine; None: not asked for, or no choice of layers meets the gates."""
    engine_metadata: EngineMetadata | None = None
    """What was written beside the engine."""
    verification: Verification | None = None
    """The verdict; None: not asked for, or there were no images to verify on."""
    warnings: tuple[str, ...] = ()
    """Doubtful images, synthetic pictures, BatchNorms that cost speed."""

    @property
    def chosen(self) -> bool:
        """Whether a choice of layers meets the gates, or none was to be made."""
        return self.choice is None or self.choice.passed

    @property
    def passed(self) -> bool:
        """Whether no gate failed. True also if none was looked at: without a choice and a verification."""
        return self.chosen and (self.verification is None or self.verification.passed)


def quantize_and_verify(
    model: OnnxSource,
    options: LowPrecisionOptions,
    output: PathLike | None = None,
    engine: PathLike | None = None,
    build: BuildOptions | None = None,
    progress: PhaseProgress | None = None,
    notify: Callable[[str], None] | None = None,
) -> LowPrecisionResult:
    """Takes an fp32 .onnx to int8 or fp8, and verifies the engine, or else the .onnx, against it.

    Args:
        model: fp32 SuperPoint .onnx of any type.
        options: images or ranges, precision, what stays in fp16, gates.
        output: the quantized .onnx to write.
        engine: the engine to write.
        build: the engine's sizes and TensorRT. Precision, ranges and layers come from `options`.
        progress: called with (what is being done, steps done, steps in all).
        notify: called with each warning as soon as it is known. The result holds them as well.

    Returns:
        Paths and evidence. A gate that fails is no error: see `passed`. If no choice of layers meets the gates, neither
        `output` nor `engine` is written.

    Raises:
        SuperPointError: the model, an option or the images are unusable, or the engine cannot be built. Everything that
            can be validated is, before the slow calibration.
    """
    source = read_onnx(model)
    build = (build or BuildOptions()).with_quantization(options.start, options.ranges)
    stages = _Stages(progress, notify)
    _check(source, options, output, engine, build)
    images, given = _images(source, options), _given_ranges(source, options)
    for warning in _doubts(source, options):  # not before everything is validated: an error stands alone
        stages.warn(warning)
    result = _measured(source, options, images, given, stages)
    if options.rank_layers or options.choose_layers:
        few = images.proof[:FEW_IMAGES]
        stage = stages.progress("quantizing one layer at a time")
        costs = rank(source, result.calibration, few, options.start.precision, stage)
        result = replace(result, layer_costs=tuple(costs))
    if options.choose_layers:
        stage = stages.progress("verifying a choice of layers")
        start, limits = options.start, dict(options.gates)
        choice = fewest_kept(source, result.calibration, images.proof, result.layer_costs, start, limits, stage)
        chosen = replace(start, keep_fp16=tuple(choice.patterns)) if choice.passed else start
        result = replace(result, choice=choice, quantize=chosen, kept_layers=tuple(choice.kept))
    if result.chosen:
        result = _written(source, result, output, engine, build, stages)
        if options.verify and images.proof and (result.onnx or result.engine):
            result = replace(result, verification=_verified(source, result, options, images, build, stages))
    return replace(result, warnings=tuple(stages.warnings))


class _Stages:
    """Tells the caller how far the work is, and collects warnings."""

    def __init__(self, progress: PhaseProgress | None, notify: Callable[[str], None] | None) -> None:
        self.phases, self._notify = progress, notify
        self.warnings: list[str] = []

    def warn(self, warning: str) -> None:
        """Notes a warning, and passes it on at once."""
        self.warnings.append(warning)
        if self._notify:
            self._notify(warning)

    def progress(self, label: str) -> Progress | None:
        """What one stage reports its steps to; None if nobody asked."""
        phases = self.phases
        return (lambda done, total: phases(label, done, total)) if phases else None


# ----------------------------------------------------------------------------------------------------------- validation


def _check(
    source: OnnxFile,
    options: LowPrecisionOptions,
    output: PathLike | None,
    engine: PathLike | None,
    build: BuildOptions,
) -> None:
    """Validates model, options and paths before the slow calibration.

    Raises:
        SuperPointError: naming what is wrong.
    """
    precision = options.start.precision.value
    check_limits(options.gates)
    if options.images is None and options.ranges is None:
        raise SuperPointError(
            f"precision {precision} needs ranges measured on images: give --calibration-images FOLDER (100 or more "
            "photographs like those to come), --calibration FILE of an earlier run, or, only to try it out, "
            f"--calibration-images {SYNTHETIC}."
        )
    if (options.choose_layers or options.rank_layers) and options.images in (None, SYNTHETIC):
        raise SuperPointError(
            f"{'--auto' if options.choose_layers else '--sensitivity'} tries layers on photographs: give "
            "--calibration-images FOLDER (with --calibration FILE the ranges are not measured again)."
        )
    if options.ranges is not None and options.rounding:
        raise SuperPointError(f"--rounding is for measuring anew: {options.ranges} says how its weights are rounded.")
    if options.ranges is None:
        ranges = check_writable(ranges_path(source.path))
        check_writable(rounded_weights_path(ranges))
    check_quantizable(source.model)
    kept_layers(source.model, options.start)
    if output is not None:
        _check_output(source, options, output, engine)
    if engine is not None:
        check_engine_name(engine)
        check_build(source, engine, build)
    if output is None and engine is None and not (options.rank_layers or options.choose_layers):
        raise SuperPointError("nothing to do: give --output FILE.onnx to write, or --sensitivity to rank the layers.")


def _check_output(source: OnnxFile, options: LowPrecisionOptions, output: PathLike, engine: PathLike | None) -> None:
    if Path(output).suffix.lower() != ".onnx":
        raise SuperPointError(f"output {output}: a model's name ends in .onnx.")
    weights = rounded_weights_path(options.ranges) if options.ranges is not None else None
    check_distinct(check_writable(output), source.path, options.ranges, weights, engine)


def _given_ranges(source: OnnxFile, options: LowPrecisionOptions) -> Calibration | None:
    """Reads the ranges of an earlier run; None if they are to be measured.

    Raises:
        SuperPointError: the file is unusable, or belongs to another network.
    """
    if options.ranges is None:
        return None
    found = load_calibration(options.ranges)
    check_same_network(found, source.description, source.path)
    quantize(source.model, found, options.start)  # refuses ranges that do not fit the network
    return found


def _doubts(source: OnnxFile, options: LowPrecisionOptions) -> Iterator[str]:
    """What to warn of before the work."""
    if options.images == SYNTHETIC:
        yield "synthetic pictures: the ranges of photographs differ; do not ship this model"
    norms, description = normalizations_after_relu(source.model), source.description
    if not norms:
        return
    if options.start.placement is Placement.CPU:
        yield (
            f"{len(norms)} BatchNorms follow a ReLU ({norms[0]}, ...): the convolutions before them stay in fp32; "
            "superpoint export --fold-batchnorm folds them, as an approximation near the border"
        )
        return
    # Another tool's graph cannot be exported again, and a folded one is folded as far as it goes.
    foldable = description.family is not None and not description.approximation
    remedy = "; superpoint export --fold-batchnorm folds them, as an approximation near the border" if foldable else ""
    yield (
        f"{len(norms)} BatchNorms follow a ReLU ({norms[0]}, ...): no {options.start.precision.value} kernel takes "
        f"them in; int8 of the v6 layout, with eight, took 1.25 times as long as fp16 (TensorRT 8.6, H100){remedy}"
    )


# --------------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class _Images:
    """The images of one run."""

    calibration: Sequence[CalibrationImage]
    """To measure ranges and round weights on."""
    proof: Sequence[Path]
    """To choose layers and verify on; empty: nothing is verified."""


def _images(source: OnnxFile, options: LowPrecisionOptions) -> _Images:
    """The images to calibrate on and those to verify on."""
    count = options.calibration.count
    if options.images is None:
        return _Images([], [])
    if options.images == SYNTHETIC:
        model, (height_px, width_px) = source.description, SYNTHETIC_SIZE_HW
        size = (model.height_px or height_px, model.width_px or width_px)
        return _Images(synthetic_images(min(count, FEW_SYNTHETIC), size), [])
    found = split_images(options.images, count)
    return _Images(found.calibration, found.held_out or found.calibration[:MOST_HELD_OUT])


def _measured(
    source: OnnxFile, options: LowPrecisionOptions, images: _Images, given: Calibration | None, stages: _Stages
) -> LowPrecisionResult:
    """Measures ranges and rounds weights, unless they are given."""
    start = options.start
    kept = tuple(kept_layers(source.model, start))
    first = tuple(first_convolutions(source.model))
    if options.ranges is not None and given is not None:
        return LowPrecisionResult(Path(options.ranges), given, start, kept, first)
    found = calibrate(source, images.calibration, options.calibration, stages.progress("calibrating"))
    for note in found.notes:
        stages.warn(note)
    if options.rounding is not Rounding.NEAREST:  # for fp8 as well: the file then serves int8 later
        found = round_weights(source, found, images.calibration, stages.progress("rounding weights"))
    if images.proof and images.proof[0] in images.calibration:
        stages.warn("too few to hold any out: verified on the images of calibration")
    return LowPrecisionResult(save_calibration(found, ranges_path(source.path)), found, start, kept, first)


def _written(
    source: OnnxFile,
    result: LowPrecisionResult,
    output: PathLike | None,
    engine: PathLike | None,
    build: BuildOptions,
    stages: _Stages,
) -> LowPrecisionResult:
    """Writes the quantized .onnx and builds the engine, each if it was asked for."""
    if output is not None:
        result = replace(result, onnx=quantize_file(source, output, result.ranges, result.quantize))
    if engine is not None:
        build = build.with_quantization(result.quantize, result.ranges)
        phases = stages.phases
        if phases:
            phases(BUILDING, 0, 0)
        tell = (lambda phase, done, total: phases(f"building: {phase}", done, total)) if phases else None
        metadata = build_engine(source, engine, build, tell)
        result = replace(result, engine=Path(engine), engine_metadata=metadata)
    return result


def _verified(
    source: OnnxFile,
    result: LowPrecisionResult,
    options: LowPrecisionOptions,
    images: _Images,
    build: BuildOptions,
    stages: _Stages,
) -> Verification:
    """Verifies the engine if it runs on this machine, else the quantized .onnx, against the fp32 network."""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.onnx"
        reference.write_bytes(raw_heads(source).SerializeToString())
        model = result.onnx if result.engine is None or build.targets else result.engine
        if model is None:
            model = Path(folder) / f"{Path(str(result.engine)).stem}.onnx"
            quantize_file(source, model, result.ranges, result.quantize)
        stage = stages.progress("verifying")
        # An engine was built here just now, so the code that it may carry can be trusted.
        found = verify(model, reference, images.proof, dict(options.gates), progress=stage, allow_host_code=True)
    return replace(found, reference=f"{source.path}, fp32")
