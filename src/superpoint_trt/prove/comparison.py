"""One image through a model and through its fp32 reference: what agrees, what does not, which known faults show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.image import Placement, load_image, to_gray
from superpoint_trt.core.types import (
    DecodeOptions,
    Float32,
    Keypoints,
    Matrix,
    ModelDescription,
    OutputType,
)
from superpoint_trt.match.nearest import match
from superpoint_trt.prove import known_faults
from superpoint_trt.prove.agreement import cosines, mutual_within, rank_correlation, within
from superpoint_trt.prove.known_faults import Finding
from superpoint_trt.prove.metrics import warp
from superpoint_trt.prove.references import Reference
from superpoint_trt.run import decode
from superpoint_trt.run.backends import Outputs
from superpoint_trt.run.extractor import SuperPoint

CORRECT_WITHIN_PX = 3.0
"""A match is right if it lies within this distance of its true place under the known homography."""

NOT_FINITE = float(np.finfo(np.float32).max)
"""Stands for an error that is not finite: the largest error there is. NaN would compare as smaller than any limit."""

SAMPLES_PER_IMAGE = 20_000
"""How many errors of each output are kept per image, for the percentiles over all images."""


@dataclass(frozen=True)
class Errors:
    """Absolute errors of one output."""

    max: float
    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, values: NDArray[np.floating]) -> Errors | None:
        """Summarizes errors; None without values."""
        if not values.size:
            return None
        p50, p99 = np.percentile(values, [50, 99])
        mean = values.mean(dtype=np.float64)  # float32 would overflow: NOT_FINITE is its largest number
        return cls(float(values.max()), float(mean), float(p50), float(p99))


def errors_to_json(outputs: Mapping[str, Errors | None]) -> dict[str, dict[str, float] | None]:
    """The errors of each output as plain data."""
    return {name: asdict(errors) if errors else None for name, errors in outputs.items()}


@dataclass
class ImageResult:
    """How far model and reference agree on one image."""

    name: str
    """The image's path below the folder that all images share."""
    reference_keypoints: int
    model_keypoints: int
    found_again: int
    """Reference points with a model point within 1 px."""
    found_back: int
    """Model points with a reference point within 1 px."""
    score_rank_correlation: float | None
    cosine_median: float | None
    cosine_p1: float | None
    """First percentile."""
    reference_matches: int
    """Right matches of the reference between the image and its warped copy."""
    model_matches: int
    """Right matches of the model between the image and its warped copy."""
    outputs: dict[str, Errors | None]
    findings: list[Finding]
    reference_xy: Float32 = field(repr=False)
    """(N, 2) in the image's pixels."""
    model_xy: Float32 = field(repr=False)
    """(M, 2) in the image's pixels."""
    path: Path = field(repr=False)
    cosines: Float32 = field(repr=False)
    """(P,) cosine of both descriptors at each point that both found."""
    score_errors: Float32 = field(repr=False)
    """(P,) absolute difference of both scores at each point that both found."""

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data, without the arrays."""
        return {
            "name": self.name,
            "reference_keypoints": self.reference_keypoints,
            "model_keypoints": self.model_keypoints,
            "found_again": self.found_again,
            "found_back": self.found_back,
            "score_rank_correlation": self.score_rank_correlation,
            "cosine_median": self.cosine_median,
            "cosine_p1": self.cosine_p1,
            "reference_matches": self.reference_matches,
            "model_matches": self.model_matches,
            "outputs": errors_to_json(self.outputs),
            "findings": [finding.to_json() for finding in self.findings],
        }


class Comparison:
    """Runs images through a model and its reference, and collects samples of the errors.

    Args:
        superpoint: the model.
        reference: its fp32 reference.

    Attributes:
        score_error_max: largest score error over all images so far; None before the first.
        proving_points: reference keypoints in images that are not blank. Those of a blank image prove nothing: on
            black a network sees only its own padding.
    """

    def __init__(self, superpoint: SuperPoint, reference: Reference) -> None:
        self._superpoint, self._reference = superpoint, reference
        self._samples: dict[str, list[NDArray[np.floating]]] = {}
        self.score_error_max: float | None = None
        self.proving_points = 0
        model = superpoint.description
        limit = superpoint.options.max_keypoints or model.max_keypoints
        self._options: DecodeOptions = replace(superpoint.options, max_keypoints=limit)
        self._decodes_in_graph = model.type is OutputType.KEYPOINTS

    def run(self, name: str, path: Path) -> ImageResult:
        """Compares model and reference on one image, and on a warped copy of it for the matches.

        Raises:
            SuperPointError: not an image, or a runtime failed.
        """
        gray = to_gray(load_image(path))
        view = self._view(gray)
        warped_gray, homography = known_faults.warped_copy(gray)
        warped = self._view(warped_gray)
        self.proving_points += len(view.expected) if np.ptp(gray) else 0
        errors = self._output_errors(view)
        pairs = mutual_within(view.expected.xy, view.found.xy)
        expected_scores, found_scores = view.expected.scores[pairs[:, 0]], view.found.scores[pairs[:, 1]]
        similar = cosines(view.expected, view.found, pairs)
        return ImageResult(
            name=name,
            reference_keypoints=len(view.expected),
            model_keypoints=len(view.found),
            found_again=int(within(view.expected.xy, view.found.xy).sum()),
            found_back=int(within(view.found.xy, view.expected.xy).sum()),
            score_rank_correlation=rank_correlation(expected_scores, found_scores),
            cosine_median=percentile(similar, 50),
            cosine_p1=percentile(similar, 1),
            reference_matches=_right_matches(view.expected, warped.expected, homography),
            model_matches=_right_matches(view.found, warped.found, homography),
            outputs={output: Errors.of(values) for output, values in errors.items()},
            findings=self._diagnose(view),
            reference_xy=view.expected.xy,
            model_xy=view.found.xy,
            path=path,
            cosines=similar,
            score_errors=np.abs(expected_scores - found_scores),
        )

    def outputs(self) -> dict[str, Errors | None]:
        """Errors of each output over all images, from the samples."""
        return {name: Errors.of(np.concatenate(parts)) for name, parts in self._samples.items()}

    def _view(self, gray: Float32) -> _View:
        prepared, placement = self._superpoint.prepare(gray)
        batch = prepared[None, None]
        outputs = self._superpoint.infer(batch)
        truth = self._reference(batch)
        (found,) = self._superpoint.decode(outputs, [placement])
        expected = _decode_reference(
            truth, placement, self._options, self._reference.description, self._decodes_in_graph
        )
        return _View(outputs, truth, found, expected, placement)

    def _output_errors(self, view: _View) -> dict[str, NDArray[np.floating]]:
        """Absolute errors of every output that both have; of a `keypoints` model, at the points that both found."""
        errors = _keypoint_errors(view) if self._decodes_in_graph else _map_errors(view)
        errors = {name: np.nan_to_num(e, nan=NOT_FINITE, posinf=NOT_FINITE) for name, e in errors.items()}
        if "scores" in errors and errors["scores"].size:
            self.score_error_max = max(self.score_error_max or 0.0, float(errors["scores"].max()))
        for name, values in errors.items():
            step = max(1, values.size // SAMPLES_PER_IMAGE)
            # A copy, because a slice would keep the whole map in memory.
            self._samples.setdefault(name, []).append(values.ravel()[::step].copy())
        return errors

    def _diagnose(self, view: _View) -> list[Finding]:
        broken = [name for name, values in view.outputs.items() if not np.isfinite(values).all()]
        if broken:
            return [Finding(known_faults.NOT_FINITE, f"{', '.join(broken)} hold values that are not finite")]
        # In pixels of the network's input, also where the image was shrunk, so that they index the reference's map.
        p = view.placement
        sides = (p.placed_width_px, p.placed_height_px)
        unscaled = Placement(*sides, *sides, p.input_width_px, p.input_height_px)
        (found,) = self._superpoint.decode(view.outputs, [unscaled])
        return known_faults.findings(
            known_faults.Evidence(
                found=found,
                scores=view.truth["scores"][0],
                descriptors=view.truth["descriptors"][0],
                sampling=self._reference.description.sampling,
                border_px=self._options.remove_borders_px,
                subpixel=bool(self._options.subpixel),
                in_graph=self._decodes_in_graph,
                raw_xy=view.raw_xy(),
            )
        )


@dataclass(frozen=True)
class _View:
    """One network input and what both networks make of it."""

    outputs: Outputs
    """The model's."""
    truth: Outputs
    """The reference's."""
    found: Keypoints
    """Decoded from `outputs`."""
    expected: Keypoints
    """Decoded from `truth`."""
    placement: Placement

    def raw_xy(self) -> Float32 | None:
        """(N, 2): all points that a `keypoints` model put out, without its padding rows; None for other types."""
        if "keypoints" not in self.outputs:
            return None
        rows: Float32 = self.outputs["keypoints"][0][self.outputs["scores"][0] > 0]
        return rows


