"""The interface of every backend: a context manager that runs a model and says what it runs on."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.contract import check_output_shapes
from superpoint_trt.core.types import INPUT_NAME, DecodeOptions, Float32, ModelDescription, Precision, SuperPointError

if TYPE_CHECKING:
    from superpoint_trt.run.lanes import Lanes

Outputs = Mapping[str, NDArray[Any]]
"""A model's outputs by name (`OUTPUT_NAMES`)."""

Image = NDArray[Any]
"""(B, 1, H, W) float32 in [0, 1], or uint8."""


def as_unit_range(image: Image) -> Float32:
    """The image as float32: uint8 is divided by 255, float32 returned as it is."""
    unit: Float32 = image.astype(np.float32) / np.float32(255) if image.dtype == np.uint8 else image
    return unit


@dataclass(frozen=True)
class RuntimeInfo:
    """Backend, device and precision that a run really used; printed with every result."""

    backend: str
    """"onnxruntime 1.19.2", "torch 2.6.0", ..."""
    device: str
    """"cpu (CPUExecutionProvider, 2 threads)", "cuda (...)"."""
    precision: str
    computed: Precision | None = None
    """The least exact type that convolutions are computed in, where the runtime tells. None: as the model says."""
    decode: str = ""
    """Where heads are decoded: "decode on the GPU (CUDA)", or on the CPU and why. Empty: in the model's graph."""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.backend, self.device, self.precision, self.decode)))


class Backend(abc.ABC):
    """One opened model.

    Attributes:
        description: what the model is.
        runtime: what it runs on.
    """

    description: ModelDescription
    runtime: RuntimeInfo

    def infer(self, image: Image) -> Outputs:
        """Runs the model.

        Args:
            image: (B, 1, H, W) float32 in [0, 1], or uint8; H and W multiples of the stride.

        Returns:
            The outputs by name.

        Raises:
            SuperPointError: the input does not fit the model, the runtime failed, or an output has another shape than
                the model's description says.
        """
        self._check_input(image)
        outputs = self._infer(image)
        self._check_outputs(image, outputs)
        return outputs

    def _check_input(self, image: Image) -> None:
        if image.dtype not in (np.float32, np.uint8):
            raise SuperPointError(f"{INPUT_NAME} is {image.dtype}; expected float32 in [0, 1], or uint8.")
        self.check(image.shape)

    def _check_outputs(self, image: Image, outputs: Outputs) -> None:
        check_output_shapes(self.description, image.shape, {name: value.shape for name, value in outputs.items()})

    def infer_timed(self, image: Image) -> tuple[Outputs, dict[str, float]]:
        """As `infer`, and seconds: network, and where they exist host_to_device and device_to_host."""
        started = time.perf_counter()
        outputs = self.infer(image)
        return outputs, {"network": time.perf_counter() - started}

    def check(self, shape: tuple[int, ...]) -> None:
        """Checks that an input (B, 1, H, W) fits the model.

        Raises:
            SuperPointError: it does not; the text says what the model takes.
        """
        stride = self.description.stride_px
        if len(shape) != 4 or shape[1] != 1 or shape[2] % stride or shape[3] % stride or 0 in shape:
            raise SuperPointError(f"{INPUT_NAME} has shape {shape}; expected (B, 1, H, W) in multiples of {stride}.")
        self._check_size(shape)

    def _check_size(self, shape: tuple[int, ...]) -> None:
        """Checks the batch and the size against the model's own."""
        model = self.description
        if not model.dynamic and shape[2:] != (model.height_px, model.width_px):
            raise SuperPointError(
                f"{INPUT_NAME} is {shape[3]}x{shape[2]}; this model takes only {model.width_px}x{model.height_px}: "
                "resize, or export with --dynamic."
            )
        if shape[0] > model.max_batch_size and not model.dynamic:
            raise SuperPointError(
                f"batch of {shape[0]} images; this model takes {model.max_batch_size} at most: export with "
                f"--max-batch-size {shape[0]}."
            )

    @abc.abstractmethod
    def _infer(self, image: Image) -> Outputs: ...

    def lanes(self, options: DecodeOptions, half: bool) -> Lanes | None:
        """Opens the way from image to keypoints on the GPU; None if this backend has none.

        Args:
            options: how to decode.
            half: descriptors as float16.

        Raises:
            SuperPointError: the backend has one, but it does not work here.
        """
        return None

    def close(self) -> None:  # noqa: B027  (nothing to free is a fine default)
        """Frees what the backend holds; it cannot be used afterwards."""

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PendingRun(abc.ABC):
    """A run that was begun. Call `result` or `abandon`, once."""

    @abc.abstractmethod
    def result(self) -> Outputs:
        """Waits for the run and returns its outputs by name.

        Raises:
            SuperPointError: the run failed.
        """

    @abc.abstractmethod
    def abandon(self) -> None:
        """Gives the run up; returns when it no longer uses the image."""


class AsyncBackend(Backend):
    """A backend that can begin a run without waiting for it: its caller decodes one while the next is under way."""

    def begin(self, image: Image) -> PendingRun:
        """Begins a run, as `infer`, without waiting for it.

        Raises:
            SuperPointError: the input does not fit the model, or the run could not be started.
        """
        self._check_input(image)
        return _CheckedRun(self, self._begin(image), image)

    @abc.abstractmethod
    def _begin(self, image: Image) -> PendingRun: ...

    def _infer(self, image: Image) -> Outputs:
        return self._begin(image).result()


class _CheckedRun(PendingRun):
    """A run whose outputs are checked against the model's description."""

    def __init__(self, backend: AsyncBackend, run: PendingRun, image: Image) -> None:
        self._backend, self._run, self._image = backend, run, image

    def result(self) -> Outputs:
        outputs = self._run.result()
        self._backend._check_outputs(self._image, outputs)
        return outputs

    def abandon(self) -> None:
        self._run.abandon()
