"""Matches many pairs of images: each image is prepared once, on the CPU or on a GPU, and then compared with many."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.device import DeviceChoice
from superpoint_trt.core.types import Float32, SuperPointError
from superpoint_trt.match.nearest import NO_MATCHES, Matches, MatchOptions, Neighbors, match, select

if TYPE_CHECKING:
    from superpoint_trt.core.types import Keypoints
    from superpoint_trt.gpu.kernels.match import DeviceDescriptors
    from superpoint_trt.match.learned import LearnedMatcher

PAIRS_A_LAUNCH = 64
"""Pairs that a GPU compares in one launch."""


@dataclass(frozen=True)
class Prepared:
    """The descriptors of one image, where a matcher needs them."""

    dim: int
    """Numbers of a descriptor."""
    count: int
    held: Any
    nbytes: int
    """Size in the memory of the matcher's device."""


class Matcher(abc.ABC):
    """Matches pairs of images whose descriptors it has prepared. A context manager.

    Attributes:
        runs_on: what computes, for the user.
        pairs_at_once: how many pairs a call of `match` should have.
    """

    runs_on: str
    pairs_at_once = 1
    needs_places = False
    """Whether images are prepared by `prepare_keypoints`, since descriptors alone are not enough."""

    def __init__(self, options: MatchOptions | None = None) -> None:
        self.options = options or MatchOptions()

    @abc.abstractmethod
    def prepare(self, descriptors: NDArray[Any]) -> Prepared:
        """Takes the descriptors (N, D) of an image, of any float type, to where they are compared.

        Raises:
            SuperPointError: they cannot be compared there.
        """

    def prepare_keypoints(self, keypoints: Keypoints) -> Prepared:
        """Takes the keypoints of an image to where they are compared.

        Raises:
            SuperPointError: they cannot be compared there.
        """
        return self.prepare(keypoints.descriptors)

    def is_of_another(self, checkpoint_sha256: str | None) -> bool:
        """Whether it was made for the descriptors of another checkpoint; False if any will do, or nobody knows."""
        return False

    def match(self, pairs: Sequence[tuple[Prepared, Prepared]]) -> list[Matches]:
        """The matches of each pair, in the order of the pairs.

        Raises:
            SuperPointError: descriptors have different lengths, or the device failed.
        """
        for first, second in pairs:
            if first.dim != second.dim:
                raise SuperPointError(
                    f"descriptors have {first.dim} and {second.dim} numbers; expected equal lengths: extract both "
                    "images with one network."
                )
        filled = [index for index, (first, second) in enumerate(pairs) if first.count and second.count]
        found = [NO_MATCHES] * len(pairs)
        for index, matches in zip(filled, self._match([pairs[index] for index in filled])):
            found[index] = matches
        return found

    @abc.abstractmethod
    def _match(self, pairs: Sequence[tuple[Prepared, Prepared]]) -> list[Matches]:
        """`match` of pairs without empty images."""

    @abc.abstractmethod
    def close(self) -> None:
        """Frees the device's memory but that of images that are still held."""

    def __enter__(self) -> Matcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class HostMatcher(Matcher):
    """Compares in float32 with numpy."""

    runs_on = "numpy on the CPU"

    def prepare(self, descriptors: NDArray[Any]) -> Prepared:
        """Keeps the descriptors as float32."""
        rows: Float32 = np.ascontiguousarray(descriptors, dtype=np.float32)
        return Prepared(rows.shape[1], len(rows), rows, rows.nbytes)

    def _match(self, pairs: Sequence[tuple[Prepared, Prepared]]) -> list[Matches]:
        return [match(first.held, second.held, self.options) for first, second in pairs]

    def close(self) -> None:
        """Nothing is held."""