def _keypoint_errors(view: _View) -> dict[str, NDArray[np.floating]]:
    """Of a `keypoints` model: (P,) distances in px and score errors, (P, D) descriptor errors."""
    a, b = mutual_within(view.expected.xy, view.found.xy).T
    return {
        "keypoints": np.linalg.norm(view.expected.xy[a] - view.found.xy[b], axis=1),
        "scores": np.abs(view.expected.scores[a] - view.found.scores[b]),
        "descriptors": np.abs(view.expected.descriptors[a] - view.found.descriptors[b]),
    }


def _map_errors(view: _View) -> dict[str, NDArray[np.floating]]:
    """Of a `dense` or `heads` model: errors of each map that both have."""
    common = [name for name in view.outputs if name in view.truth]
    errors: dict[str, NDArray[np.floating]] = {
        name: np.abs(view.outputs[name].astype(np.float32) - view.truth[name]) for name in common
    }
    if "logits" in view.outputs:  # a dense reference has scores but no logits
        errors["scores"] = np.abs(decode.scores_from_logits(view.outputs["logits"]) - view.truth["scores"])
    return errors


def _decode_reference(
    truth: Outputs, placement: Placement, options: DecodeOptions, reference: ModelDescription, in_graph: bool
) -> Keypoints:
    """Decodes the points that the model ought to find.

    A graph decodes its whole input, padding included, and points in the padding are dropped afterwards. Decoding
    outside the graph looks at the image alone.
    """
    score_map = truth["scores"][0]
    extent = np.array([placement.placed_width_px, placement.placed_height_px])
    xy, scores = decode.select(score_map if in_graph else score_map[: extent[1], : extent[0]], options)
    inside = decode.inside_border(xy, placement.placed_wh, options)
    xy, scores = xy[inside], scores[inside]
    sampled = decode.sample_descriptors(xy, truth["descriptors"][0], reference.stride_px, reference.sampling)
    size = (placement.image_width_px, placement.image_height_px)
    return Keypoints(placement.to_image(xy), scores, sampled, size)


def _right_matches(first: Keypoints, second: Keypoints, homography: Matrix) -> int:
    """Counts mutual nearest neighbors within `CORRECT_WITHIN_PX` of their true place."""
    rows = match(first.descriptors, second.descriptors).rows
    error = np.linalg.norm(warp(first.xy[rows[:, 0]], homography) - second.xy[rows[:, 1]], axis=1)
    return int((error <= CORRECT_WITHIN_PX).sum())


def percentile(values: Float32, percent: float) -> float | None:
    """A percentile; None without values."""
    return float(np.percentile(values, percent)) if len(values) else None
