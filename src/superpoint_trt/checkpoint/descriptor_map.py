"""The fixed map from a small network's descriptors to those of the full network that taught it.

A checkpoint may carry one: the array `descriptor_map`, (T, D) float16, and the metadata `descriptor_map_to`, the
SHA-256 of the checkpoint file whose descriptors have T numbers. `run.decode.lift_descriptors` applies it to
descriptors, `superpoint export --descriptors-of` to the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import LARGEST_DESCRIPTOR_DIM, Float32, SuperPointError

ARRAY = "descriptor_map"
"""Name of the array in a .safetensors."""

TARGET = "descriptor_map_to"
"""Key of the metadata."""


@dataclass(frozen=True, eq=False)
class DescriptorMap:
    """A linear map whose result, brought to unit length, compares with another network's descriptors."""

    matrix: Float32
    """(T, D), values of float16: T numbers of the other network's descriptor from D of the own one."""
    target_sha256: str
    """Of the other network's checkpoint file."""

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str], source: str
    ) -> DescriptorMap | None:
        """The map among a checkpoint's arrays; None: there is none.

        Args:
            arrays: of the file.
            metadata: of the file.
            source: names the file in an error.

        Raises:
            SuperPointError: the array or its metadata is missing, or either is not what a map has.
        """
        if ARRAY not in arrays and TARGET not in metadata:
            return None
        if ARRAY not in arrays or not re.fullmatch(r"[0-9a-f]{64}", metadata.get(TARGET, "")):
            raise SuperPointError(
                f"{source} has half a map of descriptors; expected the array {ARRAY} and the metadata {TARGET}, the "
                "SHA-256 of the checkpoint that it leads to."
            )
        array = np.asarray(arrays[ARRAY])
        if array.ndim != 2 or not 1 <= len(array) <= LARGEST_DESCRIPTOR_DIM or array.dtype.kind != "f":
            raise SuperPointError(
                f"{source} does not fit a SuperPoint: {ARRAY} is {array.dtype} {array.shape}; expected float16 (T, D) "
                f"with T up to {LARGEST_DESCRIPTOR_DIM}."
            )
        with np.errstate(over="ignore"):
            matrix = array.astype(np.float16).astype(np.float32)
        if not np.isfinite(matrix).all():
            raise SuperPointError(f"{source} is damaged: {ARRAY} holds values that are not finite in float16.")
        return cls(matrix, metadata[TARGET])