class NetworkMatcher(Matcher):
    """A trained matcher.

    A match file keeps 1 - d^2 / 4 for a distance d, so the probability of a match is given as the distance that it is
    kept for.

    Args:
        learned: the network; closed with this matcher.
    """

    needs_places = True

    def __init__(self, learned: LearnedMatcher) -> None:
        super().__init__()
        self._learned = learned
        self.runs_on = learned.runs_on

    def prepare(self, descriptors: NDArray[Any]) -> Prepared:
        """Refuses: a trained matcher needs to know where the points are."""
        raise SuperPointError("a trained matcher needs keypoints, not descriptors alone.")

    def prepare_keypoints(self, keypoints: Keypoints) -> Prepared:
        """Keeps the keypoints."""
        dim = keypoints.descriptors.shape[1]
        nbytes = keypoints.descriptors.nbytes + keypoints.xy.nbytes + keypoints.scores.nbytes
        return Prepared(dim, len(keypoints), keypoints, nbytes)

    def is_of_another(self, checkpoint_sha256: str | None) -> bool:
        """Whether the network learned the descriptors of another checkpoint."""
        return self._learned.is_of_another(checkpoint_sha256)

    def _match(self, pairs: Sequence[tuple[Prepared, Prepared]]) -> list[Matches]:
        found = [self._learned.match(first.held, second.held) for first, second in pairs]
        return [Matches(one.rows, 2 * np.sqrt(1 - one.scores)) for one in found]

    def close(self) -> None:
        """Closes the network."""
        self._learned.close()


class DeviceMatcher(Matcher):
    """Compares in float16, with float32 sums, on a GPU.

    Args:
        options: which neighbors are matches.
        index: number of the GPU; None: the thread's current one.

    Raises:
        SuperPointError: there is no such GPU, or cuda-bindings or NVRTC is missing.
    """

    pairs_at_once = PAIRS_A_LAUNCH

    def __init__(self, options: MatchOptions | None = None, index: int | None = None) -> None:
        from superpoint_trt.gpu import cuda
        from superpoint_trt.gpu.kernels.match import NearestFinder

        super().__init__(options)
        gpu = cuda.current_device() if index is None else cuda.device(index)
        self.runs_on = f"{gpu.name} (cuda:{gpu.index}), descriptors as float16"
        self._on_gpu = cuda.DeviceScope(gpu.index)
        with self._on_gpu:
            self._finder = NearestFinder()
            # Compiled here: what is missing shows before the work.
            self._find_one_pair()

    def _find_one_pair(self) -> None:
        from superpoint_trt.gpu.kernels.match import upload

        one = upload(np.ones((1, 1), np.float16))
        self._finder.find([(one, one)])

    def prepare(self, descriptors: NDArray[Any]) -> Prepared:
        """Copies the descriptors to the GPU."""
        from superpoint_trt.gpu.kernels.match import upload

        with self._on_gpu:
            held = upload(descriptors)
        return Prepared(descriptors.shape[1], len(descriptors), held, held.nbytes)

    def _match(self, pairs: Sequence[tuple[Prepared, Prepared]]) -> list[Matches]:
        held: list[tuple[DeviceDescriptors, DeviceDescriptors]] = [(first.held, second.held) for first, second in pairs]
        with self._on_gpu:
            found = self._finder.find(held)
        neighbors = [Neighbors(one.nearest, one.distances, one.seconds, one.back) for one in found]
        return [select(one, self.options) for one in neighbors]

    def close(self) -> None:
        """Frees the stream and the memory for results."""
        with self._on_gpu:
            self._finder.close()


def open_matcher(options: MatchOptions | None = None, device: str = "auto") -> Matcher:
    """Opens the matcher of a device.

    Args:
        options: which neighbors are matches.
        device: "cpu", also by the name of any of OpenVINO's devices, which run networks only; "cuda" or "cuda:N";
            "auto": a GPU if there is one that works, else the CPU. `runs_on` says why a GPU that is there is not used.

    Raises:
        SuperPointError: the GPU that was asked for cannot be used.
    """
    choice = DeviceChoice.parse(device)
    if choice.kind in ("cpu", "openvino"):
        return HostMatcher(options)
    try:
        return DeviceMatcher(options, choice.index)
    except SuperPointError as error:
        if choice.kind == "cuda":
            raise
        matcher = HostMatcher(options)
        if _has_driver():
            matcher.runs_on += f"; the GPU cannot be used: {error}"
        return matcher


def _has_driver() -> bool:
    from superpoint_trt.gpu import cuda

    return cuda.driver() is not None
