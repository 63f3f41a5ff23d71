"""Evaluates relative poses of image pairs with known cameras: extract, match, essential matrix, area under the errors.

The error of a pair is the larger one of the rotation's angle and the angle between the translations' directions; pairs
without a pose count as infinitely wrong. The area under the share of pairs over the error, up to a limit and divided by
it, is that of Sarlin et al. 2020 (SuperGlue), section 5.2. The sign of a translation is not judged, as there.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, named
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import Keypoints, Matrix, SuperPointError
from superpoint_trt.match.learned import LearnedMatcher
from superpoint_trt.match.nearest import MatchOptions, match
from superpoint_trt.match.pose import relative_pose
from superpoint_trt.prove.posed_pairs import PosedPair, load_posed_pairs
from superpoint_trt.run.extractor import SuperPoint

LIMITS_DEG = (5, 10, 20)
RATIOS = (0.95, 0.9, 0.85, 0.8)
"""Ratio tests that are judged beside plain mutual neighbors."""

MOST_ORDERS = 1000

Matching = Callable[[Keypoints, Keypoints], NDArray[np.int64]]
"""Keypoints of both images -> (M, 2) rows."""


@dataclass(frozen=True)
class PoseOptions:
    """How poses are evaluated."""

    max_keypoints: int = 2048
    """Of each image, those with the highest scores."""
    max_side_px: int | None = None
    """Larger images are shrunk for the network; points come back in the file's pixels."""
    min_gap: int = 1
    """Pairs of a scene lie at least so many images apart."""
    threshold_px: float = 1.0
    """Of MAGSAC, in px of the files."""
    subpixel: bool | None = None
    """Keypoints between pixels, or on whole ones; None: the model's own default."""
    orders: int = 1
    """Each pose is estimated from so many orders of the matches, and the areas averaged: less luck."""

    def __post_init__(self) -> None:
        if not 1 <= self.orders <= MOST_ORDERS:
            raise SuperPointError(
                f"orders are {self.orders}; expected 1 to {MOST_ORDERS} (10 takes MAGSAC's luck out)."
            )


@dataclass(frozen=True)
class PoseResult:
    """One pair by one matcher."""

    first: str
    second: str
    rotation_error_deg: float | None
    """None: no pose was found."""
    translation_error_deg: float | None
    matches: int
    inliers: int
    further_errors_deg: tuple[float, ...] = ()
    """As `error_deg`, of further orders of the matches."""

    @property
    def error_deg(self) -> float:
        """The larger of both errors; infinite without a pose."""
        if self.rotation_error_deg is None or self.translation_error_deg is None:
            return float("inf")
        return max(self.rotation_error_deg, self.translation_error_deg)


@dataclass(frozen=True)
class MatcherPoses:
    """All pairs by one matcher."""

    matcher: str
    pairs: list[PoseResult]

    @property
    def pose_auc(self) -> dict[int, float]:
        """Limit in degrees -> area in [0, 1]."""
        orders = list(zip(*((pair.error_deg, *pair.further_errors_deg) for pair in self.pairs)))
        return {limit: float(np.mean([area_under_errors(e, limit) for e in orders])) for limit in LIMITS_DEG}

    def to_json(self) -> dict[str, Any]:
        """The pairs, and their total."""
        total = {
            "pairs": len(self.pairs),
            "pose_auc": {str(limit): area for limit, area in self.pose_auc.items()},
            "matches": float(np.mean([pair.matches for pair in self.pairs])),
            "inliers": float(np.mean([pair.inliers for pair in self.pairs])),
        }
        rows = [
            {
                **asdict(pair),
                "error_deg": _finite(pair.error_deg),
                "further_errors_deg": [_finite(error) for error in pair.further_errors_deg],
            }
            for pair in self.pairs
        ]
        return {"matcher": self.matcher, "pairs": rows, "total": total}


