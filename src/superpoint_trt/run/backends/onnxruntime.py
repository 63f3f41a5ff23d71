"""ONNX Runtime: the backend that always works."""

from __future__ import annotations

import platform
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from superpoint_trt.core.contract import REQUIRED_RANKS, recognize
from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.files import PathLike, one_line, read_bytes
from superpoint_trt.core.onnx_runtime import import_onnxruntime
from superpoint_trt.core.onnx_weights import refuse_bytes_with_weights_elsewhere
from superpoint_trt.core.types import INPUT_NAME, ModelDescription, Precision, SuperPointError
from superpoint_trt.run.backends.base import AsyncBackend, Image, Outputs, PendingRun, RuntimeInfo, as_unit_range

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_UNFAITHFUL = ["ReluQuantRewrite", "WeightBiasQuantization"]
"""Rewrites of onnxruntime (1.32) that change the result of a Q/DQ graph: one drops the ReLU in front of an fp8 Q, the
other rounds biases. Without them the results equal a simulation in numpy to float32's last digits, at no cost."""

_FATAL_ONLY = 4
"""onnxruntime's log level. Its errors also come as exceptions, so the log would say them twice."""


class OnnxRuntimeBackend(AsyncBackend):
    """One .onnx file in an onnxruntime session.

    Args:
        path: the model, made by this package or by another tool with the same inputs and outputs.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads of the session; None for onnxruntime's default, the number of physical cores.
        busy_wait: whether they wait for each other in a loop, which takes the CPU from everything else.

    Raises:
        SuperPointError: not such a model, or the device cannot be used.
    """

    def __init__(
        self, path: PathLike, device: str = "auto", threads: int | None = None, busy_wait: bool = True
    ) -> None:
        ort = import_onnxruntime()

        choice = DeviceChoice.parse(device)
        data = read_bytes(path, "model")
        refuse_bytes_with_weights_elsewhere(data, path)
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        if not busy_wait:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = _providers(choice)
        self._session: Any = None
        try:
            self._session = ort.InferenceSession(data, options, providers=providers, disabled_optimizers=_UNFAITHFUL)
        except Exception as error:  # onnxruntime's exceptions share no public base
            hint = " (bf16 models are for TensorRT)" if "bfloat16" in str(error) else ""
            raise SuperPointError(f"{path} is not a model onnxruntime can load: {one_line(error)}{hint}.") from error
        provider = self._session.get_providers()[0]
        if choice.kind == "cuda" and provider != PROVIDERS["cuda"]:
            raise SuperPointError(
                f"device {choice} was asked for, but onnxruntime fell back to {provider}; install onnxruntime-gpu with "
                "a matching CUDA, look whether nvidia-smi lists that GPU, or use --device cpu."
            )
        self.description = _describe(self._session, Path(path))
        self.runtime = RuntimeInfo(
            backend=f"onnxruntime {ort.__version__}",
            device=_device(provider, choice, threads),
            precision=_precision(self.description, provider),
        )
        self._outputs = list(REQUIRED_RANKS[self.description.type])
        # One thread: runs share the session's threads, so they follow each other. It starts with the first `begin`.
        self._begun = ThreadPoolExecutor(1, thread_name_prefix="superpoint-onnxruntime")

    def _begin(self, image: Image) -> PendingRun:
        if self._session is None:
            raise _closed()
        return _Run(self._begun.submit(self._infer, image))

    def _infer(self, image: Image) -> Outputs:
        if self._session is None:
            raise _closed()
        try:
            values = self._session.run(self._outputs, {INPUT_NAME: as_unit_range(image)})
        except Exception as error:  # onnxruntime's exceptions share no public base
            size = f"{image.shape[3]}x{image.shape[2]}, batch {image.shape[0]}"
            memory = (
                "; there is too little memory: use a smaller --max-side or batch"
                if "alloc" in str(error).lower()
                else ""
            )
            raise SuperPointError(f"onnxruntime failed on {size}: {one_line(error)}{memory}.") from error
        return {name: value.astype(np.float32, copy=False) for name, value in zip(self._outputs, values)}

    def close(self) -> None:
        """Ends the session, once the runs that were begun are over."""
        self._begun.shutdown()
        self._session = None


