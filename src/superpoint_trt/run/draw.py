"""Pictures of keypoints and matches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, write_atomically
from superpoint_trt.core.image_file import opencv_quiet
from superpoint_trt.core.types import Float32, Keypoints, SuperPointError
from superpoint_trt.run.captions import (
    PAPER,
    RIM,
    SUBPIXEL_BITS,
    Color,
    Picture,
    Sign,
    add_caption,
    draw_circle,
    ints,
)

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".ppm")

Points = NDArray[np.floating]
"""(N, 2) x, y in px."""

BEST, MIDDLE, WORST = (240, 228, 66), (86, 180, 233), (0, 114, 178)
"""The ramp, light to dark: yellow, sky blue and blue, told apart by color-blind people (Okabe and Ito, "Color Universal
Design", 2008)."""
RAMP, BLUES = (BEST, MIDDLE, WORST), (MIDDLE, WORST)
"""Stops of ramps. Beside vermilion lines there are blue ones alone: who sees no red or green sees vermilion as a dark
yellow."""
OUTLIER, WRONG = (170, 170, 170), (213, 94, 0)
"""Lines that do not agree: grey where nobody knows the truth, vermilion (Okabe and Ito) where they are wrong."""


def draw_keypoints(image_rgb: NDArray[Any], keypoints: Keypoints, caption: str = "") -> Picture:
    """Draws dark-rimmed circles on a copy of the image, from the weakest score (small, blue) to the strongest one.

    Args:
        image_rgb: (H, W, 3) uint8.
        keypoints: in the image's pixels, by falling score; color and size show the rank of the score.
        caption: written below the picture, with a legend of the scores; empty: neither.

    Returns:
        (H, W, 3) uint8 RGB; with a caption it is higher.
    """
    picture = _scaled(image_rgb, 1.0)
    colors, radii = ramp(len(keypoints)), circle_radii_px(len(keypoints), picture.shape[1])
    # From weak to strong, so that strong ones lie on top.
    for row in reversed(range(len(keypoints))):
        draw_circle(picture, keypoints.xy[row], radii[row], colors[row])
    if not caption:
        return picture
    shown = sorted({0, len(keypoints) // 2, len(keypoints) - 1}) if len(keypoints) else []
    signs = [Sign(f"score {keypoints.scores[row]:.2g}", [colors[row]], float(radii[row])) for row in shown]
    return add_caption(picture, [caption], signs)


def keypoints_caption(keypoints: Keypoints, model: PathLike) -> str:
    """One line for a picture: what found how many points."""
    return f"{Path(model).name}: {len(keypoints)} keypoints"


def circle_radii_px(count: int, width_px: int) -> Float32:
    """Radii (count,) of the circles of keypoints by falling score, in a picture of that width.

    The weakest is a third of the strongest. Most are small, because pictures have many weak points.
    """
    rank = np.linspace(1, 0, max(count, 1), dtype=np.float32)[:count]
    radii: Float32 = np.float32(max(3.0, width_px / 260)) * (0.8 + 1.6 * rank**2)
    return radii


def draw_points(image_rgb: NDArray[Any], layers: Iterable[tuple[Float32, Color]], scale: float = 1.0) -> Picture:
    """Draws dark-rimmed circles on a copy of the image, layer by layer.

    Args:
        image_rgb: (H, W, 3) uint8.
        layers: for each layer its points (N, 2) in the image's pixels and their RGB color.
        scale: size of the picture over the size of the image.

    Returns:
        (H * scale, W * scale, 3) uint8 RGB.
    """
    picture = _scaled(image_rgb, scale)
    radius = max(3.0, max(picture.shape[:2]) / 240)
    for points, color in layers:
        for xy in (points + 0.5) * scale - 0.5:
            draw_circle(picture, xy, radius, color)
    return picture


@dataclass(frozen=True)
class MatchDrawing:
    """How matches are drawn."""

    most_lines: int = 150
    """Lines drawn at most, spread over the first picture. A fifth of them may be outliers; more, where inliers are
    few."""
    inlier_ramp: Sequence[Color] = RAMP
    """Stops of the inliers' colors, from the best agreement to the worst."""
    far_px: float = 3.0
    """Distance from the geometry at which an inlier's line has the ramp's last color."""
    outlier_rgb: Color = OUTLIER
    inlier_name: str = "inlier"
    outlier_name: str = "outlier"
    as_many_outliers: bool = False
    """Outliers have their share of the lines, above a fifth too."""

    def __post_init__(self) -> None:
        if self.most_lines < 0:
            raise SuperPointError(f"{self.most_lines} lines were asked for; expected 0 or more.")


_GAP_PX = 8
_WIDEST = 3.0
"""Width over height above which two pictures are not side by side but one above the other."""


def draw_matches(
    first_rgb: NDArray[Any],
    second_rgb: NDArray[Any],
    first_xy: Float32,
    second_xy: Float32,
    inliers: NDArray[np.bool_],
    distances_px: NDArray[np.floating] | None = None,
    caption: str = "",
    options: MatchDrawing | None = None,
) -> Picture:
    """Draws both images and lines between matches: by default yellow to blue for inliers, thin and grey for outliers.

    The images are side by side; one above the other if that would be wider than 3 to 1.

    Args:
        first_rgb: (H, W, 3) uint8.
        second_rgb: (H', W', 3) uint8, scaled to the first image's height, or to its width if it lies below.
        first_xy: (M, 2) matched points in the first image's pixels.
        second_xy: (M, 2) matched points in the second image's pixels.
        inliers: (M,) bool, which matches the geometry keeps.
        distances_px: (M,) how far the matches are from the geometry; None: all inliers have the ramp's first color.
        caption: written below the picture, with a legend; empty: neither.
        options: how many lines, and in which colors.

    Returns:
        (H + H' scaled, ...) or (..., W + W' scaled, 3) uint8 RGB, with a gap of 8 px; with a caption it is higher.
    """
    options = options or MatchDrawing()
    picture, scale, offset = _joined(first_rgb, second_rgb)
    starts, ends = first_xy, (second_xy + 0.5) * scale - 0.5 + offset
    rows = chosen_lines(first_xy, inliers, options.most_lines, options.as_many_outliers)
    away = np.zeros(len(first_xy)) if distances_px is None else np.nan_to_num(distances_px, nan=np.inf)
    outliers, kept = rows[~inliers[rows]], rows[inliers[rows]]
    kept = kept[np.argsort(-away[kept], kind="stable")]  # those that agree best lie on top
    width = max(1, round(max(picture.shape[:2]) / 640))
    pale = [options.outlier_rgb] * len(outliers)
    _lines(picture, starts[outliers], ends[outliers], pale, max(1, width // 2), rim=False)
    levels = np.round(np.clip(away[kept] / options.far_px, 0, 1) * (_LEVELS - 1)).astype(int)
    _lines(picture, starts[kept], ends[kept], ramp(_LEVELS, options.inlier_ramp)[levels], width, True)
    if not caption:
        return picture
    drawn = "" if len(rows) == len(inliers) else f"{len(rows)} of {len(inliers)} lines drawn"
    return add_caption(picture, [caption], _signs(options, distances_px is not None, drawn))


_LEVELS = 64


def chosen_lines(
    first_xy: Float32, inliers: NDArray[np.bool_], most_lines: int, as_many_outliers: bool = False
) -> NDArray[np.int64]:
    """Rows of the matches that are drawn: at most so many, spread over the first picture.

    Args:
        first_xy: (M, 2) points in the first image.
        inliers: (M,) bool.
        most_lines: a fifth of them may be outliers, more where inliers are few.
        as_many_outliers: outliers have their share of the lines instead.
    """
    good, bad = np.flatnonzero(inliers), np.flatnonzero(~inliers)
    share = round(most_lines * len(bad) / max(len(inliers), 1)) if as_many_outliers else most_lines // 5
    bad_count = min(len(bad), max(share, most_lines - len(good)))
    good_count = min(len(good), most_lines - bad_count)
    return np.concatenate([good[spread(first_xy[good], good_count)], bad[spread(first_xy[bad], bad_count)]])


def spread(xy: Float32, count: int) -> NDArray[np.int64]:
    """Rows of `count` points that lie far apart: each next one is the farthest from all before, from row 0 on."""
    if len(xy) <= count:
        return np.arange(len(xy))
    rows = np.zeros(count, np.int64)
    nearest = np.full(len(xy), np.inf)
    for index in range(1, count):
        nearest = np.minimum(nearest, ((xy - xy[rows[index - 1]]) ** 2).sum(axis=1))
        rows[index] = nearest.argmax()
    return rows


def _joined(first_rgb: NDArray[Any], second_rgb: NDArray[Any]) -> tuple[Picture, float, NDArray[np.float64]]:
    """Both images in one picture; the second one's scale and its place (x, y)."""
    (height, width), (second_height, second_width) = first_rgb.shape[:2], second_rgb.shape[:2]
    stacked = width / height + second_width / second_height > _WIDEST
    scale = width / second_width if stacked else height / second_height
    other = _scaled(second_rgb, scale)
    place = np.array([0, height + _GAP_PX] if stacked else [width + _GAP_PX, 0])
    right, bottom = place + np.array(other.shape[1::-1])
    picture: Picture = np.full((max(height, bottom), max(width, right), 3), PAPER, np.uint8)
    picture[:height, :width] = first_rgb
    picture[place[1] : bottom, place[0] : right] = other
    return picture, scale, place


def _lines(picture: Picture, starts: Points, ends: Points, colors: Iterable[Color], width: int, rim: bool) -> None:
    """Draws lines with a dot at either end into a picture; with a rim they are seen on any ground."""
    import cv2

    ends_fixed = list(zip(_fixed(starts), _fixed(ends)))
    # Blended in, so that lines do not hide the image; the rim is fainter than the line.
    for thickness, tone, opacity in ((width + 2, RIM, 0.35), (width, None, 0.9))[0 if rim else 1 :]:
        drawn = picture.copy()
        for (start, end), color in zip(ends_fixed, colors):
            cv2.line(drawn, start, end, ints(tone or color), thickness, cv2.LINE_AA, SUBPIXEL_BITS)
        picture[:] = cv2.addWeighted(drawn, opacity, picture, 1 - opacity, 0)
    one = 1 << SUBPIXEL_BITS
    for (start, end), color in zip(ends_fixed, colors):
        for center in (start, end):
            if rim:
                cv2.circle(picture, center, round((width + 1.6) * one), RIM, -1, cv2.LINE_AA, SUBPIXEL_BITS)
            cv2.circle(picture, center, round((width + 0.8) * one), ints(color), -1, cv2.LINE_AA, SUBPIXEL_BITS)


def _signs(options: MatchDrawing, by_distance: bool, drawn: str) -> list[Sign]:
    """The legend of a picture of matches."""
    if by_distance:
        good = Sign(
            f"{options.inlier_name}, 0 to {options.far_px:g} px off", ramp(_LEVELS, options.inlier_ramp).tolist()
        )
    else:
        good = Sign(options.inlier_name, [options.inlier_ramp[0]])
    signs = [good, Sign(options.outlier_name, [options.outlier_rgb])]
    return [*signs, Sign(drawn, [])] if drawn else signs


def check_picture_name(path: PathLike) -> None:
    """Checks that a file name ends in an image format that can be written.

    Raises:
        SuperPointError: it does not; the text names usual endings.
    """
    import cv2

    suffix = Path(path).suffix.lower()
    # OpenCV 5 crashes on a name that is no text, so it is asked about the ending alone.
    if suffix not in PICTURE_SUFFIXES or not cv2.haveImageWriter(f"picture{suffix}"):
        raise SuperPointError(f"{path}: a picture's name ends in .jpg, .png, .webp, .tiff or .bmp.")


def save_picture(path: PathLike, picture: Picture) -> Path:
    """Writes a picture as an image file.

    Raises:
        SuperPointError: the name's ending is no image format, or the file cannot be written.
    """
    check_picture_name(path)
    return write_atomically(path, encode_picture(picture, Path(path).suffix))


def encode_picture(picture: Picture, suffix: str) -> bytes:
    """The bytes of an image file.

    Args:
        picture: (H, W, 3) RGB.
        suffix: ending of the file's name, which says the format: ".png".

    Raises:
        SuperPointError: that format cannot hold the picture.
    """
    import cv2

    with opencv_quiet():
        try:
            done, data = cv2.imencode(suffix, picture[..., ::-1])
        except cv2.error:
            done = False
    if not done:
        raise SuperPointError(f"a picture of {picture.shape[1]}x{picture.shape[0]} px cannot be written as {suffix}.")
    encoded: bytes = data.tobytes()
    return encoded


def _scaled(image_rgb: NDArray[Any], scale: float) -> Picture:
    import cv2

    if scale == 1.0:
        return np.array(image_rgb, dtype=np.uint8, order="C")
    size = (max(1, round(image_rgb.shape[1] * scale)), max(1, round(image_rgb.shape[0] * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(image_rgb), size, interpolation=method), dtype=np.uint8)


def ramp(count: int, stops: Sequence[Color] = RAMP) -> NDArray[np.uint8]:
    """Colors (count, 3) RGB between stops; by default from bright to dark: yellow, sky blue, blue."""
    at = np.linspace(0, len(stops) - 1, max(count, 1))
    channels = np.array(stops, np.float64).T
    colors = np.stack([np.interp(at, np.arange(len(stops)), channel) for channel in channels], axis=1)
    return np.round(colors).astype(np.uint8)


def _fixed(xy: NDArray[Any]) -> list[list[int]]:
    rounded: list[list[int]] = np.round(xy * (1 << SUBPIXEL_BITS)).astype(int).tolist()
    return rounded
