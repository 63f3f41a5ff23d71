"""TensorRT engines: 8.6, 10, 11 and TensorRT-RTX, on memory of our own, one CUDA graph per shape."""

from __future__ import annotations

import functools
import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.contract import recognize
from superpoint_trt.core.files import PathLike, sha256
from superpoint_trt.core.types import (
    INPUT_NAME,
    OUTPUT_NAMES,
    DecodeOptions,
    ModelDescription,
    OutputType,
    Precision,
    ShapeRange,
    SuperPointError,
)
from superpoint_trt.gpu import arrays, cuda, kernels
from superpoint_trt.gpu.arrays import DeviceArray
from superpoint_trt.gpu.cuda import DeviceMemory, PinnedPool
from superpoint_trt.gpu.engine_file import EngineMetadata, check_runs_here, read_plan, with_profile
from superpoint_trt.gpu.tensorrt_api import TensorRT, flavor_of, load
from superpoint_trt.run.backends.base import Backend, Image, Outputs, RuntimeInfo, as_unit_range
from superpoint_trt.run.lanes import Lanes

MOST_SHAPES = 8
"""Input shapes whose buffers and graphs are kept; beyond, the one used longest ago goes."""

MOST_LOANS = 4
"""Results of one shape that may lie in page-locked memory at a time; further ones are copied to ordinary memory."""

_log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def _can_convert() -> bool:
    """Whether the GPU can divide pixels by 255 itself, which spares three quarters of the copy; said once if not."""
    try:
        kernels.function("preprocess.cu", "unit_range")
    except SuperPointError as error:
        _log.warning("uint8 images are converted on the CPU: %s", error)
        return False
    return True


