"""What every backend is: a context manager from named arrays to named arrays that says what it runs on."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from superpoint_trt.spec import INPUT_NAME, Float32, ModelDescription, SuperPointError

Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class RuntimeInfo:
    """What a run really used; printed with every result."""

    backend: str
    """"onnxruntime 1.19.2", "torch 2.6.0", ..."""
    device: str
    """"cpu (CPUExecutionProvider, 2 threads)", "cuda (...)"."""
    precision: str

    def __str__(self) -> str:
        return f"{self.backend}, {self.device}, {self.precision}"


class Backend(abc.ABC):
    """One opened model.

    Attributes:
        description: what the model is.
        runtime: what it runs on.
    """

    description: ModelDescription
    runtime: RuntimeInfo

    def infer(self, image: Float32) -> Outputs:
        """Runs the model.

        Args:
            image: (B, 1, H, W) float32 in [0, 1], H and W multiples of the stride.

        Returns:
            The model type's outputs by name (spec.OUTPUT_NAMES).

        Raises:
            SuperPointError: the input does not fit the model, or the runtime failed.
        """
        model = self.description
        stride = model.stride_px
        if image.ndim != 4 or image.shape[1] != 1 or image.shape[2] % stride or image.shape[3] % stride:
            raise SuperPointError(
                f"{INPUT_NAME} has shape {image.shape}; expected (B, 1, H, W) in multiples of {stride}."
            )
        if not model.dynamic and image.shape[2:] != (model.height_px, model.width_px):
            raise SuperPointError(
                f"{INPUT_NAME} is {image.shape[3]}x{image.shape[2]}; this model takes only "
                f"{model.width_px}x{model.height_px}: resize, or export with --dynamic."
            )
        if image.shape[0] > model.max_batch_size and not model.dynamic:
            raise SuperPointError(
                f"batch of {image.shape[0]} images; this model takes {model.max_batch_size} at most: export with "
                f"--max-batch-size {image.shape[0]}."
            )
        return self._infer(image)

    @abc.abstractmethod
    def _infer(self, image: Float32) -> Outputs: ...

    def close(self) -> None:  # noqa: B027  (nothing to free is a fine default)
        """Frees what the backend holds; it cannot be used afterwards."""

    def __enter__(self) -> Backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
