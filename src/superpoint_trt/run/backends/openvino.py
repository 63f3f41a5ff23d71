"""OpenVINO: Intel's runtime for CPUs, its GPUs and NPUs. It runs the .onnx as it is."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from superpoint_trt.core.contract import REQUIRED_RANKS, recognize
from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.files import PathLike, one_line, read_bytes
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.onnx_weights import refuse_weights_elsewhere
from superpoint_trt.core.types import INPUT_NAME, ModelDescription, Precision, SuperPointError, least_exact
from superpoint_trt.run.backends.base import AsyncBackend, Image, Outputs, PendingRun, RuntimeInfo, as_unit_range

_PRECISIONS = {
    "f32": Precision.FP32,
    "f16": Precision.FP16,
    "bf16": Precision.BF16,
    "i8": Precision.INT8,
    "u8": Precision.INT8,
    "f8e4m3": Precision.FP8,
}
"""OpenVINO's names of number types."""

_FULL_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""The same types as OpenVINO's properties name them."""


class OpenVinoBackend(AsyncBackend):
    """One .onnx file, compiled by OpenVINO for one of its devices.

    Args:
        path: the model, made by this package or by another tool with the same inputs and outputs.
        device: "openvino", "openvino:CPU", "openvino:GPU", "openvino:NPU", each with ":fp32" or without.
        threads: CPU threads; None leaves the choice to OpenVINO.

    Raises:
        SuperPointError: OpenVINO is not installed, has no such device here, or does not take the model.
    """

    def __init__(self, path: PathLike, device: str = "openvino", threads: int | None = None) -> None:
        choice = DeviceChoice.parse(device)
        openvino = import_openvino()
        data = read_bytes(path, "model")
        core = openvino.Core()
        _check_device(core, choice)
        metadata = _metadata(data, path)
        try:
            model = core.read_model(data)
        except Exception as error:  # OpenVINO raises RuntimeError, and others where the file is damaged
            raise SuperPointError(f"{path} is not a model OpenVINO can load: {_reason(error)}.") from error
        self.description = _describe(model, metadata, Path(path))
        try:
            compiled = core.compile_model(model, choice.unit, _settings(choice, threads))
        except Exception as error:
            raise SuperPointError(f"{path} does not compile for {choice}: {_reason(error)}.") from error
        computed = convolution_precisions(compiled)
        self.runtime = RuntimeInfo(
            backend=f"OpenVINO {openvino.__version__.split('-')[0]}",
            device=_device(core, compiled, choice),
            precision=_precision_text(self.description.precision, computed),
            computed=least_exact(computed),
        )
        self._compiled: Any = compiled
        self._outputs = list(REQUIRED_RANKS[self.description.type])
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    def _begin(self, image: Image) -> PendingRun:
        if self._compiled is None:
            raise SuperPointError("this model was closed; open it again.")
        with self._lock:
            request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        return _Request(self, request, as_unit_range(image))

    def take_back(self, request: Any) -> None:
        """Keeps a request whose run has ended for the next run."""
        with self._lock:
            self._idle.append(request)

    @property
    def output_names(self) -> list[str]:
        """The outputs that are read, by the graph contract."""
        return self._outputs

    def close(self) -> None:
        """Frees the compiled model."""
        self._compiled = None
        self._idle.clear()


class _Request(PendingRun):
    """One run in OpenVINO's own threads, begun when it is made."""

    def __init__(self, backend: OpenVinoBackend, request: Any, image: Image) -> None:
        self._backend, self._request = backend, request
        self._image = np.ascontiguousarray(image)  # OpenVINO reads it where it lies
        try:
            request.start_async({INPUT_NAME: self._image}, share_inputs=True)
        except Exception as error:
            raise self._failed(error) from error

    def result(self) -> Outputs:
        try:
            self._request.wait()
        except Exception as error:
            raise self._failed(error) from error
        found = {name: np.array(self._request.get_tensor(name).data, np.float32) for name in self._backend.output_names}
        self._backend.take_back(self._request)
        return found

    def abandon(self) -> None:
        try:
            self._request.wait()
        except Exception:  # nobody wants the result
            return
        self._backend.take_back(self._request)

    def _failed(self, error: Exception) -> SuperPointError:
        size = f"{self._image.shape[3]}x{self._image.shape[2]}, batch {self._image.shape[0]}"
        memory = (
            "; there is too little memory: use a smaller --max-side or batch" if "alloc" in str(error).lower() else ""
        )
        return SuperPointError(f"OpenVINO failed on {size}: {_reason(error)}{memory}.")


def import_openvino() -> Any:
    """Imports OpenVINO.

    Raises:
        SuperPointError: it is not installed, or does not load.
    """
    try:
        import openvino
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "openvino":
            raise SuperPointError(
                f"OpenVINO is not installed here: {install_hint('openvino')}. Without it: --device cpu."
            ) from None
        raise SuperPointError(f"OpenVINO is installed but does not load: {one_line(error)}; reinstall it.") from error
    return openvino


