"""A stand-in for CUDA: "GPU memory" is host memory, and queued work is done at once. No GPU, no TensorRT.

It shows that the host's side of the runtime is right: which address is read and written when, who keeps memory, which
GPU is current. What GPUs and TensorRT do is shown by tests/gpu.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

from superpoint_trt.core.types import DecodeOptions, ModelDescription, OutputType, ShapeRange, SuperPointError
from superpoint_trt.gpu import cuda
from superpoint_trt.gpu.engine import Engine, Execution, OutputTensor
from superpoint_trt.gpu.kernels.decode import TARGET_NBYTES, Head, Rows


def at(address: int, shape: tuple[int, ...], dtype: object) -> np.ndarray:
    """An array on memory, by address."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype).reshape(shape)


class Runtime:
    """The functions of `cuda.bindings.runtime` that the package calls; `gpus` GPUs."""

    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, gpus: int = 1) -> None:
        self.gpus, self.current = gpus, 0
        self.memory: dict[int, np.ndarray] = {}
        self.set_devices: list[int] = []
        self.streams = 0

    def cudaGetDeviceCount(self):
        return 0, self.gpus

    def cudaGetDevice(self):
        return 0, self.current

    def cudaSetDevice(self, index):
        self.current = index
        self.set_devices.append(index)
        return (0,)

    def cudaGetDeviceProperties(self, index):
        return 0, SimpleNamespace(name=f"GPU {index}".encode(), major=9, minor=0, multiProcessorCount=1)

    def cudaMalloc(self, nbytes):
        block = np.full(nbytes + 256, 0xEE, np.uint8)  # what nobody writes shows
        address = -(-block.ctypes.data // 256) * 256
        self.memory[address] = block
        return 0, address

    def cudaFree(self, address):
        del self.memory[address]
        return (0,)

    cudaMallocHost, cudaFreeHost = cudaMalloc, cudaFree

    def cudaMemcpyKind(self, kind):
        return kind

    def cudaMemcpyAsync(self, to, source, nbytes, kind, stream):
        ctypes.memmove(to, source, nbytes)
        return (0,)

    def cudaMemcpy(self, to, source, nbytes, kind):
        ctypes.memmove(to, source, nbytes)
        return (0,)

    def cudaMemsetAsync(self, to, value, nbytes, stream):
        ctypes.memset(to, value, nbytes)
        return (0,)

    def cudaStreamCreateWithFlags(self, flags):
        self.streams += 1
        return 0, 1000 + self.streams

    def cudaStreamDestroy(self, stream):
        self.streams -= 1
        return (0,)

    def cudaEventCreateWithFlags(self, flags):
        return 0, 1

    def __getattr__(self, name):
        if name.startswith(("cudaEvent", "cudaStream")):
            return lambda *arguments: (0,)
        raise AttributeError(name)


class FakeTensorRT:
    """What is asked of a TensorRT outside of an engine."""

    captures = False

    def __str__(self) -> str:
        return "TensorRT"


class FakeEngine(Engine):
    """A dynamic `heads` engine whose "network" hands on the image: logit 0 of a cell is the mean of its pixels."""

    DIM = 4

    def __init__(self, index: int = 0, most_batch: int = 4) -> None:
        self.tensorrt = FakeTensorRT()
        self.gpu = cuda.device(index)
        self.on_gpu = cuda.DeviceScope(index)
        self.profiles = [ShapeRange((1, 16, 16), (1, 32, 32), (most_batch, 64, 64))]
        self.description = ModelDescription(
            OutputType.HEADS,
            height_px=32,
            width_px=32,
            dynamic=True,
            max_batch_size=most_batch,
            descriptor_dim=self.DIM,
        )
        self.precision = "fp32"
        self.refuses = False
        self.broken_head = ""
        """The head that is NaN for images whose first pixel is white."""
        self.prepared: list[tuple[int, ...]] = []

    def new_scratch(self):
        return cuda.DeviceMemory(64)

    def prepare(self, shape, stream, scratch):
        self.fitting_profile(shape)
        assert cuda.runtime().current == self.gpu.index, "the wrong GPU is current"
        self.prepared.append(shape)
        batch, _, height, width = shape
        cells = (height // 8, width // 8)
        logits = OutputTensor("logits", (batch, 65, *cells), np.dtype(np.float32), 0)
        coarse = OutputTensor(
            "coarse_descriptors", (batch, self.DIM, *cells), np.dtype(np.float32), cuda.aligned(logits.nbytes)
        )
        return FakeExecution(self, stream, shape, [logits, coarse])


class FakeExecution(Execution):
    def __init__(self, engine, stream, shape, outputs) -> None:
        self._engine = engine
        super().__init__(engine.tensorrt, None, stream, shape, outputs)
        self.addresses: dict[str, int] = {}

    def bind(self, image, elsewhere=None):
        self.addresses = {tensor.name: self.memory.address + tensor.offset for tensor in self.outputs}
        self.addresses.update(elsewhere or {})
        self.addresses["image"] = image

    def queue(self) -> None:
        if self._engine.refuses:
            raise SuperPointError("running the engine failed")
        assert cuda.runtime().current == self._engine.gpu.index, "the wrong GPU is current"
        image = at(self.addresses["image"], self._shape, np.float32)
        batch, _, height, width = self._shape
        cells = image.reshape(batch, height // 8, 8, width // 8, 8).mean(axis=(2, 4))
        logits = at(self.addresses["logits"], self.outputs[0].shape, np.float32)
        logits[:] = 0
        logits[:, 0] = cells
        at(self.addresses["coarse_descriptors"], self.outputs[1].shape, np.float32)[:] = 1
        for tensor in self.outputs:
            if tensor.name == self._engine.broken_head:
                at(self.addresses[tensor.name], tensor.shape, np.float32)[image[:, 0, 0, 0] == 1] = np.nan


class FakeDecoder:
    """Finds the first pixel of every cell inside the image; its score is the cell's logit 0."""

    def __init__(self, logits: Head, descriptors: Head, options: DecodeOptions, sampling: object) -> None:
        self._logits, self._descriptors, self._dim, self._options = logits, descriptors, descriptors.shape[1], options
        self.usual_rows = 6

    def rows(self, half: bool, least: int = 0) -> Rows:
        return Rows(self._logits.shape[0], self._options.max_keypoints or max(self.usual_rows, least), self._dim, half)

    def queue(self, job: int, rows: Rows, stream: object) -> None:
        target = at(job, (TARGET_NBYTES // 8,), np.uint64)
        sizes = at(job + TARGET_NBYTES, (rows.batch, 2), np.int32)
        logits = at(self._logits.address, self._logits.shape, np.float32)
        names = ("keypoints", "scores", "descriptors", "num_keypoints")
        xy, scores, descriptors, counts = (
            at(int(place), rows.places[name][1], rows.places[name][2]) for place, name in zip(target, names)
        )
        for image, (width, height) in enumerate(sizes):
            found = [(x, y) for y in range(0, height, 8) for x in range(0, width, 8)][: self._options.max_keypoints]
            for row, (x, y) in enumerate(found[: rows.capacity]):
                xy[image, row] = x, y
                scores[image, row] = logits[image, 0, y // 8, x // 8]
                descriptors[image, row] = 1
            heads = (self._logits, -1), (self._descriptors, -2)
            broken = [code for head, code in heads if np.isnan(at(head.address, head.shape, np.float32)[image]).any()]
            counts[image] = broken[0] if broken else len(found)


def launch(kernel, grid, stream, arguments, threads=0) -> None:
    """The kernels of preprocess.cu: `unit_range` divides pixels by 255, `receive` also copies the job."""
    values = [getattr(value, "value", value) for value in arguments]
    if kernel == "unit_range":
        pixels, unit, count = values[0], values[1], 4 * values[2]
    else:
        assert kernel == "receive"
        job, job_to, words, pixels, unit, vectors = values
        ctypes.memmove(job_to, job, 4 * words)
        count = 16 * vectors
    at(unit, (count,), np.float32)[:] = at(pixels, (count,), np.uint8) / np.float32(255)
