"""The page's own code gives what the package gives: input, points, descriptors, matches. No browser, no npm package."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import score_map
from page_tools import WEB, needs_node
from skimage import data

from superpoint_trt.core.image import Placement, place, to_gray, to_input
from superpoint_trt.core.types import DecodeOptions, ModelDescription, OutputType, Sampling
from superpoint_trt.match.nearest import match
from superpoint_trt.run.backends import open_backend
from superpoint_trt.run.decode import normalize, sample_descriptors, select

FREE = ModelDescription(OutputType.DENSE, dynamic=True)


def in_page(
    folder: Path,
    picture: np.ndarray,
    max_side_px: int | None,
    outputs: tuple[np.ndarray, np.ndarray],
    others: np.ndarray,
    options: DecodeOptions,
    sampling: Sampling,
) -> dict[str, np.ndarray]:
    """What web/src makes of a picture and of the network's outputs for it."""
    scores, descriptors = outputs
    case = {
        "width": picture.shape[1],
        "height": picture.shape[0],
        "maxSidePx": max_side_px,
        "dim": len(descriptors),
        "options": {
            "threshold": options.threshold,
            "maxKeypoints": options.max_keypoints,
            "subpixel": options.subpixel,
            "nmsRadiusPx": options.nms_radius_px,
            "removeBordersPx": options.remove_borders_px,
        },
        "model": {"stridePx": 8, "sampling": sampling.value},
    }
    (folder / "case.json").write_text(json.dumps(case))
    arrays = {"rgba": picture, "scores": scores, "descriptors": descriptors, "others": others}
    for name, array in arrays.items():
        (folder / name).write_bytes(np.ascontiguousarray(array).tobytes())
    done = subprocess.run([needs_node(), WEB / "tests" / "compare.mjs", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = {"rows": np.int32}
    names = ("input", "points", "scores", "descriptors", "rows", "distances")
    return {name: np.frombuffer((folder / f"{name}.out").read_bytes(), kinds.get(name, np.float32)) for name in names}


def in_package(
    outputs: tuple[np.ndarray, np.ndarray], placement: Placement, options: DecodeOptions, sampling: Sampling
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points in the picture's pixels, scores and descriptors."""
    scores, descriptors = outputs
    xy, found = select(scores[: placement.placed_height_px, : placement.placed_width_px], options)
    return placement.to_image(xy), found, sample_descriptors(xy, descriptors, 8, sampling)


def random_outputs(placement: Placement, kind: str, dim: int = 32) -> tuple[np.ndarray, np.ndarray]:
    height, width = placement.input_height_px, placement.input_width_px
    descriptors = np.random.default_rng(1).normal(size=(dim, height // 8, width // 8)).astype(np.float32)
    return score_map(kind, 3, height, width).astype(np.float32), normalize(descriptors, axis=0)


def colored(height: int, width: int) -> np.ndarray:
    rgb = cv2.resize(data.astronaut(), (width, height), interpolation=cv2.INTER_AREA)
    alpha = np.random.default_rng(2).integers(0, 256, (height, width, 1), np.uint8)
    return np.concatenate([rgb, alpha], axis=2)


CASES = (
    # height, width, longest side, score map, threshold, number, sub-pixel, sampling
    (120, 160, None, "network", 0.005, 300, True, Sampling.HALF_PIXEL),
    (117, 163, None, "network", 0.005, 10**6, True, Sampling.HALF_PIXEL),
    (241, 322, 160, "network", 0.0005, 500, True, Sampling.HALF_PIXEL),
    (240, 320, 160, "network", 0.02, 50, False, Sampling.LEGACY),
    (64, 96, None, "plateaus", 0.005, 10**6, True, Sampling.HALF_PIXEL),
    (61, 93, None, "few levels", 0.0, 10**6, False, Sampling.HALF_PIXEL),
    (64, 96, None, "smooth", 0.005, 100, True, Sampling.LEGACY),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[3]}-{case[1]}x{case[0]}")
def test_the_page_finds_what_the_package_finds(case, exported, tmp_path):
    needs_node()
    height, width, max_side_px, kind, threshold, number, subpixel, sampling = case
    picture = colored(height, width)
    placement = place(picture.shape[:2], FREE, max_side_px)
    options = DecodeOptions(threshold=threshold, max_keypoints=number, subpixel=subpixel)
    network_input = to_input(to_gray(picture), placement)
    if kind == "network":
        with open_backend(exported("packaged", dynamic=True)) as backend:
            found = backend.infer(np.ascontiguousarray(network_input[None, None], np.float32))
        outputs = found["scores"][0], found["descriptors"][0]
    else:
        outputs = random_outputs(placement, kind)
    points, scores, descriptors = in_package(outputs, placement, options, sampling)
    others = descriptors[::-1][: len(points) * 2 // 3]
    noise = np.random.default_rng(4).normal(0, 0.02, others.shape)
    others = normalize(others + noise.astype(np.float32), axis=1)
    page = in_page(tmp_path, picture, max_side_px, outputs, others, options, sampling)

    np.testing.assert_allclose(page["input"].reshape(network_input.shape), network_input, atol=2e-6)
    np.testing.assert_array_equal(page["scores"], scores)
    assert len(points) > 20
    np.testing.assert_allclose(page["points"].reshape(-1, 2), points, atol=1e-3)
    np.testing.assert_allclose(page["descriptors"].reshape(descriptors.shape), descriptors, atol=1e-5)
    expected = match(descriptors, others)
    np.testing.assert_array_equal(page["rows"].reshape(-1, 2), expected.rows)
    np.testing.assert_allclose(page["distances"], expected.distances, atol=2e-3)


def test_the_page_s_own_unit_tests_pass():
    files = sorted((WEB / "tests").glob("*.test.mjs"))
    done = subprocess.run([needs_node(), "--test", *files], capture_output=True, text=True)
    assert len(files) >= 4 and done.returncode == 0, done.stdout[-3000:]
