"""Evaluates keypoints and descriptors on image pairs with known homographies: extract, match, score, summarize."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Callable

import numpy as np

from superpoint_trt.core.files import PathLike, named
from superpoint_trt.core.image import load_image, to_gray
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import Keypoints, Matrix, OutputType, SuperPointError
from superpoint_trt.match.learned import LearnedMatcher
from superpoint_trt.prove import metrics
from superpoint_trt.prove.datasets import Pair, load_pairs
from superpoint_trt.prove.opencv_features import DETECTORS, Extractor, opencv_extractor, opencv_version
from superpoint_trt.prove.protocol import Protocol, resize_to_protocol
from superpoint_trt.prove.worst_pairs import JudgedPair, WorstPairs
from superpoint_trt.run.extractor import SuperPoint

NEAREST = "nearest"
"""Mutual nearest neighbors."""

BASELINES = ("sift", "orb")
"""The detectors of `prove.opencv_features` that the command sets beside a model."""


@dataclass(frozen=True)
class PairResult:
    """One pair's figures; None where a figure is not defined."""

    pair: Pair
    repeatability: float | None
    localization_error_px: float | None
    mma: list[float]
    """Matching accuracy at each distance of `Protocol.mma_px`."""
    homography_errors_px: list[float]
    """One for each order of the matches."""
    matching_score: float
    nn_map: float
    matches: int
    """Of the best points of both images, as matching accuracy counts them."""
    right_matches: int
    """Matches within `Protocol.matching_px`."""


@dataclass(frozen=True)
class Summary:
    """The mean figures of several pairs; None where a figure is defined for none of them."""

    pairs: int
    repeatability: float | None
    localization_error_px: float | None
    mma: Mapping[int, float]
    """Distance in px -> mean matching accuracy."""
    homography: Mapping[int, float]
    """Corner error in px -> share of the homographies that are at least so good."""
    matching_score: float | None
    nn_map: float | None
    matches: float | None = None
    """Mean number of matches of a pair."""
    right_matches: float | None = None

    def to_json(self) -> dict[str, Any]:
        """One row of the report."""
        return {
            "pairs": self.pairs,
            "repeatability": self.repeatability,
            "localisation_error_px": self.localization_error_px,
            "mma": {str(px): share for px, share in self.mma.items()},
            "homography": {str(px): share for px, share in self.homography.items()},
            "matching_score": self.matching_score,
            "nn_map": self.nn_map,
            "matches": self.matches,
            "right_matches": self.right_matches,
        }


