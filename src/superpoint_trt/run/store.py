"""Feature files: the keypoints of one image as .npz."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from superpoint_trt.core.files import PathLike, one_line, read_bytes, write_npz
from superpoint_trt.core.types import Keypoints, SuperPointError


def check_npz(path: PathLike) -> None:
    """Checks that a file name ends in .npz.

    Raises:
        SuperPointError: it does not.
    """
    if Path(path).suffix.lower() != ".npz":
        raise SuperPointError(f"{path}: a feature file's name ends in .npz.")


def save_features(path: PathLike, keypoints: Keypoints) -> Path:
    """Writes keypoints (N, 2), scores (N,), descriptors (N, D) and image_size (w, h) as .npz.

    Raises:
        SuperPointError: the file cannot be written; a file that was there is unchanged.
    """
    return write_npz(path, keypoints.to_dict())


def load_features(path: PathLike) -> Keypoints:
    """Reads what `save_features` wrote.

    Raises:
        SuperPointError: the file is missing, or no feature file.
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
