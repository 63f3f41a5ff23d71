"""Features on disk: one .npz an image, with the names of feature files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from superpoint_trt.files import PathLike, read_bytes, write_atomically
from superpoint_trt.spec import Keypoints, SuperPointError


def save_features(path: PathLike, keypoints: Keypoints) -> Path:
    """Writes keypoints (N, 2), scores (N,), descriptors (N, D) and image_size (w, h) as .npz.

    Raises:
        SuperPointError: the file cannot be written; what was there is untouched.
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = keypoints.to_dict()
    np.savez(buffer, **arrays)
    return write_atomically(path, buffer.getvalue())


def load_features(path: PathLike) -> Keypoints:
    """Reads what `save_features` wrote.

    Raises:
        SuperPointError: not such a file.
    """
    data = read_bytes(path, "feature file")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            width, height = (int(side) for side in arrays["image_size"])
            return Keypoints(arrays["keypoints"], arrays["scores"], arrays["descriptors"], (width, height))
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        expected = "keypoints, scores, descriptors and image_size"
        raise SuperPointError(f"{path} is not a feature file: expected an .npz with {expected} ({error}).") from error
