"""Writes a verification as one self-contained HTML file: verdict, tables, distributions, the points on each image."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt._version import __version__
from superpoint_trt.core.files import PathLike, write_atomically
from superpoint_trt.core.image import load_image, to_picture
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.prove.agreement import within
from superpoint_trt.prove.comparison import ImageResult
from superpoint_trt.prove.gates import MEANINGS
from superpoint_trt.prove.tables import text_of
from superpoint_trt.prove.verify import Verification, verification_table
from superpoint_trt.run.draw import draw_points, encode_picture

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_PICTURES = 24
WIDEST_PICTURE_PX = 960

IMAGE_LABELS = (
    "reference points",
    "found again",
    "model points",
    "found back",
    "rank corr.",
    "cosine median",
    "cosine p1",
    "right matches",
)
"""The columns of the table of images, after the name."""

KEPT, LOST, NEW = (0, 158, 115), (213, 94, 0), (86, 180, 233)
"""RGB colors of the points, told apart by color-blind people (Okabe and Ito); the page's template names the same."""


@dataclass(frozen=True)
class _Picture:
    """One image with its points, and how many there are of each kind."""

    name: str
    data: str
    """A data URL."""
    kept: int
    lost: int
    new: int


@dataclass(frozen=True)
class _Plot:
    title: str
    data: str
    """A data URL."""


@dataclass(frozen=True)
class _Part:
    """What the page says of one model."""

    v: Verification
    plots: list[_Plot]
    pictures: list[_Picture]


def _title(verifications: Sequence[Verification]) -> str:
    verdict = "passed" if all(one.passed for one in verifications) else "FAILED"
    return f"{verdict}: {', '.join(one.model for one in verifications)}"


def check_report() -> None:
    """Checks before the verification that the report can be written after it.

    Raises:
        SuperPointError: jinja2 or matplotlib is not installed.
    """
    for package in ("jinja2", "matplotlib"):
        if not util.find_spec(package):
            raise SuperPointError(f"the report needs {package}: {install_hint('report')}.")


def write_report(path: PathLike, *verifications: Verification) -> Path:
    """Writes the report of one or several models. A reader sees the old file or the whole new one.

    Raises:
        SuperPointError: jinja2 or matplotlib is not installed, or the file cannot be written.
    """
    check_report()
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("superpoint_trt.prove"), autoescape=True)
    page = environment.get_template("verification.html").render(
        title=_title(verifications),
        table=verification_table(verifications) if len(verifications) > 1 else None,
        text_of=text_of,
        fails=lambda row, model: (
            (row == "verdict" and not verifications[model].passed)
            or row in {gate.name for gate in verifications[model].failed}
        ),
        parts=[_Part(one, _plots(one), [_picture(image) for image in _most_different(one)]) for one in verifications],
        version=__version__,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        meaning=MEANINGS,
        number=_number,
        breakable=_breakable,
        image_labels=IMAGE_LABELS,
        image_figures=_image_figures,
    )
    return write_atomically(path, page.encode(errors="backslashreplace"))


def _most_different(verification: Verification) -> list[ImageResult]:
    """The images whose points agree least, at most `MOST_PICTURES`."""

    def agreement(image: ImageResult) -> float:
        points = image.reference_keypoints + image.model_keypoints
        return (image.found_again + image.found_back) / points if points else 1.0

    return sorted(verification.images, key=agreement)[:MOST_PICTURES]


def _picture(image: ImageResult) -> _Picture:
    """Draws the kept, lost and new points on an image."""
    pixels = to_picture(load_image(image.path))
    kept = within(image.reference_xy, image.model_xy)
    new = ~within(image.model_xy, image.reference_xy)
    layers = ((image.reference_xy[kept], KEPT), (image.reference_xy[~kept], LOST), (image.model_xy[new], NEW))
    scale = min(1.0, WIDEST_PICTURE_PX / pixels.shape[1])
    picture = draw_points(pixels, layers, scale)
    data = _data_url(encode_picture(picture, ".jpg"), "image/jpeg")
    return _Picture(image.name, data, int(kept.sum()), int((~kept).sum()), int(new.sum()))


def _plots(verification: Verification) -> list[_Plot]:
    """Histograms of the errors at the points that both found."""
    cosines = np.concatenate([image.cosines for image in verification.images])
    errors = np.concatenate([image.score_errors for image in verification.images])
    if not len(cosines):
        return []
    return [
        _histogram("1 - cosine of descriptors at common points", 1.0 - cosines),
        _histogram("score error at common points", errors),
    ]


def _histogram(title: str, values: NDArray[np.floating]) -> _Plot:
    """Draws errors on a logarithmic axis, because their magnitude counts; zero goes into the smallest bin."""
    from matplotlib.figure import Figure

    smallest = 1e-8
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes: Any = figure.subplots()
    bins = np.logspace(np.log10(smallest), max(0.0, np.log10(max(values.max(), smallest))), 60)
    # As float64: the float32 number next to the lowest bin's edge lies below it.
    axes.hist(np.clip(values.astype(np.float64), bins[0], None), bins=bins)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel(title)
    axes.set_ylabel("points")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _Plot(title, _data_url(buffer.getvalue(), "image/png"))


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _image_figures(image: ImageResult) -> list[tuple[str, str]]:
    """One image's row of the table: (label, figure), in the order of `IMAGE_LABELS`."""
    figures = (
        str(image.reference_keypoints),
        str(image.found_again),
        str(image.model_keypoints),
        str(image.found_back),
        _number(image.score_rank_correlation),
        _number(image.cosine_median),
        _number(image.cosine_p1),
        f"{image.model_matches} of {image.reference_matches}",
    )
    return list(zip(IMAGE_LABELS, figures))


def _breakable(name: str) -> Markup:
    """A file's name that a browser may break where a person would: after slashes, dots, dashes and underscores."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([/._-])", r"\1<wbr>", str(escape(name))))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.2e}"