class TensorRTBackend(Backend):
    """One engine, on one stream of its own.

    Instances of the same file share the engine's weights. One instance belongs to one thread at a time; open one in
    each thread.

    Args:
        path: the plan; the .json beside it, if any, is compared with what is here first.
        device: "auto" or "cuda": the current CUDA device.

    Raises:
        SuperPointError: no GPU, no TensorRT, or the plan was made for another GPU, TensorRT or model.
    """

    def __init__(self, path: PathLike, device: str = "auto") -> None:
        if device not in ("auto", "cuda"):
            raise SuperPointError(f"device is {device!r}; a TensorRT engine runs on cuda: --device auto or cuda.")
        path = Path(path)
        plan, metadata = read_plan(path)
        tensorrt = load(metadata.flavor if metadata else flavor_of(plan))
        gpu = cuda.current_device()
        if metadata:
            check_runs_here(metadata, path, tensorrt.flavor, tensorrt.version, gpu.capability)
        self._shared = _shared_engine(plan, path, tensorrt, gpu.index)
        self._tensorrt = tensorrt
        engine = self._shared.engine
        known = metadata.description if metadata else _introspected(engine, path)
        self._profiles = _profiles(engine)
        _check_formats(tensorrt, engine, path)
        if metadata:
            _check_belongs(metadata, engine, self._profiles, path)
        self.description = with_profile(known, self._profiles[0])
        precision = known.precision.value if metadata or known.superpoint_trt_version else "precision unknown"
        self.runtime = RuntimeInfo(str(tensorrt), f"cuda:{gpu.index} ({gpu.name}, {gpu.capability})", precision)
        nbytes = tensorrt.activation_bytes(engine)
        self._activations: DeviceMemory | None = DeviceMemory(nbytes)
        self._stream = cuda.Stream()
        self._shapes: OrderedDict[tuple[Any, ...], _Shape] = OrderedDict()

    def _infer(self, image: Image) -> Outputs:
        return self._shape(image.shape, image.dtype).infer(image)

    def infer_timed(self, image: Image) -> tuple[Outputs, dict[str, float]]:
        """As `infer`, each step waited for, and the seconds of each."""
        self.check(image.shape)
        marks = [time.perf_counter()]

        def mark() -> None:
            self._stream.synchronize()
            marks.append(time.perf_counter())

        outputs = self._shape(image.shape, image.dtype).infer(image, mark)
        return outputs, dict(zip(("host_to_device", "network", "device_to_host"), map(float, np.diff(marks))))

    def infer_device(
        self, image: Any, out: Mapping[str, Any] | None = None, stream: int | None = None
    ) -> dict[str, DeviceArray]:
        """Runs on arrays that are in GPU memory already, without a copy.

        Args:
            image: (B, 1, H, W) float32 in [0, 1], any library's CUDA array (`__cuda_array_interface__` or DLPack).
            out: arrays to write to, by output name (spec.OUTPUT_NAMES), of exactly the shape and type; the others,
                and all without `out`, are this model's own buffers. Not for outputs written channels-last.
            stream: handle of the CUDA stream that made `image` and will use the results (torch:
                `torch.cuda.current_stream().cuda_stream`); the call then returns at once. None: the call waits for
                the legacy default stream before, and for the results after.

        Returns:
            The outputs by name, [B, C, H, W] whatever their strides. Buffers of the model's own are overwritten by the
            next call: copy what is to stay.

        Raises:
            SuperPointError: shape, type or memory is not what the engine takes, or the run failed.
        """
        source = arrays.view(image)
        self.check(source.shape)
        if source.dtype != np.float32:
            raise SuperPointError(f"{INPUT_NAME} is {source.dtype} on the GPU; expected float32 in [0, 1].")
        targets = {name: arrays.view(array) for name, array in (out or {}).items()}
        shape = self._shape(source.shape, source.dtype, source, targets)
        self._stream.wait_for(cuda.LEGACY_STREAM if stream is None else stream)
        shape.run()
        if stream is None:
            self._stream.synchronize()
        else:
            self._stream.signal(stream)
        return shape.results()

    def _shape(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        source: DeviceArray | None = None,
        targets: Mapping[str, DeviceArray] = MappingProxyType({}),
    ) -> _Shape:
        """What is kept for a kind of input, and where the arrays are other people's, for their places."""
        if self._activations is None:
            raise SuperPointError("this model was closed; open it again.")
        places = tuple(sorted((name, array.address) for name, array in targets.items()))
        key = (shape, dtype, source.address if source else None, places)
        if key in self._shapes:
            self._shapes.move_to_end(key)
            return self._shapes[key]
        while len(self._shapes) >= MOST_SHAPES:
            self._shapes.popitem(last=False)[1].close()
        with self._tensorrt.explaining(f"preparing the engine for {_size(shape)} failed") as log:
            context = self._new_context(shape, self._stream, self._activations, log)
            made = _Shape(self._tensorrt, context, self._stream, log, shape, dtype, source, targets)
        self._shapes[key] = made
        return made

    def _new_context(self, shape: tuple[int, ...], stream: cuda.Stream, scratch: DeviceMemory, log: Any) -> Any:
        """An execution context set to one input shape."""
        profile = self._fitting_profile(shape)
        with self._shared.lock:
            context = self._tensorrt.create_context(self._shared.engine, scratch.address, scratch.nbytes)
            if context is None or not context.set_optimization_profile_async(profile, stream.address):
                raise log.failed()
            stream.synchronize()
        if not context.set_input_shape(INPUT_NAME, shape):
            raise log.failed()
        return context

    # ------------------------------------------------------------------------------------------------ what lanes need

    def lanes(self, options: DecodeOptions, half: bool) -> Lanes | None:
        """Image to keypoints in one CUDA graph, for `heads` engines; None for other types.

        Raises:
            SuperPointError: the kernels cannot be compiled here.
        """
        return Lanes(self, options, half) if self.description.type is OutputType.HEADS else None

    def replay(self, stream: cuda.Stream, name: str) -> cuda.Replay:
        """For work around a context, to be queued over and over; `name` is for the log."""
        return cuda.Replay(stream, self._tensorrt.captures, name)

    def new_scratch(self) -> DeviceMemory:
        """What contexts that run one after the other share."""
        return DeviceMemory(self._tensorrt.activation_bytes(self._shared.engine))

    def new_context(
        self, shape: tuple[int, ...], stream: cuda.Stream, scratch: DeviceMemory
    ) -> tuple[Any, list[_Tensor]]:
        """An execution context set to one input shape, and its outputs one behind the other.

        Raises:
            SuperPointError: the shape is outside what the engine was built for, or TensorRT refuses.
        """
        with self._tensorrt.explaining(f"preparing the engine for {_size(shape)} failed") as log:
            context = self._new_context(shape, stream, scratch, log)
            return context, _layout(self._tensorrt, context, log)[0]

    def execute(self, context: Any, stream: cuda.Stream) -> None:
        """Queues the network of a context that is bound to memory."""
        with self._tensorrt.explaining("running the engine failed") as log:
            if not context.execute_async_v3(stream.address):
                raise log.failed()

    def _fitting_profile(self, shape: tuple[int, ...]) -> int:
        batch, _, height, width = shape
        for index, profile in enumerate(self._profiles):
            if profile.holds((batch, height, width)):
                return index
        ranges = " or ".join(map(str, self._profiles))
        too_small = all(height < profile.min[1] or width < profile.min[2] for profile in self._profiles)
        here = "give it larger images" if too_small else "shrink the image (--max-side) or split the batch"
        raise SuperPointError(
            f"{INPUT_NAME} is {_size(shape)}; this engine was built for {ranges}: {here}, or build "
            "the engine for more (superpoint build --min-shape --max-shape HxW --max-batch-size N)."
        )

    def _check_size(self, shape: tuple[int, ...]) -> None:
        self._fitting_profile(shape)

    def close(self) -> None:
        """Frees everything but results still in use; the engine itself goes with its last user."""
        for shape in self._shapes.values():
            shape.close()
        self._shapes.clear()
        if self._activations is not None:
            self._activations = None
            self._stream.close()


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[3]}x{shape[2]} px, batch {shape[0]}"