@dataclass
class PoseEvaluation:
    """One model on one scene, by several matchers; the one asked for comes first."""

    model: str
    runtime: str
    scene: str
    options: PoseOptions
    matchers: list[MatcherPoses]
    problems: list[str]
    """One line for each image that could not be used; its pairs are left out."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Wall time of `extract`, and of `match` and `pose` for all matchers."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain data: the first matcher's pairs and total, the others under "baselines" by name."""
        first, *others = self.matchers
        return {
            "model": self.model,
            "runtime": self.runtime,
            "scene": self.scene,
            "options": asdict(self.options),
            **first.to_json(),
            "baselines": {other.matcher: other.to_json() for other in others},
            "problems": self.problems,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def evaluate_poses(
    model: PathLike,
    scene: PathLike,
    options: PoseOptions | None = None,
    matcher: PathLike | None = None,
    min_score: float | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> PoseEvaluation:
    """Estimates the relative pose of each pair, by every matcher.

    Args:
        model: a model file.
        scene: a folder or list, as `load_posed_pairs` reads it.
        options: which pairs and points.
        matcher: file of a learned matcher; None: nearest neighbors alone.
        min_score: of the learned matcher.
        device: where the model and the matcher run.
        threads: CPU threads.
        progress: called with (images and pairs done, all of them).

    Raises:
        SuperPointError: no usable model, scene or matcher, or no readable pair.
    """
    options = options or PoseOptions()
    pairs = load_posed_pairs(scene, options.min_gap)
    paths = list(dict.fromkeys(path for pair in pairs for path in (pair.first, pair.second)))
    steps = Steps(len(paths) + len(pairs), progress)
    settings: dict[str, Any] = {"max_keypoints": options.max_keypoints, "max_side_px": options.max_side_px}
    opened = LearnedMatcher(matcher, device, threads, min_score) if matcher is not None else nullcontext()
    with opened as learned:
        found: dict[Path, Keypoints] = {}
        problems: list[str] = []
        seconds: dict[str, float] = defaultdict(float)
        with SuperPoint(model, device=device, threads=threads, subpixel=options.subpixel, **settings) as superpoint:
            runtime = str(superpoint.runtime)
            checkpoint = superpoint.description.features_sha256
            for path in paths:
                started = time.perf_counter()
                try:
                    found[path] = superpoint.extract(path)
                except SuperPointError as error:
                    problems.append(named(error, path))
                seconds["extract"] += time.perf_counter() - started
                steps.advance()
        ways = _matchings(learned)
        results: dict[str, list[PoseResult]] = {name: [] for name in ways}
        for pair in pairs:
            if pair.first in found and pair.second in found:
                for name, matching in ways.items():
                    results[name].append(_judge(pair, found, matching, options, seconds))
            steps.advance()
        if learned:
            another = ", of another network" if learned.is_of_another(checkpoint) else ""
            runtime += f"; matcher: {learned.runs_on}{another}"
    if not any(results.values()):
        raise SuperPointError(f"{scene} holds no readable pair: {problems[0]}")
    rows = [MatcherPoses(name, list_of) for name, list_of in results.items()]
    return PoseEvaluation(str(model), runtime, str(scene), options, rows, problems, seconds)


def _matchings(learned: LearnedMatcher | None) -> dict[str, Matching]:
    """Name -> matcher: the learned one, if any, then nearest neighbors without and with ratio tests."""
    ways: dict[str, Matching] = {}
    if learned is not None:
        ways["learned"] = lambda first, second: learned.match(first, second).rows
    for ratio in (None, *RATIOS):
        name = "nearest" if ratio is None else f"nearest, ratio {ratio:g}"
        ways[name] = _nearest(MatchOptions(max_ratio=ratio))
    return ways


def _nearest(options: MatchOptions) -> Matching:
    return lambda first, second: match(first.descriptors, second.descriptors, options).rows


def _judge(
    pair: PosedPair, found: dict[Path, Keypoints], matching: Matching, options: PoseOptions, seconds: dict[str, float]
) -> PoseResult:
    first, second = found[pair.first], found[pair.second]
    started = time.perf_counter()
    rows = matching(first, second)
    matched = time.perf_counter()
    xy = first.xy[rows[:, 0]], second.xy[rows[:, 1]]
    results = []
    for order in range(options.orders):
        pose = relative_pose(*xy, pair.first_intrinsics, pair.second_intrinsics, options.threshold_px, order)
        errors: tuple[float | None, float | None] = (None, None)
        if pose.rotation is not None and pose.translation is not None:
            turned = rotation_error_deg(pose.rotation, pair.rotation)
            errors = turned, direction_error_deg(pose.translation, pair.translation)
        results.append(PoseResult(pair.first.name, pair.second.name, *errors, len(rows), int(pose.inliers.sum())))
    seconds["match"] += matched - started
    seconds["pose"] += time.perf_counter() - matched
    return replace(results[0], further_errors_deg=tuple(result.error_deg for result in results[1:]))


def rotation_error_deg(found: Matrix, true: Matrix) -> float:
    """Angle of the rotation from one to the other."""
    cosine = (np.trace(found.T @ true) - 1) / 2
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def direction_error_deg(found: NDArray[np.float64], true: NDArray[np.float64]) -> float:
    """Angle between two lines, 0 to 90: an essential matrix does not tell a translation's sign."""
    norm = np.linalg.norm(found) * np.linalg.norm(true)
    if norm == 0:
        return 90.0
    return float(np.degrees(np.arccos(np.clip(abs(found @ true) / norm, 0, 1))))


def area_under_errors(errors: Sequence[float], limit: float) -> float:
    """Area under the share of pairs with at most an error, from 0 to the limit, over the limit.

    Args:
        errors: one for each pair, infinite where there is no result.
        limit: largest error that counts.

    Returns:
        In [0, 1]; 1 if all errors are 0.
    """
    if not errors:
        return 0.0
    ordered = np.sort(np.asarray(errors, dtype=np.float64))
    shares = np.arange(1, len(ordered) + 1) / len(ordered)
    x, y = np.concatenate([[0.0], ordered]), np.concatenate([[0.0], shares])
    inside = np.searchsorted(x, limit)
    x, y = np.append(x[:inside], limit), np.append(y[:inside], y[inside - 1])
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / limit)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
