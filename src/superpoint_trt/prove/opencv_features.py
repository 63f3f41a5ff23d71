"""OpenCV's detectors as extractors, to compare with: SIFT, RootSIFT, ORB."""

from __future__ import annotations

from typing import Callable

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.types import Float32, Keypoints
from superpoint_trt.run.decode import normalize

Extractor = Callable[[Float32], Keypoints]
"""(H, W) float32 in [0, 1] -> keypoints by falling score."""

DETECTORS = ("sift", "rootsift", "orb")
"""The names that stand for these detectors in place of a model file."""

_LENGTHS = {"sift": 128, "rootsift": 128, "orb": 256}


def opencv_extractor(name: str, count: int) -> Extractor:
    """One of `DETECTORS`, with its best `count` keypoints.

    SIFT (Lowe 2004) has 128 floats of unit length, RootSIFT their square roots (Arandjelovic and Zisserman 2012), ORB
    256 bits as 0 and 1, whose squared L2 distance is the Hamming distance.
    """
    import cv2

    detector = cv2.ORB.create(nfeatures=count) if name == "orb" else cv2.SIFT.create(nfeatures=count)

    def extract(gray: Float32) -> Keypoints:
        points, descriptors = detector.detectAndCompute(np.round(gray * 255).astype(np.uint8), None)
        size = (gray.shape[1], gray.shape[0])
        if descriptors is None or not len(points):
            nothing = np.zeros((0, _LENGTHS[name]), np.float32)
            return Keypoints(np.zeros((0, 2), np.float32), np.zeros(0, np.float32), nothing, size)
        scores = np.array([point.response for point in points], np.float32)
        order = np.argsort(-scores, kind="stable")
        xy = np.array([point.pt for point in points], np.float32)[order]
        return Keypoints(xy, scores[order], _FORMS[name](descriptors[order]), size)

    return extract


def opencv_version() -> str:
    """For example "OpenCV 4.11.0"."""
    import cv2

    return f"OpenCV {cv2.__version__}"


def _unit(descriptors: NDArray[np.float32]) -> Float32:
    return normalize(descriptors.astype(np.float32), axis=1)


def _root(descriptors: NDArray[np.float32]) -> Float32:
    return _unit(np.sqrt(descriptors))  # of unit length in L2 means of sum 1 before the root


def _bits(descriptors: NDArray[np.uint8]) -> Float32:
    return np.unpackbits(np.asarray(descriptors, dtype=np.uint8), axis=1).astype(np.float32)


_FORMS: dict[str, Callable[..., Float32]] = {"sift": _unit, "rootsift": _root, "orb": _bits}
