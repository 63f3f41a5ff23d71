"""Frames of videos, by PyAV: which there are, with their exact times, and their pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, is_regular_file, one_line
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.contexts import Closes

VIDEO_SUFFIXES = (
    ".mp4",
    ".mov",
    ".m4v",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".m2ts",
    ".wmv",
    ".3gp",
)

_SEEK_BEYOND_S = 10.0
"""A frame that lies further ahead is sought; up to it, frames are decoded one after another."""


class Frame(NamedTuple):
    """One frame of a video."""

    number: int
    """From 0, in the order in which frames are shown."""
    pts: int
    """Presentation time in the file's own ticks."""
    time_s: float
    """Presentation time in seconds, as the file has it; the first frame's need not be 0."""

    @property
    def name(self) -> str:
        """For example "000123_4.100s"."""
        return f"{self.number:06d}_{self.time_s:.3f}s"


def is_video_name(path: PathLike) -> bool:
    """Whether a file of this name is taken for a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def list_frames(path: PathLike) -> list[Frame]:
    """The frames of a video's first video stream, in the order in which they are shown.

    Reads the file's packets without decoding them, which takes about as long as reading the file.

    Raises:
        SuperPointError: no video, or PyAV is missing.
    """
    with VideoReader(path) as video:
        return video.frames()


def choose_frames(frames: Sequence[Frame], every: int = 1, fps: float | None = None) -> list[Frame]:
    """Some of a video's frames.

    Args:
        frames: in the order in which they are shown; times may have any distances.
        every: of each `every` frames the first.
        fps: at most this many frames a second: the first frame at or after each tick, counted from the first frame on.

    Raises:
        SuperPointError: a number is out of range.
    """
    if every < 1:
        raise SuperPointError(f"--every is {every}; expected 1 or more.")
    if fps is not None and not 0 < fps < 1e6:
        raise SuperPointError(f"--fps is {fps:g}; expected a number of frames a second, 2 say.")
    chosen = list(frames[::every])
    if fps is None or not chosen:
        return chosen
    kept, next_tick, start_s = [], 0, chosen[0].time_s
    for frame in chosen:
        tick = (frame.time_s - start_s) * fps + 1e-6  # a frame exactly at its tick counts, whatever the rounding
        if tick >= next_tick:
            kept.append(frame)
            next_tick = int(tick) + 1
    return kept


class VideoReader(Closes):
    """Reads single frames of a video, fastest in rising order. A context manager; for one thread.

    Raises:
        SuperPointError: no such file, no video, or PyAV is missing.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._av = import_av()
        if not is_regular_file(self.path, "video"):
            raise SuperPointError(f"video {path} does not exist (looked in {Path.cwd()}).")
        try:
            self._container = self._av.open(str(self.path))
            self._stream = self._container.streams.video[0]
        except (self._av.error.FFmpegError, IndexError) as error:
            raise SuperPointError(f"{path} cannot be opened as a video: {_why(error)}.") from error
        self._stream.thread_type = "AUTO"
        self._decoded: Iterator[Any] = iter(())
        self._at: int | None = None
        """Time of the frame that was decoded last, in ticks; None: nothing was since the last seek."""

    def frames(self) -> list[Frame]:
        """All frames, in the order in which they are shown; of frames with equal times, one.

        Raises:
            SuperPointError: the file is damaged, or has no times.
        """
        try:
            packets = [packet for packet in self._container.demux(self._stream) if packet.size]
            times = [packet.pts for packet in packets if not packet.is_discard]
            if None in times:
                self._seek(None)  # a container without times of its own; decoding gives them
                times = [frame.pts for frame in self._decoded]
        except self._av.error.FFmpegError as error:
            raise SuperPointError(f"{self.path} cannot be read as a video: {_why(error)}.") from error
        if not times or None in times:
            what = "has frames without times" if times else "has no frames"
            raise SuperPointError(f"{self.path} {what}; write it anew: ffmpeg -fflags +genpts -i OLD -c copy NEW.mp4")
        tick_s = self._stream.time_base or Fraction(1)
        return [Frame(number, pts, float(pts * tick_s)) for number, pts in enumerate(sorted(set(times)))]

    def read(self, frame: Frame) -> NDArray[np.uint8]:
        """The pixels of a frame, upright: the rotation that the file asks for is applied.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            SuperPointError: it cannot be decoded.
        """
        try:
            found = self._find(frame)
        except self._av.error.FFmpegError as error:
            self._at = None
            raise SuperPointError(f"{self.path}: frame {frame.number} cannot be decoded: {_why(error)}.") from error
        if found is None:
            raise SuperPointError(f"{self.path}: frame {frame.number} cannot be decoded; the video is damaged there.")
        pixels: NDArray[np.uint8] = found.to_ndarray(format="rgb24")
        quarter_turns = round(found.rotation / 90)  # counterclockwise, as numpy's
        return np.ascontiguousarray(np.rot90(pixels, quarter_turns)) if quarter_turns % 4 else pixels

    def _find(self, frame: Frame) -> Any:
        """The decoded frame of that time, or None."""
        tick_s = float(self._stream.time_base or 1)
        if self._at is None or not self._at < frame.pts <= self._at + _SEEK_BEYOND_S / tick_s:
            return self._seek_and_find(frame.pts, tick_s)
        return self._advance(frame.pts)

    def _seek_and_find(self, pts: int, tick_s: float) -> Any:
        """Seeks further and further back until decoding starts at or before a time.

        Where frames are stored in another order than shown, the first try may start behind it.
        """
        for back_s in (0.0, 2.0, 30.0):
            self._seek(pts - int(back_s / tick_s))
            first = next(self._decoded, None)
            if first is not None and first.pts is not None and first.pts <= pts:
                self._at = first.pts
                return first if first.pts == pts else self._advance(pts)
        self._seek(None)
        return self._advance(pts)

    def _seek(self, pts: int | None) -> None:
        """Goes to the last key frame at or before a time; None: to the beginning."""
        self._decoded, self._at = iter(()), None
        start = self._stream.start_time or 0
        at_start = pts is None or pts <= start
        if at_start:  # not every file can be sought in, so the beginning is reached by opening it again
            self._container.close()
            self._container = self._av.open(str(self.path))
            self._stream = self._container.streams.video[0]
            self._stream.thread_type = "AUTO"
        else:
            self._container.seek(pts, stream=self._stream, backward=True)
        self._decoded = self._frames_from_here()

    def _frames_from_here(self) -> Iterator[Any]:
        """Decodes on; packets that cannot be decoded are left out."""
        for packet in self._container.demux(self._stream):
            try:
                yield from packet.decode()
            except self._av.error.InvalidDataError:
                continue

    def _advance(self, pts: int) -> Any:
        for frame in self._decoded:
            if frame.pts is None:
                continue
            self._at = frame.pts
            if frame.pts >= pts:
                return frame if frame.pts == pts else None
        return None

    def close(self) -> None:
        """Closes the file."""
        self._decoded = iter(())
        self._container.close()


def import_av() -> ModuleType:
    """The module av, PyAV.

    Raises:
        SuperPointError: it is not installed.
    """
    try:
        import av
        import av.error
    except ImportError as error:
        raise SuperPointError(f"videos need PyAV: {install_hint('bulk')}.") from error
    av.logging.set_level(None)  # errors are reported once, as exceptions
    return av


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or (
        "it has no video stream" if isinstance(error, IndexError) else one_line(error)
    )
