"""Two ways from images to Keypoints, through the host or on the GPU; one is chosen when a model opens."""

from __future__ import annotations

import abc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from superpoint_trt.core.contract import check_finite
from superpoint_trt.core.image import (
    ImageLike,
    Placement,
    PreparedImage,
    as_loaded,
    check_image,
    check_shape,
    needed_side_px,
    pad,
    place,
    placed_gray,
)
from superpoint_trt.core.image_file import ReadOptions
from superpoint_trt.core.memory import keep_freed_memory
from superpoint_trt.core.types import DecodeOptions, Float32, Keypoints, ModelDescription, OutputType, SuperPointError
from superpoint_trt.run.backends import AsyncBackend, Backend, Outputs, PendingRun, RuntimeInfo
from superpoint_trt.run.decode import inside_border, normalize, sample_descriptors, scores_from_logits, select

if TYPE_CHECKING:
    from superpoint_trt.gpu.kernels.decode import DeviceKeypoints
    from superpoint_trt.run.lanes import Lanes

_MOST_PLACEMENTS = 1024
"""Image shapes whose placement is remembered."""


class BatchSlot(Protocol):
    """Holds one batch at a time, from `submit` to `collect`. Batches in different slots may run side by side."""

    def submit(self, batch: Sequence[PreparedImage], batch_size: int) -> None:
        """Takes a batch, and starts its run where runs go on by themselves.

        Args:
            batch: images that may share a run (`run_key`).
            batch_size: size of a full batch; `len(batch)` or more.

        Raises:
            SuperPointError: the run could not be started.
        """

    def collect(self) -> list[Keypoints]:
        """Returns the Keypoints of each image of the batch.

        Raises:
            SuperPointError: the run failed.
        """

    def abandon(self) -> None:
        """Forgets the batch, and waits for its run if that is under way."""


class Runner(abc.ABC):
    """One way from prepared images to Keypoints."""

    @abc.abstractmethod
    def prepare(self, image: ImageLike) -> PreparedImage:
        """Reads and checks an image, shrinks it if it must be, and makes the pixels that a batch takes.

        Raises:
            SuperPointError: not an image.
        """

    @abc.abstractmethod
    def slots(self, count: int) -> AbstractContextManager[Sequence[BatchSlot]]:
        """Slots for one caller, as a context manager that takes them back at its end. No run may be under way then."""

    @abc.abstractmethod
    def run_timed(self, images: Sequence[ImageLike]) -> dict[str, float]:
        """Prepares and runs images that share a run, step by step, waiting for each.

        Returns:
            Seconds of preprocess, network, decode, and where they exist host_to_device and device_to_host.
        """

    @abc.abstractmethod
    def run_on_device(self, image: ImageLike) -> DeviceKeypoints:
        """Prepares and runs one image; the results stay on the GPU.

        Raises:
            SuperPointError: not an image, the run failed, or this way does not use the GPU's memory.
        """

    def run(self, batch: Sequence[PreparedImage]) -> list[Keypoints]:
        """The Keypoints of images that share a run.

        Raises:
            SuperPointError: the run failed.
        """
        with self.slots(1) as (slot,):
            slot.submit(batch, len(batch))
            return slot.collect()

    def close(self) -> None:  # noqa: B027  (nothing to free is a fine default)
        """Frees what the runner holds."""


def run_key(image: PreparedImage) -> tuple[Any, ...]:
    """What images of one run have in common: type and input size."""
    pixels, placement = image
    return pixels.dtype, placement.input_height_px, placement.input_width_px


# --------------------------------------------------------------------------------------------------- through the host


