"""A line of words and a legend below a picture, in letters that can still be read when it is shown 400 px wide."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Color = Sequence[int]
"""R, G, B from 0 to 255."""

INK, PAPER, RIM = (32, 32, 32), (255, 255, 255), (0, 0, 0)
SUBPIXEL_BITS = 4
"""Fraction bits of the coordinates given to OpenCV: keypoints of shrunk images lie between pixels."""

LETTERS_SHARE = 1 / 56
"""Height of a capital over the picture's width: 7.1 px of 400."""
SMALLEST_LETTERS_PX = 8
_NARROWEST_PX = 240
"""A narrower picture stands on white of this width, so that words have room."""


@dataclass(frozen=True)
class Sign:
    """One entry of a legend: a mark, and what it means."""

    text: str
    colors: Sequence[Color]
    """A line in these colors from left to right, or a circle in the first one; empty: words alone."""
    circle_px: float = 0.0
    """Radius of the circle; 0: a line."""


def letters_px(width_px: int) -> int:
    """Height of a capital in px below a picture of that width."""
    return max(SMALLEST_LETTERS_PX, math.ceil(width_px * LETTERS_SHARE))


def add_caption(picture: Picture, lines: Sequence[str], signs: Sequence[Sign] = ()) -> Picture:
    """Puts words and a legend below a picture.

    Args:
        picture: (H, W, 3) uint8 RGB.
        lines: each begins on a line of its own and is broken between words where it is too long.
        signs: the legend, in rows below the words.

    Returns:
        (H', W', 3) uint8 RGB; the picture at its top left, W' above W only for a very narrow picture.
    """
    width = max(picture.shape[1], _NARROWEST_PX)
    capital = letters_px(width)
    margin, row_height = capital, round(1.9 * capital)
    room = width - 2 * margin
    written = [row for line in lines for row in _broken(line, capital, room)]
    legend = list(_rows_of_signs(signs, capital, room))
    height = row_height * (len(written) + len(legend)) + margin
    canvas: Picture = np.full((picture.shape[0] + height, width, 3), PAPER, np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    base = picture.shape[0] + round(1.7 * capital)
    for row in written:
        _write(canvas, row, margin, base, capital)
        base += row_height
    for signs_of_row in legend:
        left = margin
        for sign in signs_of_row:
            _draw_sign(canvas, sign, left, base, capital)
            left += _sign_width(sign, capital)
        base += row_height
    return canvas


def text_width(text: str, capital_px: int) -> int:
    """Width in px of a text whose capitals are so high."""
    import cv2

    scale, thickness = _font(capital_px)
    return int(cv2.getTextSize(_printable(text), cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)[0][0])


def _write(canvas: Picture, text: str, left: int, base: int, capital: int) -> None:
    import cv2

    scale, thickness = _font(capital)
    place = (left, base)
    cv2.putText(canvas, _printable(text), place, cv2.FONT_HERSHEY_SIMPLEX, scale, INK, thickness, cv2.LINE_AA)


def _font(capital: int) -> tuple[float, int]:
    """Scale and thickness for OpenCV."""
    return capital / _capital_of_scale_1(), max(1, round(capital / 8))


@functools.lru_cache(maxsize=1)
def _capital_of_scale_1() -> float:
    """Height in px of a capital, drawn and measured: OpenCV's versions have letters of different heights."""
    import cv2

    sheet = np.zeros((400, 400), np.uint8)
    cv2.putText(sheet, "H", (50, 300), cv2.FONT_HERSHEY_SIMPLEX, 8.0, 255, 1, cv2.LINE_AA)
    return int((sheet > 127).any(axis=1).sum()) / 8


def _printable(text: str) -> str:
    """OpenCV's letters are ASCII."""
    return text.encode("ascii", "replace").decode()


def _broken(line: str, capital: int, room: int) -> Iterator[str]:
    row = ""
    for word in line.split():
        longer = f"{row} {word}" if row else word
        if row and text_width(longer, capital) > room:
            yield row
            longer = word
        row = longer
    if row:
        yield row


def _rows_of_signs(signs: Sequence[Sign], capital: int, room: int) -> Iterator[list[Sign]]:
    row: list[Sign] = []
    for sign in signs:
        if row and sum(_sign_width(one, capital) for one in (*row, sign)) > room:
            yield row
            row = []
        row.append(sign)
    if row:
        yield row


def _mark_width(sign: Sign, capital: int) -> int:
    if not len(sign.colors):
        return 0
    return round(2 * sign.circle_px) if sign.circle_px else capital * (2 if len(sign.colors) == 1 else 6)


def _sign_width(sign: Sign, capital: int) -> int:
    return _mark_width(sign, capital) + text_width(sign.text, capital) + 2 * capital


def _draw_sign(canvas: Picture, sign: Sign, left: int, base: int, capital: int) -> None:
    import cv2

    wide, middle = _mark_width(sign, capital), base - capital // 2
    if not wide:
        _write(canvas, sign.text, left, base, capital)
        return
    if sign.circle_px:
        draw_circle(canvas, (left + sign.circle_px, middle), sign.circle_px, sign.colors[0])
    elif len(sign.colors) == 1:
        thickness = max(1, capital // 4)
        cv2.line(canvas, (left, middle), (left + wide, middle), ints(sign.colors[0]), thickness, cv2.LINE_AA)
    else:
        high = max(3, capital // 2)
        bar = np.asarray(sign.colors, np.uint8)[np.arange(wide) * len(sign.colors) // wide]
        canvas[middle - high // 2 : middle - high // 2 + high, left : left + wide] = bar
    _write(canvas, sign.text, left + wide + capital // 2, base, capital)


def draw_circle(picture: Picture, center_xy: Sequence[float], radius_px: float, color: Color) -> None:
    """Draws a dark-rimmed circle into a picture; its line grows with its radius."""
    import cv2

    one = 1 << SUBPIXEL_BITS
    center = (round(float(center_xy[0]) * one), round(float(center_xy[1]) * one))
    line = max(1, round(radius_px / 4))
    for tone, thickness in ((RIM, line + 1), (ints(color), line)):
        cv2.circle(picture, center, round(radius_px * one), tone, thickness, cv2.LINE_AA, SUBPIXEL_BITS)


def ints(color: Color) -> tuple[int, ...]:
    """A color as OpenCV takes it."""
    return tuple(int(value) for value in color)
