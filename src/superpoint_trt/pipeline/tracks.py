"""Tracks of points through a sequence of images.

Each image is matched with the one before it and with no other. A point that is matched goes on as the same track, one
that is not begins a new track, and a track whose point is not found again ends. So a track has no gaps, and a point
that comes back later is a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, write_npz
from superpoint_trt.core.types import Float32, Keypoints, SuperPointError
from superpoint_trt.match.nearest import MatchOptions, match
from superpoint_trt.run.draw import Picture, ramp


@dataclass(frozen=True)
class TrackOptions:
    """Which points are the same, and which tracks count."""

    max_distance: float = 0.7
    """Largest L2 distance of the descriptors of a point in two images."""
    min_length: int = 2
    """Images that a track has at least, to be drawn and saved."""
    max_length: int = 5
    """Newest images through which the path of a track is drawn."""

    def __post_init__(self) -> None:
        MatchOptions(max_distance=self.max_distance)  # checks it
        if self.min_length < 1:
            raise SuperPointError(f"the least length of a track is {self.min_length} images; expected 1 or more.")
        if self.max_length < 2:
            raise SuperPointError(f"paths are drawn through {self.max_length} images; expected 2 or more.")


@dataclass(frozen=True, eq=False)
class TracksNow:
    """The tracks of the newest image: one for each of its N keypoints."""

    numbers: NDArray[np.int64]
    """(N,) which track a keypoint belongs to; a number is used once."""
    lengths: NDArray[np.int64]
    """(N,) images that the track has so far."""
    paths: Float32
    """(N, L, 2) float32: x, y px in the newest L images, the newest last; NaN before the track began."""
    keypoints: Keypoints


class PointTracker:
    """Follows points from image to image."""

    def __init__(self, options: TrackOptions | None = None) -> None:
        self.options = options or TrackOptions()
        self._now: TracksNow | None = None
        self._begun = 0

    def update(self, keypoints: Keypoints) -> TracksNow:
        """Takes the next image.

        Returns:
            Its tracks, in the order of its keypoints.
        """
        count = len(keypoints)
        lengths = np.zeros(count, np.int64)
        numbers = np.full(count, -1, np.int64)
        paths = np.full((count, self.options.max_length, 2), np.nan, np.float32)
        before = self._now
        if before is not None:
            options = MatchOptions(max_distance=self.options.max_distance)
            there, here = match(before.keypoints.descriptors, keypoints.descriptors, options).rows.T
            lengths[here], numbers[here] = before.lengths[there], before.numbers[there]
            paths[here, :-1] = before.paths[there, 1:]
        begin = numbers < 0
        numbers[begin] = self._begun + np.arange(begin.sum())
        self._begun += int(begin.sum())
        paths[:, -1] = keypoints.xy
        self._now = TracksNow(numbers, lengths + 1, paths, keypoints)
        return self._now


@dataclass(frozen=True, eq=False)
class Tracks:
    """All tracks of a sequence, as rows: one for each point in each image, image by image."""

    track: NDArray[np.int64]
    """(R,) number of the track, from 0."""
    frame: NDArray[np.int64]
    """(R,) index of the image in `names`."""
    xy: Float32
    """(R, 2) float32: x, y px, pixel centres at integers."""
    scores: Float32
    """(R,) float32."""
    names: tuple[str, ...]
    """Of the F images."""
    times_s: NDArray[np.float64]
    """(F,) float64 seconds."""

    def __len__(self) -> int:
        """Number of tracks."""
        return int(self.track[-1:].size and self.track.max() + 1)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Images of each track."""
        return np.bincount(self.track, minlength=len(self)).astype(np.int64)


class TrackRecord:
    """Collects the tracks of a sequence."""

    def __init__(self) -> None:
        self._seen: list[TracksNow] = []
        self._names: list[str] = []
        self._times_s: list[float] = []

    def __len__(self) -> int:
        """Number of images."""
        return len(self._names)

    def add(self, name: str, time_s: float, now: TracksNow) -> None:
        """Notes one image's tracks; their descriptors and paths are not kept."""
        found = now.keypoints
        bare = Keypoints(found.xy, found.scores, found.descriptors[:0], found.image_size)
        self._seen.append(TracksNow(now.numbers, now.lengths, now.paths[:0], bare))
        self._names.append(name)
        self._times_s.append(time_s)

    def tracks(self, min_length: int) -> Tracks:
        """The tracks with at least so many images, numbered anew."""
        numbers = np.concatenate([np.zeros(0, np.int64), *(now.numbers for now in self._seen)])
        frames = np.repeat(np.arange(len(self._seen)), [len(now.numbers) for now in self._seen])
        xy = np.concatenate([np.zeros((0, 2), np.float32), *(now.keypoints.xy for now in self._seen)])
        scores = np.concatenate([np.zeros(0, np.float32), *(now.keypoints.scores for now in self._seen)])
        lasting = np.bincount(numbers) >= min_length
        kept = lasting[numbers]
        anew = np.cumsum(lasting) - 1
        times_s = np.array(self._times_s, np.float64)
        return Tracks(anew[numbers[kept]], frames[kept], xy[kept], scores[kept], tuple(self._names), times_s)


def save_tracks(path: PathLike, tracks: Tracks) -> Path:
    """Writes the fields of `Tracks` as arrays of an .npz.

    Raises:
        SuperPointError: the file cannot be written; a file that was there is unchanged.
    """
    arrays: dict[str, NDArray[Any]] = {
        name: getattr(tracks, name) for name in ("track", "frame", "xy", "scores", "times_s")
    }
    return write_npz(path, {**arrays, "names": np.array(tracks.names, dtype=np.str_)})


def draw_tracks(image_rgb: Picture, now: TracksNow, options: TrackOptions) -> Picture:
    """Draws the paths of the newest image's tracks on a copy of it, long ones in yellow, short ones in blue.

    Args:
        image_rgb: (H, W, 3) uint8, the newest image.
        now: its tracks.
        options: which tracks are drawn, and over how many images.
    """
    import cv2

    picture = np.array(image_rgb, dtype=np.uint8, order="C")
    width = max(1, round(max(picture.shape[:2]) / 640))
    colors = ramp(options.max_length)[::-1]  # dark to bright
    bits = 4
    for row in np.argsort(now.lengths, kind="stable"):  # long ones lie on top
        if now.lengths[row] < options.min_length:
            continue
        path = now.paths[row][-int(now.lengths[row]) :] * (1 << bits)
        color = _ints(colors[min(int(now.lengths[row]), options.max_length) - 1])
        points = np.round(path).astype(np.int32)
        cv2.polylines(picture, [points], False, color, width, cv2.LINE_AA, bits)
        cv2.circle(picture, points[-1].tolist(), (width + 1) << bits, color, -1, cv2.LINE_AA, bits)
    return picture


def _ints(color: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in color)
