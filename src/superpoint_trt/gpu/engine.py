"""An opened TensorRT engine and what can be read from it: sizes, outputs, execution contexts.

All engines of one plan in a process share its weights. What runs an engine (a backend, a lane) makes an `Execution`
for each input shape and gives it a stream.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.contract import check_contract, check_metadata, check_output_shapes, recognize
from superpoint_trt.core.files import PathLike, sha256
from superpoint_trt.core.typed_json import JsonError, parse
from superpoint_trt.core.types import (
    INPUT_NAME,
    OUTPUT_NAMES,
    ModelDescription,
    Precision,
    ShapeRange,
    SuperPointError,
)
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.arrays import channels_last
from superpoint_trt.gpu.cuda import DeviceMemory
from superpoint_trt.gpu.engine_file import (
    EngineMetadata,
    VersionCompatible,
    check_runs_here,
    read_plan,
    why_refused,
    with_profile,
)
from superpoint_trt.gpu.tensorrt_api import FailureLog, Flavor, TensorRT, flavor_of, runtimes

_LONGEST_NAME = 1 << 20
"""Characters of a plan's name that is read as a description."""

_REMEDY = "build one with: superpoint build"

ImageShape = tuple[int, ...]
"""(B, 1, H, W)."""


class Engine:
    """One plan, opened on one GPU.

    One instance belongs to one thread at a time; open one in each thread. Instances of the same plan share its
    weights.

    Args:
        path: the plan. Its .json, if there is one, is compared with this machine first.
        device_index: number of the GPU; None: the thread's current one.
        allow_host_code: whether code that the plan carries may run in this process. Version-compatible plans carry
            TensorRT's lean runtime.

    Attributes:
        description: what the model is; size and batch are the first profile's.
        profiles: the input sizes it takes.
        tensorrt: the TensorRT that runs it.
        gpu: the GPU it runs on.
        on_gpu: a context manager that makes this GPU the current one. Enter it around every other call.
        precision: for people: "fp16", or "precision unknown".

    Raises:
        SuperPointError: no such GPU, no TensorRT, the plan was made for another GPU, TensorRT or model, or it carries
            host code that is not allowed.
    """

    def __init__(self, path: PathLike, device_index: int | None = None, allow_host_code: bool = False) -> None:
        path = Path(path)
        plan, metadata = read_plan(path)
        self.tensorrt = _fitting_runtime(metadata.flavor if metadata else flavor_of(plan), metadata)
        self.gpu = cuda.current_device() if device_index is None else cuda.device(device_index)
        if metadata:
            runs = self.tensorrt
            check_runs_here(metadata, path, runs.flavor, runs.version, self.gpu.capability, runs.part)
            check_host_code(metadata, path, allow_host_code)
        self._metadata = metadata
        self.on_gpu = cuda.DeviceScope(self.gpu.index)
        with self.on_gpu:
            self._shared = _shared_plan(plan, path, self.tensorrt, self.gpu.index, allow_host_code)
            known = metadata.description if metadata else described_by_plan(self._shared.engine, path)
            self.profiles = profiles_of(self._shared.engine)
            check_formats(self.tensorrt, self._shared.engine, path, metadata)
            if metadata:
                check_same_model(metadata, self._shared.engine, self.profiles, path)
            self.description = _checked(
                with_profile(known, self.profiles[0]), self._shared.engine, self.profiles[0], path
            )
        self.precision = known.precision.value if metadata or known.superpoint_trt_version else "precision unknown"

    @property
    def device(self) -> str:
        """The GPU, for people: "cuda:0 (NVIDIA H200, sm90)"."""
        return f"cuda:{self.gpu.index} ({self.gpu.name}, {self.gpu.capability})"

    def fitting_profile(self, shape: ImageShape) -> int:
        """Number of the first profile that takes the input.

        Raises:
            SuperPointError: none does; the text says what the engine takes.
        """
        batch, _, height, width = shape
        for index, profile in enumerate(self.profiles):
            if profile.holds((batch, height, width)):
                return index
        ranges = " or ".join(map(str, self.profiles))
        too_small = all(height < profile.min[1] or width < profile.min[2] for profile in self.profiles)
        here = "give it larger images" if too_small else "shrink the image (--max-side) or split the batch"
        raise SuperPointError(
            f"{INPUT_NAME} is {size_text(shape)}; this engine was built for {ranges}: {here}, or build "
            "the engine for more (superpoint build --min-shape --max-shape HxW --max-batch-size N)."
        )

    def new_scratch(self) -> DeviceMemory:
        """Scratch memory for executions that run one after the other."""
        return DeviceMemory(self.tensorrt.activation_bytes(self._shared.engine))

    def prepare(self, shape: ImageShape, stream: cuda.Stream, scratch: DeviceMemory) -> Execution:
        """An execution for one input shape.

        Args:
            shape: of the input.
            stream: where it will run.
            scratch: memory that no other stream's execution uses.

        Raises:
            SuperPointError: the engine was not built for that shape, or TensorRT refuses.
        """
        profile = self.fitting_profile(shape)
        with self.tensorrt.explaining(f"preparing the engine for {size_text(shape)} failed") as log:
            with self._shared.lock:
                context = self.tensorrt.create_context(self._shared.engine, scratch.address, scratch.nbytes)
                if context is None or not context.set_optimization_profile_async(profile, stream.address):
                    raise log.failed()
                stream.synchronize()
            if not context.set_input_shape(INPUT_NAME, shape):
                raise log.failed()
            outputs = output_tensors(self.tensorrt, context, log, self._metadata)
            check_output_shapes(self.description, shape, {tensor.name: tensor.shape for tensor in outputs})
            return Execution(self.tensorrt, context, stream, shape, outputs)

    def layers(self) -> list[dict[str, Any]]:
        """What TensorRT's inspector tells of each layer; empty if the plan was built without these details."""
        inspector = self._shared.engine.create_engine_inspector()
        text = inspector.get_engine_information(self.tensorrt.module.LayerInformationFormat.JSON)
        # Names hold control characters; without details a layer is only a name.
        return [layer for layer in json.loads(text, strict=False)["Layers"] if isinstance(layer, dict)]

    def formats(self) -> dict[str, str]:
        """Name of each input and output -> TensorRT's name of its format ("LINEAR", "HWC8")."""
        engine = self._shared.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        stated = self._metadata
        return {n: self.tensorrt.tensor_format(engine, n, 0, stated.format_of(n) if stated else None) for n in names}

    def shares_weights_with(self, other: Engine) -> bool:
        """Whether both use one copy of the weights."""
        return self._shared is other._shared


