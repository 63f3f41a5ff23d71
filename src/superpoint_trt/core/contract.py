"""Recognizes a model by its metadata, or by the names and shapes of its tensors. Every runtime uses this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import INPUT_NAME, OUTPUT_NAMES, ModelDescription, OutputType, SuperPointError

REQUIRED_RANKS: Mapping[OutputType, Mapping[str, int]] = {
    OutputType.DENSE: {"scores": 3, "descriptors": 4},
    OutputType.KEYPOINTS: {"keypoints": 3, "scores": 2, "descriptors": 3},
    OutputType.HEADS: {"logits": 4, "coarse_descriptors": 4},
}

"""Names and ranks of the outputs that a model must have. `num_keypoints` may be missing from other tools' models."""


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
        `described`. If that is None: what the shapes say, and the MIT reference's conventions for everything else.

    Raises:
        SuperPointError: names or ranks are not those of the graph contract.
    """
    ranks = {name: len(shape) for name, shape in outputs.items()}
    kind = described.type if described else next((t for t in OutputType if _fits(t, ranks)), None)
    if kind is None or not _fits(kind, ranks) or [*map(len, inputs.values())] != [4] or list(inputs) != [INPUT_NAME]:
        got = ", ".join(f"{name}{list(shape)}" for name, shape in outputs.items())
        raise SuperPointError(
            f"{path} is not one of this project's models: inputs {', '.join(inputs)}; outputs {got}. "
            f"Expected input {INPUT_NAME} [B, 1, H, W] and outputs "
            + " or ".join(" + ".join(names) for names in OUTPUT_NAMES.values())
            + f"; {remedy}."
        )
    return described or _describe_foreign(kind, inputs[INPUT_NAME], outputs, path, remedy)


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
    rows = None if kind is OutputType.KEYPOINTS else _known(descriptors[2])
    return ModelDescription(
        type=kind,
        height_px=height,
        width_px=width,
        dynamic=height is None,
        stride_px=height // rows if rows and height else ModelDescription.stride_px,
        descriptor_dim=dim or ModelDescription.descriptor_dim,
        superpoint_trt_version="",
    )