def openvino_devices() -> list[str]:
    """The devices that OpenVINO has here, as `DeviceChoice` names them; with ":fp32" where that is a choice.

    Empty if OpenVINO is not installed.
    """
    try:
        core = import_openvino().Core()
    except SuperPointError:
        return []
    found = []
    for name in core.available_devices:
        can = core.get_property(name, "OPTIMIZATION_CAPABILITIES")
        found.append(f"openvino:{name}")
        if "FP32" in can and {"BF16", "FP16"} & set(can):
            found.append(f"openvino:{name}:fp32")
    return found


def _check_device(core: Any, choice: DeviceChoice) -> None:
    """Refuses a device that is not there.

    Raises:
        SuperPointError: naming those that are, and OpenVINO's reason.
    """
    here = [str(name) for name in core.available_devices]
    if any(choice.unit in (name, name.split(".")[0]) for name in here):
        return
    try:
        why = str(core.get_property(choice.unit, "FULL_DEVICE_NAME"))
    except Exception as error:
        why = _reason(error)
    missing_driver = f" ({choice.unit}: {why})" if why.startswith("Cannot load library") else ""
    there = ", ".join(f"openvino:{name}" for name in here) or "no device"
    raise SuperPointError(
        f"device {choice} was asked for, but OpenVINO finds only {there} here{missing_driver}; it needs the device and "
        "its driver."
    )


def _metadata(data: bytes, path: PathLike) -> dict[str, str]:
    """The metadata of an .onnx, read by onnx: not every OpenVINO passes it on.

    Raises:
        SuperPointError: no model, or one whose weights lie in another file. OpenVINO would read any file that it names.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(data)
        metadata = {str(entry.key): str(entry.value) for entry in model.metadata_props}
    except (DecodeError, UnicodeDecodeError) as error:
        raise SuperPointError(f"{path} is not a model OpenVINO can load: {one_line(error)}.") from error
    refuse_weights_elsewhere(model, path)
    return metadata


def _settings(choice: DeviceChoice, threads: int | None) -> dict[str, Any]:
    """OpenVINO's properties for a device."""
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if choice.fp32:
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    if choice.unit == "CPU":
        settings["ENABLE_CPU_PINNING"] = False  # two processes would pin their threads to the same cores
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def convolution_precisions(compiled: Any) -> Counter[Precision]:
    """The number types in which a compiled model computes its convolutions, and how many convolutions each has.

    Where the device does not tell (some NPU drivers), the type that it says it prefers, counted once.
    """
    found: Counter[Precision] = Counter()
    try:
        for node in compiled.get_runtime_model().get_ordered_ops():
            told = node.get_rt_info()
            if "layerType" in told and _text(told["layerType"]).lower() == "convolution":
                precision = _PRECISIONS.get(_text(told["runtimePrecision"]).lower())
                found.update([precision] if precision else [])
    except Exception:  # not every device has a runtime model
        found.clear()
    if not found:
        preferred = _preferred(compiled)
        found.update([preferred] if preferred else [])
    return found


def _preferred(compiled: Any) -> Precision | None:
    try:
        name = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    except Exception:
        return None
    return _PRECISIONS.get(_FULL_NAMES.get(name, name))


def _precision_text(stored: Precision, computed: Counter[Precision]) -> str:
    """In words, the precision of the file, and the one really computed in."""
    if not computed:
        return f"{stored.value} model, computed in a type that the device does not tell"
    parts = [f"{precision.value} ({count} convolutions)" for precision, count in computed.most_common()]
    text = next(iter(computed)).value if len(computed) == 1 else " and ".join(parts)
    return text if list(computed) == [stored] else f"{stored.value} model, computed in {text}"


def _device(core: Any, compiled: Any, choice: DeviceChoice) -> str:
    """The device, for people: "openvino:CPU (AMD EPYC, 2 threads)", with ":fp32" if that was asked for."""
    name = " ".join(str(core.get_property(choice.unit, "FULL_DEVICE_NAME")).split())
    if choice.unit != "CPU":
        return f"{choice} ({name})"
    return f"{choice} ({name}, {compiled.get_property('INFERENCE_NUM_THREADS')} threads)"


def _describe(model: Any, metadata: Mapping[str, str], path: Path) -> ModelDescription:
    """What the model is, by its metadata; another tool's model by the names, ranks and shapes of its tensors."""
    takes, gives = ({_name(port): _shape(port) for port in ports} for ports in (model.inputs, model.outputs))
    for port in model.inputs:
        if _name(port) == INPUT_NAME and port.get_element_type().get_type_name() != "f32":
            raise SuperPointError(
                f"{path} takes {port.get_element_type().get_type_name()}; expected float32 images. Export it with "
                "superpoint export."
            )
    described = ModelDescription.from_metadata(metadata, path)
    return recognize(path, described, takes, gives, remedy="make one with: superpoint export")


def _name(port: Any) -> str:
    return str(next(iter(port.get_names()), ""))


def _shape(port: Any) -> list[Any]:
    """Sizes of a tensor; a free size is None."""
    return [size.get_length() if size.is_static else None for size in port.get_partial_shape()]


def _text(value: Any) -> str:
    """The text of OpenVINO's wrapped values."""
    return str(getattr(value, "value", value))


def _reason(error: Exception) -> str:
    """OpenVINO's message without the places in its source code."""
    places = r"Exception from \S+:\d+:|Check '.*?' failed at \S+:\d+:|FrontEnd API failed with \w+:"
    return one_line(RuntimeError(re.sub(places, " ", str(error))))
