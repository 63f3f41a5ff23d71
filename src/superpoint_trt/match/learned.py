"""The learned matcher on the keypoints of two images: an .onnx, a TensorRT engine, or its weights in PyTorch."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.files import PathLike, one_line, read_bytes
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.matcher import INPUTS, MIN_SCORE, MOST_ROWS, OUTPUTS, MatcherDescription
from superpoint_trt.core.onnx_runtime import import_onnxruntime
from superpoint_trt.core.types import ENGINE_SUFFIXES, Float32, SuperPointError
from superpoint_trt.match.nearest import Matches

Arrays = Mapping[str, NDArray[Any]]

FEWEST_ROWS = 1
_FATAL_ONLY = 4


class PointsLike(Protocol):
    """Points of one image, as `Keypoints` and feature files hold them."""

    @property
    def xy(self) -> Any:
        """(N, 2) px, x then y."""

    @property
    def scores(self) -> Any:
        """(N,) detection scores, by falling score."""

    @property
    def descriptors(self) -> Any:
        """(N, D) of unit length, any float type."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height) in px."""


@dataclass(frozen=True)
class LearnedMatches(Matches):
    """Pairs of rows, and how sure the matcher is of them."""

    scores: Float32
    """(M,) probability of each match."""


class LearnedMatcher:
    """Matches the keypoints of two images by a trained network. A context manager.

        with SuperPoint() as superpoint, LearnedMatcher("matcher.onnx") as matcher:
            matches = matcher.match(superpoint.extract("a.jpg"), superpoint.extract("b.jpg"))

    Args:
        path: `.onnx` of `superpoint matcher export`, an engine of `superpoint matcher build`, or weights in
            `.safetensors` (need torch). None: the packaged matcher, exported to the user's cache at first use.
        device: "auto", "cpu", "cuda" or "cuda:N".
        threads: CPU threads; None leaves the choice to the runtime.
        min_score: least probability of a match; None: the file's own, which a higher one can only narrow.

    Attributes:
        description: what the matcher is.
        runs_on: what computes, for the user.

    Raises:
        SuperPointError: no such file, not a matcher, or the device cannot be used.
    """

    def __init__(
        self,
        path: PathLike | None = None,
        device: str = "auto",
        threads: int | None = None,
        min_score: float | None = None,
    ) -> None:
        if min_score is not None and not 0 <= min_score < 1:
            raise SuperPointError(f"least score is {min_score:g}; expected 0 <= score < 1 ({MIN_SCORE:g} is usual).")
        self._path = _packaged() if path is None else Path(path)
        self._runner: _Runner | None = _open(self._path, DeviceChoice.parse(device), threads, min_score)
        self.description = self._runner.description
        self.runs_on = self._runner.runs_on
        self._features = self._runner.features()
        own = self.description.min_score
        self._min_score = own if min_score is None else min_score
        if self._min_score < own:
            raise SuperPointError(
                f"matches from {self._min_score:g} on were asked for, but {self._path} gives those from {own:g} on: "
                f"export it with --min-score {self._min_score:g}."
            )

    def match(self, first: PointsLike, second: PointsLike) -> LearnedMatches:
        """Matches two images' keypoints. A matcher of N rows looks at the N best of each image.

        Args:
            first: keypoints of the first image.
            second: keypoints of the second image, from the same model.

        Returns:
            The matches, in the order of the first image's rows.

        Raises:
            SuperPointError: the descriptors are not of the length that the matcher takes, there are too many points,
                or the runtime failed.
        """
        if self._runner is None:
            raise SuperPointError("this matcher was closed; open it again.")
        counts = [min(len(one.xy), self.description.rows or MOST_ROWS + 1) for one in (first, second)]
        for one in (first, second):
            self._check(one)
        if min(counts) == 0:
            return LearnedMatches(np.zeros((0, 2), np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
        if max(counts) > MOST_ROWS:
            raise SuperPointError(
                f"an image has {max(len(first.xy), len(second.xy))} keypoints; a matcher takes {MOST_ROWS} at most: "
                f"--max-keypoints {MOST_ROWS}."
            )
        rows = self.description.rows or max(*counts, FEWEST_ROWS)
        feed: dict[str, NDArray[Any]] = {}
        for index, (one, count) in enumerate(zip((first, second), counts)):
            for name, array in zip(INPUTS, _padded(one, count, rows)):
                feed[f"{name}{index}"] = np.repeat(array[None], self.description.batch, axis=0)
        outputs = self._runner.infer(feed)
        there, scores = (outputs[name][0][: counts[0]] for name in OUTPUTS)
        chosen = np.flatnonzero((there >= 0) & (scores > self._min_score))
        pairs = np.stack([chosen, there[chosen]], axis=1).astype(np.int64)
        a, b = (np.asarray(one.descriptors, np.float32)[pairs[:, i]] for i, one in enumerate((first, second)))
        distances = np.linalg.norm(a - b, axis=1).astype(np.float32)
        return LearnedMatches(pairs, distances, scores[chosen].astype(np.float32))

    def is_of_another(self, checkpoint_sha256: str | None) -> bool:
        """Whether it learned the descriptors of another network than the one of this checkpoint; False if unknown."""
        known = [digest for digest in self._features.values() if digest]
        return bool(known and checkpoint_sha256) and checkpoint_sha256 not in known

    def _check(self, points: PointsLike) -> None:
        dim = points.descriptors.shape[1] if points.descriptors.ndim == 2 else 0
        if dim not in self._features:
            raise SuperPointError(
                f"descriptors have {dim} numbers; the matcher {self._path} takes "
                f"{' or '.join(map(str, self._features))}: it belongs to another network. Take its own features, or "
                "nearest neighbors."
            )

    def close(self) -> None:
        """Frees the session or the engine."""
        if self._runner:
            self._runner.close()
        self._runner = None

    def __enter__(self) -> LearnedMatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _packaged() -> Path:
    # The only import of the conversion by the matchers: the packaged one is exported when it is opened.
    from superpoint_trt.convert.default_matcher import default_matcher

    return default_matcher()


def _padded(points: PointsLike, count: int, rows: int) -> tuple[NDArray[Any], ...]:
    """The matcher's inputs of one image, in the order of `INPUTS`, filled up with zeros."""
    arrays = [np.asarray(array, np.float32)[:count] for array in (points.xy, points.scores, points.descriptors)]
    filled = [np.concatenate([a, np.zeros((rows - count, *a.shape[1:]), np.float32)]) for a in arrays]
    return *filled, np.array(count, np.int32), np.array(points.image_size, np.float32)


# ------------------------------------------------------------------------------------------------------------- runtimes


class _Runner(abc.ABC):
    """What computes."""

    description: MatcherDescription
    runs_on: str

    def features(self) -> dict[int, str | None]:
        """Each length of descriptors that it takes -> SHA-256 of the checkpoint that it learned from, if known."""
        return {self.description.descriptor_dim: self.description.features_sha256}

    @abc.abstractmethod
    def infer(self, feed: Arrays) -> Arrays:
        """`INPUTS` of both images -> `OUTPUTS`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees it."""


def _open(path: Path, choice: DeviceChoice, threads: int | None, min_score: float | None) -> _Runner:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return _OnnxRunner(path, choice, threads)
    if suffix in ENGINE_SUFFIXES:
        return _EngineRunner(path, choice)
    if suffix == ".safetensors":
        try:
            return _TorchRunner(path, choice, threads, MIN_SCORE if min_score is None else min_score)
        except ImportError:
            raise SuperPointError(
                f"running the weights {path} themselves needs PyTorch: {install_hint('torch')}. Without: superpoint "
                "matcher export makes an .onnx of them."
            ) from None
    raise SuperPointError(
        f"{path}: a matcher's name ends in .onnx, .safetensors, {', '.join(ENGINE_SUFFIXES)}; commands also take "
        "nearest and learned."
    )


class _OnnxRunner(_Runner):
    def __init__(self, path: Path, choice: DeviceChoice, threads: int | None) -> None:
        ort = import_onnxruntime()
        wanted = {"auto": ["CUDA", "CPU"], "cpu": ["CPU"], "cuda": ["CUDA"]}[choice.kind]
        there = ort.get_available_providers()
        providers: list[Any] = [f"{name}ExecutionProvider" for name in wanted]
        providers = [
            (name, {"device_id": str(choice.index)}) if choice.index is not None else name
            for name in providers
            if name in there
        ]
        if not providers:
            raise SuperPointError(f"device {choice} was asked for, but this onnxruntime has only {', '.join(there)}.")
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        data = read_bytes(path, "matcher")
        try:
            self._session: Any = ort.InferenceSession(data, options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise SuperPointError(f"{path} is not a model onnxruntime can load: {one_line(error)}.") from error
        used = self._session.get_providers()[0]
        if choice.kind == "cuda" and not used.startswith("CUDA"):
            raise SuperPointError(f"device {choice} was asked for, but onnxruntime fell back to {used}.")
        self.description = MatcherDescription.from_metadata(self._session.get_modelmeta().custom_metadata_map, path)
        self.runs_on = f"onnxruntime {ort.__version__}, {used}, {self.description.precision.value}"

    def infer(self, feed: Arrays) -> Arrays:
        try:
            return dict(zip(OUTPUTS, self._session.run(list(OUTPUTS), feed)))
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise SuperPointError(f"onnxruntime failed on the matcher: {one_line(error)}.") from error

    def close(self) -> None:
        self._session = None


class _TorchRunner(_Runner):
    def __init__(self, path: Path, choice: DeviceChoice, threads: int | None, min_score: float) -> None:
        import torch

        from superpoint_trt.checkpoint.matcher import load_matcher
        from superpoint_trt.checkpoint.matcher_network import MatcherNet

        weights = load_matcher(path)
        cuda = torch.cuda.is_available()
        if choice.kind == "cuda" and not cuda:
            raise SuperPointError(f"device {choice} was asked for, but torch sees no GPU; use --device cpu.")
        self._device = torch.device(str(choice) if choice.kind != "auto" else "cuda" if cuda else "cpu")
        if threads is not None:
            torch.set_num_threads(threads)
        self._net = MatcherNet.from_weights(weights).to(self._device)
        dim, *_ = dims = weights.shape.descriptor_dims
        self._features = {each: weights.features.get(each) for each in dims}
        self.description = MatcherDescription(
            dim,
            None,
            layers=weights.shape.layers,
            min_score=min_score,
            features_sha256=weights.features.get(dim),
            weights_sha256=weights.sha256,
        )
        self.runs_on = f"torch {torch.__version__} eager, {self._device}, fp32"

    def features(self) -> dict[int, str | None]:
        return self._features

    def infer(self, feed: Arrays) -> Arrays:
        import torch

        from superpoint_trt.checkpoint.matcher_network import PointSets, matches

        sets = [
            PointSets(*(torch.from_numpy(feed[f"{name}{image}"]).to(self._device) for name in INPUTS))
            for image in (0, 1)
        ]
        with torch.inference_mode():
            found = matches(self._net(*sets)[-1], self.description.min_score)
        return {name: tensor.cpu().numpy() for name, tensor in zip(OUTPUTS, found)}

    def close(self) -> None:
        """Nothing is held outside Python's memory."""


class _EngineRunner(_Runner):
    def __init__(self, path: Path, choice: DeviceChoice) -> None:
        from superpoint_trt.gpu.matcher_engine import MatcherEngine

        if choice.kind == "cpu":
            raise SuperPointError("device is 'cpu'; a TensorRT engine runs on cuda: --device auto, cuda or cuda:N.")
        self._engine = MatcherEngine(path, choice.index)
        self.description = self._engine.description
        self.runs_on = f"{self._engine.tensorrt}, {self._engine.device}, {self.description.precision.value}"

    def infer(self, feed: Arrays) -> Arrays:
        return self._engine.infer(feed)

    def close(self) -> None:
        self._engine.close()
