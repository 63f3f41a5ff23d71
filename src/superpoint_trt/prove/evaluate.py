"""Keypoints and descriptors on image pairs with known homographies: extract, match, score, summarise."""

from __future__ import annotations

import enum
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Union

import cv2
import numpy as np

from superpoint_trt.core import image as images
from superpoint_trt.core.files import PathLike, named
from superpoint_trt.core.progress import Progress, Steps
from superpoint_trt.core.types import Float32, Keypoints, Matrix, OutputType, SuperPointError
from superpoint_trt.match.geometry import Estimator
from superpoint_trt.prove import metrics
from superpoint_trt.prove.datasets import Pair, load_pairs
from superpoint_trt.run.decode import normalize
from superpoint_trt.run.extractor import SuperPoint


class Resize(str, enum.Enum):
    """How images come to one size before extraction."""

    CROP = "crop"
    """Cover the size, proportions kept, and cut the middle out: the MIT reference's rule."""
    FIT = "fit"
    """Shrink to fit into the size, proportions kept."""
    NONE = "none"
    """As they are."""


LARGEST_SIDE_PX = 8192
MOST_ORDERS = 1000


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how. The defaults are those of the table that rpautrat/SuperPoint publishes.

    Sources: its magic-point_repeatability.yaml and superpoint_hpatches.yaml for sizes, NMS and threshold, its
    evaluations/ for the rest.
    """

    resize: Resize = Resize.CROP
    detector_size_hw: tuple[int, int] = (240, 320)
    """For repeatability and localisation."""
    detector_nms_radius_px: int = 4
    detector_keypoints: int = 300
    repeatability_px: float = 3.0
    descriptor_size_hw: tuple[int, int] = (480, 640)
    """For everything that matches."""
    descriptor_nms_radius_px: int = 8
    descriptor_keypoints: int = 1000
    matching_px: float = 3.0
    """Of matching score and NN mAP."""
    threshold: float = 0.001
    """Detection threshold."""
    homography_px: tuple[int, ...] = (1, 3, 5)
    mma_px: tuple[int, ...] = tuple(range(1, 11))
    estimator: Estimator = Estimator.RANSAC
    ransac_px: float = 3.0
    ransac_orders: int = 1
    """Homographies are estimated from so many orders of the matches, and their correctness averaged: less luck."""

    def __post_init__(self) -> None:
        for side in (*self.detector_size_hw, *self.descriptor_size_hw):
            if not images.SMALLEST_SIDE_PX <= side <= LARGEST_SIDE_PX:
                raise SuperPointError(
                    f"a size to evaluate at has a side of {side} px; "
                    f"expected {images.SMALLEST_SIDE_PX} to {LARGEST_SIDE_PX}."
                )
        if not 1 <= self.ransac_orders <= MOST_ORDERS:
            raise SuperPointError(
                f"{self.ransac_orders} orders of the matches were asked for; expected 1 to {MOST_ORDERS}."
            )
        for name, value in (("matching distance", self.matching_px), ("inlier distance", self.ransac_px)):
            if not 0 < value < np.inf:
                raise SuperPointError(f"{name} is {value} px; expected more than 0.")


Extractor = Callable[[Float32], Keypoints]
"""(H, W) float32 in [0, 1] -> keypoints by falling score."""

Source = Union[PathLike, str]
"""A model file, or the name of an OpenCV detector."""

BASELINES = ("sift", "orb")


@dataclass
class PairResult:
    """One pair's figures; None where a figure is not defined."""

    pair: Pair
    repeatability: float | None
    localisation_error_px: float | None
    mma: list[float]
    homography_errors_px: list[float]
    """One for each order of the matches."""
    matching_score: float
    nn_map: float