class HostRunner(Runner):
    """The backend gives its outputs to the host, and numpy decodes them.

    Args:
        backend: the opened model.
        runtime: what it runs on, for messages.
        options: how to decode.
        max_side_px: shrink larger images first.
        half: descriptors as float16.
        reading: which image files are read.
    """

    def __init__(
        self,
        backend: Backend,
        runtime: RuntimeInfo,
        options: DecodeOptions,
        max_side_px: int | None,
        half: bool,
        reading: ReadOptions,
    ) -> None:
        self._backend, self._runtime = backend, runtime
        self._model: ModelDescription = backend.description
        self._options, self._max_side_px, self._reading = options, max_side_px, reading
        self._descriptor_type = np.dtype(np.float16 if half else np.float32)
        keep_freed_memory()

    def prepare(self, image: ImageLike) -> PreparedImage:
        """The network's input (H, W) float32 in [0, 1], padded, and where the image lies in it."""
        loaded = as_loaded(image, self._reading, needed_side_px(self._model, self._max_side_px))
        check_shape(loaded.pixels)
        placement = place(loaded.full_hw, self._model, self._max_side_px)
        return PreparedImage(pad(placed_gray(loaded, placement), placement), placement)

    def decode(self, outputs: Outputs, placements: Sequence[Placement]) -> list[Keypoints]:
        """A batch's outputs -> the Keypoints of each image, in that image's own pixels; descriptors float32."""
        if self._model.type is OutputType.KEYPOINTS:
            return [self._unpad(outputs, index, placement) for index, placement in enumerate(placements)]
        if self._model.type is OutputType.HEADS:
            scores = scores_from_logits(outputs["logits"])
            descriptors = normalize(outputs["coarse_descriptors"], axis=1)
        else:
            scores, descriptors = outputs["scores"], outputs["descriptors"]
        return [self._select(s, d, placement) for s, d, placement in zip(scores, descriptors, placements)]

    def _select(self, scores: Float32, descriptors: Float32, placement: Placement) -> Keypoints:
        # Padding is cut off before the suppression: what lies outside the image must not weigh on what is inside.
        inside = scores[: placement.placed_height_px, : placement.placed_width_px]
        xy, found = select(inside, self._options)
        sampled = sample_descriptors(xy, descriptors, self._model.stride_px, self._model.sampling)
        return Keypoints(placement.to_image(xy), found, sampled, placement.image_wh)

    def _unpad(self, outputs: Outputs, index: int, placement: Placement) -> Keypoints:
        """One image's rows of a `keypoints` model, without padding rows and without points outside the image."""
        scores = outputs["scores"][index]
        xy = outputs["keypoints"][index]
        wanted = (scores > self._options.threshold) & inside_border(xy, placement.placed_wh, self._options)
        rows = np.flatnonzero(wanted)[: self._options.max_keypoints]
        descriptors = outputs["descriptors"][index][rows]
        return Keypoints(placement.to_image(xy[rows]), scores[rows], descriptors, placement.image_wh)

    def run_now(self, batch: Sequence[PreparedImage]) -> list[Keypoints]:
        """Runs a batch and waits for it."""
        return self.finish(self._backend.infer(_stacked(batch)), batch)

    def finish(self, outputs: Outputs, batch: Sequence[PreparedImage]) -> list[Keypoints]:
        """A batch's outputs -> the Keypoints of each image, in the type asked for."""
        check_finite(outputs)
        found = self.decode(outputs, [image.placement for image in batch])
        return [replace(one, descriptors=one.descriptors.astype(self._descriptor_type, copy=False)) for one in found]

    def slots(self, count: int) -> _HostSlots:
        """Slots whose runs go on while others are decoded, if the backend can; else they run when collected."""
        backend = self._backend
        if count > 1 and isinstance(backend, AsyncBackend):
            return _HostSlots([_AsyncSlot(self, backend) for _ in range(count)])
        return _HostSlots([_HostSlot(self) for _ in range(count)])

    def run_timed(self, images: Sequence[ImageLike]) -> dict[str, float]:
        """Seconds of preprocess, network, decode, and where there is a device, of the copies to and from it."""
        started = time.perf_counter()
        batch = [self.prepare(image) for image in images]
        inputs = _stacked(batch)
        spans = {"preprocess": time.perf_counter() - started}
        outputs, steps = self._backend.infer_timed(inputs)
        started = time.perf_counter()
        self.finish(outputs, batch)
        return {**spans, **steps, "decode": time.perf_counter() - started}

    def run_on_device(self, image: ImageLike) -> DeviceKeypoints:
        """Refuses: the results are decoded on the host."""
        raise SuperPointError(
            f"results stay on the GPU with a heads engine only; this is {self._model.type.value} on "
            f"{self._runtime}: superpoint export --type heads, then superpoint build."
        )


