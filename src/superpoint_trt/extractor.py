"""`SuperPoint`: image -> preprocess -> backend -> decode -> Keypoints. What a library user imports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt import decode
from superpoint_trt import image as images
from superpoint_trt.backends import Outputs, RuntimeInfo, open_backend
from superpoint_trt.files import PathLike
from superpoint_trt.image import ImageLike, Placement
from superpoint_trt.spec import DecodeOptions, Float32, Keypoints, ModelDescription, OutputType, SuperPointError

_MOST = {"max_side": 1 << 20, "threads": 1024}


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
        return self.extract_batch([image])[0]

    def extract_batch(self, batch: Iterable[ImageLike]) -> list[Keypoints]:
        """The keypoints of several images, of one size or many, in their order.

        Neighbours that make equal network inputs share a run, up to the model's largest batch.

        Raises:
            SuperPointError: as `extract`; or one path or array was given instead of several.
        """
        if isinstance(batch, (str, os.PathLike)) or getattr(batch, "ndim", 3) == 2:
            raise SuperPointError("extract_batch takes several images: a list of paths or arrays; extract takes one.")
        found: list[Keypoints] = []
        pending: list[tuple[Float32, Placement]] = []
        for image in batch:
            prepared, placement = self.prepare(image)
            full = len(pending) == self.description.max_batch_size
            if pending and (full or pending[0][0].shape != prepared.shape):
                found += self._run(pending)
                pending = []
            pending.append((prepared, placement))
        return found + (self._run(pending) if pending else [])

    def prepare(self, image: ImageLike) -> tuple[Float32, Placement]:
        """The first of the three steps of `extract`: the network's input (H, W), and where the image lies in it."""
        gray = images.to_gray(images.as_array(image))
        placement = images.place(gray.shape[:2], self.description, self._max_side_px)
        return images.to_input(gray, placement), placement

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
            descriptors = decode.normalise(outputs["coarse_descriptors"], axis=1)
        else:
            scores, descriptors = outputs["scores"], outputs["descriptors"]
        return [self._select(s, d, placement) for s, d, placement in zip(scores, descriptors, placements)]

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

    def _run(self, prepared: Sequence[tuple[Float32, Placement]]) -> list[Keypoints]:
        inputs, placements = zip(*prepared)
        return self.decode(self.infer(np.stack(inputs)[:, None]), placements)

    def close(self) -> None:
        """Frees the model; the extractor cannot be used afterwards."""
        self._backend.close()

    def __enter__(self) -> SuperPoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


def _size(placement: Placement) -> tuple[int, int]:
    return placement.image_width_px, placement.image_height_px
