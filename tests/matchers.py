"""Matchers whose answers are known or random, as weights, and points for them."""

from __future__ import annotations

import numpy as np

from superpoint_trt.checkpoint.matcher import MatcherShape, MatcherWeights
from superpoint_trt.core.types import Keypoints

SMALL = MatcherShape((32,), 32, 2, 2)

SHARPNESS = 20.0
"""Of `plain_matcher`: similarity of two equal descriptors."""

SPREAD = {"self.read.weight": 4.5, "cross.read.weight": 8.0, "self.hidden.weight": 0.6, "cross.hidden.weight": 0.6}
"""Of `random_matcher`'s weights of a layer, times the root of their inputs' number."""


def plain_matcher(shape: MatcherShape = SMALL) -> MatcherWeights:
    """Layers change nothing and every point is matchable: it gives the descriptors' mutual best, in a dual softmax.

    The matcher is at least as wide as the longest descriptor.
    """
    arrays = {name: np.zeros(size, np.float32) for name, size in shape.arrays().items()}
    for dim in shape.descriptor_dims:
        arrays[f"project.{dim}.weight"][:dim, :dim] = np.eye(dim)
    for layer in range(shape.layers):
        arrays[f"layers.{layer}.head.project.weight"][:] = np.eye(shape.width) * (SHARPNESS**0.5 * shape.width**0.25)
        arrays[f"layers.{layer}.head.matchable.bias"][:] = 8
    return MatcherWeights(shape, arrays, {})


def random_matcher(shape: MatcherShape = SMALL, seed: int = 0) -> MatcherWeights:
    """The plain matcher with layers that change every point a little, by its own image's points and by the other's.

    Without torch, so that GPU tests need nothing but the package.
    """
    rng = np.random.default_rng(seed)
    plain, made = plain_matcher(shape).arrays, {}
    for name, size in shape.arrays().items():
        array = rng.normal(0, SPREAD.get(name.split(".", 2)[-1], 0.0) / size[-1] ** 0.5, size)
        if name == "positions.weight":
            array = rng.normal(0, 10, size)
        elif name.endswith("norm.weight"):
            array = np.ones(size)
        elif name.endswith("write.weight"):
            array = rng.normal(0, 0.02, size)
        elif name.endswith("support"):
            array = np.array([1.0, 2.0])
        elif ".head." in name or name.startswith("project."):
            array = plain[name] + rng.normal(0, 0.1, size)
        made[name] = array.astype(np.float32)
    return MatcherWeights(shape, made, {})


def points(count: int, seed: int = 0, dim: int = 32, size: tuple[int, int] = (320, 240)) -> Keypoints:
    rng = np.random.default_rng(seed)
    descriptors = rng.normal(size=(count, dim)).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True).clip(1e-6)
    xy = (rng.random((count, 2)) * size).astype(np.float32)
    return Keypoints(xy, np.sort(rng.random(count).astype(np.float32))[::-1].copy(), descriptors, size)


def shuffled(first: Keypoints, seed: int = 1, noise: float = 0.05) -> tuple[Keypoints, np.ndarray]:
    """The same points in another order, their descriptors a little off; and the row where each one went."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(first))
    moved = first.rows(order)
    descriptors = moved.descriptors + noise * rng.normal(size=moved.descriptors.shape).astype(np.float32)
    descriptors /= np.linalg.norm(descriptors, axis=1, keepdims=True)
    there = np.empty(len(first), np.int64)
    there[order] = np.arange(len(first))
    return Keypoints(moved.xy + np.float32(5), moved.scores, descriptors, first.image_size), there
