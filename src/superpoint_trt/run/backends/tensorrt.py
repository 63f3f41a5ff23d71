"""TensorRT engines (8.6, 10, 11 and TensorRT-RTX), with memory and a CUDA graph for each input shape."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Callable

import numpy as np

from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.types import INPUT_NAME, DecodeOptions, OutputType, SuperPointError
from superpoint_trt.gpu import cuda, kernels
from superpoint_trt.gpu.arrays import DeviceArray, view
from superpoint_trt.gpu.cuda import DeviceMemory, PinnedPool
from superpoint_trt.gpu.engine import Engine, Execution
from superpoint_trt.run.backends.base import Backend, Image, Outputs, RuntimeInfo, as_unit_range
from superpoint_trt.run.lanes import Lanes

MOST_SHAPES = 8
"""Input shapes whose buffers and graphs are kept; beyond, the one used longest ago is freed."""

MOST_LOANS = 4
"""Results of one shape that may lie in page-locked memory at a time; further ones get ordinary memory."""

_log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def _can_convert() -> bool:
    """Whether the GPU can divide pixels by 255 itself, so that images are copied as uint8. If not, logs why, once."""
    try:
        kernels.function("preprocess.cu", "unit_range")
    except SuperPointError as error:
        _log.warning("uint8 images are converted on the CPU: %s", error)
        return False
    return True


class TensorRTBackend(Backend):
    """One engine, on a stream of its own.

    Instances of the same file share the engine's weights. One instance belongs to one thread at a time; open one in
    each thread.

    Args:
        path: the plan. Its .json, if there is one, is compared with this machine first.
        device: "auto" or "cuda": the current CUDA device; "cuda:N": that GPU.
        allow_host_code: run the code that a version-compatible plan carries.

    Attributes:
        engine: the opened engine.
        stream: where it runs.

    Raises:
        SuperPointError: no such GPU, no TensorRT, or the plan was made for another GPU, TensorRT or model.
    """

    def __init__(self, path: PathLike, device: str = "auto", allow_host_code: bool = False) -> None:
        choice = DeviceChoice.parse(device)
        if choice.kind == "cpu":
            raise SuperPointError(
                f"device is {device!r}; a TensorRT engine runs on cuda: --device auto, cuda or cuda:N."
            )
        self.engine = Engine(path, choice.index, allow_host_code)
        self.description = self.engine.description
        self.runtime = RuntimeInfo(str(self.engine.tensorrt), self.engine.device, self.engine.precision)
        with self.engine.on_gpu:
            self._scratch: DeviceMemory | None = self.engine.new_scratch()
            self.stream = cuda.Stream()
        self._shapes: OrderedDict[tuple[Any, ...], ShapeRunner] = OrderedDict()

    def _infer(self, image: Image) -> Outputs:
        with self.engine.on_gpu:
            return self._runner(image.shape, image.dtype).infer(image)

    def infer_timed(self, image: Image) -> tuple[Outputs, dict[str, float]]:
        """As `infer`, waiting for each step.

        Returns:
            The outputs, and the seconds of host_to_device, network and device_to_host.
        """
        self.check(image.shape)
        marks = [time.perf_counter()]

        def mark() -> None:
            self.stream.synchronize()
            marks.append(time.perf_counter())

        with self.engine.on_gpu:
            outputs = self._runner(image.shape, image.dtype).infer(image, mark)
        return outputs, dict(zip(("host_to_device", "network", "device_to_host"), map(float, np.diff(marks))))

    def infer_device(
        self, image: Any, out: Mapping[str, Any] | None = None, stream: int | None = None
    ) -> dict[str, DeviceArray]:
        """Runs on arrays that are in GPU memory already, without a copy.

        Args:
            image: (B, 1, H, W) float32 in [0, 1], any library's CUDA array (`__cuda_array_interface__` or DLPack).
            out: output name -> array to write that output to, of exactly its shape and type. Outputs without an
                array are written to the model's own buffers. Not for outputs that the engine writes channels-last.
            stream: handle of the CUDA stream that made `image` and will use the results (torch:
                `torch.cuda.current_stream().cuda_stream`); the call then returns at once. None: the call waits for
                the legacy default stream first, and for the results at the end.

        Returns:
            The outputs by name, [B, C, H, W] whatever their strides. The next call overwrites the model's own
            buffers: copy what is to stay.

        Raises:
            SuperPointError: shape, type or memory is not what the engine takes, or the run failed.
        """
        source = view(image)
        self.check(source.shape)
        if source.dtype != np.float32:
            raise SuperPointError(f"{INPUT_NAME} is {source.dtype} on the GPU; expected float32 in [0, 1].")
        targets = {name: view(array) for name, array in (out or {}).items()}
        with self.engine.on_gpu:
            runner = self._runner(source.shape, source.dtype, source, targets)
            self.stream.wait_for(cuda.LEGACY_STREAM if stream is None else stream)
            runner.run()
            if stream is None:
                self.stream.synchronize()
            else:
                self.stream.signal(stream)
            return runner.results(self.engine.gpu.index)

    def _runner(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        source: DeviceArray | None = None,
        targets: Mapping[str, DeviceArray] = MappingProxyType({}),
    ) -> ShapeRunner:
        """The runner of a shape and type; of the caller's own arrays, also for their addresses."""
        if self._scratch is None:
            raise SuperPointError("this model was closed; open it again.")
        addresses = tuple(sorted((name, array.address) for name, array in targets.items()))
        key = (shape, dtype, source.address if source else None, addresses)
        if key in self._shapes:
            self._shapes.move_to_end(key)
            return self._shapes[key]
        while len(self._shapes) >= MOST_SHAPES:
            self._shapes.popitem(last=False)[1].close()
        execution = self.engine.prepare(shape, self.stream, self._scratch)
        made = ShapeRunner(execution, self.stream, shape, dtype, source, targets)
        self._shapes[key] = made
        return made

    @property
    def runners(self) -> list[ShapeRunner]:
        """The runners made so far, one for each kind of input; the one used last is at the end."""
        return list(self._shapes.values())

    def lanes(self, options: DecodeOptions, half: bool) -> Lanes | None:
        """Opens the way from image to keypoints on the GPU, for `heads` engines; None for other types.

        Raises:
            SuperPointError: the kernels cannot be compiled here.
        """
        if self.description.type is not OutputType.HEADS:
            return None
        with self.engine.on_gpu:
            return Lanes(self.engine, options, half)

    def _check_size(self, shape: tuple[int, ...]) -> None:
        self.engine.fitting_profile(shape)

    def close(self) -> None:
        """Frees everything but results still in use; the engine itself goes with its last user."""
        with self.engine.on_gpu:
            for runner in self._shapes.values():
                runner.close()
            self._shapes.clear()
            if self._scratch is not None:
                self._scratch = None
                self.stream.close()