@dataclass
class Evaluation:
    """One model on one dataset."""

    model: str
    runtime: str
    protocol: Protocol
    pairs: list[PairResult]
    problems: list[str]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Wall time of `extract` (with the network in it), `match` (matching and scoring) and `read`."""

    def to_json(self) -> dict[str, Any]:
        """The report: model, protocol, sequences, kinds, total, problems, seconds."""
        return {
            "model": self.model,
            "runtime": self.runtime,
            "protocol": asdict(self.protocol),
            "sequences": self._grouped(lambda pair: pair.sequence),
            "kinds": self._grouped(lambda pair: pair.kind),
            "total": self._summary(self.pairs),
            "problems": self.problems,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def _grouped(self, key: Callable[[Pair], str]) -> dict[str, Any]:
        groups: dict[str, list[PairResult]] = {}
        for result in self.pairs:
            groups.setdefault(key(result.pair), []).append(result)
        return {name: self._summary(group) for name, group in sorted(groups.items())}

    def _summary(self, results: list[PairResult]) -> dict[str, Any]:
        errors = np.array([result.homography_errors_px for result in results])
        accuracy = np.array([result.mma for result in results])
        return {
            "pairs": len(results),
            "repeatability": _mean(result.repeatability for result in results),
            "localisation_error_px": _mean(result.localisation_error_px for result in results),
            "mma": {str(px): float(accuracy[:, i].mean()) for i, px in enumerate(self.protocol.mma_px)},
            "homography": {str(px): float((errors <= px).mean()) for px in self.protocol.homography_px},
            "matching_score": _mean(result.matching_score for result in results),
            "nn_map": _mean(result.nn_map for result in results),
        }


def evaluate(
    model: Source,
    dataset: PathLike,
    protocol: Protocol | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Runs a model, or OpenCV's SIFT or ORB, over a dataset.

    Args:
        model: a model file, "sift" or "orb".
        dataset: folder of sequences (datasets.load_pairs).
        protocol: sizes, counts, thresholds.
        device: for model files, as SuperPoint takes it.
        threads: likewise.
        progress: called with (images and pairs done, in all).

    Raises:
        SuperPointError: no usable model or pair. A single bad image, file or homography is noted in `problems`.
    """
    protocol = protocol or Protocol()
    found = load_pairs(dataset)
    paths = list(dict.fromkeys(path for pair in found.pairs for path in (pair.first, pair.second)))
    steps = Steps(2 * len(paths) + len(found.pairs), progress)
    with ExitStack() as stack:
        detector = _Run(protocol, protocol.detector_size_hw, protocol.detector_nms_radius_px)
        descriptor = _Run(protocol, protocol.descriptor_size_hw, protocol.descriptor_nms_radius_px)
        evaluation = Evaluation(str(model), detector.open(model, device, threads, stack), protocol, [], found.problems)
        # One stage after the other: sessions side by side would spin at each other's cost.
        detected = detector.extract(paths, evaluation, steps, descriptors=False)
        descriptor.open(model, device, threads, stack)
        described = descriptor.extract(paths, evaluation, steps)
    for pair in found.pairs:
        if all(path in views for path in (pair.first, pair.second) for views in (detected, described)):
            started = time.perf_counter()
            result = _score(pair, _views(pair, detected), _views(pair, described), protocol)
            evaluation.seconds["match"] += time.perf_counter() - started
            evaluation.pairs.append(result)
        steps.advance()
    if not evaluation.pairs:
        raise SuperPointError(f"{dataset} holds no readable pair: {evaluation.problems[0]}")
    return evaluation


@dataclass(frozen=True)
class _View:
    """An image as it was evaluated."""

    keypoints: Keypoints
    to_view: Matrix
    """(3, 3): pixels of the file to pixels of the resized image."""


class _Run:
    """Extraction of every image at one size."""

    def __init__(self, protocol: Protocol, size_hw: tuple[int, int], nms_radius_px: int) -> None:
        self._protocol = protocol
        self._size_hw = size_hw
        self._nms_radius_px = nms_radius_px
        self._extractor: Extractor | None = None

    def open(self, model: Source, device: str, threads: int | None, stack: ExitStack) -> str:
        """Opens the model, and says what it runs on."""
        if str(model) in BASELINES:
            self._extractor = _opencv(str(model), self._protocol.descriptor_keypoints)
            return f"OpenCV {cv2.__version__}, cpu"
        superpoint = stack.enter_context(_superpoint(model, self._protocol, self._nms_radius_px, device, threads))
        self._extractor = superpoint.extract
        if superpoint.description.type is not OutputType.KEYPOINTS:
            return str(superpoint.runtime)
        options = superpoint.options
        own = f"NMS radius {options.nms_radius_px} px, threshold {options.threshold:g}"
        return f"{superpoint.runtime}; decoded in its graph: {own} instead of the protocol's"

    def extract(
        self, paths: list[Path], evaluation: Evaluation, steps: Steps, descriptors: bool = True
    ) -> dict[Path, _View]:
        """The views of all readable images, without descriptors where nothing reads them; the rest is noted once."""
        assert self._extractor is not None
        views = {}
        for path in paths:
            started = time.perf_counter()
            try:
                gray, to_view = _resize(images.to_gray(images.load_image(path)), self._size_hw, self._protocol.resize)
                read = time.perf_counter()
                found = self._extractor(gray)
                views[path] = _View(found if descriptors else _points_only(found), to_view)
                evaluation.seconds["read"] += read - started
                evaluation.seconds["extract"] += time.perf_counter() - read
            except SuperPointError as error:
                problem = named(error, path)
                if problem not in evaluation.problems:
                    evaluation.problems.append(problem)
            steps.advance()
        return views


