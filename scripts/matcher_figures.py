"""The pictures of docs/matcher.md: nearest neighbors and the learned matcher on the same points.

Which matches are right is known: by the change that made the second picture, by the cameras of a map of the scene, or
because both pictures have nothing in common.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from map_matchers import MATCHERS, map_with
from numpy.typing import NDArray

from superpoint_trt.core.image import load_image
from superpoint_trt.core.types import Matrix
from superpoint_trt.match.learned import LearnedMatcher
from superpoint_trt.match.nearest import match
from superpoint_trt.pipeline.colmap_map import HALF_PIXEL, MapReport, map_points
from superpoint_trt.pipeline.map_picture import draw_map
from superpoint_trt.prove.metrics import warp
from superpoint_trt.prove.worst_pairs import lines_of_known_truth
from superpoint_trt.run.captions import Picture, add_caption
from superpoint_trt.run.draw import draw_matches
from superpoint_trt.run.extractor import SuperPoint

Distances = Callable[[NDArray[Any], NDArray[Any]], NDArray[np.float64]]
"""How far matched points, (M, 2) in each picture, are from where they belong, (M,) in px."""

WIDTH_PX = 560
"""Of each photograph in a picture of matches."""
MAX_KEYPOINTS = 1024
RIGHT_PX = 3.0
MARGIN_PX = 8
"""White around the changed copy."""
GAP_PX = 10
MAP_PX = 520
"""Height of a map."""
FRAMES = (2, 8)
"""Two of TUM's frames, six seconds apart."""
ZOOM = 0.4
"""Size of a thing in the changed copy of a photograph over its size in the photograph."""
EXPOSURE = 0.6
"""How bright the changed copy of a photograph is."""


@dataclass(frozen=True)
class KnownPair:
    """Two pictures, and which matches between them are right."""

    first: Picture
    second: Picture
    distances_px: Distances


def changed_pair(photo: Picture) -> KnownPair:
    """A photograph, and the same from a side and from far away, turned and darker."""
    height, width = photo.shape[:2]
    matrix = seen_from_a_side((width, height), turn_deg=20, tilt_deg=20, zoom=ZOOM)
    corners = warp(np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32), matrix)
    left, top = np.floor(corners.min(axis=0)) - MARGIN_PX
    matrix = np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]]) @ matrix
    size_wh = tuple(int(side) + 2 * MARGIN_PX for side in np.ceil(np.ptp(corners, axis=0)))
    # What shrinks is averaged first, as by a lens: as in `prove.changes`.
    blurred = cv2.GaussianBlur(photo * EXPOSURE, (0, 0), 0.5 * (1 / ZOOM**2 - 1) ** 0.5)
    dark = np.round(blurred).astype(np.uint8)
    copy = cv2.warpPerspective(dark, matrix, size_wh, flags=cv2.INTER_AREA, borderValue=(255,) * 3)
    return KnownPair(photo, np.asarray(copy, np.uint8), lambda a, b: np.linalg.norm(warp(a, matrix) - b, axis=1))


def seen_from_a_side(size_wh: tuple[int, ...], turn_deg: float, tilt_deg: float, zoom: float) -> Matrix:
    """Pixels of a flat photograph to those of a camera that sees its middle from a side.

    Args:
        size_wh: (width, height) of both pictures in px.
        turn_deg: of the camera about its axis.
        tilt_deg: angle between the photograph and the camera's picture; 0: head on.
        zoom: size of the middle of the photograph in the picture.

    Returns:
        (3, 3).
    """
    width, height = size_wh
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * np.array([width, height]) / 2
    tilt, turn, distance = np.radians(tilt_deg), np.radians(turn_deg), 1.3 * width
    depth = distance + corners[:, :1] * np.sin(tilt)
    seen = zoom * distance / depth * corners * np.array([np.cos(tilt), 1])
    turned = seen @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    middle = (np.array([width, height]) - 1) / 2
    places = (corners + middle).astype(np.float32), (turned + middle).astype(np.float32)
    return np.asarray(cv2.getPerspectiveTransform(*places), np.float64)


