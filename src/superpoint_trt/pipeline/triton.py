"""Writes a model repository for NVIDIA's Triton Inference Server.

A `keypoints` model needs nothing but its own runtime, so Triton's onnxruntime or TensorRT backend serves it. Other
models are decoded by this package: Triton's Python backend runs `triton_model.py` around `SuperPoint`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from superpoint_trt.convert.default_model import model_path
from superpoint_trt.core.files import PathLike, make_folder, read_bytes, write_atomically
from superpoint_trt.core.types import ENGINE_SUFFIXES, ModelDescription, OutputType, SuperPointError
from superpoint_trt.gpu.engine_file import read_plan, sidecar

VERSION = "1"
"""The folder of the model's first version."""
CONFIG = "config.pbtxt"
_QUEUE_DELAY_US = 200
"""How long a request may wait for others to share a run with."""
_PYTHON_MODEL = "triton_model.py"


@dataclass(frozen=True)
class TritonOptions:
    """How a model is served."""

    name: str = "superpoint"
    """Under which name."""
    instances: int = 1
    """Copies of the model that run at once, on each GPU."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `SuperPoint`; not for `keypoints` models, whose decoding is in the graph."""

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "_-." for letter in self.name):
            raise SuperPointError(f"the model's name is {self.name!r}; expected letters, digits, '_', '-' and '.'.")
        if not 1 <= self.instances <= 64:
            raise SuperPointError(f"the number of instances is {self.instances}; expected 1 to 64.")


@dataclass(frozen=True)
class Served:
    """What a repository serves."""

    folder: Path
    """Of the model, in the repository."""
    backend: str
    """Triton's: "onnxruntime", "tensorrt" or "python"."""
    max_batch_size: int
    """Images in a request; 0: requests have no batch axis."""


def make_repository(model: PathLike | None, output: PathLike, options: TritonOptions | None = None) -> Served:
    """Writes `output`/NAME/config.pbtxt and `output`/NAME/1 with the model; what is there is replaced.

    Args:
        model: .onnx, or an engine with its .json, or the name of a packaged network; None: the default one.
        output: the repository, which may hold other models.
        options: name, number of instances, settings.

    Raises:
        SuperPointError: the model cannot be served, or the files cannot be written.
    """
    options, model = options or TritonOptions(), model_path(model)
    description = _describe(model)
    folder = make_folder(Path(output) / options.name)
    version = make_folder(folder / VERSION)
    if description.type is OutputType.KEYPOINTS:
        if options.settings:
            names = ", ".join(sorted(options.settings))
            raise SuperPointError(
                f"{model} decodes in its graph, so {names} cannot be set; export it with other options."
            )
        served = _native(model, description, folder)
    else:
        served = _python(model, folder)
    for name, data in _files(model, served.backend):
        write_atomically(version / name, data)
    write_atomically(folder / CONFIG, _config(model, description, served, options).encode())
    return served


def _describe(model: Path) -> ModelDescription:
    """What a model file is.

    Raises:
        SuperPointError: it is missing, damaged, or of a kind that is not served.
    """
    suffix = model.suffix.lower()
    if suffix == ".onnx":
        from superpoint_trt.convert.onnx_file import read_onnx

        return read_onnx(model).description
    if suffix not in ENGINE_SUFFIXES:
        raise SuperPointError(
            f"{model} cannot be served; expected an .onnx or an engine ({', '.join(ENGINE_SUFFIXES)})."
        )
    metadata = read_plan(model)[1]
    if metadata is None:
        raise SuperPointError(
            f"engine {model} has no {sidecar(model).name} beside it, which says what it is; build it anew."
        )
    return metadata.description


def _native(model: Path, description: ModelDescription, folder: Path) -> Served:
    backend = "onnxruntime" if model.suffix.lower() == ".onnx" else "tensorrt"
    return Served(folder, backend, description.max_batch_size if description.max_batch_size > 1 else 0)


def _python(model: Path, folder: Path) -> Served:
    return Served(folder, "python", 0)


def _files(model: Path, backend: str) -> list[tuple[str, bytes]]:
    """The files of a version: name and content."""
    data = read_bytes(model, "model")
    if backend != "python":
        return [("model.onnx" if backend == "onnxruntime" else "model.plan", data)]
    files = [("model.py", (Path(__file__).with_name(_PYTHON_MODEL)).read_bytes()), (model.name, data)]
    if model.suffix.lower() in ENGINE_SUFFIXES:
        files.append((sidecar(model).name, read_bytes(sidecar(model), "engine metadata")))
    return files


# --------------------------------------------------------------------------------------------------------- config.pbtxt


def _config(model: Path, description: ModelDescription, served: Served, options: TritonOptions) -> str:
    """The text of config.pbtxt, a `ModelConfig` of Triton's model_config.proto."""
    blocks = [
        f'name: "{options.name}"',
        f'backend: "{served.backend}"',
        f"max_batch_size: {served.max_batch_size}",
        *(_python_tensors(description) if served.backend == "python" else _native_tensors(description, served)),
        f"instance_group [{{ count: {options.instances} }}]",
    ]
    if served.max_batch_size:
        blocks.append(f"dynamic_batching {{ max_queue_delay_microseconds: {_QUEUE_DELAY_US} }}")
    if served.backend == "python":
        blocks += [_parameter("file", model.name), _parameter("settings", json.dumps(dict(options.settings)))]
    return "\n".join(blocks) + "\n"


def _native_tensors(description: ModelDescription, served: Served) -> list[str]:
    """A `keypoints` model's tensors, without the batch axis if requests may be batched."""
    sides = (-1, -1) if description.dynamic else (description.height_px, description.width_px)
    count, batch = description.max_keypoints or -1, () if served.max_batch_size else (1,)
    # Triton has no tensors without axes, so a number for each image is an axis of 1 that the model does not have.
    counts = _tensor("num_keypoints", "TYPE_INT32", (1,), reshape="" if served.max_batch_size else None)
    return [
        _list("input", [_tensor("image", "TYPE_FP32", (*batch, 1, *(side or -1 for side in sides)))]),
        _list(
            "output",
            [
                _tensor("keypoints", "TYPE_FP32", (*batch, count, 2)),
                _tensor("scores", "TYPE_FP32", (*batch, count)),
                _tensor("descriptors", "TYPE_FP32", (*batch, count, description.descriptor_dim)),
                counts,
            ],
        ),
    ]


def _python_tensors(description: ModelDescription) -> list[str]:
    """The tensors of triton_model.py: one image a request."""
    return [
        _list("input", [_tensor("image", "TYPE_UINT8", (-1, -1, -1))]),
        _list(
            "output",
            [
                _tensor("keypoints", "TYPE_FP32", (-1, 2)),
                _tensor("scores", "TYPE_FP32", (-1,)),
                _tensor("descriptors", "TYPE_FP32", (-1, description.descriptor_dim)),
                _tensor("image_size", "TYPE_INT64", (2,)),
            ],
        ),
    ]


def _list(name: str, entries: Sequence[str]) -> str:
    return f"{name} [\n" + ",\n".join(f"  {entry}" for entry in entries) + "\n]"


def _tensor(name: str, kind: str, shape: Sequence[int], reshape: str | None = None) -> str:
    dims = ", ".join(map(str, shape))
    shown = "" if reshape is None else f" reshape: {{ shape: [ {reshape} ] }}"
    return f'{{ name: "{name}" data_type: {kind} dims: [ {dims} ]{shown} }}'


def _parameter(key: str, value: str) -> str:
    # A JSON string's escapes are those of protobuf's text format.
    return f"parameters {{ key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }} }}"