def size_text(shape: ImageShape) -> str:
    """An input's size, for messages."""
    return f"{shape[3]}x{shape[2]} px, batch {shape[0]}"


# --------------------------------------------------------------------------------------------------- one input shape


@dataclass(frozen=True)
class OutputTensor:
    """One output of an engine, and its place in the block that all outputs share."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    """uint16 for bfloat16, which numpy does not have."""
    offset: int
    """Bytes from the start of the block. One copy brings the whole block to the host."""
    bfloat16: bool = False
    pixel_pitch: int = 0
    """Values from one pixel to the next if the channels of a pixel lie together, padded (NHWC); 0 for NCHW."""

    @property
    def nbytes(self) -> int:
        """Size in memory, padding included."""
        values = math.prod(self.shape)
        return (values // self.shape[1] * self.pixel_pitch if self.pixel_pitch else values) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Bytes from one value to the next along each axis, as in numpy; None: contiguous."""
        return channels_last(self.shape, self.pixel_pitch, self.dtype.itemsize) if self.pixel_pitch else None

    def of(self, block: NDArray[Any]) -> NDArray[Any]:
        """This output's values in a block on the host; bfloat16 becomes float32."""
        values: NDArray[Any] = np.ndarray(self.shape, self.dtype, block, self.offset, self.strides)
        return (values.astype(np.uint32) << 16).view(np.float32) if self.bfloat16 else values


