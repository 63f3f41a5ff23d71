"""Reads pairs of images with known relative poses: scenes with a cameras.json, and lists of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, read_bytes
from superpoint_trt.core.typed_json import JsonError, mapping, member, parse
from superpoint_trt.core.types import Matrix, SuperPointError

CAMERAS = "cameras.json"
MOST_CHARS = 1 << 24
MOST_PAIRS = 100_000

_COLUMNS = 2 + 2 + 9 + 9 + 16
"""Of a line of a list: names, quarter turns, intrinsics, pose."""

_ORTHOGONAL = 1e-2
"""How far a rotation's product with its transpose may be from the identity."""


@dataclass(frozen=True)
class PosedPair:
    """Two images, their cameras, and how the second stands relative to the first: x2 = R x1 + t."""

    first: Path
    second: Path
    first_intrinsics: Matrix
    """(3, 3), of the file's pixels, centers at integers."""
    second_intrinsics: Matrix
    rotation: Matrix
    """(3, 3)."""
    translation: NDArray[np.float64]
    """(3,), of any length above 0."""


def load_posed_pairs(scene: PathLike, min_gap: int = 1) -> list[PosedPair]:
    """Reads all pairs of a scene, or those of a list.

    Args:
        scene: a folder with `cameras.json` (name -> `fx_fy_cx_cy`, `cam_from_world_rotation`, `centre`), images beside
            it or in `images/`; or a text file of pairs as ScanNet's and MegaDepth's are given: two names relative to
            the file's folder, quarter turns of both, K0, K1 and the 4x4 pose of the first camera in the second's frame.
        min_gap: pairs of a scene lie at least so many images apart, in the order of their names.

    Raises:
        SuperPointError: nothing there, a number or an image is missing, or no pair is so far apart.
    """
    scene = Path(scene)
    if min_gap < 1:
        raise SuperPointError(f"the least gap is {min_gap} images; expected 1 or more.")
    if scene.is_dir():
        return _of_scene(scene, min_gap)
    if min_gap > 1:
        raise SuperPointError(f"--min-gap is for folders with {CAMERAS}; {scene} lists its pairs itself.")
    return _of_list(scene)


@dataclass(frozen=True)
class _Camera:
    path: Path
    intrinsics: Matrix
    rotation: Matrix
    centre: NDArray[np.float64]


def _of_scene(scene: Path, min_gap: int) -> list[PosedPair]:
    source = scene / CAMERAS
    try:
        found = mapping(parse(read_bytes(source, "cameras"), MOST_CHARS), CAMERAS)
        cameras = [_camera(scene, name, mapping(found[name], name)) for name in sorted(found)]
    except (JsonError, TypeError, ValueError) as error:
        raise SuperPointError(f"{source} cannot be read: {error}.") from error
    pairs = [_pair(a, b) for index, a in enumerate(cameras) for b in cameras[index + min_gap :]]
    if not pairs:
        raise SuperPointError(f"{scene} has {len(cameras)} images, none of them {min_gap} apart; lower --min-gap.")
    return pairs


def _camera(scene: Path, name: str, values: dict[str, object]) -> _Camera:
    path = next((path for path in (scene / "images" / name, scene / name) if path.is_file()), None)
    if path is None:
        raise SuperPointError(f"{scene / CAMERAS} names {name}, which is neither in {scene} nor in its images/.")
    fx, fy, cx, cy = _numbers(member(values, "fx_fy_cx_cy"), (4,), name)
    rotation = _numbers(member(values, "cam_from_world_rotation"), (3, 3), name)
    intrinsics = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])
    return _Camera(path, intrinsics, _checked(rotation, name), _numbers(member(values, "centre"), (3,), name))


def _pair(a: _Camera, b: _Camera) -> PosedPair:
    rotation = b.rotation @ a.rotation.T
    return PosedPair(a.path, b.path, a.intrinsics, b.intrinsics, rotation, b.rotation @ (a.centre - b.centre))


def _of_list(path: Path) -> list[PosedPair]:
    lines = read_bytes(path, "list of pairs").decode(errors="replace").splitlines()
    rows = [(number, line.split()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows or len(rows) > MOST_PAIRS:
        raise SuperPointError(f"{path} lists {len(rows)} pairs; expected 1 to {MOST_PAIRS}.")
    return [_listed(path, f"{path}, line {number}", words) for number, words in rows]


def _listed(path: Path, where: str, words: list[str]) -> PosedPair:
    if len(words) != _COLUMNS:
        raise SuperPointError(
            f"{where}: {len(words)} columns; expected {_COLUMNS}: two names, two quarter turns, K0, K1 (9 numbers "
            "each), and the 4x4 pose of the first camera in the second's frame."
        )
    try:
        numbers = _numbers([float(word) for word in words[2:]], (_COLUMNS - 2,), where)
    except ValueError as error:
        raise SuperPointError(f"{where}: {error}.") from None
    if numbers[:2].any():
        raise SuperPointError(f"{where}: images turned by quarters are not read; turn the files and their cameras.")
    first, second = (path.parent / name for name in words[:2])
    for image in (first, second):
        if not image.is_file():
            raise SuperPointError(f"{where}: {image} does not exist; names are relative to {path.parent}.")
    pose = numbers[20:].reshape(4, 4)
    intrinsics = numbers[2:11].reshape(3, 3), numbers[11:20].reshape(3, 3)
    return PosedPair(first, second, *intrinsics, _checked(pose[:3, :3], where), pose[:3, 3])


def _numbers(values: object, shape: tuple[int, ...], where: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        raise SuperPointError(f"{where}: expected {shape} finite numbers, got {array.shape}.")
    return array


def _checked(rotation: Matrix, where: str) -> Matrix:
    if abs(rotation @ rotation.T - np.eye(3)).max() > _ORTHOGONAL or np.linalg.det(rotation) < 0:
        raise SuperPointError(f"{where}: the rotation is none (its product with its transpose is not the identity).")
    return rotation
