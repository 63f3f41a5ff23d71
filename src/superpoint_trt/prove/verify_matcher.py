"""Compares a converted matcher with its weights in PyTorch, on the keypoints of real images."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from superpoint_trt import packaged
from superpoint_trt.checkpoint.matcher import load_matcher, save_matcher
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.image import find_images, load_image, to_gray
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import Keypoints, Precision, SuperPointError
from superpoint_trt.match.learned import LearnedMatcher
from superpoint_trt.run.extractor import SuperPoint

SAME_SHARE = {Precision.FP32: 0.999, Precision.FP16: 0.97}
"""Least share of all matches, of either, that are in both."""

SCORE_ERROR = {Precision.FP32: 1e-3, Precision.FP16: 0.1}
"""Largest difference of the scores of a match that is in both."""

MAX_KEYPOINTS = 1024


@dataclass(frozen=True)
class MatcherVerification:
    """What was found."""

    model: str
    runs_on: str
    precision: str
    pairs: int
    reference_matches: int
    model_matches: int
    same_share: float
    """Matches in both, as a share of those in either; 1 if there are none."""
    same_limit: float
    score_error: float
    score_limit: float

    @property
    def passed(self) -> bool:
        """Whether both figures are within their limits."""
        return self.same_share >= self.same_limit and self.score_error <= self.score_limit

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        return {"passed": self.passed, **asdict(self)}


def verify_matcher(
    model: PathLike,
    weights: PathLike,
    images: PathLike,
    limit: int = 16,
    features: PathLike = packaged.DEFAULT,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> MatcherVerification:
    """Matches each image with itself seen a little differently, and with the next one, by both.

    Args:
        model: .onnx or engine.
        weights: safetensors that it was made of.
        images: folder of real images.
        limit: use so many.
        features: the network that finds the points: a model, or the name of a packaged one.
        device: where the model runs; the reference runs on the CPU.
        threads: CPU threads of the model.
        progress: called with (images done, images in all).

    Raises:
        SuperPointError: files do not fit each other, or there is no readable image.
    """
    import tempfile
    from pathlib import Path

    paths = find_images(images)[:limit]
    steps = Steps(len(paths), progress)
    read = load_matcher(weights)
    with LearnedMatcher(model, device, threads) as matcher, tempfile.TemporaryDirectory() as folder:
        known = matcher.description
        # The reference is cut to the model's layers; its descriptors' length is the first that it takes.
        cut = read.with_layers(known.layers)
        if read.shape.descriptor_dims[0] != known.descriptor_dim:
            raise SuperPointError(
                f"{model} takes descriptors of {known.descriptor_dim} numbers; only models of the first length, "
                f"{read.shape.descriptor_dims[0]}, are verified."
            )
        reference = save_matcher(cut, Path(folder) / "reference.safetensors", half=False)
        with LearnedMatcher(reference, "cpu", min_score=known.min_score) as expected:
            tally = _Tally()
            most = known.rows or MAX_KEYPOINTS
            with SuperPoint(features, device=device, threads=threads, max_keypoints=most) as superpoint:
                found = superpoint.description.descriptor_dim
                if found != known.descriptor_dim:
                    raise SuperPointError(
                        f"descriptors of {features} have {found} numbers; {model} takes {known.descriptor_dim}: name "
                        "its network with --features."
                    )
                before: Keypoints | None = None
                for path in paths:
                    gray = to_gray(load_image(path))
                    here = superpoint.extract(gray)
                    tally.add(expected, matcher, here, superpoint.extract(np.ascontiguousarray(gray[:, ::-1][::-1])))
                    tally.add(expected, matcher, here, superpoint.extract(np.ascontiguousarray(gray[8:, 8:])))
                    if before is not None:
                        tally.add(expected, matcher, before, here)
                    before = here
                    steps.advance()
    return MatcherVerification(
        model=str(model),
        runs_on=matcher.runs_on,
        precision=known.precision.value,
        pairs=tally.pairs,
        reference_matches=tally.expected,
        model_matches=tally.found,
        same_share=tally.same / max(tally.expected + tally.found - tally.same, 1) if tally.expected else 1.0,
        same_limit=SAME_SHARE[known.precision],
        score_error=tally.error,
        score_limit=SCORE_ERROR[known.precision],
    )


@dataclass
class _Tally:
    pairs: int = 0
    expected: int = 0
    found: int = 0
    same: int = 0
    error: float = 0.0

    def add(self, reference: LearnedMatcher, model: LearnedMatcher, first: Keypoints, second: Keypoints) -> None:
        """Matches one pair by both and compares."""
        rows = [
            {(int(i), int(j)): float(score) for (i, j), score in zip(found.rows, found.scores)}
            for found in (matcher.match(first, second) for matcher in (reference, model))
        ]
        both = rows[0].keys() & rows[1].keys()
        self.pairs += 1
        self.expected += len(rows[0])
        self.found += len(rows[1])
        self.same += len(both)
        self.error = max([self.error, *(abs(rows[0][key] - rows[1][key]) for key in both)])
