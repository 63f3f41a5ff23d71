"""Features on disk: one .npz an image, with the names of feature files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from superpoint_trt.core.files import PathLike, one_line, read_bytes, write_atomically
from superpoint_trt.core.types import Keypoints, SuperPointError
from superpoint_trt.match.nearest import ImageMatches


def check_npz(path: PathLike) -> None:
    """Refuses a name that does not end in .npz, by which our files are known.

    Raises:
        SuperPointError: saying so.
    """
    if Path(path).suffix.lower() != ".npz":
        raise SuperPointError(f"{path}: a feature file's name ends in .npz.")


def save_features(path: PathLike, keypoints: Keypoints) -> Path:
    """Writes keypoints (N, 2), scores (N,), descriptors (N, D) and image_size (w, h) as .npz.

    Raises:
        SuperPointError: the file cannot be written; what was there is untouched.
    """
    return _save(path, keypoints.to_dict())


def save_matches(path: PathLike, found: ImageMatches) -> Path:
    """Writes both feature sets (`keypoints0`, `keypoints1`, ...), matches, distances, inliers and geometry as .npz.

    `matches` is (M, 2) rows of the two sets, `inliers` (M,) bool, `geometry` (3, 3), all zeros if there is none.
    """
    arrays = {
        f"{name}{index}": a for index, s in enumerate((found.first, found.second)) for name, a in s.to_dict().items()
    }
    matrix = np.zeros((3, 3)) if found.geometry.matrix is None else found.geometry.matrix
    arrays.update(matches=found.matches.rows, distances=found.matches.distances)
    arrays.update(inliers=found.geometry.inliers, geometry=matrix, geometry_type=np.array(found.geometry.model.value))
    return _save(path, arrays)


def load_features(path: PathLike) -> Keypoints:
    """Reads what `save_features` wrote.

    Raises:
        SuperPointError: not such a file.
    """
    data = read_bytes(path, "feature file")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            width, height = (int(side) for side in arrays["image_size"])
            found = [np.asarray(arrays[name], dtype=np.float32) for name in ("keypoints", "scores", "descriptors")]
            xy, scores, descriptors = found
            if xy.ndim != 2 or xy.shape[1] != 2 or descriptors.ndim != 2 or {len(a) for a in found} != {scores.size}:
                raise ValueError(f"shapes {xy.shape}, {scores.shape}, {descriptors.shape}")
            return Keypoints(xy, scores, descriptors, (width, height))
    except Exception as error:  # a damaged zip raises whatever its reader stumbles over
        expected = "keypoints, scores, descriptors and image_size"
        raise SuperPointError(
            f"{path} is not a feature file: expected an .npz with {expected} ({one_line(error)})."
        ) from error


def _save(path: PathLike, arrays: dict[str, Any]) -> Path:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return write_atomically(path, buffer.getvalue())