@dataclass
class Evaluation:
    """One model on one dataset."""

    model: str
    runtime: str
    protocol: Protocol
    pairs: list[PairResult]
    problems: list[str]
    """One line for each image, file or homography that could not be used."""
    matcher: str = NEAREST
    """What matched the points. Matching score and NN mAP are always those of nearest neighbors."""
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Wall time of `read`, of `extract` (with the network in it), and of `match` (matching and scoring)."""

    @property
    def name(self) -> str:
        """The model, and the matcher if it is not nearest neighbors."""
        return self.model if self.matcher == NEAREST else f"{self.model}, {self.matcher}"

    @property
    def sequences(self) -> dict[str, Summary]:
        """A summary of each sequence, by name."""
        return self._grouped(lambda pair: pair.sequence)

    @property
    def kinds(self) -> dict[str, Summary]:
        """A summary of each kind of sequence: illumination, viewpoint, other."""
        return self._grouped(lambda pair: pair.kind)

    @property
    def total(self) -> Summary:
        """The summary of all pairs."""
        return self._summarize(self.pairs)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data: model, protocol, sequences, kinds, total, problems, seconds."""
        return {
            "model": self.model,
            "runtime": self.runtime,
            "matcher": self.matcher,
            "protocol": self.protocol.to_json(),
            "sequences": {name: summary.to_json() for name, summary in self.sequences.items()},
            "kinds": {name: summary.to_json() for name, summary in self.kinds.items()},
            "total": self.total.to_json(),
            "problems": self.problems,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def _grouped(self, key: Callable[[Pair], str]) -> dict[str, Summary]:
        groups: dict[str, list[PairResult]] = {}
        for result in self.pairs:
            groups.setdefault(key(result.pair), []).append(result)
        return {name: self._summarize(group) for name, group in sorted(groups.items())}

    def _summarize(self, results: list[PairResult]) -> Summary:
        errors = np.array([result.homography_errors_px for result in results])
        accuracy = np.array([result.mma for result in results])
        return Summary(
            pairs=len(results),
            repeatability=_mean(result.repeatability for result in results),
            localization_error_px=_mean(result.localization_error_px for result in results),
            mma={px: float(accuracy[:, i].mean()) for i, px in enumerate(self.protocol.mma_px)},
            homography={px: float((errors <= px).mean()) for px in self.protocol.homography_px},
            matching_score=_mean(result.matching_score for result in results),
            nn_map=_mean(result.nn_map for result in results),
            matches=_mean(result.matches for result in results),
            right_matches=_mean(result.right_matches for result in results),
        )


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def report_with_baselines(evaluation: Evaluation, *baselines: Evaluation) -> dict[str, Any]:
    """The report of one model as plain data; those of other models, if any, under "baselines" by name.

    The same model with another matcher is named by the matcher.
    """
    report = evaluation.to_json()
    if baselines:
        report["baselines"] = {_name_beside(evaluation, baseline): baseline.to_json() for baseline in baselines}
    return report


def _name_beside(evaluation: Evaluation, baseline: Evaluation) -> str:
    if baseline.matcher == evaluation.matcher:
        return baseline.model
    if baseline.model in DETECTORS:
        return baseline.model
    return baseline.matcher if baseline.model == evaluation.model else f"{baseline.model}, {baseline.matcher}"


def evaluate(
    model: PathLike,
    dataset: PathLike,
    protocol: Protocol | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    allow_host_code: bool = False,
    worst: WorstPairs | None = None,
    matcher: LearnedMatcher | None = None,
) -> Evaluation:
    """Runs a model, or OpenCV's SIFT, RootSIFT or ORB, over a dataset.

    Args:
        model: a model file, "sift", "rootsift" or "orb".
        dataset: folder of sequences, as `load_pairs` reads it.
        protocol: sizes, counts, thresholds.
        device: where a model file runs, as `SuperPoint` takes it.
        threads: CPU threads of a model file.
        progress: called with (images and pairs done, all of them).
        allow_host_code: run the code that a version-compatible engine carries.
        worst: is told of each pair, and keeps those with the worst homography.
        matcher: a learned one, in the place of mutual nearest neighbors.

    Raises:
        SuperPointError: no usable model or pair. A single bad image, file or homography is listed in `problems`.
    """
    protocol = protocol or Protocol()
    found = load_pairs(dataset)
    paths = list(dict.fromkeys(path for pair in found.pairs for path in (pair.first, pair.second)))
    steps = Steps(2 * len(paths) + len(found.pairs), progress)
    detector = _Stage(protocol.detector_size_hw, protocol.detector_nms_radius_px, keeps_descriptors=False)
    descriptor = _Stage(protocol.descriptor_size_hw, protocol.descriptor_nms_radius_px, keeps_descriptors=True)
    with ExitStack() as stack:
        open_model = partial(SuperPoint, model, device=device, threads=threads, allow_host_code=allow_host_code)
        opened = _open(model, open_model, protocol, detector, stack)
        evaluation = Evaluation(str(model), opened.runtime, protocol, [], found.problems)
        matching: metrics.Matching = metrics.mutual_neighbors
        if matcher is not None:
            evaluation.matcher = "learned"
            another = ", of another network" if matcher.is_of_another(opened.features_sha256) else ""
            evaluation.runtime += f"; matcher: {matcher.runs_on}{another}"
            matching = _rows_of(matcher)
        # The second model is opened after the first stage: the idle threads of two sessions would slow each other.
        detected = _extract(opened.extract, paths, detector, evaluation, steps)
        opened = _open(model, open_model, protocol, descriptor, stack)
        described = _extract(opened.extract, paths, descriptor, evaluation, steps)
    for pair in found.pairs:
        if all(path in views for path in (pair.first, pair.second) for views in (detected, described)):
            started = time.perf_counter()
            result = _score(pair, _views(pair, detected), _views(pair, described), protocol, matching)
            evaluation.seconds["match"] += time.perf_counter() - started
            evaluation.pairs.append(result)
            if worst is not None and worst.wants(result):
                worst.add(_judged(result, _views(pair, described), protocol, matching))
        steps.advance()
    if not evaluation.pairs:
        raise SuperPointError(f"{dataset} holds no readable pair: {evaluation.problems[0]}")
    return evaluation


@dataclass(frozen=True)
class _Stage:
    """One of the protocol's two passes over all images: for the detector's figures, and for the descriptors'."""

    size_hw: tuple[int, int]
    nms_radius_px: int
    keeps_descriptors: bool


@dataclass(frozen=True)
class _Opened:
    """A model ready to extract."""

    extract: Extractor
    runtime: str
    """What it runs on, and what it decides itself."""
    features_sha256: str | None = None
    """Of the checkpoint whose descriptors the model has, if it is known."""


def _open(
    model: PathLike, open_model: Callable[..., SuperPoint], protocol: Protocol, stage: _Stage, stack: ExitStack
) -> _Opened:
    """Opens a model file by `open_model`, or OpenCV's detector of that name; the stack closes it."""
    if str(model) in DETECTORS:
        return _Opened(opencv_extractor(str(model), protocol.descriptor_keypoints), f"{opencv_version()}, cpu")
    superpoint = open_model(subpixel=protocol.subpixel)
    if superpoint.description.type is OutputType.KEYPOINTS:
        stack.enter_context(superpoint)
        options = superpoint.options
        own = f"NMS radius {options.nms_radius_px} px, threshold {options.threshold:g}"
        where = f"{superpoint.runtime}; decoded in its graph: {own} instead of the protocol's"
        return _Opened(superpoint.extract, where, superpoint.description.features_sha256)
    superpoint.close()  # its type is known only now, and a keypoints model does not take the options below
    superpoint = open_model(threshold=protocol.threshold, nms_radius_px=stage.nms_radius_px, subpixel=protocol.subpixel)
    stack.enter_context(superpoint)
    places = "sub-pixel" if superpoint.options.subpixel else "whole pixels"
    return _Opened(superpoint.extract, f"{superpoint.runtime}; {places}", superpoint.description.features_sha256)


@dataclass(frozen=True)
class _View:
    """An image as one stage sees it."""

    keypoints: Keypoints
    to_view: Matrix
    """(3, 3): pixels of the file to pixels of the resized image."""


def _extract(
    extract: Extractor, paths: Iterable[Path], stage: _Stage, evaluation: Evaluation, steps: Steps
) -> dict[Path, _View]:
    """Extracts all readable images at a stage's size; lists the others once in the evaluation's problems."""
    views = {}
    for path in paths:
        started = time.perf_counter()
        try:
            gray, to_view = resize_to_protocol(to_gray(load_image(path)), stage.size_hw, evaluation.protocol.resize)
            read = time.perf_counter()
            found = extract(gray)
            views[path] = _View(found if stage.keeps_descriptors else _without_descriptors(found), to_view)
            evaluation.seconds["read"] += read - started
            evaluation.seconds["extract"] += time.perf_counter() - read
        except SuperPointError as error:
            problem = named(error, path)
            if problem not in evaluation.problems:
                evaluation.problems.append(problem)
        steps.advance()
    return views


def _without_descriptors(keypoints: Keypoints) -> Keypoints:
    """Saves the memory of a dataset's descriptors, which the detector's figures do not need."""
    return replace(keypoints, descriptors=np.zeros((len(keypoints), 0), np.float32))


@dataclass(frozen=True)
class _PairViews:
    """Both images of a pair at one stage's size."""

    first: Keypoints
    second: Keypoints
    homography: Matrix
    """(3, 3): pixels of the first resized image to pixels of the second."""


def _views(pair: Pair, views: Mapping[Path, _View]) -> _PairViews:
    first, second = views[pair.first], views[pair.second]
    homography = second.to_view @ pair.homography @ np.linalg.inv(first.to_view)
    return _PairViews(first.keypoints, second.keypoints, homography)


def _judged(result: PairResult, views: _PairViews, protocol: Protocol, matching: metrics.Matching) -> JudgedPair:
    """The pair with the points that its homography was estimated from, and their matches."""
    there, count = views.homography, protocol.descriptor_keypoints
    first = metrics.shared(views.first, there, views.second.image_size, count)
    second = metrics.shared(views.second, np.linalg.inv(there), views.first.image_size, count)
    return JudgedPair(result, first, second, there, matching(first, second))


def _rows_of(matcher: LearnedMatcher) -> metrics.Matching:
    return lambda first, second: matcher.match(first, second).rows


def _score(
    pair: Pair, detected: _PairViews, described: _PairViews, protocol: Protocol, matching: metrics.Matching
) -> PairResult:
    again = metrics.repeatability(
        detected.first,
        detected.second,
        detected.homography,
        protocol.detector_keypoints,
        protocol.repeatability_px,
    )
    count, pixels = protocol.descriptor_keypoints, protocol.matching_px
    views = (described.first, described.second, described.homography)
    errors = metrics.match_errors_px(views[0].top(count), views[1].top(count), views[2], matching)
    return PairResult(
        pair=pair,
        repeatability=again.share,
        localization_error_px=again.localization_error_px,
        mma=metrics.accuracy_of(errors, protocol.mma_px),
        homography_errors_px=[
            metrics.homography_error_px(*views, count, protocol.estimator, protocol.ransac_px, order, matching)
            for order in range(protocol.ransac_orders)
        ],
        matching_score=metrics.matching_score(*views, count, pixels),
        nn_map=metrics.nn_average_precision(*views, count, pixels),
        matches=len(errors),
        right_matches=int((errors <= pixels).sum()),
    )
