"""ONNX Runtime: the backend that always works."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from superpoint_trt.backends.base import Backend, Outputs, RuntimeInfo
from superpoint_trt.files import PathLike, read_bytes
from superpoint_trt.spec import (
    INPUT_NAME,
    OUTPUT_NAMES,
    Float32,
    ModelDescription,
    OutputType,
    SuperPointError,
)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_RANKS = {
    # Names that a model must have, and their ranks; num_keypoints may be missing from other tools' models.
    OutputType.DENSE: {"scores": 3, "descriptors": 4},
    OutputType.KEYPOINTS: {"keypoints": 3, "scores": 2, "descriptors": 3},
    OutputType.HEADS: {"logits": 4, "coarse_descriptors": 4},
}
_ERRORS_ONLY = 3


class OnnxRuntimeBackend(Backend):
    """One .onnx file in an onnxruntime session.

    Args:
        path: the model; ours, or another tool's with the same inputs and outputs.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads of the session; None for onnxruntime's default, the number of physical cores.
    """

    def __init__(self, path: PathLike, device: str = "auto", threads: int | None = None) -> None:
        import onnxruntime as ort

        data = read_bytes(path, "model")
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(data, options, providers=_providers(device))
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise SuperPointError(f"{path} is not a model onnxruntime can load: {_reason(error)}.") from error
        provider = self._session.get_providers()[0]
        if device == "cuda" and provider != PROVIDERS["cuda"]:
            raise SuperPointError(
                f"device cuda was asked for, but onnxruntime fell back to {provider}; install onnxruntime-gpu with a "
                "matching CUDA, or use --device cpu."
            )
        self.description = _describe(self._session, Path(path))
        self.runtime = RuntimeInfo(
            backend=f"onnxruntime {ort.__version__}",
            device=_device(provider, threads),
            precision=self.description.precision.value,
        )
        self._outputs = list(_RANKS[self.description.type])

    def _infer(self, image: Float32) -> Outputs:
        try:
            values = self._session.run(self._outputs, {INPUT_NAME: image})
        except Exception as error:  # as above
            size = f"{image.shape[3]}x{image.shape[2]}, batch {image.shape[0]}"
            raise SuperPointError(
                f"onnxruntime failed on {size}: {_reason(error)}. If memory ran out, use a smaller --max-side or batch."
            ) from error
        return dict(zip(self._outputs, values))

    def close(self) -> None:
        """Ends the session."""
        del self._session


def _providers(device: str) -> list[str]:
    import onnxruntime as ort

    if device not in ("auto", *PROVIDERS):
        raise SuperPointError(f"device is {device!r}; expected auto, {' or '.join(PROVIDERS)}.")
    available = ort.get_available_providers()
    if device == "cuda" and PROVIDERS["cuda"] not in available:
        raise SuperPointError(
            f"device cuda was asked for, but this onnxruntime has only {', '.join(available)}; "
            "pip install onnxruntime-gpu, or use --device cpu."
        )
    wanted = ["cuda", "cpu"] if device == "auto" else [device]
    return [PROVIDERS[name] for name in wanted if PROVIDERS[name] in available]


def _device(provider: str, threads: int | None) -> str:
    names = {name: short for short, name in PROVIDERS.items()}
    if provider != PROVIDERS["cpu"]:
        return f"{names.get(provider, provider)} ({provider})"
    return f"cpu ({provider}, {threads or f'default of {os.cpu_count()}'} threads)"


def _describe(session: Any, path: Path) -> ModelDescription:
    """The file's own metadata; for other tools' models, what names, ranks and shapes tell."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    described = ModelDescription.from_metadata(session.get_modelmeta().custom_metadata_map)
    ranks = {output.name: len(output.shape) for output in outputs}
    kind = described.type if described else next((t for t in OutputType if _fits(t, ranks)), None)
    if kind is None or not _fits(kind, ranks) or [i.name for i in inputs] != [INPUT_NAME] or len(inputs[0].shape) != 4:
        got = ", ".join(f"{tensor.name}{tensor.shape}" for tensor in outputs)
        raise SuperPointError(
            f"{path} is not one of this project's models: inputs {', '.join(i.name for i in inputs)}; outputs {got}. "
            f"Expected input {INPUT_NAME} [B, 1, H, W] and outputs "
            + " or ".join(" + ".join(names) for names in OUTPUT_NAMES.values())
            + "; make one with: superpoint export."
        )
    return described or _describe_foreign(kind, inputs[0].shape, outputs)


def _fits(kind: OutputType, ranks: dict[str, int]) -> bool:
    return all(ranks.get(name) == rank for name, rank in _RANKS[kind].items())


def _describe_foreign(kind: OutputType, image: list[Any], outputs: list[Any]) -> ModelDescription:
    """Another tool's model: what its shapes say, and the MIT reference's conventions for the rest."""
    batch, _, height, width = (size if isinstance(size, int) else None for size in image)
    shapes = {tensor.name: tensor.shape for tensor in outputs}
    descriptors = "coarse_descriptors" if kind is OutputType.HEADS else "descriptors"
    dim = shapes[descriptors][2 if kind is OutputType.KEYPOINTS else 1]
    return ModelDescription(
        type=kind,
        height_px=height,
        width_px=width,
        dynamic=height is None or width is None,
        max_batch_size=batch or 1,
        descriptor_dim=dim if isinstance(dim, int) else ModelDescription.descriptor_dim,
        superpoint_trt_version="",
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
