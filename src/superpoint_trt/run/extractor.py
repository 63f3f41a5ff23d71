"""`SuperPoint`: image -> preprocess -> backend -> decode -> Keypoints. What a library user imports."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core import image as images
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.image import ImageLike, Placement
from superpoint_trt.core.types import DecodeOptions, Float32, Keypoints, ModelDescription, OutputType, SuperPointError
from superpoint_trt.run import decode
from superpoint_trt.run.backends import Outputs, RuntimeInfo, open_backend

_MOST = {"max_side": 1 << 20, "threads": 1024}
_MOST_IN_FLIGHT = 64
_MOST_PLACEMENTS = 1024

Prepared = tuple[NDArray[Any], Placement]
"""An image on its way to a network input, (H, W) uint8, or float32 in [0, 1]; and its place there."""

_log = logging.getLogger(__name__)


class SuperPoint:
    """One opened model.

        with SuperPoint("superpoint.onnx") as superpoint:
            keypoints = superpoint.extract("photo.jpg")

    Args:
        model: `.onnx`, or a checkpoint, which runs in the PyTorch reference.
        threshold: scores must be strictly greater; default 0.005, or what a `keypoints` model was exported with
            (it can be raised there, not lowered).
        max_keypoints: keep at most this many, the best; default all (a `keypoints` model: its N).
        nms_radius_px: default 4; fixed inside a `keypoints` model.
        remove_borders_px: default 4; fixed inside a `keypoints` model.
        max_side_px: shrink larger images first; default no.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads; default the runtime's own choice.
        half_descriptors: descriptors as float16, half the memory and half the way from a GPU.

    Attributes:
        description: what the model is.
        runtime: backend, device and precision really used.
        options: the decode options in force.

    Raises:
        SuperPointError: unusable model, device or option.
    """

    def __init__(
        self,
        model: PathLike,
        *,
        threshold: float | None = None,
        max_keypoints: int | None = None,
        nms_radius_px: int | None = None,
        remove_borders_px: int | None = None,
        max_side_px: int | None = None,
        device: str = "auto",
        threads: int | None = None,
        half_descriptors: bool = False,
    ) -> None:
        for name, value in (("max_side", max_side_px), ("threads", threads)):
            if value is not None and not 1 <= value <= _MOST[name]:
                raise SuperPointError(f"{name} is {value}; expected 1 to {_MOST[name]}.")
        asked: dict[str, Any] = {
            "nms_radius_px": nms_radius_px,
            "remove_borders_px": remove_borders_px,
            "threshold": threshold,
            "max_keypoints": max_keypoints,
        }
        chosen = DecodeOptions(**{key: value for key, value in asked.items() if value is not None})
        self._max_side_px = max_side_px
        self._backend = open_backend(model, device, threads)
        self.description: ModelDescription = self._backend.description
        self.runtime: RuntimeInfo = self._backend.runtime
        self.options = _in_force(self.description, chosen, asked)
        self._descriptor_dtype = np.dtype(np.float16 if half_descriptors else np.float32)
        self._lanes = self._open_lanes(half_descriptors)
        self._placements: dict[tuple[int, ...], Placement] = {}

    def _open_lanes(self, half: bool) -> Any:
        """The way through the GPU that raw heads have; without one, which is said, they are decoded here."""
        if self.description.type is not OutputType.HEADS:
            return None
        where, lanes = "decode on the CPU (numpy)", None
        try:
            lanes = self._backend.lanes(self.options, half)
        except SuperPointError as error:
            _log.warning("heads are decoded on the CPU: %s", error)
            where += f": {error}"
        self.runtime = replace(self.runtime, decode="decode on the GPU (CUDA)" if lanes else where)
        return lanes

    def extract(self, image: ImageLike) -> Keypoints:
        """The keypoints of one image.

        Args:
            image: a path, or an array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA, of uint8, uint16, bool or
                float in [0, 1]; any size from 8x8 px.

        Returns:
            Keypoints in the pixels of that image, by falling score; possibly none.

        Raises:
            SuperPointError: not an image, or the runtime failed.
        """
        return self._run([self._prepare(image)])[0]

    def extract_batch(self, batch: Iterable[ImageLike]) -> list[Keypoints]:
        """The keypoints of several images, of one size or many, in their order.

        Neighbours that make equal network inputs share a run, up to the model's largest batch.

        Raises:
            SuperPointError: as `extract`; or one path or array was given instead of several.
        """
        if isinstance(batch, (str, os.PathLike)) or getattr(batch, "ndim", 3) == 2:
            raise SuperPointError("extract_batch takes several images: a list of paths or arrays; extract takes one.")
        found: list[Keypoints] = []
        pending: list[Prepared] = []
        for image in batch:
            prepared = self._prepare(image)
            full = len(pending) == self.description.max_batch_size
            if pending and (full or _kind(pending[0]) != _kind(prepared)):
                found += self._run(pending)
                pending = []
            pending.append(prepared)
        return found + (self._run(pending) if pending else [])

    def extract_many(
        self, images: Iterable[ImageLike], batch_size: int | None = None, in_flight: int = 2, loaders: int | None = None
    ) -> Iterator[Keypoints | SuperPointError]:
        """The keypoints of a stream of images, in its order, as fast as the machine goes.

        Files are read and decoded by threads ahead of the runs; on a GPU with a `heads` engine several batches are
        under way at once, each on a stream of its own. No more than `(in_flight + 1) * batch_size` images are held:
        the stream is read on only as results are taken.

        Args:
            images: as `extract` takes them, of one size or many; neighbours of one size share a run.
            batch_size: images in a run; default the model's largest batch.
            in_flight: runs under way at once.
            loaders: threads that read files; default one for each CPU.

        Yields:
            For each image its Keypoints; or, where that one could not be read or run, the SuperPointError that says
            why. The others are not affected.

        Raises:
            SuperPointError: at the call, batch_size, in_flight or loaders is out of range.
        """
        most = self.description.max_batch_size
        limits = {
            "batch_size": (batch_size, most),
            "in_flight": (in_flight, _MOST_IN_FLIGHT),
            "loaders": (loaders, 1024),
        }
        for name, (value, highest) in limits.items():
            if value is not None and not 1 <= value <= highest:
                raise SuperPointError(f"{name} is {value}; expected 1 to {highest}.")
        return self._stream(images, batch_size or most, in_flight, loaders or os.cpu_count() or 1)

    def _stream(
        self, images: Iterable[ImageLike], batch_size: int, in_flight: int, loaders: int
    ) -> Iterator[Keypoints | SuperPointError]:
        slots = self._lanes.take(in_flight) if self._lanes else [None] * in_flight
        flying: deque[_Flight] = deque()
        pool = ThreadPoolExecutor(loaders, thread_name_prefix="superpoint-loader")
        try:
            for turn, group in enumerate(_groups(self._prepared(images, pool, batch_size), batch_size)):
                if len(flying) == in_flight:
                    yield from flying.popleft().results()
                flying.append(_Flight(self, group, slots[turn % in_flight], batch_size))
            while flying:
                yield from flying.popleft().results()
        finally:  # also when the caller stops early
            pool.shutdown(wait=True, cancel_futures=True)
            for flight in flying:
                flight.abandon()
            if self._lanes:
                self._lanes.give_back(slots)

    def _prepared(
        self, images: Iterable[ImageLike], pool: ThreadPoolExecutor, ahead: int
    ) -> Iterator[Prepared | SuperPointError]:
        """Each image prepared, or why it cannot be; files are up to `ahead` images early."""
        waiting: deque[Future[Prepared | SuperPointError] | ImageLike] = deque()
        for image in images:
            # What is in memory already gains nothing from another thread.
            is_file = isinstance(image, (str, os.PathLike))
            waiting.append(pool.submit(self._try_prepare, image) if is_file else image)
            if len(waiting) > ahead:
                yield self._ready(waiting.popleft())
        while waiting:
            yield self._ready(waiting.popleft())

    def _ready(self, item: Any) -> Prepared | SuperPointError:
        return item.result() if isinstance(item, Future) else self._try_prepare(item)

    def _try_prepare(self, image: ImageLike) -> Prepared | SuperPointError:
        try:
            return self._prepare(image)
        except SuperPointError as error:
            return error

    def extract_device(self, image: ImageLike) -> Any:
        """The keypoints of one image, left on the GPU for what follows there (a matcher). `heads` engines only.

        Args:
            image: as `extract` takes it.

        Returns:
            kernels.decode.DeviceKeypoints: keypoints (N, 2), scores (N,), descriptors (N, D), for torch, CuPy and the
            like (DLPack, CUDA array interface); the work is done. Coordinates are pixels of the network's input: the
            image's own, unless it was shrunk. Valid until the next call.

        Raises:
            SuperPointError: as `extract`; or the model is no `heads` engine.
        """
        if self._lanes is None:
            raise SuperPointError(
                f"results stay on the GPU with a heads engine only; this is {self.description.type.value} on "
                f"{self.runtime}: superpoint export --type heads, then superpoint build."
            )
        prepared = self._prepare(image)
        (slot,) = self._lanes.take(1)
        try:
            lane = self._fill(slot, [prepared], 1)
            return lane.on_device(_placed(prepared[1]))
        finally:
            self._lanes.give_back([slot])

    def prepare(self, image: ImageLike) -> tuple[Float32, Placement]:
        """The first of the three steps of `extract`: the network's input (H, W), and where the image lies in it."""
        gray = images.to_gray(images.as_array(image))
        placement = images.place(gray.shape[:2], self.description, self._max_side_px)
        return images.to_input(gray, placement), placement

    def _prepare(self, image: ImageLike) -> Prepared:
        """As `prepare`; for a lane, which has memory of its own to pad in, and takes uint8 as it is, not yet padded."""
        if self._lanes is None:
            return self.prepare(image)
        array = images.as_array(image)
        placement = self._placements.get(array.shape)
        if placement is None:
            images.check(array)
            placement = images.place(array.shape[:2], self.description, self._max_side_px)
            if len(self._placements) >= _MOST_PLACEMENTS:
                self._placements.clear()
            self._placements[array.shape] = placement
        if array.ndim == 2 and array.dtype == np.uint8 and not placement.resized:
            return array, placement
        return images.shrink(images.to_gray(array), placement), placement

    def infer(self, inputs: Float32) -> Outputs:
        """The second: (B, 1, H, W) float32 in [0, 1] -> the model's outputs by name (spec.OUTPUT_NAMES)."""
        return self._backend.infer(inputs)

    def infer_timed(self, inputs: Float32) -> tuple[Outputs, dict[str, float]]:
        """As `infer`, and the seconds of its steps: network, and where they exist host_to_device, device_to_host."""
        return self._backend.infer_timed(inputs)

    def decode(self, outputs: Outputs, placements: Sequence[Placement]) -> list[Keypoints]:
        """The third: the model's outputs -> Keypoints of each image of the batch, in that image's own pixels."""
        if self.description.type is OutputType.KEYPOINTS:
            return [self._unpad(outputs, index, placement) for index, placement in enumerate(placements)]
        if self.description.type is OutputType.HEADS:
            scores = decode.scores_from_logits(outputs["logits"])
            descriptors = decode.normalize(outputs["coarse_descriptors"], axis=1)
        else:
            scores, descriptors = outputs["scores"], outputs["descriptors"]
        return [self._select(s, d, placement) for s, d, placement in zip(scores, descriptors, placements)]

    def extract_timed(self, batch: Sequence[ImageLike]) -> dict[str, float]:
        """Runs images that share a run step by step, each step waited for, and tells the seconds of each.

        Returns:
            preprocess, network, decode, and where there is such a thing host_to_device, device_to_host.
        """
        clock = time.perf_counter
        started = clock()
        prepared = [self._prepare(image) for image in batch]
        if self._lanes is None:
            inputs = np.stack([pixels for pixels, _ in prepared])[:, None]
            spans = {"preprocess": clock() - started}
            outputs, steps = self.infer_timed(inputs)
            started = clock()
            self.decode(outputs, [placement for _, placement in prepared])
            return {**spans, **steps, "decode": clock() - started}
        (slot,) = self._lanes.take(1)
        try:
            lane = self._fill(slot, prepared, len(prepared))
            spans = {"preprocess": clock() - started}
            spans.update(lane.timed([_placed(placement) for _, placement in prepared]))
        finally:
            self._lanes.give_back([slot])
        return spans

    def _select(self, scores: Float32, descriptors: Float32, placement: Placement) -> Keypoints:
        # Padding is cut off before the suppression: what lies outside the image must not weigh on what is inside.
        inside = scores[: placement.placed_height_px, : placement.placed_width_px]
        xy, found = decode.select(inside, self.options)
        stride, sampling = self.description.stride_px, self.description.sampling
        sampled = decode.sample_descriptors(xy, descriptors, stride, sampling)
        return Keypoints(placement.to_image(xy), found, sampled, _size(placement))

    def _unpad(self, outputs: Outputs, index: int, placement: Placement) -> Keypoints:
        """One image's rows of a `keypoints` model, without padding rows and without points outside the image."""
        scores: NDArray[Any] = outputs["scores"][index]
        xy = outputs["keypoints"][index]
        far = np.array([placement.placed_width_px, placement.placed_height_px]) - self.options.remove_borders_px
        wanted = (scores > self.options.threshold) & (xy < far).all(axis=1)
        rows = np.flatnonzero(wanted)[: self.options.max_keypoints]
        descriptors = outputs["descriptors"][index][rows]
        return Keypoints(placement.to_image(xy[rows]), scores[rows], descriptors, _size(placement))

    def _run(self, prepared: Sequence[Prepared]) -> list[Keypoints]:
        if self._lanes is None:
            placements = [placement for _, placement in prepared]
            found = self.decode(self.infer(np.stack([pixels for pixels, _ in prepared])[:, None]), placements)
            return [
                replace(one, descriptors=one.descriptors.astype(self._descriptor_dtype, copy=False)) for one in found
            ]
        (slot,) = self._lanes.take(1)
        try:
            lane = self._fill(slot, prepared, len(prepared))
            return self._collect(lane, self._submit(lane, prepared))
        finally:
            self._lanes.give_back([slot])

    def _fill(self, slot: Any, prepared: Sequence[Prepared], batch: int) -> Any:
        """A lane with the images in its buffer."""
        pixels, placement = prepared[0]
        lane = slot.lane((batch, 1, placement.input_height_px, placement.input_width_px), pixels.dtype)
        for place, (image, its) in zip(lane.image, prepared):
            images.pad_into(place, image, its)
        return lane

    def _submit(self, lane: Any, prepared: Sequence[Prepared]) -> list[Placement]:
        placements = [placement for _, placement in prepared]
        lane.submit([_placed(placement) for placement in placements])
        return placements

    def _collect(self, lane: Any, placements: Sequence[Placement]) -> list[Keypoints]:
        return [
            Keypoints(placement.to_image(found.xy), found.scores, found.descriptors, _size(placement))
            for found, placement in zip(lane.collect(), placements)
        ]

    def close(self) -> None:
        """Frees the model; the extractor cannot be used afterwards."""
        if self._lanes:
            self._lanes.close()
        self._backend.close()

    def __enter__(self) -> SuperPoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Flight:
    """One group of images under way; its results come in their order, errors in their places."""

    def __init__(
        self, superpoint: SuperPoint, group: Sequence[Prepared | SuperPointError], slot: Any, batch_size: int
    ) -> None:
        self._superpoint, self._group = superpoint, group
        self._prepared = [one for one in group if not isinstance(one, SuperPointError)]
        self._lane: Any = None
        self._failed = False
        if slot is None or not self._prepared:
            return
        try:
            # A last, smaller group takes the lane of the full ones, which is ready: making another takes longer.
            self._lane = superpoint._fill(slot, self._prepared, batch_size)
            self._placements = superpoint._submit(self._lane, self._prepared)
        except SuperPointError:
            self._failed = True

    def results(self) -> Iterator[Keypoints | SuperPointError]:
        found = iter(self._found())
        for one in self._group:
            yield one if isinstance(one, SuperPointError) else next(found)

    def _found(self) -> Sequence[Keypoints | SuperPointError]:
        try:
            if self._lane and not self._failed:
                return self._superpoint._collect(self._lane, self._placements)
            if self._prepared and not self._failed:
                return self._superpoint._run(self._prepared)
        except SuperPointError:
            self._failed = True
        return [self._alone(one) for one in self._prepared]

    def _alone(self, prepared: Prepared) -> Keypoints | SuperPointError:
        """After the group failed: which of its images it was."""
        try:
            return self._superpoint._run([prepared])[0]
        except SuperPointError as error:
            return error

    def abandon(self) -> None:
        """Waits for what is under way and forgets it."""
        if self._lane and not self._failed:
            self._lane.collect()


