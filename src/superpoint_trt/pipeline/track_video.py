"""Follows points through a video, a folder of images or a camera, and writes a video of their tracks."""

from __future__ import annotations

import fnmatch
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, check_writable, make_folder
from superpoint_trt.core.image import load_image, to_picture
from superpoint_trt.core.image_file import opencv_quiet, upright_size
from superpoint_trt.core.progress import PhaseProgress
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.inputs import Item, find_items
from superpoint_trt.pipeline.pairs import in_sequence
from superpoint_trt.pipeline.tracks import PointTracker, TrackOptions, TrackRecord, Tracks, draw_tracks, save_tracks
from superpoint_trt.pipeline.video import VideoReader
from superpoint_trt.pipeline.video_writer import VideoWriter
from superpoint_trt.run.captions import Picture
from superpoint_trt.run.draw import save_picture
from superpoint_trt.run.extractor import SuperPoint
from superpoint_trt.run.store import check_npz

CAMERA = "camera"
"""The source that is a camera, not a file."""
WINDOW = "superpoint track (q: stop)"


@dataclass(frozen=True)
class SourceOptions:
    """Which images of a source are taken."""

    every: int = 1
    """Of each so many images the first."""
    image_glob: str | None = None
    """Names that a folder's images must have: "*.png"."""
    fps: float = 10.0
    """Images a second that a folder's images are shown at."""
    camera: int = 0
    """Number of the camera."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SuperPointError(f"every is {self.every}; expected 1 or more: of each so many images the first.")
        if not 0 < self.fps <= 1000:
            raise SuperPointError(f"{self.fps:g} images a second; expected more than 0, at most 1000.")


@dataclass(frozen=True)
class TrackOutputs:
    """What is made of the tracks; nothing is required."""

    video: PathLike | None = None
    """A video of the tracks: .mp4, .mkv, .mov or .webm."""
    tracks: PathLike | None = None
    """All tracks, as an .npz."""
    pictures: PathLike | None = None
    """A folder for a .png of each image."""
    window: bool = False
    """Whether each picture is shown on the screen."""


@dataclass(frozen=True)
class TrackSummary:
    """What was followed."""

    tracks: Tracks = field(repr=False)
    seconds: float = 0.0
    left_out: tuple[str, ...] = ()
    """Why images were left out, one line for each."""

    @property
    def frames(self) -> int:
        """Images that were followed through."""
        return len(self.tracks.names)


class SourceFrame(NamedTuple):
    """One image of a source."""

    name: str
    time_s: float
    pixels: NDArray[Any]
    """As `load_image` returns it."""


def track(
    source: PathLike,
    superpoint: SuperPoint,
    outputs: TrackOutputs,
    options: TrackOptions | None = None,
    source_options: SourceOptions | None = None,
    progress: PhaseProgress | None = None,
) -> TrackSummary:
    """Follows points through a sequence of images.

    All images must have one size, because a track is a row of places in one picture. This is looked at before the work.
    An image that cannot be read is left out. A camera is followed until the user interrupts (Ctrl-C), or presses q in
    the window; what was followed until then is written.

    Args:
        source: a video, a folder of images, a glob or a list of them, or "camera".
        superpoint: finds the points.
        outputs: what is made of the tracks.
        options: which points are the same.
        source_options: which images are taken.
        progress: is told how many images are done.

    Raises:
        SuperPointError: the source cannot be read, its images differ in size, an output cannot be written, or there is
            no screen for a window.
    """
    options, source_options = options or TrackOptions(), source_options or SourceOptions()
    tracker, record, left_out, same = PointTracker(options), TrackRecord(), list[str](), OneSize()
    is_live, started = source == CAMERA, time.monotonic()
    with ExitStack() as stack:
        frames, total = _open_source(source, source_options, left_out, stack, progress)
        sinks = [stack.enter_context(sink) for sink in _open_sinks(outputs)]
        try:
            for frame, found in _extracted(superpoint, frames, is_live):
                if isinstance(found, SuperPointError):
                    left_out.append(f"{frame.name}: {found}")
                    continue
                same.check(frame.name, found.image_size)  # also frames of videos, and formats whose header is unknown
                now = tracker.update(found)
                record.add(frame.name, frame.time_s, now)
                if sinks:
                    picture = draw_tracks(to_picture(frame.pixels), now, options)
                    for sink in sinks:
                        sink.show(frame, picture)
                if progress:
                    progress("following points", len(record), total)
        except _Stopped:
            pass
        except KeyboardInterrupt:
            if not is_live:
                raise
    if not len(record):
        raise SuperPointError(f"{source} has no image that can be read" + (f": {left_out[0]}" if left_out else "."))
    tracks = record.tracks(options.min_length)
    if outputs.tracks is not None:
        save_tracks(outputs.tracks, tracks)
    return TrackSummary(tracks, time.monotonic() - started, tuple(left_out))


class _Stopped(Exception):
    """The user has seen enough."""


def _extracted(
    superpoint: SuperPoint, frames: Iterable[SourceFrame], is_live: bool
) -> Iterator[tuple[SourceFrame, Any]]:
    """Each image with its keypoints, or the error that says why there are none."""
    waiting: deque[SourceFrame] = deque()

    def pixels() -> Iterator[NDArray[Any]]:
        for frame in frames:
            waiting.append(frame)
            yield frame.pixels

    if is_live:  # nothing is read ahead, so that the picture is not late
        yield from ((waiting.popleft(), superpoint.extract(image)) for image in pixels())
        return
    for found in superpoint.extract_many(pixels()):
        yield waiting.popleft(), found


# -------------------------------------------------------------------------------------------------------------- sources


def _open_source(
    source: PathLike,
    options: SourceOptions,
    left_out: list[str],
    stack: ExitStack,
    progress: PhaseProgress | None,
) -> tuple[Iterator[SourceFrame], int]:
    """The images of a source, and their number, or 0 if nobody knows it.

    Raises:
        SuperPointError: there are none, or of different sizes.
    """
    if source == CAMERA:
        return _camera_frames(options), 0
    found = {item.name: item for item in find_items([source])}
    items = [found[name] for name in in_sequence(found)]
    if options.image_glob is not None:
        items = [item for item in items if fnmatch.fnmatch(os.path.basename(item.path), options.image_glob)]
        if not items:
            raise SuperPointError(f"{source} holds no image whose name is {options.image_glob!r}.")
    items = items[:: options.every]
    _check_sizes(items, progress)
    return _file_frames(items, options, left_out, stack), len(items)


def _check_sizes(items: Sequence[Item], progress: PhaseProgress | None) -> None:
    """Checks by their headers that all image files have one size.

    Raises:
        SuperPointError: naming the first that has another.
    """
    same = OneSize()
    for done, item in enumerate(items):
        size = upright_size(item.path) if item.frame is None else None
        if size is not None:
            same.check(item.name, size)
        if progress:
            progress("looking at sizes", done + 1, len(items))


class OneSize:
    """Checks images one after another: all must have the size of the first."""

    def __init__(self) -> None:
        self._first: tuple[str, tuple[int, int]] | None = None

    def check(self, name: str, size: tuple[int, int]) -> None:
        """Checks an image's (width, height) in px.

        Raises:
            SuperPointError: it differs.
        """
        self._first = self._first or (name, size)
        first, expected = self._first
        if size != expected:
            raise SuperPointError(
                f"{name} has {size[0]}x{size[1]} px, {first} {expected[0]}x{expected[1]}; tracks need images of one "
                "size: scale them first, or choose some with --img-glob."
            )


def _file_frames(
    items: Iterable[Item], options: SourceOptions, left_out: list[str], stack: ExitStack
) -> Iterator[SourceFrame]:
    videos: dict[str, VideoReader] = {}
    for index, item in enumerate(items):
        try:
            if item.frame is None:
                yield SourceFrame(item.name, index / options.fps, load_image(item.path))
                continue
            if item.path not in videos:
                videos[item.path] = stack.enter_context(VideoReader(item.path))
            yield SourceFrame(item.name, item.frame.time_s, videos[item.path].read(item.frame))
        except SuperPointError as error:
            left_out.append(str(error))


def _camera_frames(options: SourceOptions) -> Iterator[SourceFrame]:
    """The images of a camera until the user interrupts."""
    import cv2

    with opencv_quiet():
        camera = cv2.VideoCapture(options.camera)
    try:
        if not camera.isOpened():
            raise SuperPointError(f"camera {options.camera} cannot be opened; --camid gives another number.")
        started, index = time.monotonic(), 0
        while True:
            is_read, pixels = camera.read()
            if not is_read:
                raise SuperPointError(f"camera {options.camera} gives no more images.")
            if index % options.every == 0:
                yield SourceFrame(f"{index:06}", time.monotonic() - started, pixels[..., ::-1])
            index += 1
    finally:
        camera.release()


# -------------------------------------------------------------------------------------------------------------- outputs


class _Sink(Protocol):
    """Where the pictures of the tracks go."""

    def show(self, frame: SourceFrame, picture: Picture) -> None: ...

    def __enter__(self) -> _Sink: ...

    def __exit__(self, *error: Any) -> None: ...


def _open_sinks(outputs: TrackOutputs) -> list[_Sink]:
    """Checks all outputs before the work.

    Raises:
        SuperPointError: one cannot be written.
    """
    if outputs.tracks is not None:
        check_npz(check_writable(outputs.tracks))
    sinks: list[_Sink] = []
    if outputs.video is not None:
        sinks.append(_Video(outputs.video))
    if outputs.pictures is not None:
        sinks.append(_Pictures(make_folder(outputs.pictures)))
    if outputs.window:
        sinks.append(_Window())
    return sinks


class _Video:
    """A video with the source's times."""

    def __init__(self, path: PathLike) -> None:
        self._writer = VideoWriter(path)

    def show(self, frame: SourceFrame, picture: Picture) -> None:
        self._writer.write(picture, frame.time_s)

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)


class _Pictures:
    """A folder of numbered pictures."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def show(self, frame: SourceFrame, picture: Picture) -> None:
        save_picture(self._folder / f"frame_{self._count:05}.png", picture)
        self._count += 1

    def __enter__(self) -> _Pictures:
        return self

    def __exit__(self, *error: Any) -> None: ...


class _Window:
    """A window on the screen."""

    def __init__(self) -> None:
        import cv2

        try:
            cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise SuperPointError(
                "this OpenCV cannot show a window (opencv-python-headless, or no screen): give --output tracks.mp4, or "
                "pip install opencv-python in its place."
            ) from error

    def show(self, frame: SourceFrame, picture: Picture) -> None:
        import cv2

        cv2.imshow(WINDOW, picture[..., ::-1])
        if cv2.waitKey(1) & 0xFF == ord("q"):
            raise _Stopped

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *error: Any) -> None:
        import cv2

        cv2.destroyWindow(WINDOW)
