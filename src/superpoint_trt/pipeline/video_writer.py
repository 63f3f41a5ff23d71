"""Writes videos, by PyAV."""

from __future__ import annotations

import os
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from superpoint_trt.core.files import PathLike, check_writable, one_line
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.pipeline.contexts import WritesWhole
from superpoint_trt.pipeline.video import import_av
from superpoint_trt.run.captions import Picture

WRITTEN_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")
CODECS = ("libx264", "mpeg4")
"""The first that this PyAV has is used."""
_TICKS_A_SECOND = 60_000
"""mpeg4 takes at most 65535."""
_RATE = 30
"""Images a second that players are told; the images' own times count."""
_QUALITY = {"crf": "20", "preset": "veryfast"}


class VideoWriter(WritesWhole):
    """Writes pictures as a video. A context manager.

        with VideoWriter("tracks.mp4") as video:
            video.write(picture, time_s=0.1)

    It is written beside its place and renamed when the context ends without an error. All pictures have the size of the
    first one; of odd sizes the last column or row is repeated.

    Raises:
        SuperPointError: the place cannot be written to, the ending is no video's, or PyAV is missing.
    """

    def __init__(self, path: PathLike) -> None:
        self._av, self.path = import_av(), Path(path)
        if self.path.suffix.lower() not in WRITTEN_SUFFIXES:
            raise SuperPointError(
                f"{path}: a video that is written has a name that ends in {', '.join(WRITTEN_SUFFIXES)}."
            )
        target = check_writable(path).resolve()
        self._place = target
        self._beside = target.with_name(f".{target.stem}.{os.urandom(8).hex()}{target.suffix}")
        self._container: Any = None
        self._stream: Any = None
        self._last_ticks = -1
        self._start_s: float | None = None

    def write(self, picture: Picture, time_s: float) -> None:
        """Adds a picture.

        Args:
            picture: (H, W, 3) uint8 RGB.
            time_s: when it is shown, counted from any moment; later than the picture before.

        Raises:
            SuperPointError: it cannot be written, or has another size than the first one.
        """
        try:
            if self._container is None:
                self._open(picture)
            if (self._stream.width, self._stream.height) != _even_size(picture):
                raise SuperPointError(
                    f"{self.path}: a picture has {picture.shape[1]}x{picture.shape[0]} px, the first one "
                    f"{self._stream.width}x{self._stream.height}; a video needs images of one size."
                )
            self._start_s = time_s if self._start_s is None else self._start_s
            self._last_ticks = max(self._last_ticks + 1, round((time_s - self._start_s) * _TICKS_A_SECOND))
            frame = self._av.VideoFrame.from_ndarray(_padded_to_even(picture), format="rgb24")
            frame.pts, frame.time_base = self._last_ticks, Fraction(1, _TICKS_A_SECOND)
            self._container.mux(self._stream.encode(frame))
        except (self._av.error.FFmpegError, OSError) as error:
            raise self._unwritable(error) from error

    def _open(self, picture: Picture) -> None:
        self._container = self._av.open(str(self._beside), "w")
        codec = next((name for name in CODECS if name in self._av.codecs_available), None)
        if codec is None:
            raise SuperPointError(f"this PyAV encodes none of {', '.join(CODECS)}; pip install --upgrade av.")
        self._stream = self._container.add_stream(codec, rate=_RATE, options=_QUALITY if codec == "libx264" else {})
        self._stream.width, self._stream.height = _even_size(picture)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _TICKS_A_SECOND)

    def close(self) -> None:
        """Completes the file and gives it its name; without any picture there is none.

        Raises:
            SuperPointError: it cannot be written; a file that was there is unchanged.
        """
        if self._container is None:
            return
        try:
            self._container.mux(self._stream.encode())
            self._container.close()
            self._beside.replace(self._place)
        except (self._av.error.FFmpegError, OSError) as error:
            self.abandon()
            raise self._unwritable(error) from error
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Ends without a file of that name; an old one stays."""
        with suppress(Exception):
            self._container.close()
        with suppress(OSError):
            self._beside.unlink()

    def _unwritable(self, error: BaseException) -> SuperPointError:
        return SuperPointError(f"{self.path} cannot be written: {getattr(error, 'strerror', None) or one_line(error)}.")


def _even_size(picture: Picture) -> tuple[int, int]:
    """(width, height) px; encoders halve the size of color."""
    return picture.shape[1] + picture.shape[1] % 2, picture.shape[0] + picture.shape[0] % 2


def _padded_to_even(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    return np.ascontiguousarray(np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge"))
