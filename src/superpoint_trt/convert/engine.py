""".onnx -> TensorRT engine and its metadata, with whichever TensorRT is installed."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from superpoint_trt.convert.cast import to_precision
from superpoint_trt.convert.engine_trt86 import constrain_types, shift_windows
from superpoint_trt.convert.onnx_file import (
    QUANTIZED_TYPES,
    OnnxFile,
    OnnxSource,
    convolution_type,
    has_low_type,
    model_description,
    own_description,
    read_onnx,
)
from superpoint_trt.convert.quantize.options import FirstConvolution, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import quantize
from superpoint_trt.convert.quantize.ranges_file import check_same_network, load_calibration
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, read_bytes, sha256, write_atomically
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.matcher import METADATA_KEY
from superpoint_trt.core.memory import address_space_left
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import (
    CELL_PX,
    ENGINE_SUFFIXES,
    INPUT_NAME,
    OUTPUT_NAMES,
    TENSORRT_MAX_TOPK,
    OutputType,
    Precision,
    ShapeRange,
    SuperPointError,
)
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.engine_file import EngineMetadata, VersionCompatible, sidecar, with_profile
from superpoint_trt.gpu.tensorrt_api import RTX_TARGETS, Flavor, TensorRT, load

MIN_SHAPE_HW, MAX_SHAPE_HW = (240, 320), (960, 1280)
"""The guide's range: the default for dynamic models."""

MOST_WORKSPACE_GIB = 1024.0
HIGHEST_LEVEL = 5

BUILD_BYTES = 512 << 20
"""Address space that a build needs at least. Measured with TensorRT-RTX 1.7 and the network `full`: 380 MB."""


