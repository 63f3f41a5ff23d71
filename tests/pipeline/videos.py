"""Small videos whose frames show their own number, for tests. Needs PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

WIDTH, HEIGHT = 160, 96


def picture(number: int) -> np.ndarray:
    """A frame: its number in 8 bars, bit by bit from the left, and a white corner at the top left."""
    image = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    for bit in range(8):
        image[32:, 20 * bit : 20 * (bit + 1)] = 220 if number >> bit & 1 else 20
    image[:24, :24] = 255
    return image


def number_of(image: np.ndarray) -> int:
    """The number of an upright frame."""
    return sum(1 << bit for bit in range(8) if image[64, 20 * bit + 10].mean() > 120)


def write_video(
    path: Path, times_ms: Sequence[int], codec: str = "libx264", rotation: int | None = None, **options: str
) -> Path:
    """A video whose frame i shows the number i at a time in ms."""
    av = pytest.importorskip("av", reason="videos need PyAV: pip install '.[bulk]'")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = WIDTH, HEIGHT, "yuv420p", options
        stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this PyAV writes no rotation")
            stream.set_display_rotation(rotation)
        for number, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