class _Run(PendingRun):
    """A run in another thread, so that its caller can decode the one before."""

    def __init__(self, outputs: Future[Outputs]) -> None:
        self._outputs = outputs

    def result(self) -> Outputs:
        return self._outputs.result()

    def abandon(self) -> None:
        with suppress(CancelledError, SuperPointError, MemoryError):
            self._outputs.cancel()
            self._outputs.result()


def _closed() -> SuperPointError:
    return SuperPointError("this model was closed; open it again.")


def _precision(model: ModelDescription, provider: str) -> str:
    """The precision really computed in.

    On x86, onnxruntime has no fp16 kernels and turns fp16 weights into fp32. It fuses no Q/DQ pairs that are placed
    for TensorRT.
    """
    precision = model.precision
    if provider != PROVIDERS["cpu"]:
        return precision.value
    if precision is Precision.FP16 and platform.machine() in ("x86_64", "AMD64"):
        return "fp16 weights, computed in fp32"
    if precision is Precision.INT8 and not model.placement:
        return "int8 steps computed in fp32 (slow: superpoint quantize --for cpu)"
    return precision.value


def _providers(choice: DeviceChoice) -> list[tuple[str, dict[str, str]]]:
    """Onnxruntime's execution providers for a device, each with its options.

    Raises:
        SuperPointError: this onnxruntime or this machine does not have the device.
    """
    ort = import_onnxruntime()

    available = ort.get_available_providers()
    if choice.kind == "cuda" and PROVIDERS["cuda"] not in available:
        raise SuperPointError(
            f"device {choice} was asked for, but this onnxruntime has only {', '.join(available)}; "
            "pip install onnxruntime-gpu, or use --device cpu."
        )
    on_cuda = {"use_tf32": "0"}  # an fp32 model is computed in fp32
    if choice.index is not None:
        _check_gpu(choice)
        on_cuda["device_id"] = str(choice.index)
    options = {"cuda": on_cuda, "cpu": {}}
    wanted = ["cuda", "cpu"] if choice.kind == "auto" else [choice.kind]
    return [(PROVIDERS[name], options[name]) for name in wanted if PROVIDERS[name] in available]


def _check_gpu(choice: DeviceChoice) -> None:
    """Refuses a GPU that does not exist; onnxruntime would use the CPU. Without cuda-bindings nobody knows."""
    from superpoint_trt.gpu import cuda

    try:
        cuda.runtime()
    except SuperPointError:
        return
    cuda.device(choice.index or 0)


def _device(provider: str, choice: DeviceChoice, threads: int | None) -> str:
    if provider == PROVIDERS["cpu"]:
        return f"cpu ({provider}, {threads or 'default'} threads)"
    names = {name: short for short, name in PROVIDERS.items()}
    return f"{names.get(provider, provider) if choice.index is None else choice} ({provider})"


def _describe(session: Any, path: Path) -> ModelDescription:
    """What the model is, by its metadata; another tool's model by the names, ranks and shapes of its tensors."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    try:
        described = ModelDescription.from_metadata(session.get_modelmeta().custom_metadata_map, path)
        takes, gives = ({tensor.name: list(tensor.shape) for tensor in tensors} for tensors in (inputs, outputs))
    except UnicodeDecodeError:
        raise SuperPointError(f"{path} has names or metadata that are not text; export it again.") from None
    if [tensor.type for tensor in inputs if tensor.name == INPUT_NAME] not in ([], ["tensor(float)"]):
        raise SuperPointError(
            f"{path} takes {inputs[0].type}; expected float32 images. Export it with superpoint export."
        )
    return recognize(path, described, takes, gives, remedy="make one with: superpoint export")
