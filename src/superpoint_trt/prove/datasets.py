"""Reads image pairs with known homographies from disk, in HPatches' layout or the Oxford (VGG affine) layout."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from superpoint_trt.core.files import PathLike, read_bytes
from superpoint_trt.core.types import Matrix, SuperPointError

MOST_HOMOGRAPHY_BYTES = 10_000
"""A file of nine numbers is smaller."""

ILLUMINATION, VIEWPOINT, OTHER = "illumination", "viewpoint", "other"


@dataclass(frozen=True)
class _Layout:
    """How the files of a sequence are named."""

    image: str
    """Regular expression for an image's name in lower case; its group is the image's number."""
    homography: str
    """Name of a homography, with a place for the number of its second image."""

    def images(self, folder: Path) -> dict[int, Path]:
        """Number -> image."""
        return {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(self.image, path.name.lower()))}

    def homographies(self, folder: Path) -> dict[int, Path]:
        """Number of the second image -> homography."""
        pattern = self.homography.format(r"(\d+)")
        return {int(m[1]): path for path in folder.iterdir() if (m := re.fullmatch(pattern, path.name))}


_HPATCHES = _Layout(r"(\d+)\.(?:ppm|png|jpg|jpeg)", "H_1_{}")
_OXFORD = _Layout(r"img(\d+)\.(?:ppm|pgm|png|jpg|jpeg)", "H1to{}p")
_LAYOUTS = (_HPATCHES, _OXFORD)
_OXFORD_KINDS = {  # Mikolajczyk et al. 2005, section 4: what changes in each sequence
    "graf": VIEWPOINT,
    "wall": VIEWPOINT,
    "boat": VIEWPOINT,
    "bark": VIEWPOINT,
    "leuven": ILLUMINATION,
}


@dataclass(frozen=True)
class Pair:
    """Two images of one plane."""

    sequence: str
    kind: str
    """illumination, viewpoint or other (blur, compression)."""
    first: Path
    second: Path
    homography: Matrix
    """(3, 3), pixels of the first image to pixels of the second."""


@dataclass
class Dataset:
    """The pairs of a folder."""

    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One line for each pair or sequence that cannot be used."""


def load_pairs(folder: PathLike) -> Dataset:
    """Reads every sequence below a folder (or the folder itself, if it is one).

    Raises:
        SuperPointError: no folder, or no usable pair in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SuperPointError(f"dataset {folder} is not a folder.")
    dataset = Dataset()
    for sequence in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        for item in _pairs(sequence):
            if isinstance(item, Pair):
                dataset.pairs.append(item)
            else:
                dataset.problems.append(item)
    if not dataset.pairs:
        reason = f" ({dataset.problems[0]})" if dataset.problems else ""
        raise SuperPointError(
            f"{folder} holds no image pairs{reason}; expected folders with 1.ppm, 2.ppm, ..., H_1_2, ... (HPatches) or "
            "img1.png, img2.png, ..., H1to2p, ... (Oxford)."
        )
    return dataset


def input_files(folder: PathLike) -> list[Path]:
    """Lists every image and homography that `load_pairs` reads; nothing if the folder does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    sequences = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return [
        path
        for sequence in sequences
        for layout in _LAYOUTS
        for path in (*layout.images(sequence).values(), *layout.homographies(sequence).values())
    ]


def _pairs(folder: Path) -> Iterator[Pair | str]:
    """Yields the pairs of one sequence, and a line of text for each pair that cannot be used."""
    name = Path(os.path.abspath(folder)).name  # Path(".").name is empty
    layouts = [layout for layout in _LAYOUTS if layout.homographies(folder)]
    if not layouts and any(layout.images(folder) for layout in _LAYOUTS):
        yield f"{folder}: no homography (H_1_2, ... or H1to2p, ...) beside its images; the sequence is left out."
    for layout in layouts:
        images = layout.images(folder)
        for index in sorted((set(layout.homographies(folder)) | set(images)) - {1}):
            try:
                matrix = _homography(folder / layout.homography.format(index))
                first, second = _image(images, 1, folder), _image(images, index, folder)
            except SuperPointError as error:
                yield str(error)
                continue
            yield Pair(name, _kind(name), first, second, matrix)


def _image(images: dict[int, Path], index: int, folder: Path) -> Path:
    if index not in images:
        raise SuperPointError(f"{folder}: image {index} is missing; the pair is left out.")
    return images[index]


def _homography(path: Path) -> Matrix:
    if not path.exists():
        raise SuperPointError(f"{path} is missing; the pair is left out.")
    text = read_bytes(path, "homography")
    try:
        if len(text) > MOST_HOMOGRAPHY_BYTES:
            raise ValueError("too long")
        matrix = np.array([line.split() for line in text.decode().splitlines() if line.strip()], dtype=np.float64)
    except ValueError:  # also of text that is no UTF-8
        raise SuperPointError(f"{path} is no 3x3 matrix of numbers; the pair is left out.") from None
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or not _is_invertible(matrix):
        raise SuperPointError(f"{path} is no invertible 3x3 homography; the pair is left out.")
    return matrix


def _is_invertible(matrix: Matrix) -> bool:
    try:
        with np.errstate(all="ignore"):  # numbers near the end of float64
            return bool(np.linalg.cond(matrix) <= 1 / np.finfo(float).eps and np.isfinite(np.linalg.inv(matrix)).all())
    except np.linalg.LinAlgError:
        return False


def _kind(name: str) -> str:
    hpatches = re.search(r"(?:^|_)([iv])_", name)
    if hpatches:
        return ILLUMINATION if hpatches[1] == "i" else VIEWPOINT
    return next((kind for scene, kind in _OXFORD_KINDS.items() if scene in name.lower()), OTHER)
