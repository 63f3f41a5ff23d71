"""A matcher's engine: arrays on the host in, arrays on the host out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, read_bytes
from superpoint_trt.core.matcher import OUTPUTS, MatcherDescription
from superpoint_trt.core.typed_json import JsonError, mapping, parse, text
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.cuda import DeviceMemory
from superpoint_trt.gpu.tensorrt_api import flavor_of, load

_LONGEST_NAME = 1 << 20


class MatcherEngine:
    """One plan of `superpoint matcher build`, opened on one GPU, with a stream of its own.

    Args:
        path: the plan.
        device_index: number of the GPU; None: the thread's current one.

    Attributes:
        description: what the matcher is.
        tensorrt: the TensorRT that runs it.

    Raises:
        SuperPointError: no such GPU, no TensorRT, or the plan was made for another GPU or TensorRT, or is no matcher.
    """

    def __init__(self, path: PathLike, device_index: int | None = None) -> None:
        plan = read_bytes(path, "engine")
        self.tensorrt = load(flavor_of(plan))
        self._gpu = cuda.current_device() if device_index is None else cuda.device(device_index)
        self._on_gpu = cuda.DeviceScope(self._gpu.index)
        with self._on_gpu, self.tensorrt.explaining(f"{path} is not an engine that can be loaded here") as log:
            self._runtime = self.tensorrt.module.Runtime(self.tensorrt.logger)
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            if self._engine is None:
                raise log.failed()
            self.description = _described(self._engine.name, Path(path))
            self._stream = cuda.Stream()
            self._scratch = DeviceMemory(self.tensorrt.activation_bytes(self._engine))
            self._context = self.tensorrt.create_context(self._engine, self._scratch.address, self._scratch.nbytes)
            if self._context is None:
                raise log.failed()
            self._buffers = self._bind(log)
        self._replay = cuda.Replay(self._stream, self.tensorrt.captures, str(path))

    @property
    def device(self) -> str:
        """The GPU, for people."""
        return f"cuda:{self._gpu.index} ({self._gpu.name}, {self._gpu.capability})"

    def _bind(self, log: Any) -> dict[str, tuple[DeviceMemory, NDArray[Any]]]:
        """Memory on the GPU and on the host of each input and output."""
        buffers = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype = np.dtype(self.tensorrt.module.nptype(self._engine.get_tensor_dtype(name)))
            host = np.zeros(tuple(self._engine.get_tensor_shape(name)), dtype)
            memory = DeviceMemory(cuda.aligned(host.nbytes))
            if not self._context.set_tensor_address(name, memory.address):
                raise log.failed(f"the memory for {name} was refused")
            buffers[name] = memory, host
        return buffers

    def infer(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the matcher.

        Args:
            feed: the inputs by name, of the shapes that the engine was built for.

        Returns:
            The outputs by name.

        Raises:
            SuperPointError: an input has another shape, or TensorRT refuses to run.
        """
        with self._on_gpu:
            for name, array in feed.items():
                memory, host = self._buffers[name]
                if array.shape != host.shape:
                    raise SuperPointError(f"{name} is {array.shape}; this engine takes {host.shape}.")
                host[...] = array
                cuda.copy(memory.address, host.ctypes.data, host.nbytes, cuda.TO_DEVICE, self._stream)
            self._replay.run(self._queue)
            for name in OUTPUTS:
                memory, host = self._buffers[name]
                cuda.copy(host.ctypes.data, memory.address, host.nbytes, cuda.TO_HOST, self._stream)
            self._stream.synchronize()
            return {name: self._buffers[name][1].copy() for name in OUTPUTS}

    def run(self) -> None:
        """Runs again on the inputs that are on the GPU already, and waits: what benchmarks time."""
        with self._on_gpu:
            self._replay.run(self._queue)
            self._stream.synchronize()

    def _queue(self) -> None:
        with self.tensorrt.explaining("running the matcher failed") as log:
            if not self._context.execute_async_v3(self._stream.address):
                raise log.failed()

    def close(self) -> None:
        """Frees the context and the memory."""
        with self._on_gpu:
            self._stream.synchronize()
            self._replay.forget()
            self._context = None
            self._buffers.clear()
            self._stream.close()


def _described(name: str, path: Path) -> MatcherDescription:
    """The description in a plan's name.

    Raises:
        SuperPointError: it is no matcher's.
    """
    try:
        found = {key: text(value, key) for key, value in mapping(parse(name, _LONGEST_NAME), "the name").items()}
    except JsonError:
        found = {}
    return MatcherDescription.from_metadata(found, path)