class Execution:
    """An execution context set to one input shape, and memory for its outputs.

    Attributes:
        outputs: the outputs, one behind the other in `memory`.
        memory: one block on the GPU for all outputs.
    """

    def __init__(
        self, tensorrt: TensorRT, context: Any, stream: cuda.Stream, shape: ImageShape, outputs: list[OutputTensor]
    ) -> None:
        self._tensorrt, self._context, self._stream, self._shape = tensorrt, context, stream, shape
        self.outputs = outputs
        self.memory = DeviceMemory(sum(cuda.aligned(tensor.nbytes) for tensor in outputs))

    def bind(self, image: int, elsewhere: Mapping[str, int] = MappingProxyType({})) -> None:
        """Tells TensorRT where the input and the outputs lie.

        Args:
            image: address of the input on the GPU.
            elsewhere: output name -> address, for outputs that are not written to `memory`.

        Raises:
            SuperPointError: TensorRT refuses an address.
        """
        addresses = {tensor.name: self.memory.address + tensor.offset for tensor in self.outputs}
        with self._tensorrt.explaining(f"preparing the engine for {size_text(self._shape)} failed") as log:
            for name, address in {INPUT_NAME: image, **addresses, **elsewhere}.items():
                if not self._context.set_tensor_address(name, address):
                    raise log.failed(f"the memory for {name} was refused")

    def queue(self) -> None:
        """Queues the network on the stream.

        Raises:
            SuperPointError: TensorRT refuses.
        """
        with self._tensorrt.explaining(f"running the engine on {size_text(self._shape)} failed") as log:
            if not self._context.execute_async_v3(self._stream.address):
                raise log.failed()

    def replay(self) -> cuda.Replay:
        """Repeats work that contains this execution, as a CUDA graph where TensorRT allows it."""
        return cuda.Replay(self._stream, self._tensorrt.captures, size_text(self._shape))

    @property
    def context(self) -> Any:
        """TensorRT's own execution context."""
        return self._context

    def close(self) -> None:
        """Frees the context; the memory is freed with its last user."""
        self._context = None


