"""What a matcher's .onnx or engine is: names of its inputs and outputs, and its description."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from superpoint_trt._version import __version__
from superpoint_trt.core.typed_json import JsonError, choice, integer, mapping, member, parse, real, text
from superpoint_trt.core.types import LARGEST_BATCH, LARGEST_DESCRIPTOR_DIM, Precision, SuperPointError

INPUTS = ("keypoints", "keypoint_scores", "descriptors", "count", "image_size")
"""Names of the inputs of each image, followed by 0 or 1: [B, N, 2], [B, N], [B, N, D], [B] int32, [B, 2] (width and
height); float32 but for `count`, the number of real rows, which come first."""

OUTPUTS = ("matches0", "scores0")
"""[B, N] int32 rows of the second image, -1 for none; [B, N] float32 probabilities, 0 for none."""

MOST_ROWS = 8192
"""The largest N that is accepted: a similarity of 8192 x 8192 points takes 256 MB."""

MIN_SCORE = 0.2
"""Least probability of a match, unless asked otherwise."""

METADATA_KEY = "superpoint_trt.matcher"
"""Metadata key of a description; other models do not have it."""

_MOST_CHARS = 1 << 16


@dataclass(frozen=True)
class MatcherDescription:
    """What a matcher's file is. Stored as metadata in every .onnx, and as the name of an engine's network."""

    descriptor_dim: int
    """D: numbers of a descriptor."""
    rows: int | None
    """N: points of each image, filled up; None: any number."""
    batch: int = 1
    layers: int = 6
    min_score: float = MIN_SCORE
    """Least probability of a match that the graph gives."""
    precision: Precision = Precision.FP32
    features_sha256: str | None = None
    """Of the extractor's checkpoint that the matcher learned from; None: unknown."""
    weights_sha256: str | None = None
    superpoint_trt_version: str = __version__

    def to_metadata(self) -> dict[str, str]:
        """The description as one JSON text, with the key `superpoint_trt.matcher`."""
        import json

        return {METADATA_KEY: json.dumps({**asdict(self), "precision": self.precision.value})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], source: object) -> MatcherDescription:
        """Reads what `to_metadata` wrote.

        Raises:
            SuperPointError: the metadata are of no matcher, or damaged.
        """
        if METADATA_KEY not in metadata:
            raise SuperPointError(
                f"{source} is not a matcher of this package: it has no metadata {METADATA_KEY}. Make one with: "
                "superpoint matcher export."
            )
        try:
            found = mapping(parse(metadata[METADATA_KEY], _MOST_CHARS), METADATA_KEY)

            def optional(key: str, read: Any) -> Any:
                return None if found.get(key) is None else read(found[key])

            return cls(
                descriptor_dim=integer(member(found, "descriptor_dim"), "descriptor_dim", 1, LARGEST_DESCRIPTOR_DIM),
                rows=optional("rows", lambda value: integer(value, "rows", 1, MOST_ROWS)),
                batch=integer(member(found, "batch"), "batch", 1, LARGEST_BATCH),
                layers=integer(member(found, "layers"), "layers", 1, 1000),
                min_score=real(member(found, "min_score"), "min_score", 0.0, 1.0),
                precision=choice(text(member(found, "precision"), "precision"), "precision", Precision),
                features_sha256=optional("features_sha256", lambda value: text(value, "features_sha256")),
                weights_sha256=optional("weights_sha256", lambda value: text(value, "weights_sha256")),
                superpoint_trt_version=text(member(found, "superpoint_trt_version"), "superpoint_trt_version"),
            )
        except JsonError as error:
            raise SuperPointError(f"the metadata of {source} cannot be read: {error}; export it again.") from error
