"""Recognizes a model by its metadata, or by the names and shapes of its tensors. Every runtime uses this.

Where the metadata and the shapes contradict each other, the model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import (
    INPUT_NAME,
    OUTPUT_NAMES,
    STRIDES_PX,
    ModelDescription,
    OutputType,
    SuperPointError,
)

REQUIRED_RANKS: Mapping[OutputType, Mapping[str, int]] = {
    OutputType.DENSE: {"scores": 3, "descriptors": 4},
    OutputType.KEYPOINTS: {"keypoints": 3, "scores": 2, "descriptors": 3},
    OutputType.HEADS: {"logits": 4, "coarse_descriptors": 4},
}
"""Names and ranks of the outputs that a model must have. `num_keypoints` may be missing from other tools' models."""


_LONGEST_LIST = 300
"""Characters of a list of tensors in an error."""


def not_finite(output: str) -> SuperPointError:
    """The error for an output that holds NaN or infinity."""
    return SuperPointError(
        f"the model's output {output} holds NaN or infinite values, so there are no keypoints to trust: check the "
        "checkpoint with superpoint verify, or build the model in a wider precision (bf16, fp32)."
    )


def check_finite(outputs: Mapping[str, NDArray[Any]]) -> None:
    """Refuses outputs that hold NaN or infinity.

    Raises:
        SuperPointError: naming the first such output.
    """
    for name, values in outputs.items():
        # Terms of a finite sum are finite, and summing is fast. If the sum overflows, each value is looked at.
        with np.errstate(over="ignore", invalid="ignore"):
            total = values.sum(dtype=np.float32)
        if not np.isfinite(total) and not np.isfinite(values).all():
            raise not_finite(name)


Shapes = Mapping[str, Sequence[Any]]
"""Tensor name -> sizes. A size that is no positive int is free."""


def recognize(
    path: Path, described: ModelDescription | None, inputs: Shapes, outputs: Shapes, remedy: str
) -> ModelDescription:
    """Checks that a model has this project's inputs and outputs, and says what it is.

    Args:
        path: the model's file, for the error.
        described: the description in the model's metadata; None for other tools' models.
        inputs: shapes of the model's inputs.
        outputs: shapes of the model's outputs.
        remedy: how to make a model that fits, for the error.

    Returns:
        `described`, with a height and width that its metadata lack. If that is None: what the shapes say, and the MIT
        reference's conventions for everything else.

    Raises:
        SuperPointError: names or ranks are not those of the graph contract, or the metadata contradict the shapes.
    """
    kind = check_contract(path, described, inputs, outputs, remedy)
    if described is None:
        return _describe_foreign(kind, inputs[INPUT_NAME], outputs, path, remedy)
    return check_metadata(path, described, inputs[INPUT_NAME], outputs, remedy)


def check_contract(
    path: Path, described: ModelDescription | None, inputs: Shapes, outputs: Shapes, remedy: str
) -> OutputType:
    """Checks names and ranks of inputs and outputs; arguments as `recognize`.

    Returns:
        The model's type.

    Raises:
        SuperPointError: names or ranks are not those of the graph contract.
    """
    ranks = {name: len(shape) for name, shape in outputs.items()}
    kind = described.type if described else next((t for t in OutputType if _fits(t, ranks)), None)
    image = inputs.get(INPUT_NAME, ())
    if (
        kind is None
        or not _fits(kind, ranks)
        or len(inputs) != 1
        or len(image) != 4
        or _known(image[1]) not in (None, 1)
    ):
        raise SuperPointError(
            f"{path} is not one of this project's models: inputs {_listed(inputs)}; outputs {_listed(outputs)}. "
            f"Expected input {INPUT_NAME} [B, 1, H, W] and outputs "
            + " or ".join(" + ".join(names) for names in OUTPUT_NAMES.values())
            + f"; {remedy}."
        )
    return kind


def _listed(tensors: Shapes) -> str:
    return ", ".join(f"{name}{list(shape)}" for name, shape in tensors.items())[:_LONGEST_LIST] or "none"


