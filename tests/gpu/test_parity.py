"""Engines against the PyTorch reference on photographs: maps, descriptors, and the keypoints by nearest neighbour."""

from __future__ import annotations

import numpy as np
import pytest

from superpoint_trt.core.types import DecodeOptions, Sampling
from superpoint_trt.run import decode
from superpoint_trt.run.extractor import SuperPoint

FOUND_WITHIN_PX = 1.0
TOP = 1024
SUBPIXEL = True
"""As the engines of the packaged weights have their keypoints."""


def expected(truth: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The reference's best keypoints (N, 2) and descriptors (N, D)."""
    xy, _ = decode.select(truth["scores"][0], DecodeOptions(max_keypoints=TOP, subpixel=SUBPIXEL))
    return xy, decode.sample_descriptors(xy, truth["descriptors"][0], 8, Sampling.HALF_PIXEL)


def agreement(truth: dict[str, np.ndarray], engine) -> tuple[float, float, np.ndarray]:
    """Shares of points found again, there and back, and the cosines of those found."""
    with SuperPoint(engine, max_keypoints=TOP) as superpoint:
        assert superpoint.options.subpixel is SUBPIXEL
        found = superpoint.extract(truth["inputs"][0, 0])
    xy, descriptors = expected(truth)
    distance = np.linalg.norm(xy[:, None] - found.xy[None], axis=2)
    near = distance.min(axis=1) <= FOUND_WITHIN_PX
    cosines = (descriptors[near] * found.descriptors[distance.argmin(axis=1)[near]]).sum(axis=1)
    return float(near.mean()), float((distance.min(axis=0) <= FOUND_WITHIN_PX).mean()), cosines


def test_fp32_equals_pytorch(engine, reference):
    with SuperPoint(engine("dense", "fp32")) as superpoint:
        for truth in reference():
            outputs = superpoint.infer(truth["inputs"])
            for name in ("scores", "descriptors"):
                assert np.abs(outputs[name] - truth[name]).max() < 1e-3, name


def test_batchnorm_behind_the_relu(engine, reference, batchnorm_weights):
    """A random network of the v6 layout, whose BatchNorm stays in the graph."""
    with SuperPoint(engine("dense", "fp32", size_hw=(240, 320), checkpoint=batchnorm_weights)) as superpoint:
        for truth in reference((240, 320), batchnorm_weights)[:2]:
            outputs = superpoint.infer(truth["inputs"])
            for name in ("scores", "descriptors"):
                assert np.abs(outputs[name] - truth[name]).max() < 1e-3, name


@pytest.mark.parametrize("kind", ["dense", "keypoints", "heads"])
@pytest.mark.parametrize(
    ("precision", "share", "median", "p1"),
    [
        ("fp32", 0.999, 0.99999, 0.9999),
        ("tf32", 0.98, 0.999, 0.99),
        ("fp16", 0.98, 0.999, 0.99),
    ],
)
def test_keypoints_are_the_same(engine, reference, kind, precision, share, median, p1):
    results = [agreement(truth, engine(kind, precision)) for truth in reference()]
    there, back = (np.mean([result[i] for result in results]) for i in (0, 1))
    cosines = np.concatenate([result[2] for result in results])
    print(
        f"{kind} {precision}: {there:.4f} {back:.4f} cosine median {np.median(cosines):.6f} "
        f"p1 {np.percentile(cosines, 1):.6f}"
    )
    assert there >= share and back >= share
    assert np.median(cosines) >= median and np.percentile(cosines, 1) >= p1


def test_another_image_does_not_agree(engine, reference):
    """The measure above can fail."""
    first, second = reference()[:2]
    there, _, cosines = agreement({**first, "inputs": second["inputs"]}, engine("dense", "fp16"))
    assert there < 0.5 and np.median(cosines) < 0.99


@pytest.mark.parametrize("size_hw", [(240, 320), (480, 640), (720, 1280), (960, 1280)])
def test_dynamic_sizes_equal_pytorch(engine, reference, size_hw):
    with SuperPoint(engine("dense", "fp32", dynamic=True, batch=8)) as superpoint:
        for truth in reference(size_hw)[:2]:
            outputs = superpoint.infer(truth["inputs"])
            assert np.abs(outputs["scores"] - truth["scores"]).max() < 1e-3
            assert np.abs(outputs["descriptors"] - truth["descriptors"]).max() < 1e-3


@pytest.mark.parametrize("kind", ["dense", "keypoints", "heads"])
def test_batches_and_dynamic_agree_with_static(engine, reference, kind):
    truths = reference()
    with SuperPoint(engine(kind, "fp16")) as static, SuperPoint(engine(kind, "fp16", dynamic=True, batch=8)) as dynamic:
        alone = [static.extract(truth["inputs"][0, 0]) for truth in truths]
        for count in (1, 2, 3, 5, 8):
            found = dynamic.extract_batch([truth["inputs"][0, 0] for truth in truths[:count]])
            for one, other in zip(alone, found):
                distance = np.linalg.norm(one.xy[:, None] - other.xy[None], axis=2)
                assert (distance.min(axis=1) <= FOUND_WITHIN_PX).mean() >= 0.98
                near = distance.min(axis=1) <= FOUND_WITHIN_PX
                cosines = (one.descriptors[near] * other.descriptors[distance.argmin(axis=1)[near]]).sum(axis=1)
                assert np.percentile(cosines, 1) >= 0.99
