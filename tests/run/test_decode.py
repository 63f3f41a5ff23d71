"""The numpy decode against known answers, and against the PyTorch reference, which shares no code with it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import KINDS, rarely, score_map

from superpoint_trt.checkpoint import reference as network
from superpoint_trt.checkpoint.descriptor_map import DescriptorMap
from superpoint_trt.core.types import DecodeOptions, Sampling, SuperPointError
from superpoint_trt.run import decode


def in_torch(scores: np.ndarray, options: DecodeOptions) -> tuple[np.ndarray, np.ndarray]:
    descriptors = torch.zeros(1, 4, scores.shape[0] // 8, scores.shape[1] // 8)
    xy, found, _ = network.decode(torch.from_numpy(scores)[None], descriptors, options, Sampling.HALF_PIXEL)[0]
    return xy.numpy(), found.numpy()


COMBINATIONS = [(4, 4, None), (0, 0, 17), (1, 11, None), (2, 4, 17), (7, 0, None), (18, 4, None)]
OTHER_COMBINATIONS = [
    combination
    for combination in itertools.product((0, 1, 2, 4, 7), (0, 4, 11), (None, 17))
    if combination not in COMBINATIONS
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("radius", "border", "number"), [*COMBINATIONS, *rarely(*OTHER_COMBINATIONS)])
def test_select_equals_the_reference(kind, radius, border, number):
    for seed in range(3):
        scores = score_map(kind, seed)
        options = DecodeOptions(nms_radius_px=radius, remove_borders_px=border, max_keypoints=number)
        xy, found = decode.select(scores, options)
        reference_xy, reference_found = in_torch(scores, options)
        np.testing.assert_array_equal(xy, reference_xy)
        np.testing.assert_array_equal(found, reference_found)
        assert (len(found) == 0) == (kind == "below threshold")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", [0, 1, 4, 17, 90])
def test_suppression_equals_the_reference_where_the_window_is_larger_than_the_image(kind, radius):
    for height, width in ((64, 96), (8, 40), (8, 8)):
        scores = score_map(kind, radius)[:height, :width]  # rows of a larger array, as padding is cut off
        survive = decode.suppress(scores, radius)
        expected = network.suppress(torch.from_numpy(scores.copy())[None], radius)[0].numpy()
        np.testing.assert_array_equal(np.where(survive, scores, 0), expected)


def test_suppression_takes_three_looks():
    """Points 3 px apart in a row, by falling score: each look finds the next one that is not near those found."""
    scores = np.zeros((8, 40), np.float32)
    scores[4, 4:40:3] = np.linspace(1.2, 0.1, 12)
    found = [np.flatnonzero(decode.suppress(scores, radius)[4] & (scores[4] > 0)).tolist() for radius in (2, 3, 6)]
    assert found == [list(range(4, 40, 3)), [4, 10, 16], [4, 13, 22]]  # a fourth look would find 22 and 31


def test_the_threshold_is_strict():
    scores = np.zeros((16, 16), np.float32)
    scores[5, 5], scores[5, 11] = 0.25, np.nextafter(np.float32(0.25), np.float32(1))
    xy, found = decode.select(scores, DecodeOptions(nms_radius_px=1, threshold=0.25))
    assert xy.tolist() == [[11, 5]]
    assert len(found) == 1


@pytest.mark.filterwarnings("error")
def test_what_is_no_number_is_no_keypoint_and_suppresses_none():
    scores = score_map("random")
    without, broken = scores.copy(), scores.copy()
    without[20:24, 30:50], broken[20:24, 30:50] = 0, np.nan
    for expected, found in zip(*(decode.select(one, DecodeOptions()) for one in (without, broken))):
        np.testing.assert_array_equal(found, expected)


def test_the_border_goes_on_all_four_sides_after_the_suppression():
    scores = np.zeros((32, 48), np.float32)
    inside = [(4, 4), (43, 4), (4, 27), (43, 27)]  # x, y: the outermost allowed
    outside = [(3, 15), (44, 15), (20, 3), (20, 28)]
    for x, y in inside + outside:
        scores[y, x] = 0.5
    scores[16, 4] = 0.3  # loses to its stronger neighbour (3, 15), though that one is in the border
    xy, _ = decode.select(scores, DecodeOptions())
    assert {tuple(point) for point in xy.tolist()} == set(inside)


def test_equal_scores_come_in_reading_order():
    scores = np.zeros((40, 40), np.float32)
    scores[30, 10] = scores[10, 30] = scores[10, 8] = 0.5
    scores[20, 20] = 0.9
    xy, _ = decode.select(scores, DecodeOptions())
    assert xy.tolist() == [[20, 20], [8, 10], [30, 10], [10, 30]]
    xy, _ = decode.select(scores, DecodeOptions(max_keypoints=2))
    assert xy.tolist() == [[20, 20], [8, 10]]


@pytest.mark.parametrize("sampling", Sampling)
def test_sampled_descriptors_equal_the_reference(sampling):
    """Every pixel, the outermost included, where the reference pads with zeros."""
    rng = np.random.default_rng(1)
    descriptors = decode.normalize(rng.normal(size=(16, 5, 7)), axis=0)
    y, x = np.mgrid[0:40, 0:56]
    xy = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)
    sampled = decode.sample_descriptors(xy, descriptors, 8, sampling)
    reference = network.sample_descriptors(torch.from_numpy(xy), torch.from_numpy(descriptors), 8, sampling)
    np.testing.assert_allclose(sampled, reference.numpy(), atol=2e-6)
    assert sampled.dtype == np.float32


def test_heads_equal_the_reference_even_where_fp16_would_overflow():
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 40, (2, 65, 3, 4)).astype(np.float32)
    coarse = rng.normal(0, 300, (2, 16, 3, 4)).astype(np.float32)
    scores, descriptors = network.dense(torch.from_numpy(logits), torch.from_numpy(coarse))
    np.testing.assert_allclose(decode.scores_from_logits(logits), scores.numpy(), atol=1e-6)
    np.testing.assert_allclose(decode.normalize(coarse, axis=1), descriptors.numpy(), atol=1e-6)
    # fp16 heads: squares beyond 65504 and exponentials beyond it must not reach infinity.
    half = decode.normalize(coarse.astype(np.float16), axis=1)
    assert np.isfinite(half).all()
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-5)
    assert np.isfinite(decode.scores_from_logits(logits.astype(np.float16))).all()


def test_a_zero_descriptor_stays_zero():
    assert decode.normalize(np.zeros((3, 2)), axis=1).tolist() == [[0, 0]] * 3


@pytest.mark.filterwarnings("error")
def test_a_descriptor_whose_squares_overflow_gets_unit_length():
    """3e38 * (1, 0) and 1e30 * (3, 4), between vectors of ordinary lengths, which keep every bit."""
    vectors = np.array([[3, 4], [3e38, 0], [0.1, 0.7], [3e30, 4e30]], np.float32)
    unit = decode.normalize(vectors, axis=1)
    np.testing.assert_allclose(unit[[0, 1, 3]], [[0.6, 0.8], [1, 0], [0.6, 0.8]], rtol=1e-6)
    np.testing.assert_array_equal(unit[[0, 2]], decode.normalize(vectors[[0, 2]], axis=1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_in_silence(value):
    """`verify` decodes such outputs, and reports them itself."""
    broken = np.full((1, 65, 2, 2), value, np.float32)
    assert np.isnan(decode.normalize(broken, axis=1)).all()
    assert np.isnan(decode.scores_from_logits(broken)).all()


def test_lifted_descriptors_are_known():
    turned = DescriptorMap(np.array([[0, 2], [0, 0], [-1, 0]], np.float32), "f" * 64)
    received = np.array([[1, 0], [0, 3], [3, 4], [0, 0]], np.float16)
    expected = [[0, 0, -1], [1, 0, 0], [8 / np.sqrt(73), 0, -3 / np.sqrt(73)], [0, 0, 0]]
    lifted = decode.lift_descriptors(received, turned)
    assert lifted.dtype == np.float32
    np.testing.assert_allclose(lifted, expected, atol=1e-6)
    assert decode.lift_descriptors(received[:0], turned).shape == (0, 3)
    for strange in (received[0], received.T):
        with pytest.raises(SuperPointError, match=r"descriptors are \(.*\); the map takes \(N, 2\)"):
            decode.lift_descriptors(strange, turned)


def test_between_cells():
    """Four cells with a unit vector each; their centers lie at 3.5 and 11.5 px."""
    descriptors = np.eye(4, dtype=np.float32).reshape(4, 2, 2)
    xy = np.array([[7.5, 7.5], [5.5, 3.5], [11.5, 9.5], [0, 15]], np.float32)
    sampled = decode.sample_descriptors(xy, descriptors, 8, Sampling.HALF_PIXEL)
    expected = np.array([[1, 1, 1, 1], [3, 1, 0, 0], [0, 1, 0, 3], [0, 0, 1, 0]], np.float32)
    np.testing.assert_allclose(sampled, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_one_cell():
    descriptors = np.ones((4, 1, 1), np.float32) / 2
    sampled = decode.sample_descriptors(np.array([[0, 7]], np.float32), descriptors, 8, Sampling.HALF_PIXEL)
    assert sampled.tolist() == [[0.5, 0.5, 0.5, 0.5]]