def cut(photo: Picture) -> Picture:
    """The middle of a photograph, 4 to 3, so that two fit side by side."""
    height, width = photo.shape[:2]
    start = (width - height * 4 // 3) // 2
    return photo[:, max(start, 0) : width - max(start, 0)]


def unrelated_pair(first: Picture, second: Picture) -> KnownPair:
    """Two photographs that have nothing in common: no match is right."""
    return KnownPair(first, second, lambda a, b: np.full(len(a), np.inf))


def frames_pair(frames: Path) -> KnownPair:
    """Two far frames; a match is as far off as its second point lies from the first one's line of sight in the map."""
    import pycolmap

    paths = [sorted(frames.glob("*.png"))[index] for index in FRAMES]
    model = pycolmap.Reconstruction(mapped(frames, "nearest")[0] / "sparse" / "0")
    views = {view.name: view for view in model.images.values()}
    first, second = (views[path.name] for path in paths)
    cameras = [model.cameras[view.camera_id] for view in (first, second)]
    moved = second.cam_from_world() * first.cam_from_world().inverse()
    (x, y, z), rotation = moved.translation, moved.rotation.matrix()
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ rotation

    def rays(index: int, xy: NDArray[Any]) -> NDArray[np.float64]:
        flat = cameras[index].cam_from_img(np.asarray(xy, np.float64) + HALF_PIXEL)
        return np.concatenate([flat, np.ones((len(xy), 1))], axis=1)

    def distances_px(first_xy: NDArray[Any], second_xy: NDArray[Any]) -> NDArray[np.float64]:
        lines = rays(0, first_xy) @ essential.T
        off = np.abs((rays(1, second_xy) * lines).sum(axis=1)) / np.linalg.norm(lines[:, :2], axis=1)
        return np.asarray(off * cameras[1].mean_focal_length(), np.float64)

    return KnownPair(load_image(paths[0]), load_image(paths[1]), distances_px)


def draw_with_both(pair: KnownPair) -> Picture:
    """Both matchers on the same points of `full`: nearest neighbors above, the learned matcher below."""
    with SuperPoint("full", max_keypoints=MAX_KEYPOINTS) as superpoint:
        first, second = (superpoint.extract(picture) for picture in (pair.first, pair.second))
    with LearnedMatcher() as network:
        found = {"learned": network.match(first, second).rows}
    found["nearest"] = match(first.descriptors, second.descriptors).rows
    return stacked([_drawn(pair, name, first.xy[found[name][:, 0]], second.xy[found[name][:, 1]]) for name in MATCHERS])


def _drawn(pair: KnownPair, matcher: str, first_xy: NDArray[Any], second_xy: NDArray[Any]) -> Picture:
    """A pair with the matches of one matcher, and how many are right."""
    away = pair.distances_px(first_xy, second_xy)
    right = away <= RIGHT_PX
    scale = WIDTH_PX / pair.first.shape[1]
    views = [
        cv2.resize(one, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for one in (pair.first, pair.second)
    ]
    places = [(xy + 0.5) * scale - 0.5 for xy in (first_xy, second_xy)]
    caption = f"{matcher}: {int(right.sum())} of {len(right)} matches right"
    return draw_matches(*views, *places, right, away, caption, lines_of_known_truth(RIGHT_PX))


def stacked(pictures: list[Picture]) -> Picture:
    """Pictures of one width, one above the other."""
    gap = np.full((GAP_PX, pictures[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([pictures[0], *(part for one in pictures[1:] for part in (gap, one))]).astype(np.uint8)


def draw_maps_of_both(frames: Path) -> Picture:
    """The maps of one scene with both matchers, from above, side by side."""
    import pycolmap

    maps = []
    for matcher in MATCHERS:
        folder, report = mapped(frames, matcher)
        drawn = draw_map(map_points(pycolmap.Reconstruction(folder / "sparse" / "0")), has_caption=False)
        scale = MAP_PX / drawn.shape[0]
        small = cv2.resize(drawn, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        maps.append(add_caption(small, [map_words(matcher, report)]))
    height = max(one.shape[0] for one in maps)
    padded = [np.pad(one, ((0, height - len(one)), (0, GAP_PX), (0, 0)), constant_values=255) for one in maps]
    return np.concatenate(padded, axis=1).astype(np.uint8)


def map_words(matcher: str, report: MapReport) -> str:
    """A line below a map."""
    return f"{matcher}: {report.registered} of {report.images} images, {report.points} points"


@functools.cache
def mapped(frames: Path, matcher: str) -> tuple[Path, MapReport]:
    """The folder of a scene's map with a matcher, and its report; made once, and removed when the process ends."""
    folder = Path(_scratch().name) / matcher
    return folder, map_with(matcher, frames, folder)


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()