def _groups(
    prepared: Iterable[Prepared | SuperPointError], batch_size: int
) -> Iterator[list[Prepared | SuperPointError]]:
    """Neighbours that may share a run; errors stay in their places and take no room in it."""
    group: list[Prepared | SuperPointError] = []
    kind, count = None, 0
    for one in prepared:
        if not isinstance(one, SuperPointError):
            if count == batch_size or (count and _kind(one) != kind):
                yield group
                group, count = [], 0
            kind, count = _kind(one), count + 1
        group.append(one)
        if len(group) >= 2 * batch_size:  # of errors: they are not to pile up
            yield group
            group, count = [], 0
    if group:
        yield group


def _kind(prepared: Prepared) -> tuple[Any, ...]:
    """What images of one run have in common."""
    pixels, placement = prepared
    return pixels.dtype, placement.input_height_px, placement.input_width_px


def _in_force(model: ModelDescription, chosen: DecodeOptions, asked: dict[str, Any]) -> DecodeOptions:
    """The decode options of a run: the caller's, within what a `keypoints` model has baked in."""
    if model.type is not OutputType.KEYPOINTS:
        return chosen
    for name in ("nms_radius_px", "remove_borders_px"):
        baked = getattr(model, name)
        if asked[name] is not None and baked is not None and asked[name] != baked:
            raise SuperPointError(
                f"{name} {asked[name]} was asked for, but this model does {baked} in its graph; export it anew."
            )
    baked_threshold = model.threshold if model.threshold is not None else 0.0
    if asked["threshold"] is not None and asked["threshold"] < baked_threshold:
        raise SuperPointError(
            f"threshold {asked['threshold']:g} was asked for, but this model drops scores up to {baked_threshold:g} "
            "in its graph; export it with a lower --threshold, or as dense."
        )
    return replace(
        chosen,
        nms_radius_px=model.nms_radius_px if model.nms_radius_px is not None else chosen.nms_radius_px,
        remove_borders_px=model.remove_borders_px if model.remove_borders_px is not None else 0,
        threshold=asked["threshold"] if asked["threshold"] is not None else baked_threshold,
    )


def _placed(placement: Placement) -> tuple[int, int]:
    return placement.placed_width_px, placement.placed_height_px


def _size(placement: Placement) -> tuple[int, int]:
    return placement.image_width_px, placement.image_height_px