@dataclass(frozen=True)
class BuildOptions:
    """How to build. Where a field is None, TensorRT or the model decides."""

    precision: Precision = Precision.FP32
    workspace_gib: float | None = None
    """Most scratch memory that a kernel may use."""
    min_shape_hw: tuple[int, int] | None = None
    opt_shape_hw: tuple[int, int] | None = None
    max_shape_hw: tuple[int, int] | None = None
    max_batch_size: int | None = None
    timing_cache: PathLike | None = None
    """File of kernel timings. It is read if it exists and written after the build; later builds then take seconds."""
    optimization_level: int | None = None
    """0 (fastest build) to 5 (fastest engine); None: TensorRT's default, 3."""
    runtime: Flavor | None = None
    targets: tuple[str, ...] = ()
    """Compute capabilities to build for ("sm89"); TensorRT-RTX only. Empty: the GPU here."""
    calibration: PathLike | None = None
    """int8, fp8: the file of ranges that `save_calibration` wrote. An .onnx that is quantized already needs none."""
    keep_fp16: tuple[str, ...] = ()
    """int8, fp8: as in `QuantizeOptions`."""
    first_convolution: FirstConvolution | None = None
    """int8, fp8: as in `QuantizeOptions`."""
    linear_heads: bool = False
    """Writes raw fp16 heads as NCHW, for programs other than this package. False: channels-last, as convolutions make
    them."""
    version_compatible: bool = False
    """The engine also runs in newer versions of TensorRT, and in its lean and dispatch runtimes. Not for RTX."""
    exclude_lean_runtime: bool = False
    """Leaves the lean runtime out of a version-compatible plan; it then needs its own version's. TensorRT 10 and newer.
    """

    def __post_init__(self) -> None:
        if self.workspace_gib is not None and not 0 < self.workspace_gib <= MOST_WORKSPACE_GIB:
            raise SuperPointError(f"workspace is {self.workspace_gib} GiB; expected more than 0, 4 say.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= HIGHEST_LEVEL:
            raise SuperPointError(f"optimisation level is {self.optimization_level}; expected 0 to {HIGHEST_LEVEL}.")
        if self.max_batch_size is not None and self.max_batch_size < 1:
            raise SuperPointError(f"the largest batch is {self.max_batch_size} images; expected 1 or more.")
        if self.exclude_lean_runtime and not self.version_compatible:
            raise SuperPointError("--exclude-lean-runtime is for --version-compatible; give both.")
        unknown = [target for target in self.targets if target not in RTX_TARGETS]
        if unknown:
            raise SuperPointError(f"target {unknown[0]!r} is unknown; expected some of {','.join(RTX_TARGETS)}.")

    @property
    def version_compatibility(self) -> VersionCompatible | None:
        """What the plan needs in other versions of TensorRT; None: it runs in none."""
        if not self.version_compatible:
            return None
        return VersionCompatible.LEAN_APART if self.exclude_lean_runtime else VersionCompatible.LEAN_INSIDE

    @property
    def quantize_options(self) -> QuantizeOptions:
        """The options of the quantization, for int8 and fp8."""
        return QuantizeOptions(self.precision, tuple(self.keep_fp16), self.first_convolution)

    def with_quantization(self, options: QuantizeOptions, calibration: PathLike | None) -> BuildOptions:
        """The same build of a network quantized with these options and ranges."""
        return replace(
            self,
            precision=options.precision,
            calibration=calibration,
            keep_fp16=options.keep_fp16,
            first_convolution=options.first_convolution,
        )

    def command(self, model: PathLike, engine: PathLike, flavor: Flavor) -> str:
        """The command that builds the same engine again."""
        words = ["superpoint", "build", "--onnx", str(model), "--engine", str(engine)]
        words += ["--precision", self.precision.value, "--runtime", flavor.value]
        shapes = {"min": self.min_shape_hw, "opt": self.opt_shape_hw, "max": self.max_shape_hw}
        options: dict[str, Any] = {
            "workspace": self.workspace_gib,
            **{f"{name}-shape": f"{shape[0]}x{shape[1]}" for name, shape in shapes.items() if shape},
            "max-batch-size": self.max_batch_size,
            "optimization-level": self.optimization_level,
            "target": ",".join(self.targets) or None,
            "calibration": self.calibration,
            "first-convolution": self.first_convolution.value if self.first_convolution else None,
        }
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
        # The command keeps the coarse layers in fp16 unless it is told "none".
        none = ["none"] if self.calibration is not None else []
        for pattern in self.keep_fp16 or none:
            words += ["--keep-fp16", pattern]
        for flag in ("linear_heads", "version_compatible", "exclude_lean_runtime"):
            if getattr(self, flag):
                words.append(f"--{flag.replace('_', '-')}")
        return shlex.join(words)


def build(
    model: OnnxSource, engine: PathLike, options: BuildOptions | None = None, progress: PhaseProgress | None = None
) -> EngineMetadata:
    """Builds one engine and the .json beside it.

    Args:
        model: a SuperPoint .onnx of this package or another tool; in fp32, or already in the precision asked for.
        engine: the engine file to write, a plain TensorRT plan.
        options: precision, sizes, runtime.
        progress: told how far the builder is. TensorRT 8.6 does not tell.

    Returns:
        What was written to the .json.

    Raises:
        SuperPointError: there is no TensorRT; or model, sizes, precision, GPU and TensorRT do not fit each other, and
            the text carries TensorRT's own log lines. Nothing is written then.
    """
    options = options or BuildOptions()
    setup = check_build(model, engine, options)
    source, tensorrt, targets = setup.source, setup.tensorrt, setup.targets
    engine = Path(engine)
    typed = _in_precision(source, options)
    profile = _profile(typed, options)
    description = with_profile(replace(model_description(typed, source.path), precision=options.precision), profile)
    started = time.monotonic()
    with tensorrt.explaining(f"building {engine} of {source.path} failed") as log:
        builder = EngineBuilder(tensorrt, options, log)
        plan = builder.plan(typed, profile, targets, progress)
    metadata = EngineMetadata(
        description=description,
        flavor=tensorrt.flavor,
        tensorrt_version=tensorrt.version,
        targets=targets,
        gpu_name=setup.gpu_name,
        profile=profile,
        plan_sha256=sha256(plan),
        onnx_sha256=source.sha256,
        rebuild=options.command(source.path, engine, tensorrt.flavor),
        build={
            "seconds": round(time.monotonic() - started, 1),
            "workspace_gib": options.workspace_gib,
            "optimization_level": options.optimization_level,
            "channels_last": builder.channels_last,
            "bytes": len(plan),
        },
        version_compatible=options.version_compatibility,
    )
    # A reader finds out by the hash if it sees one new file and one old one.
    write_atomically(engine, plan)
    write_atomically(sidecar(engine), metadata.to_json())
    return metadata


@dataclass(frozen=True)
class BuildSetup:
    """What a build needs and `check_build` found."""

    source: OnnxFile
    tensorrt: TensorRT
    targets: tuple[str, ...]
    """Compute capabilities to build for."""
    gpu_name: str | None
    """The GPU here, if the engine is built for it."""


def check_build(model: OnnxSource, engine: PathLike, options: BuildOptions) -> BuildSetup:
    """Validates everything but the calibration, before the slow calibration and build.

    Raises:
        SuperPointError: `build` would fail.
    """
    path = model.path if isinstance(model, OnnxFile) else model
    engine = check_writable(engine)
    for output in (engine, check_writable(sidecar(engine))):
        check_distinct(output, path, options.timing_cache, options.calibration)
    source = read_onnx(model)
    model_description(source.model, source.path)  # refuses what is no SuperPoint
    tensorrt = load(options.runtime)
    _profile(source.model, options)
    _check_fits(source, options, tensorrt)
    targets, gpu_name = targets_of(options, tensorrt)
    return BuildSetup(source, tensorrt, targets, gpu_name)


def check_engine_name(engine: PathLike) -> None:
    """Refuses a file name that no reader takes for an engine.

    Raises:
        SuperPointError: listing the endings.
    """
    if Path(engine).suffix.lower() not in ENGINE_SUFFIXES:
        raise SuperPointError(f"{engine}: an engine's name ends in one of {', '.join(ENGINE_SUFFIXES)}.")


class EngineBuilder:
    """TensorRT's builder, for one engine.

    Raises:
        SuperPointError: a limit leaves too little memory. TensorRT-RTX's threads wait forever once they get none.
    """

    def __init__(self, tensorrt: TensorRT, options: BuildOptions, log: Any) -> None:
        self._tensorrt = tensorrt
        self._options = options
        self._log = log
        self.channels_last: list[str] = []
        """Names of the outputs that are channels-last, once the plan is made."""
        left = address_space_left()
        if left is not None and left < BUILD_BYTES:
            raise SuperPointError(
                f"too little memory to build an engine: this shell's limit leaves {left >> 20} MB; expected at least "
                f"{BUILD_BYTES >> 20} MB. Raise the limit: ulimit -v unlimited."
            )
        # The bindings do not keep alive what they depend on, so the builder is kept until the plan is made.
        self._builder = tensorrt.module.Builder(tensorrt.logger)

    def plan(
        self, model: onnx.ModelProto, profile: ShapeRange, targets: tuple[str, ...], progress: PhaseProgress | None
    ) -> bytes:
        """Builds the engine.

        Args:
            model: typed graph.
            profile: smallest, usual and largest input shapes.
            targets: compute capabilities, as `targets_of` gives them.
            progress: told of each phase.

        Returns:
            The serialized plan.

        Raises:
            SuperPointError: TensorRT cannot build it; with the lines of its log.
        """
        quantized = convolution_type(model) in QUANTIZED_TYPES
        if not self._tensorrt.strongly_typed:
            model = shift_windows(model)
        elif quantized and not has_low_type(model):
            model = to_precision(model, Precision.FP16)
        network, parser = self._parse(model)
        network.name = _plan_name(model)
        if not self._tensorrt.strongly_typed:
            constrain_types(self._tensorrt.module, network, model)
        if not self._options.linear_heads:
            self.channels_last = _leave_channels_last(self._tensorrt, network)
        config = self._config(targets)
        cache = self._timing_cache(config)
        self._add_profile(network, config, profile)
        if progress:
            self._tensorrt.set_progress(config, progress)
        plan = self._builder.build_serialized_network(network, config)
        if plan is None:
            raise self._log.failed()
        del parser
        if cache is not None:
            write_atomically(cache, bytes(config.get_timing_cache().serialize()))
        return bytes(plan)

    def _parse(self, model: onnx.ModelProto) -> tuple[Any, Any]:
        network = self._tensorrt.create_network(self._builder)
        parser = self._tensorrt.module.OnnxParser(network, self._tensorrt.logger)
        if not parser.parse(model.SerializeToString()):
            errors = [parser.get_error(index) for index in range(parser.num_errors)]
            raise self._log.failed("; ".join(" ".join(str(error.desc()).split()) for error in errors))
        return network, parser

    def _config(self, targets: tuple[str, ...]) -> Any:
        trt, options = self._tensorrt.module, self._options
        config = self._builder.create_builder_config()
        if options.workspace_gib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        self._tensorrt.set_builder_defaults(config)
        self._tensorrt.set_precision_flags(
            config,
            tf32=options.precision is Precision.TF32,
            fp16=options.precision in (Precision.FP16, Precision.INT8),
            int8=options.precision is Precision.INT8,
        )
        if self._tensorrt.flavor is Flavor.RTX:
            self._tensorrt.set_targets(config, targets)
        if options.version_compatible:
            self._tensorrt.set_version_compatible(config, not options.exclude_lean_runtime)
        return config

    def _timing_cache(self, config: Any) -> Path | None:
        if self._options.timing_cache is None:
            return None
        path = check_writable(self._options.timing_cache)
        known = read_bytes(path, "timing cache") if path.exists() else b""
        cache = config.create_timing_cache(known)
        # False: a mismatch is an error. Times of another GPU or TensorRT would choose the wrong kernels.
        if cache is None or not config.set_timing_cache(cache, False):
            raise self._log.failed(f"the timing cache {path} is another TensorRT's or GPU's; remove it")
        return path

    def _add_profile(self, network: Any, config: Any, shapes: ShapeRange) -> None:
        if all(size >= 0 for size in network.get_input(0).shape):
            return
        profile = self._builder.create_optimization_profile()
        sizes = [(batch, 1, height, width) for batch, height, width in (shapes.min, shapes.opt, shapes.max)]
        profile.set_shape(INPUT_NAME, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise self._log.failed(f"the optimisation profile {shapes} was refused")


# -------------------------------------------------------------------------------------------------------- what to build


def _in_precision(source: OnnxFile, options: BuildOptions) -> onnx.ModelProto:
    """The graph in the precision asked for; unchanged if it has that precision already."""
    path, precision, found = source.path, options.precision, convolution_type(source.model)
    if found is precision and found is not Precision.FP32:
        if options.calibration is not None or options.keep_fp16 or options.first_convolution:
            raise SuperPointError(
                f"{path} is quantized already, so calibration, --keep-fp16 and --first-convolution come too late; use "
                "the fp32 .onnx."
            )
        return source.model
    if found is not None and found is not Precision.FP32:
        raise SuperPointError(
            f"{path} is already {found.value}, but {precision.value} was asked for; use --precision {found.value}, or "
            "the fp32 .onnx."
        )
    if precision not in QUANTIZED_TYPES:
        if options.calibration is not None or options.keep_fp16 or options.first_convolution:
            raise SuperPointError(
                "calibration, --keep-fp16 and --first-convolution are for int8 and fp8, but "
                f"{precision.value} was asked for."
            )
        return to_precision(source.model, precision)
    if options.calibration is None:
        raise SuperPointError(
            f"precision {precision.value} needs ranges measured on images: give --calibration-images FOLDER (100 or "
            "more photographs like those to come), or --calibration FILE of an earlier run."
        )
    ranges = load_calibration(options.calibration)
    check_same_network(ranges, source.description, path)
    return quantize(source.model, ranges, options.quantize_options)


def _profile(model: onnx.ModelProto, options: BuildOptions) -> ShapeRange:
    """The range of inputs that the engine takes: what the options ask for, within what the graph allows."""
    inputs = [value for value in model.graph.input if value.name == INPUT_NAME]
    dims = inputs[0].type.tensor_type.shape.dim if inputs else []
    if len(dims) != 4:
        raise SuperPointError(
            f"the .onnx has inputs {', '.join(value.name for value in model.graph.input)}; expected {INPUT_NAME} "
            "[B, 1, H, W]: make one with superpoint export."
        )
    batch, _, height, width = (dim.dim_value or None for dim in dims)
    asked = [options.min_shape_hw, options.opt_shape_hw, options.max_shape_hw]
    if height and width:
        if any(shape not in (None, (height, width)) for shape in asked):
            raise SuperPointError(
                f"the .onnx takes {height}x{width} (HxW) only, so there is no other shape to build for; export it with "
                "--dynamic, or leave out --min-shape, --opt-shape and --max-shape."
            )
        shapes = [(height, width)] * 3
    else:
        shapes = _dynamic_shapes(model, options)
    most = options.max_batch_size or _largest_batch(model)
    if batch and options.max_batch_size not in (None, batch):
        raise SuperPointError(
            f"batches up to {options.max_batch_size} were asked for, but the .onnx takes {batch} only; export it with "
            f"--max-batch-size {options.max_batch_size}."
        )
    batches = [batch] * 3 if batch else [1, most, most]
    low, usual, high = [(count, *shape) for count, shape in zip(batches, shapes)]
    return ShapeRange(low, usual, high)


def is_dynamic(model: onnx.ModelProto) -> bool:
    """Whether the graph takes images of more than one size."""
    images = [value.type.tensor_type.shape.dim for value in model.graph.input if value.name == INPUT_NAME]
    return bool(images) and not all(dim.dim_value for dim in images[0][2:])


def usual_size(model: onnx.ModelProto) -> tuple[int, int] | None:
    """(height, width) in px that a model of this package was exported for; None for other tools' models."""
    own = own_description(model)
    return (own.height_px, own.width_px) if own and own.height_px and own.width_px else None


def _dynamic_shapes(model: onnx.ModelProto, options: BuildOptions) -> list[tuple[int, int]]:
    """(height, width) in px, smallest, usual and largest, of an engine that takes several sizes."""
    own, usual = own_description(model), usual_size(model)
    low = options.min_shape_hw or MIN_SHAPE_HW
    high = options.max_shape_hw or MAX_SHAPE_HW
    inside = [min(max(side, a), b) for side, a, b in zip(usual or high, low, high)]
    opt = options.opt_shape_hw or (inside[0], inside[1])
    stride = own.stride_px if own else CELL_PX
    for name, shape in (("min", low), ("opt", opt), ("max", high)):
        if any(side % stride or side < stride for side in shape):
            raise SuperPointError(
                f"--{name}-shape is {shape[0]}x{shape[1]} (HxW); expected multiples of {stride}, "
                f"{_whole(shape, stride)} say."
            )
    if not all(a <= b <= c for a, b, c in zip(low, opt, high)):
        raise SuperPointError(
            f"the shapes (HxW) run from {low[0]}x{low[1]} over {opt[0]}x{opt[1]} to {high[0]}x{high[1]}; expected "
            "min <= opt <= max, in height and in width."
        )
    return [low, opt, high]


def _whole(shape: tuple[int, int], stride_px: int) -> str:
    return "x".join(str(-(-side // stride_px) * stride_px) for side in shape)


def _largest_batch(model: onnx.ModelProto) -> int:
    own = own_description(model)
    return own.max_batch_size if own else 1


def _check_fits(source: OnnxFile, options: BuildOptions, tensorrt: TensorRT) -> None:
    """Refuses models and options that this TensorRT is known not to take, before it says so after minutes.

    Raises:
        SuperPointError: the model is no SuperPoint, or this TensorRT does not take it.
    """
    model, path, description = source.model, source.path, source.description
    if description.placement:
        raise SuperPointError(
            f"{path} is quantized for CPUs (superpoint quantize --for cpu), which {tensorrt} does not take; build from "
            "the fp32 .onnx, with --precision int8."
        )
    newest = tensorrt.newest_opset
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if newest and opset > newest:
        raise SuperPointError(
            f"{path} has opset {opset}; {tensorrt} takes {newest} at most: superpoint export --opset {newest}."
        )
    if options.precision in (Precision.BF16, Precision.FP8) and not tensorrt.strongly_typed:
        instead = "int8" if options.precision is Precision.FP8 else "fp16"
        raise SuperPointError(
            f"{options.precision.value} needs TensorRT 10 or newer; here is {tensorrt}: use --precision {instead}."
        )
    if tensorrt.flavor is not Flavor.RTX and options.targets:
        raise SuperPointError(
            f"--target is TensorRT-RTX's: {tensorrt} builds for the GPU it runs on only. Use --runtime rtx, or leave "
            "out --target."
        )
    if options.version_compatible and tensorrt.flavor is Flavor.RTX:
        raise SuperPointError(f"{tensorrt} builds no version-compatible engines; leave out --version-compatible.")
    if options.exclude_lean_runtime and not tensorrt.excludes_lean_runtime:
        raise SuperPointError(
            f"--exclude-lean-runtime needs TensorRT 10 or newer; here is {tensorrt}, whose plans no other TensorRT "
            "takes without the lean runtime inside."
        )
    if options.timing_cache is not None and not tensorrt.has_timing_cache:
        raise SuperPointError(f"{tensorrt} times nothing when it builds; leave out --timing-cache.")
    if description.type is OutputType.KEYPOINTS and (description.max_keypoints or 0) > TENSORRT_MAX_TOPK:
        raise SuperPointError(
            f"{path} finds {description.max_keypoints} keypoints in its graph; TensorRT's TopK takes "
            f"{TENSORRT_MAX_TOPK} at most: export it with --max-keypoints {TENSORRT_MAX_TOPK}, or as dense or heads."
        )


def targets_of(options: BuildOptions, tensorrt: TensorRT) -> tuple[tuple[str, ...], str | None]:
    """Compute capabilities to build for, and the name of the GPU here if it decides."""
    if options.targets:
        return options.targets, None
    try:
        device = cuda.current_device()
    except SuperPointError as error:
        if tensorrt.flavor is Flavor.RTX:
            raise SuperPointError(
                f"no GPU to build for was found here ({error}) Name what to build for: superpoint build --target "
                f"sm86,sm89 (of {','.join(RTX_TARGETS)})."
            ) from error
        raise SuperPointError(
            f"{tensorrt} builds on the GPU that it builds for, and none was found: {error} Without a GPU, TensorRT-RTX "
            "builds for RTX GPUs: --runtime rtx --target sm89."
        ) from error
    if tensorrt.flavor is Flavor.RTX and device.capability not in RTX_TARGETS:
        raise SuperPointError(
            f"{device.name} is {device.capability}, which TensorRT-RTX does not run on (it takes "
            f"{', '.join(RTX_TARGETS)}): {install_hint('tensorrt')} and --runtime tensorrt, or --target to "
            "build for another GPU."
        )
    return (device.capability,), device.name


def _plan_name(model: onnx.ModelProto) -> str:
    """The network's name in the plan: the description as JSON, so that it survives the loss of the .json."""
    own = own_description(model)
    if own:
        return json.dumps(own.to_metadata())
    # A matcher's metadata are its description.
    found = {entry.key: entry.value for entry in model.metadata_props if entry.key == METADATA_KEY}
    return json.dumps(found) if found else "superpoint"


def _leave_channels_last(tensorrt: TensorRT, network: Any) -> list[str]:
    """Lets raw fp16 heads be written channels-last, as fp16 convolutions make them: this spares a kernel for each head.

    The decode reads either format. Call this once the network's types are set: float32 has no such format.

    Returns:
        The names of the channels-last outputs; empty for a network of another type.
    """
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    heads = [
        output
        for output in outputs
        if output.name in OUTPUT_NAMES[OutputType.HEADS] and output.dtype == tensorrt.module.float16
    ]
    for output in heads:
        tensorrt.allow_channels_last(output)
    return [output.name for output in heads]