class ShapeRunner:
    """Runs one input shape and type.

    Attributes:
        execution: the execution context and the outputs' memory.
    """

    def __init__(
        self,
        execution: Execution,
        stream: cuda.Stream,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        source: DeviceArray | None,
        targets: Mapping[str, DeviceArray],
    ) -> None:
        self.execution = execution
        self._stream = stream
        self._count = math.prod(shape)
        self._convert = dtype == np.uint8 and _can_convert()
        self._host_dtype = np.dtype(np.uint8 if self._convert else np.float32)
        self._source = source
        self._targets = dict(targets)
        self._check_targets()
        # The caller's arrays are used where they lie; buffers are made only for the rest.
        self._unit = source or DeviceMemory(4 * self._count)
        self._pixels = DeviceMemory(self._count) if self._convert else None
        self._loans = None if source else PinnedPool(execution.memory.nbytes, MOST_LOANS)
        execution.bind(self._unit.address, {name: array.address for name, array in self._targets.items()})
        self._replay = execution.replay()

    def _check_targets(self) -> None:
        by_name = {tensor.name: tensor for tensor in self.execution.outputs}
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
        """Takes an image on the host to outputs on the host; calls `mark` after each of the three steps."""
        if image.dtype != self._host_dtype:
            image = as_unit_range(image)
        image = np.ascontiguousarray(image)
        # Straight from the caller's memory. If it is not page-locked the driver copies it first, faster than numpy can.
        into = self._pixels or self._unit
        cuda.copy(into.address, image.__array_interface__["data"][0], image.nbytes, cuda.TO_DEVICE, self._stream)
        mark()
        self.run()
        mark()
        nbytes = self.execution.memory.nbytes
        loan = self._loans.lend() if self._loans else None
        memory: Any = np.empty(nbytes, np.uint8) if loan is None else np.asarray(loan)
        address = memory.__array_interface__["data"][0]
        cuda.copy(address, self.execution.memory.address, nbytes, cuda.TO_HOST, self._stream)
        self._stream.synchronize()
        mark()
        return {tensor.name: tensor.of(memory) for tensor in self.execution.outputs}

    def run(self) -> None:
        """Queues the network."""
        self._replay.run(self._queue)

    def _queue(self) -> None:
        if self._pixels:
            kernels.unit_range(self._pixels.address, self._unit.address, self._count, self._stream)
        self.execution.queue()

    @property
    def graph(self) -> cuda.Graph | None:
        """The recorded run, from the second run on."""
        return self._replay.graph

    @property
    def input_address(self) -> int:
        """Of the network's float32 input on the GPU."""
        return self._unit.address

    def results(self, device_index: int) -> dict[str, DeviceArray]:
        """The outputs where they lie on the GPU."""
        memory = self.execution.memory
        found = {}
        for tensor in self.execution.outputs:
            address = memory.address + tensor.offset
            own = DeviceArray(address, tensor.shape, tensor.dtype, device_index, memory, tensor.strides)
            found[tensor.name] = self._targets.get(tensor.name, own)
        return found

    def close(self) -> None:
        """Frees the graph and the context; memory is freed with its last user."""
        self._stream.synchronize()
        self._replay.forget()
        self.execution.close()