def output_tensors(
    tensorrt: TensorRT, context: Any, log: FailureLog, metadata: EngineMetadata | None = None
) -> list[OutputTensor]:
    """The outputs of a context whose input shape is set, in the graph contract's order.

    Args:
        tensorrt: whose context it is.
        context: the context.
        log: for the exception.
        metadata: the engine's .json, which states the outputs' formats; None: it has none.

    Raises:
        SuperPointError: the shape of an output is known only after the run.
    """
    trt, engine = tensorrt.module, context.engine
    tensors: list[OutputTensor] = []
    offset = 0
    every = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    names = [name for name in every if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
    contract = [name for outputs in OUTPUT_NAMES.values() for name in outputs]
    for name in sorted(names, key=lambda name: contract.index(name) if name in contract else len(contract)):
        shape = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise log.failed(f"the shape of {name} is not known before the run")
        dtype, is_bfloat16 = numpy_type(trt, engine.get_tensor_dtype(name))
        stated = metadata.format_of(name) if metadata else None
        pitch = tensorrt.pixel_pitch(engine, name, context.active_optimization_profile, stated)
        tensors.append(OutputTensor(name, shape, dtype, offset, is_bfloat16, pitch))
        offset += cuda.aligned(tensors[-1].nbytes)
    return tensors


def numpy_type(trt: Any, dtype: Any) -> tuple[np.dtype[Any], bool]:
    """The numpy type of a TensorRT type, and whether its values are the bits of bfloat16 in a uint16."""
    if getattr(trt.DataType, "BF16", None) == dtype:
        return np.dtype(np.uint16), True
    return np.dtype(trt.nptype(dtype)), False


# -------------------------------------------------------------------------------------------- the plan and its content


def _fitting_runtime(flavor: Flavor | None, metadata: EngineMetadata | None) -> TensorRT:
    """The TensorRT here that runs a plan: the full one, its dispatch or its lean runtime; else the first that is there.

    Raises:
        SuperPointError: none is installed.
    """
    here = runtimes(flavor)
    first = next(here)
    if metadata is None or not why_refused(metadata, first.flavor, first.version, first.part):
        return first
    return next((one for one in here if not why_refused(metadata, one.flavor, one.version, one.part)), first)


def check_host_code(metadata: EngineMetadata, path: PathLike, allowed: bool) -> None:
    """Refuses a plan with host code inside unless that is allowed.

    Raises:
        SuperPointError: saying what the code is, and how to allow it.
    """
    if metadata.version_compatible is VersionCompatible.LEAN_INSIDE and not allowed:
        raise SuperPointError(
            f"{path} carries host code (the lean runtime that makes it version-compatible), which runs in this process "
            "unchecked: if you trust who built it, open it with --allow-host-code (Python: allow_host_code=True)."
        )


class _SharedPlan:
    """One deserialized plan, for all its users in this process."""

    def __init__(self, plan: bytes, path: Path, tensorrt: TensorRT, allow_host_code: bool) -> None:
        with tensorrt.explaining(f"{path} is not an engine that can be loaded here") as log:
            self._runtime, self.engine = tensorrt.deserialize(plan, allow_host_code, log)
        self.lock = threading.Lock()
        """Held while an execution context is made."""


_plans: WeakValueDictionary[tuple[str, int, bool], _SharedPlan] = WeakValueDictionary()
_plans_lock = threading.Lock()


def _shared_plan(plan: bytes, path: Path, tensorrt: TensorRT, device_index: int, allow_host_code: bool) -> _SharedPlan:
    key = (sha256(plan), device_index, allow_host_code)
    with _plans_lock:
        shared = _plans.get(key)
        if shared is None:
            shared = _plans[key] = _SharedPlan(plan, path, tensorrt, allow_host_code)
        return shared


def profiles_of(engine: Any) -> list[ShapeRange]:
    """The input sizes of each optimization profile; a static engine has one profile of one size."""
    found = []
    for index in range(engine.num_optimization_profiles):
        shapes = engine.get_tensor_profile_shape(INPUT_NAME, index)
        low, usual, high = ((int(b), int(h), int(w)) for b, _, h, w in map(tuple, shapes))
        found.append(ShapeRange(low, usual, high))
    return found


def check_formats(tensorrt: TensorRT, engine: Any, path: Path, metadata: EngineMetadata | None = None) -> None:
    """Checks that every input and output has a memory layout that this package reads. Its own engines all have.

    Raises:
        SuperPointError: one has another layout.
    """
    for profile in range(engine.num_optimization_profiles):
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            try:
                stated = metadata.format_of(name) if metadata else None
                pitch = tensorrt.pixel_pitch(engine, name, profile, stated)
            except SuperPointError as error:
                raise SuperPointError(f"{path}: {error}") from None
            if name == INPUT_NAME and pitch > 1:
                raise SuperPointError(f"{path}: {name} is padded to {pitch} channels; expected one, or LINEAR.")


def check_same_model(metadata: EngineMetadata, engine: Any, profiles: list[ShapeRange], path: Path) -> None:
    """Checks that the .json and the plan name the same sizes and the same checkpoint.

    Raises:
        SuperPointError: they do not.
    """
    inside = description_inside(engine)
    differences = []
    if profiles != [metadata.profile]:
        differences.append(f"takes {' or '.join(map(str, profiles))}, the .json says {metadata.profile}")
    if inside and inside.checkpoint_sha256 != metadata.description.checkpoint_sha256:
        differences.append(
            f"is of checkpoint {str(inside.checkpoint_sha256)[:12]}, the .json says "
            f"{str(metadata.description.checkpoint_sha256)[:12]}"
        )
    if differences:
        raise SuperPointError(f"{path} {' and '.join(differences)}; build it again: {metadata.rebuild}")


def described_by_plan(engine: Any, path: Path) -> ModelDescription:
    """What a plan without a .json is: by the description in its name, else by its inputs and outputs.

    Raises:
        SuperPointError: it is no SuperPoint.
    """
    inputs, outputs = _tensor_shapes(engine)
    inside = description_inside(engine)
    if inside is None:
        return replace(recognize(path, None, inputs, outputs, _REMEDY), precision=Precision.FP32)
    check_contract(path, inside, inputs, outputs, _REMEDY)
    return inside


def _tensor_shapes(engine: Any) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Shapes of the inputs and of the outputs, by name; -1 stands for a free size."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    shapes = {name: list(engine.get_tensor_shape(name)) for name in names}
    modes = {name: engine.get_tensor_mode(name).name for name in names}
    inputs, outputs = ({name: shapes[name] for name in names if modes[name] == mode} for mode in ("INPUT", "OUTPUT"))
    return inputs, outputs


def _checked(described: ModelDescription, engine: Any, profile: ShapeRange, path: Path) -> ModelDescription:
    """Checks a description, with the profile's sizes, against the engine's tensors.

    Raises:
        SuperPointError: the engine's inputs or outputs are not those of the contract, or the description contradicts
            them.
    """
    inputs, outputs = _tensor_shapes(engine)
    check_contract(path, described, inputs, outputs, _REMEDY)
    batch, height, width = (low if low == high else -1 for low, high in zip(profile.min, profile.max))
    return check_metadata(path, described, (batch, 1, height, width), outputs, _REMEDY)


def description_inside(engine: Any) -> ModelDescription | None:
    """The description that this package writes into a plan's name; None: another tool built the plan."""
    try:
        metadata = parse(engine.name, _LONGEST_NAME)
    except JsonError:
        return None
    return ModelDescription.from_metadata(metadata) if isinstance(metadata, dict) else None
