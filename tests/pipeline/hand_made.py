"""Feature files made by hand: images that share descriptors, so that their matches are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from superpoint_trt.core.types import Keypoints
from superpoint_trt.pipeline.feature_files import FeatureWriter


def orthogonal(rows: list[int], dim: int = 64) -> Keypoints:
    """A keypoint for each number: its descriptor is that unit vector, its place (number, 10 * number)."""
    numbers = np.array(rows, np.int64)
    xy = np.stack([numbers, 10 * numbers], axis=1).astype(np.float32)
    scores = np.linspace(0.9, 0.1, len(rows), dtype=np.float32)
    return Keypoints(xy, scores, np.eye(dim, dtype=np.float32)[numbers], (640, 480))


def write_features(path: Path, images: dict[str, Keypoints]) -> Path:
    with FeatureWriter(path) as writer:
        for name, keypoints in images.items():
            writer.write(name, keypoints, keypoints.image_size)
    return path