class _HostSlot:
    """Keeps a batch until it is collected."""

    def __init__(self, runner: HostRunner) -> None:
        self._runner = runner
        self._batch: Sequence[PreparedImage] = ()

    def submit(self, batch: Sequence[PreparedImage], batch_size: int) -> None:
        self._batch = batch

    def collect(self) -> list[Keypoints]:
        batch, self._batch = self._batch, ()
        return self._runner.run_now(batch)

    def abandon(self) -> None:
        self._batch = ()


class _AsyncSlot:
    """Begins a batch's run, which goes on in other threads."""

    def __init__(self, runner: HostRunner, backend: AsyncBackend) -> None:
        self._runner, self._backend = runner, backend
        self._run: PendingRun | None = None
        self._batch: Sequence[PreparedImage] = ()

    def submit(self, batch: Sequence[PreparedImage], batch_size: int) -> None:
        self._run, self._batch = self._backend.begin(_stacked(batch)), batch

    def collect(self) -> list[Keypoints]:
        run, self._run = self._run, None
        assert run is not None, "collect follows submit"
        return self._runner.finish(run.result(), self._batch)

    def abandon(self) -> None:
        if self._run is not None:
            self._run.abandon()
            self._run = None


def _stacked(batch: Sequence[PreparedImage]) -> Float32:
    """The network's input (B, 1, H, W)."""
    if len(batch) == 1:
        return batch[0].pixels[None, None]
    return np.stack([image.pixels for image in batch])[:, None]


class _HostSlots:
    """As many slots as wanted: the host has no resources to share out."""

    def __init__(self, slots: Sequence[BatchSlot]) -> None:
        self._slots = slots

    def __enter__(self) -> Sequence[BatchSlot]:
        return self._slots

    def __exit__(self, *_: object) -> None:
        pass


# ------------------------------------------------------------------------------------------------------ on the GPU


class DeviceRunner(Runner):
    """A `heads` engine and CUDA kernels take images to keypoints on the GPU.

    Args:
        lanes: of the opened engine.
        model: what the engine is.
        max_side_px: shrink larger images first.
        reading: which image files are read.
    """

    def __init__(self, lanes: Lanes, model: ModelDescription, max_side_px: int | None, reading: ReadOptions) -> None:
        self.lanes = lanes
        self._model, self._max_side_px, self._reading = model, max_side_px, reading
        self._placements: dict[tuple[int, ...], Placement] = {}

    def prepare(self, image: ImageLike) -> PreparedImage:
        """The image as uint8 if it can stay so, else float32 in [0, 1]; not yet padded: a lane pads in its buffer."""
        loaded = as_loaded(image, self._reading, needed_side_px(self._model, self._max_side_px))
        array, shape = loaded.pixels, (*loaded.full_hw, *loaded.pixels.shape)
        placement = self._placements.get(shape)
        if placement is None:
            check_image(array)
            placement = place(loaded.full_hw, self._model, self._max_side_px)
            if len(self._placements) >= _MOST_PLACEMENTS:
                self._placements.clear()
            self._placements[shape] = placement
        if array.ndim == 2 and array.dtype == np.uint8 and not placement.resized:
            return PreparedImage(array, placement)
        return PreparedImage(placed_gray(loaded, placement), placement)

    def slots(self, count: int) -> AbstractContextManager[Sequence[BatchSlot]]:
        """Slots with a stream each."""
        return self.lanes.borrow(count)

    def run_timed(self, images: Sequence[ImageLike]) -> dict[str, float]:
        """Seconds of preprocess, host_to_device, network, and decode, which also writes the results to the host."""
        started = time.perf_counter()
        batch = [self.prepare(image) for image in images]
        with self.lanes.borrow(1) as (slot,):
            filled, spans = slot.timed(batch)
        return {"preprocess": filled - started, **spans}

    def run_on_device(self, image: ImageLike) -> DeviceKeypoints:
        """The keypoints of one image in GPU memory, valid until the next call."""
        prepared = self.prepare(image)
        with self.lanes.borrow(1) as (slot,):
            return slot.on_device(prepared)

    def close(self) -> None:
        """Frees the lanes."""
        self.lanes.close()
