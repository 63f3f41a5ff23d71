"""`SuperPoint`: opens a model and takes images to Keypoints. The class that library users import."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from superpoint_trt import packaged
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.image import ImageLike, Placement, PreparedImage
from superpoint_trt.core.image_file import MOST_PIXELS, ReadOptions
from superpoint_trt.core.networks import packaged_network
from superpoint_trt.core.types import DecodeOptions, Float32, Keypoints, ModelDescription, OutputType, SuperPointError
from superpoint_trt.run.backends import Outputs, RuntimeInfo, open_backend
from superpoint_trt.run.runner import DeviceRunner, HostRunner, Runner, run_key
from superpoint_trt.run.stream import PreparedOrError, StreamOptions, run_groups, stream_keypoints

if TYPE_CHECKING:
    from superpoint_trt.gpu.kernels.decode import DeviceKeypoints
    from superpoint_trt.run.lanes import Lanes

MOST_SIDE_PX = 1 << 20
MOST_THREADS = 1024

_log = logging.getLogger(__name__)


class SuperPoint:
    """One opened model.

        with SuperPoint() as superpoint:
            keypoints = superpoint.extract("photo.jpg")

    Args:
        model: `.onnx`; an engine (`.engine`, `.trt`, `.plan`); a checkpoint (`.pth`, `.safetensors`), which runs in
            the PyTorch reference; or the name of a packaged network ("full"), which is exported to the user's cache at
            first use. None: the default one of these.
        threshold: scores must be strictly greater; default 0.005, or the threshold that a `keypoints` model was
            exported with (there it can be raised, not lowered).
        max_keypoints: keep at most this many, the best; default all (a `keypoints` model: its N).
        nms_radius_px: default 4; fixed inside a `keypoints` model.
        remove_borders_px: default 4; fixed inside a `keypoints` model.
        subpixel: whether keypoints lie between pixels (`run.decode.refine`); default the model's own choice, yes for
            this project's weights; fixed inside a `keypoints` model.
        max_side_px: shrink larger images first; default no.
        device: "auto", "cpu", "cuda", "cuda:N"; or, for `.onnx`, "openvino", "openvino:GPU", "openvino:NPU", each with
            ":fp32" behind it to compute in float32.
        threads: CPU threads; default the runtime's own choice.
        allow_host_code: run the code that a version-compatible TensorRT engine carries. Only for engines from those you
            trust.
        half_descriptors: descriptors as float16, which halves their memory and their copy from a GPU.
        max_pixels: image files with more pixels are refused before they are decoded; default 2^28.
        allow_damaged: read what a decoder can still read of damaged image files; default no, they are an error.
        busy_wait: whether onnxruntime's CPU threads wait for each other in a loop. That is up to 2 % faster alone, and
            much slower beside other work, such as the decoding of files; default yes.

    Attributes:
        description: what the model is.
        runtime: backend, device and precision really used.
        options: the decode options in force.

    Raises:
        SuperPointError: unusable model, device or option.
    """

    def __init__(
        self,
        model: PathLike | None = None,
        *,
        threshold: float | None = None,
        max_keypoints: int | None = None,
        nms_radius_px: int | None = None,
        remove_borders_px: int | None = None,
        subpixel: bool | None = None,
        max_side_px: int | None = None,
        device: str = "auto",
        threads: int | None = None,
        allow_host_code: bool = False,
        half_descriptors: bool = False,
        max_pixels: int = MOST_PIXELS,
        allow_damaged: bool = False,
        busy_wait: bool = True,
    ) -> None:
        for name, value, most in (("max_side", max_side_px, MOST_SIDE_PX), ("threads", threads, MOST_THREADS)):
            if value is not None and not 1 <= value <= most:
                raise SuperPointError(f"{name} is {value}; expected 1 to {most}.")
        reading = ReadOptions(max_pixels, allow_damaged)
        reading.check()
        asked = _AskedDecode(nms_radius_px, remove_borders_px, threshold, max_keypoints, subpixel)
        asked.options()  # checks the ranges before the model is opened, which can take seconds
        model = packaged.DEFAULT if model is None else model
        self._name = str(Path(model))
        network = packaged_network(model)
        path = _exported(network.name) if network else model
        self._backend = open_backend(path, device, threads, allow_host_code, busy_wait)
        self.description: ModelDescription = self._backend.description
        self.options = _decode_options(self.description, asked)
        lanes, where = self._open_lanes(half_descriptors)
        self.runtime: RuntimeInfo = replace(self._backend.runtime, decode=where)
        self._host = HostRunner(self._backend, self.runtime, self.options, max_side_px, half_descriptors, reading)
        self._runner: Runner = DeviceRunner(lanes, self.description, max_side_px, reading) if lanes else self._host

    def _open_lanes(self, half: bool) -> tuple[Lanes | None, str]:
        """Opens GPU decoding of raw heads. If it is unavailable, logs why; then numpy decodes them.

        Returns:
            The lanes or None; and where heads are decoded, for `RuntimeInfo`.
        """
        if self.description.type is not OutputType.HEADS:
            return None, ""
        why = ""
        try:
            lanes = self._backend.lanes(self.options, half)
        except SuperPointError as error:
            _log.warning("heads are decoded on the CPU: %s", error)
            lanes, why = None, f": {error}"
        return lanes, "decode on the GPU (CUDA)" if lanes else f"decode on the CPU (numpy){why}"

    def __repr__(self) -> str:
        return f"SuperPoint({self._name!r}, {self.description.type.value}, {self.runtime})"

    def extract(self, image: ImageLike) -> Keypoints:
        """The keypoints of one image.

        Args:
            image: a path, or an array (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA, of uint8, uint16, bool or
                float in [0, 1]; any size from 8x8 px; or a `LoadedImage`.

        Returns:
            Keypoints in the pixels of that image, by falling score; possibly none.

        Raises:
            SuperPointError: not an image, or the runtime failed.
        """
        return self._runner.run([self._runner.prepare(image)])[0]

    def extract_batch(self, batch: Iterable[ImageLike]) -> list[Keypoints]:
        """The keypoints of several images, of one size or many, in their order.

        Neighbors that make equal network inputs share a run, up to the model's largest batch.

        Raises:
            SuperPointError: as `extract`; or one path or array was given instead of several.
        """
        if isinstance(batch, (str, os.PathLike)) or getattr(batch, "ndim", 3) == 2:
            raise SuperPointError("extract_batch takes several images: a list of paths or arrays; extract takes one.")
        found: list[Keypoints] = []
        pending: list[PreparedImage] = []
        for image in batch:
            prepared = self._runner.prepare(image)
            full = len(pending) == self.description.max_batch_size
            if pending and (full or run_key(pending[0]) != run_key(prepared)):
                found += self._runner.run(pending)
                pending = []
            pending.append(prepared)
        return found + (self._runner.run(pending) if pending else [])

    def extract_many(
        self, images: Iterable[ImageLike], batch_size: int | None = None, in_flight: int = 2, loaders: int | None = None
    ) -> Iterator[Keypoints | SuperPointError]:
        """The keypoints of a stream of images, in its order, as fast as the machine goes.

        Threads read and decode files ahead of the runs. On a GPU with a `heads` engine several batches are under way
        at once, each on a stream of its own. On a CPU a batch runs while the keypoints of the one before are found. No
        more than `(in_flight + 1) * batch_size` images are held: the stream is read on only as results are taken.

        Args:
            images: as `extract` takes them, of one size or many; neighbors of one size share a run.
            batch_size: images in a run; default the model's largest batch.
            in_flight: runs under way at once.
            loaders: threads that read files; default one for each CPU.

        Yields:
            For each image its Keypoints; or the SuperPointError that says why that image could not be read or run.
            The other images are not affected.

        Raises:
            SuperPointError: at the call, batch_size, in_flight or loaders is out of range.
        """
        most = self.description.max_batch_size
        options = StreamOptions(
            most if batch_size is None else batch_size,
            in_flight,
            (os.cpu_count() or 1) if loaders is None else loaders,
        )
        options.check(most)
        return stream_keypoints(self._runner, images, options)

    def load(self, image: ImageLike) -> PreparedImage:
        """Reads an image and makes it ready for `extract_groups`. Several threads may do so at once.

        Raises:
            SuperPointError: not an image.
        """
        return self._runner.prepare(image)

    def extract_groups(
        self, groups: Iterable[Sequence[PreparedOrError]], batch_size: int | None = None, in_flight: int = 2
    ) -> Generator[list[Keypoints | SuperPointError], None, None]:
        """As `extract_many`, of images that the caller has loaded and sorted into runs.

        Args:
            groups: what `load` returned, at most `batch_size` images that may share a run (`run.runner.run_key`);
                errors may stand between them.
            batch_size: images in a run; default the model's largest batch.
            in_flight: runs under way at once.

        Yields:
            For each group, for each entry, its Keypoints, or the SuperPointError that says why there are none.

        Raises:
            SuperPointError: at the call, batch_size or in_flight is out of range.
        """
        most = self.description.max_batch_size
        options = StreamOptions(most if batch_size is None else batch_size, in_flight)
        options.check(most)
        return run_groups(self._runner, groups, options)

    def extract_device(self, image: ImageLike) -> DeviceKeypoints:
        """The keypoints of one image, left on the GPU for later steps there (a matcher). `heads` engines only.

        Args:
            image: as `extract` takes it.

        Returns:
            Keypoints (N, 2), scores (N,) and descriptors (N, D) for torch, CuPy and others (DLPack, CUDA array
            interface); the work is done. Coordinates are pixels of the network's input: the image's own, unless it
            was shrunk. Valid until the next call.

        Raises:
            SuperPointError: as `extract`; or the model is no `heads` engine.
        """
        return self._runner.run_on_device(image)

    def prepare(self, image: ImageLike) -> PreparedImage:
        """The first step of `extract` through the host: the network's input, and where the image lies in it.

        Returns:
            Pixels (H, W) float32 in [0, 1], and their Placement.
        """
        return self._host.prepare(image)

    def infer(self, inputs: Float32) -> Outputs:
        """The second step: (B, 1, H, W) float32 in [0, 1] -> the model's outputs by name (`OUTPUT_NAMES`).

        Unlike `extract`, it returns NaN and infinity as they come, for who looks into a model that is broken.
        """
        return self._backend.infer(inputs)

    def infer_timed(self, inputs: Float32) -> tuple[Outputs, dict[str, float]]:
        """As `infer`, and seconds: network, and where they exist host_to_device and device_to_host."""
        return self._backend.infer_timed(inputs)

    def decode(self, outputs: Outputs, placements: Sequence[Placement]) -> list[Keypoints]:
        """The third step: the model's outputs -> Keypoints of each image of the batch, in that image's own pixels."""
        return self._host.decode(outputs, placements)

    def extract_timed(self, batch: Sequence[ImageLike]) -> dict[str, float]:
        """Runs images that share a run step by step, waiting for each step.

        Returns:
            Seconds of preprocess, network, decode, and where they exist host_to_device and device_to_host.
        """
        return self._runner.run_timed(batch)

    def close(self) -> None:
        """Frees the model; the extractor cannot be used afterwards."""
        self._runner.close()
        self._backend.close()

    def __enter__(self) -> SuperPoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _exported(network: str) -> Path:
    # The only import of the conversion by the runtime: a packaged network is exported when it is opened by its name.
    from superpoint_trt.convert.default_model import default_model

    return default_model(network)


@dataclass(frozen=True)
class _AskedDecode:
    """The decode options that the caller gave; None: not given."""

    nms_radius_px: int | None
    remove_borders_px: int | None
    threshold: float | None
    max_keypoints: int | None
    subpixel: bool | None

    def options(self) -> DecodeOptions:
        """With the usual values in place of those not given."""
        return DecodeOptions(**{name: value for name, value in vars(self).items() if value is not None})


def _decode_options(model: ModelDescription, asked: _AskedDecode) -> DecodeOptions:
    """The decode options of a run: the caller's, within the limits that a `keypoints` model's graph sets.

    Raises:
        SuperPointError: the graph does otherwise.
    """
    chosen = asked.options()
    if chosen.subpixel is None:
        chosen = replace(chosen, subpixel=model.subpixel)
    if model.type is not OutputType.KEYPOINTS:
        return chosen
    if chosen.subpixel != model.subpixel:
        does, flag = ("", "--subpixel") if chosen.subpixel else ("not ", "--no-subpixel")
        raise SuperPointError(
            f"keypoints should {does}be sub-pixel, but this model decides that in its graph; export it with {flag}."
        )
    for name, wanted, in_graph in (
        ("nms_radius_px", asked.nms_radius_px, model.nms_radius_px),
        ("remove_borders_px", asked.remove_borders_px, model.remove_borders_px),
    ):
        if wanted is not None and in_graph is not None and wanted != in_graph:
            raise SuperPointError(
                f"{name} {wanted} was asked for, but this model does {in_graph} in its graph; export it anew."
            )
    threshold_in_graph = model.threshold if model.threshold is not None else 0.0
    if asked.threshold is not None and asked.threshold < threshold_in_graph:
        raise SuperPointError(
            f"threshold {asked.threshold:g} was asked for, but this model drops scores up to {threshold_in_graph:g} "
            "in its graph; export it with a lower --threshold, or as dense."
        )
    return replace(
        chosen,
        nms_radius_px=model.nms_radius_px if model.nms_radius_px is not None else chosen.nms_radius_px,
        remove_borders_px=model.remove_borders_px if model.remove_borders_px is not None else 0,
        threshold=asked.threshold if asked.threshold is not None else threshold_in_graph,
    )