def check_metadata(
    path: Path, described: ModelDescription, image: Sequence[Any], outputs: Shapes, remedy: str
) -> ModelDescription:
    """Checks a model's metadata against the shapes of its tensors.

    Free sizes are checked when the model runs (`check_output_shapes`).

    Args:
        path: the model's file, for the error.
        described: what the metadata say.
        image: shape of the input (B, 1, H, W).
        outputs: shapes of the outputs, by name; names and ranks are those of the contract.
        remedy: how to make a model that fits, for the error.

    Returns:
        `described`, with a height and width that the metadata lack.

    Raises:
        SuperPointError: naming the key, the value in the metadata, and the tensor's.
    """
    batch, _, height, width = map(_known, image)
    kind = described.type
    descriptors = outputs["coarse_descriptors" if kind is OutputType.HEADS else "descriptors"]
    found: list[tuple[str, object, object]] = [
        ("descriptor_dim", described.descriptor_dim, _known(descriptors[2 if kind is OutputType.KEYPOINTS else 1])),
        ("dynamic", described.dynamic, height is None or width is None),
        ("max_batch_size", described.max_batch_size, batch),
    ]
    if not described.dynamic:
        found += [("height_px", described.height_px, height), ("width_px", described.width_px, width)]
    if kind is OutputType.KEYPOINTS:
        rows = {_known(outputs[name][1]) for name in REQUIRED_RANKS[kind]} - {None}
        found += [("max_keypoints", described.max_keypoints, one) for one in rows]
    else:
        found += [("stride_px", described.stride_px, stride) for stride in _strides(kind, image, outputs)]
    for key, said, shaped in found:
        if said is not None and shaped is not None and said != shaped:
            raise SuperPointError(
                f"{path} contradicts itself: the metadata say {key} {_plain(said)}, the tensors {_plain(shaped)}; "
                f"{remedy}."
            )
    if described.dynamic:
        return described
    return replace(described, height_px=height, width_px=width)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _strides(kind: OutputType, image: Sequence[Any], outputs: Shapes) -> list[float]:
    """What the known sizes of a `dense` or `heads` model say of the cell's side in px; empty if all are free."""
    found = []
    if kind is OutputType.HEADS:
        channels = _known(outputs["logits"][1])
        found += [(channels - 1) ** 0.5] if channels else []
    for name in REQUIRED_RANKS[kind]:
        if len(outputs[name]) == 4:  # a grid of cells
            pairs = zip(image[2:], outputs[name][2:])
            found += [side / cells for side, cells in pairs if _known(side) and _known(cells)]
    return found


def check_output_shapes(model: ModelDescription, image: Sequence[int], outputs: Mapping[str, Sequence[int]]) -> None:
    """Checks the outputs of one run against the model's description and the image.

    Args:
        model: what the model is.
        image: shape of the input (B, 1, H, W).
        outputs: shapes of the outputs, by name; those that no model must have are not looked at.

    Raises:
        SuperPointError: an output has another shape than the description says.
    """
    batch, _, height, width = image
    stride, dim = model.stride_px, model.descriptor_dim
    cells = (height // stride, width // stride)
    count = model.max_keypoints or outputs.get("scores", (0, 0))[1]
    expected: dict[OutputType, dict[str, tuple[int, ...]]] = {
        OutputType.DENSE: {"scores": (batch, height, width), "descriptors": (batch, dim, *cells)},
        OutputType.HEADS: {"logits": (batch, stride**2 + 1, *cells), "coarse_descriptors": (batch, dim, *cells)},
        OutputType.KEYPOINTS: {
            "keypoints": (batch, count, 2),
            "scores": (batch, count),
            "descriptors": (batch, count, dim),
        },
    }
    for name, shape in expected[model.type].items():
        if name in outputs and tuple(outputs[name]) != shape:
            raise SuperPointError(
                f"the model's output {name} is {list(outputs[name])} for {batch} image(s) of {width}x{height} px; "
                f"expected {list(shape)}, because its metadata or tensors say stride_px {stride} and descriptor_dim "
                f"{dim}: make the model again with superpoint export."
            )


def _fits(kind: OutputType, ranks: Mapping[str, int]) -> bool:
    return all(ranks.get(name) == rank for name, rank in REQUIRED_RANKS[kind].items())


def _known(size: Any) -> int | None:
    return size if isinstance(size, int) and size > 0 else None


def _describe_foreign(
    kind: OutputType, image: Sequence[Any], outputs: Shapes, path: Path, remedy: str
) -> ModelDescription:
    batch, _, height, width = map(_known, image)
    if (height is None) != (width is None) or (batch or 1) != 1:
        raise SuperPointError(
            f"{path} takes images {list(image)}; expected one image or a free batch, and both sides fixed or both "
            f"free; {remedy}."
        )
    descriptors = outputs["coarse_descriptors" if kind is OutputType.HEADS else "descriptors"]
    dim = _known(descriptors[2 if kind is OutputType.KEYPOINTS else 1])
    strides = [] if kind is OutputType.KEYPOINTS else _strides(kind, image, outputs)
    stride = strides[0] if strides else float(ModelDescription.stride_px)
    low, high = STRIDES_PX
    if not low <= stride <= high or any(other != stride for other in (*strides, int(stride))):
        cells = " and ".join(f"{one:.4g}" for one in dict.fromkeys(strides))
        raise SuperPointError(
            f"{path} has cells of {cells} px by the shapes of its tensors ({_listed(outputs)}); expected one whole "
            f"number from {low} to {high}; {remedy}."
        )
    return ModelDescription(
        type=kind,
        height_px=height,
        width_px=width,
        dynamic=height is None,
        stride_px=int(stride),
        descriptor_dim=dim or ModelDescription.descriptor_dim,
        superpoint_trt_version="",
    )
