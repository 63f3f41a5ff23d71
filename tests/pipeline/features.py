"""What tests of bulk work share: folders of small photographs, and the content of feature files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from conftest import photograph

from superpoint_trt.pipeline.feature_files import FeatureFile

SIZES = ((96, 128), (120, 80), (64, 160))


def write_photographs(folder: Path, count: int) -> list[str]:
    """Different cuts of one photograph, in three sizes and two folders; returns their names, sorted."""
    whole = photograph(480, 640)
    names = []
    for index in range(count):
        height, width = SIZES[index % len(SIZES)]
        top, left = 7 * index % (480 - height), 31 * index % (640 - width)
        name = f"{'street' if index % 2 else 'park'}/{index:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(folder / name), whole[top : top + height, left : left + width])
        names.append(name)
    return sorted(names)


def content(path: Path) -> dict[str, tuple[np.ndarray, ...]]:
    """Every entry, to be compared with `assert_equal`."""
    with FeatureFile(path) as features:
        entries = {name: features[name] for name in features}
    return {
        name: (e.keypoints, e.scores, np.asarray(e.descriptors), np.array(e.image_size), np.array(e.uncertainty))
        for name, e in entries.items()
    }


def assert_equal(found: dict[str, tuple[np.ndarray, ...]], expected: dict[str, tuple[np.ndarray, ...]]) -> None:
    """Equal names, and equal bits in every entry."""
    assert list(found) == list(expected)
    for name, arrays in expected.items():
        for one, other in zip(found[name], arrays):
            assert one.dtype == other.dtype, name
            np.testing.assert_array_equal(one, other, err_msg=name)