def _points_only(keypoints: Keypoints) -> Keypoints:
    return replace(keypoints, descriptors=np.zeros((len(keypoints), 0), np.float32))


def _superpoint(model: Source, protocol: Protocol, nms_radius_px: int, device: str, threads: int | None) -> SuperPoint:
    superpoint = SuperPoint(model, device=device, threads=threads)
    if superpoint.description.type is OutputType.KEYPOINTS:
        return superpoint  # its radius, threshold and number are in the graph
    superpoint.close()
    return SuperPoint(model, threshold=protocol.threshold, nms_radius_px=nms_radius_px, device=device, threads=threads)


def _opencv(name: str, count: int) -> Extractor:
    """SIFT (128 floats) or ORB (256 bits as 0 and 1, whose squared L2 distance is the Hamming distance)."""
    detector = cv2.SIFT.create(nfeatures=count) if name == "sift" else cv2.ORB.create(nfeatures=count)

    def extract(gray: Float32) -> Keypoints:
        points, descriptors = detector.detectAndCompute(np.round(gray * 255).astype(np.uint8), None)
        size = (gray.shape[1], gray.shape[0])
        if descriptors is None or not len(points):
            return Keypoints(
                np.zeros((0, 2), np.float32),
                np.zeros(0, np.float32),
                np.zeros((0, 256 if name == "orb" else 128), np.float32),
                size,
            )
        if name == "orb":
            descriptors = np.unpackbits(np.asarray(descriptors, dtype=np.uint8), axis=1)
        scores = np.array([point.response for point in points], np.float32)
        order = np.argsort(-scores, kind="stable")
        xy = np.array([point.pt for point in points], np.float32)[order]
        described = descriptors[order].astype(np.float32)
        return Keypoints(xy, scores[order], described if name == "orb" else normalize(described, axis=1), size)

    return extract


def _resize(gray: Float32, size_hw: tuple[int, int], rule: Resize) -> tuple[Float32, Matrix]:
    """An image at the protocol's size, and the (3, 3) map of its pixels; pixel centres at integers.

    Raises:
        SuperPointError: too thin an image: nothing would be left of it.
    """
    height, width = gray.shape
    if rule is Resize.NONE:
        return gray, np.eye(3)
    ratios = size_hw[0] / height, size_hw[1] / width
    scale = max(ratios) if rule is Resize.CROP else min(1.0, *ratios)
    new_h, new_w = round(height * scale), round(width * scale)
    if min(new_h, new_w) < images.SMALLEST_SIDE_PX:
        least = f"{images.SMALLEST_SIDE_PX}x{images.SMALLEST_SIDE_PX}"
        raise SuperPointError(f"{width}x{height} px shrink to {new_w}x{new_h}; the smallest usable is {least}.")
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized: Any = cv2.resize(gray, (new_w, new_h), interpolation=method)
    sx, sy = new_w / width, new_h / height
    to_view = np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])
    if rule is Resize.CROP:
        top, left = (new_h - size_hw[0]) // 2, (new_w - size_hw[1]) // 2
        resized = resized[top : top + size_hw[0], left : left + size_hw[1]]
        to_view = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]]) @ to_view
    return np.ascontiguousarray(resized), to_view


def _views(pair: Pair, views: dict[Path, _View]) -> tuple[Keypoints, Keypoints, Matrix]:
    """Both images' keypoints and the homography between the resized images."""
    first, second = views[pair.first], views[pair.second]
    homography = second.to_view @ pair.homography @ np.linalg.inv(first.to_view)
    return first.keypoints, second.keypoints, homography


_Views = tuple[Keypoints, Keypoints, Matrix]


def _score(pair: Pair, detected: _Views, described: _Views, protocol: Protocol) -> PairResult:
    again = metrics.repeatability(*detected, protocol.detector_keypoints, protocol.repeatability_px)
    count = protocol.descriptor_keypoints
    return PairResult(
        pair=pair,
        repeatability=again.share,
        localisation_error_px=again.localisation_error_px,
        mma=metrics.matching_accuracy(*described, protocol.mma_px, count),
        homography_errors_px=[
            metrics.homography_error_px(*described, count, protocol.estimator, protocol.ransac_px, order)
            for order in range(protocol.ransac_orders)
        ],
        matching_score=metrics.matching_score(*described, count, protocol.matching_px),
        nn_map=metrics.nn_average_precision(*described, count, protocol.matching_px),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