# ------------------------------------------------------------------------------------------------------ one input shape


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    """Bytes into the block that all outputs share, so that one copy brings them all."""
    bfloat16: bool = False
    pixel_pitch: int = 0
    """Values from one pixel to the next if the channels of a pixel lie together, padded; 0: pixels do (NCHW)."""

    @property
    def nbytes(self) -> int:
        """In memory, padding included."""
        values = math.prod(self.shape)
        return (values // self.shape[1] * self.pixel_pitch if self.pixel_pitch else values) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...] | None:
        """Bytes, as numpy's and DeviceArray's; None: contiguous."""
        return arrays.channels_last(self.shape, self.pixel_pitch, self.dtype.itemsize) if self.pixel_pitch else None

    def of(self, block: NDArray[Any]) -> NDArray[Any]:
        """This output in the block, in the order of its shape, as numpy can hold it: bfloat16 becomes float32."""
        values: NDArray[Any] = np.ndarray(self.shape, self.dtype, block, self.offset, self.strides)
        return (values.astype(np.uint32) << 16).view(np.float32) if self.bfloat16 else values


class _Shape:
    """A context set to one kind of input, its buffers, and from the second run on its CUDA graph."""

    def __init__(
        self,
        tensorrt: TensorRT,
        context: Any,
        stream: cuda.Stream,
        log: Any,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        source: DeviceArray | None,
        targets: Mapping[str, DeviceArray],
    ) -> None:
        self._tensorrt = tensorrt
        self._context = context
        self._stream = stream
        self._image_shape = shape
        self._outputs, self._output_bytes = _layout(tensorrt, context, log)
        self._count = math.prod(shape)
        self._convert = dtype == np.uint8 and _can_convert()
        self._host_dtype = np.dtype(np.uint8 if self._convert else np.float32)
        self._source = source
        self._targets = dict(targets)
        self._check_targets()
        # Other people's arrays stay where they are; what is missing is made here.
        self._unit = source or DeviceMemory(4 * self._count)
        self._pixels = DeviceMemory(self._count) if self._convert else None
        self._device_out = DeviceMemory(self._output_bytes)
        self._loans = None if source else PinnedPool(self._output_bytes, MOST_LOANS)
        self._bind(log)
        self._replay = cuda.Replay(stream, tensorrt.captures, _size(shape))

    def _bind(self, log: Any) -> None:
        places = {tensor.name: self._device_out.address + tensor.offset for tensor in self._outputs}
        places.update({name: array.address for name, array in self._targets.items()})
        for name, address in {INPUT_NAME: self._unit.address, **places}.items():
            if not self._context.set_tensor_address(name, address):
                raise log.failed(f"the memory for {name} was refused")

    def _check_targets(self) -> None:
        by_name = {tensor.name: tensor for tensor in self._outputs}
        for name, array in self._targets.items():
            if name not in by_name:
                raise SuperPointError(f"out names {name!r}; this engine's outputs are {', '.join(by_name)}.")
            wanted = by_name[name]
            if wanted.pixel_pitch:
                raise SuperPointError(
                    f"out names {name!r}, which this engine writes channels-last, {wanted.pixel_pitch} values a pixel; "
                    "take the array that the call returns, or build the engine with --linear-heads."
                )
            if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
                raise SuperPointError(
                    f"out[{name!r}] is {array.dtype} {array.shape}; expected {wanted.dtype} {wanted.shape}."
                )

    def infer(self, image: Image, mark: Callable[[], None] = lambda: None) -> Outputs:
        """A host image in, host outputs out; `mark` is called after each of the three steps."""
        if image.dtype != self._host_dtype:
            image = as_unit_range(image)
        image = np.ascontiguousarray(image)
        # Straight from the caller's memory: from page-locked one it is queued, from any other the driver copies it
        # aside first, faster than numpy can.
        into = self._pixels or self._unit
        cuda.copy(into.address, image.__array_interface__["data"][0], image.nbytes, cuda.TO_DEVICE, self._stream)
        mark()
        self.run()
        mark()
        loan = self._loans.lend() if self._loans else None
        memory: Any = np.empty(self._output_bytes, np.uint8) if loan is None else np.asarray(loan)
        address = memory.__array_interface__["data"][0]
        cuda.copy(address, self._device_out.address, self._output_bytes, cuda.TO_HOST, self._stream)
        self._stream.synchronize()
        mark()
        return {tensor.name: tensor.of(memory) for tensor in self._outputs}

    def run(self) -> None:
        """Queues the network."""
        self._replay.run(self._enqueue)

    def _enqueue(self) -> None:
        if self._pixels:
            kernels.unit_range(self._pixels.address, self._unit.address, self._count, self._stream)
        with self._tensorrt.explaining(f"running the engine on {_size(self._image_shape)} failed") as log:
            if not self._context.execute_async_v3(self._stream.address):
                raise log.failed()

    def results(self) -> dict[str, DeviceArray]:
        """The outputs where they lie on the GPU."""
        found = {}
        for tensor in self._outputs:
            place = self._device_out.address + tensor.offset
            own = DeviceArray(place, tensor.shape, tensor.dtype, self._device_index, self._device_out, tensor.strides)
            found[tensor.name] = self._targets.get(tensor.name, own)
        return found

    @property
    def _device_index(self) -> int:
        return int(cuda.call("cudaGetDevice"))

    def close(self) -> None:
        """Frees the graph; memory goes with its last user."""
        self._stream.synchronize()
        self._replay.forget()
        self._context = None


def _layout(tensorrt: TensorRT, context: Any, log: Any) -> tuple[list[_Tensor], int]:
    """The outputs of a context whose input shape is set, one behind the other."""
    trt, engine = tensorrt.module, context.engine
    tensors: list[_Tensor] = []
    offset = 0
    names = _names(trt, engine, trt.TensorIOMode.OUTPUT)
    contract = [name for outputs in OUTPUT_NAMES.values() for name in outputs]
    for name in sorted(names, key=lambda name: contract.index(name) if name in contract else len(contract)):
        shape = tuple(context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise log.failed(f"the shape of {name} is not known before the run")
        dtype, is_bfloat16 = _dtype(trt, engine.get_tensor_dtype(name))
        pitch = tensorrt.pixel_pitch(engine, name, context.active_optimization_profile)
        tensor = _Tensor(name, shape, dtype, offset, is_bfloat16, pitch)
        tensors.append(tensor)
        offset += cuda.aligned(tensor.nbytes)
    return tensors, offset


def _dtype(trt: Any, dtype: Any) -> tuple[np.dtype[Any], bool]:
    if getattr(trt.DataType, "BF16", None) == dtype:
        return np.dtype(np.uint16), True  # numpy has none: its bits
    return np.dtype(trt.nptype(dtype)), False


# --------------------------------------------------------------------------------------------------------- the engine


class _SharedEngine:
    """One deserialised plan, for all its users in this process."""

    def __init__(self, plan: bytes, path: Path, tensorrt: TensorRT) -> None:
        with tensorrt.explaining(f"{path} is not an engine that can be loaded here") as log:
            self._runtime = tensorrt.module.Runtime(tensorrt.logger)
            self.engine = self._runtime.deserialize_cuda_engine(plan)
            if self.engine is None:
                raise log.failed()
        self.lock = threading.Lock()


_engines: WeakValueDictionary[tuple[str, int], _SharedEngine] = WeakValueDictionary()
_engines_lock = threading.Lock()


def _shared_engine(plan: bytes, path: Path, tensorrt: TensorRT, device: int) -> _SharedEngine:
    key = (sha256(plan), device)
    with _engines_lock:
        shared = _engines.get(key)
        if shared is None:
            shared = _engines[key] = _SharedEngine(plan, path, tensorrt)
        return shared


def _names(trt: Any, engine: Any, mode: Any) -> list[str]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == mode]


def _profiles(engine: Any) -> list[ShapeRange]:
    """Of the image; a static engine has one profile of one shape."""
    found = []
    for index in range(engine.num_optimization_profiles):
        shapes = engine.get_tensor_profile_shape(INPUT_NAME, index)
        low, usual, high = ((int(b), int(h), int(w)) for b, _, h, w in map(tuple, shapes))
        found.append(ShapeRange(low, usual, high))
    return found


def _check_formats(tensorrt: TensorRT, engine: Any, path: Path) -> None:
    """Refuses an engine whose tensors lie in ways that are not read here: such are built by others only."""
    for profile in range(engine.num_optimization_profiles):
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            try:
                pitch = tensorrt.pixel_pitch(engine, name, profile)
            except SuperPointError as error:
                raise SuperPointError(f"{path}: {error}") from None
            if name == INPUT_NAME and pitch > 1:
                raise SuperPointError(f"{path}: {name} is padded to {pitch} channels; expected one, or LINEAR.")


def _check_belongs(metadata: EngineMetadata, engine: Any, profiles: list[ShapeRange], path: Path) -> None:
    """Holds the .json against the plan's own profile and checkpoint."""
    inside = _described_inside(engine)
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


def _introspected(engine: Any, path: Path) -> ModelDescription:
    """Without a .json: what the plan's name says if it is ours, else what its tensors say."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    shapes = {name: list(engine.get_tensor_shape(name)) for name in names}
    modes = {name: engine.get_tensor_mode(name).name for name in names}
    inputs, outputs = ({name: shapes[name] for name in names if modes[name] == mode} for mode in ("INPUT", "OUTPUT"))
    inside = _described_inside(engine)
    found = recognize(path, inside, inputs, outputs, remedy="build one with: superpoint build")
    return found if inside else replace(found, precision=Precision.FP32)


def _described_inside(engine: Any) -> ModelDescription | None:
    try:
        metadata = json.loads(engine.name)
    except ValueError:
        return None
    return ModelDescription.from_metadata(metadata) if isinstance(metadata, dict) else None
