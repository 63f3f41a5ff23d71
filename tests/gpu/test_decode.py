"""The CUDA decode against the numpy reference, on the same heads. Needs a GPU and NVRTC, neither TensorRT nor torch."""

from __future__ import annotations

import numpy as np
import pytest
from heads import KINDS, as_type, check, download, found_of, logits_of, score_map, upload

from superpoint_trt.core.types import DecodeOptions, Sampling, SuperPointError
from superpoint_trt.gpu import arrays, cuda
from superpoint_trt.gpu.kernels.decode import USUAL_ROWS, check_counts, decode_heads
from superpoint_trt.run import decode

try:
    cuda.current_device()
except SuperPointError as error:
    pytest.skip(f"no GPU: {error}", allow_module_level=True)

GRIDS = [(1, 60, 80), (1, 30, 40), (2, 17, 23), (3, 8, 9), (1, 1, 1), (1, 1, 40), (1, 40, 1), (1, 90, 160)]
TOLD: list[dict[str, float]] = []


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    if TOLD:
        worst = {key: max(one[key] for one in TOLD) for key in ("score", "descriptor")}
        points, off = (sum(one[key] for one in TOLD) for key in ("points", "points_off"))
        print(f"\n{len(TOLD)} decodes, {points} points; worst {worst}; of numpy's own maps {off} points differ")


def checked(*arguments, **options) -> dict[str, float]:
    told = check(*arguments, **options)
    TOLD.append(told)
    return told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    ("radius", "border", "number"), [(4, 4, 1024), (3, 0, None), (1, 9, 17), (0, 4, 200), (5, 5, 1)]
)
def test_small_radii(kind, grid, radius, border, number):
    many = number is None or radius == 0
    if grid[1] * grid[2] > (2000 if many else 5000) and (many or radius != 4):
        pytest.skip("numpy takes too long for so many points")
    for seed in range(1 if grid[1] * grid[2] > 2000 else 2):
        checked(kind, seed, grid, DecodeOptions(radius, border, 0.005, number))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("radius", [6, 9, 33, 1024])
def test_large_radii(kind, radius):
    for seed, grid in enumerate([(1, 30, 40), (2, 9, 7)]):
        checked(kind, seed, grid, DecodeOptions(radius, 4, 0.005, 100))


@pytest.mark.parametrize("threshold", [0.0, 0.005, 0.0154, 0.1, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_thresholds(kind, threshold):
    for seed in range(3):
        checked(kind, seed, (1, 15, 20), DecodeOptions(4, 4, threshold, 300))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["float32", "float16"])
@pytest.mark.parametrize("multiple", [0, 8])
@pytest.mark.parametrize(("radius", "border"), [(4, 4), (1, 0), (9, 1)])
def test_subpixel(kind, head, multiple, radius, border):
    """At the image's edge as well, which padding follows inside the same cell."""
    for seed, grid in enumerate([(2, 9, 13), (1, 1, 1), (1, 30, 40)]):
        options = DecodeOptions(radius, border, 0.005, 300, subpixel=True)
        checked(kind, seed, grid, options, head=head, multiple=multiple)


@pytest.mark.parametrize(("stride", "dim"), [(4, 64), (2, 16), (1, 8), (16, 128), (32, 8)])
def test_subpixel_of_other_strides(stride, dim):
    for seed, kind in enumerate(KINDS):
        checked(kind, seed, (2, 7, 9), DecodeOptions(3, 1, 0.0001, 400, subpixel=True), stride=stride, dim=dim)


@pytest.mark.parametrize("number", [1, 2, 31, 512, 1024, 4096, 10_000])
def test_numbers(number):
    for kind in ("noise", "levels", "flat"):
        checked(kind, number, (1, 30, 40), DecodeOptions(2, 4, 0.0, number))


@pytest.mark.parametrize("head", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("sampling", list(Sampling))
@pytest.mark.parametrize("half", [False, True])
def test_types_and_samplings(head, sampling, half):
    for seed, kind in enumerate(KINDS):
        for grid in ((2, 13, 21), (1, 1, 6), (1, 60, 80)):
            checked(kind, seed, grid, DecodeOptions(4, 2, 0.005, 500), sampling, head, half)


@pytest.mark.parametrize(
    ("stride", "dim"),
    [(8, dim) for dim in (1, 32, 48, 64, 96, 100, 128, 512)] + [(4, 64), (2, 16), (1, 8), (16, 128), (32, 8)],
)
def test_strides_and_dims(stride, dim):
    for seed, kind in enumerate(KINDS):
        told = checked(kind, seed, (2, 7, 9), DecodeOptions(3, 1, 0.0001, 400), stride=stride, dim=dim)
    assert told["points"]


@pytest.mark.parametrize("head", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize("radius", [4, 9])
def test_channels_last(head, multiple, radius):
    """As convolutions of TensorRT (padded) and torch (not) write them."""
    for seed, kind in enumerate(KINDS):
        for grid, dim in (((2, 13, 21), 256), ((2, 9, 5), 64), ((3, 1, 1), 100), ((2, 1, 6), 512), ((2, 7, 1), 36)):
            checked(kind, seed, grid, DecodeOptions(radius, 2, 0.005, 500), head=head, dim=dim, multiple=multiple)
    checked("image-like", 0, (1, 60, 80), DecodeOptions(radius, 4, 0.005, 1024), head=head, multiple=multiple)


@pytest.mark.parametrize("dim", [48, 64, 128])
@pytest.mark.parametrize("head", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("multiple", [0, 1, 8])
def test_short_descriptors(dim, head, half, multiple):
    """Of networks with a topology: fewer channels than a warp reads at a time, in every layout and type."""
    for seed, kind in enumerate(KINDS):
        options = DecodeOptions(4, 4, 0.005, 500, subpixel=bool(seed % 2))
        for grid in ((2, 13, 21), (1, 1, 6), (3, 1, 1)):
            checked(kind, seed, grid, options, Sampling.HALF_PIXEL, head, half, dim=dim, multiple=multiple)
    checked("image-like", 0, (1, 60, 80), DecodeOptions(4, 4, 0.005, 1024), Sampling.LEGACY, head, half, dim=dim)


@pytest.mark.parametrize(("stride", "dim"), [(4, 64), (2, 16), (1, 8), (16, 128), (32, 8)])
def test_channels_last_of_other_strides(stride, dim):
    for seed, kind in enumerate(KINDS):
        options = DecodeOptions(3, 1, 0.0001, 400)
        checked(kind, seed, (2, 7, 9), options, head="float16", stride=stride, dim=dim, multiple=8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("skipped", [1, 4, 8])
def test_channels_last_from_any_address_on(skipped, dtype):
    """Part of a larger array: it starts where 16 bytes can be read at once only if enough channels are skipped."""
    rng = np.random.default_rng(2)
    logits = logits_of("image-like", 2, (1, 65, 30, 40)).astype(dtype)
    coarse = rng.normal(0, 1, (1, 256, 30, 40)).astype(dtype)

    def within_more(values: np.ndarray) -> arrays.DeviceArray:
        channels = values.shape[1]
        more = rng.normal(0, 9, (1, channels + 15, *values.shape[2:])).astype(dtype)
        more[:, skipped : skipped + channels] = values
        memory = upload(more, multiple=8)
        place = memory.address + skipped * memory.dtype.itemsize
        return arrays.DeviceArray(place, values.shape, memory.dtype, 0, memory, memory.strides)

    options = DecodeOptions(max_keypoints=200)
    found = found_of(decode_heads(within_more(logits), within_more(coarse), options), 0)
    xy, scores, descriptors = found_of(decode_heads(upload(logits), upload(coarse), options), 0)
    assert len(xy) == 200
    np.testing.assert_array_equal(found[0], xy)
    np.testing.assert_array_equal(found[1], scores)
    np.testing.assert_allclose(found[2], descriptors, rtol=0, atol=2e-6)


def test_images_of_one_cell():
    """Both layouts at once; a batch of them tells whether the next image is found."""
    checked("noise", 0, (5, 1, 1), DecodeOptions(2, 0, 0.005, 10))


def test_again_and_again_the_same():
    """The list of survivors is in any order; the result is not."""
    logits, _ = as_type(logits_of("levels", 5, (1, 65, 60, 80)), "float32")
    coarse = upload(np.random.default_rng(0).normal(0, 1, (1, 256, 60, 80)).astype(np.float32))
    options = DecodeOptions(max_keypoints=1024)
    first = found_of(decode_heads(logits, coarse, options), 0)
    assert len(first[0]) == 1024 and len(np.unique(first[1])) < 1024, "there must be ties"
    for _ in range(50):
        for a, b in zip(first, found_of(decode_heads(logits, coarse, options), 0)):
            np.testing.assert_array_equal(a, b)


def test_every_row_is_written():
    """Into memory that held something else: what is not written shows."""
    grid, number = (2, 30, 40), 300
    logits, values = as_type(logits_of("noise", 1, (2, 65, *grid[1:])), "float32")
    coarse = upload(np.random.default_rng(0).normal(0, 1, (2, 256, *grid[1:])).astype(np.float32))
    result = decode_heads(logits, coarse, DecodeOptions(max_keypoints=number))
    for image in range(2):
        xy, scores, descriptors = found_of(result, image)
        assert len(xy) == number
        assert len(np.unique(xy, axis=0)) == number
        np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(
            scores, decode.scores_from_logits(values)[image][tuple(xy[:, ::-1].astype(int).T)], rtol=1e-6
        )


@pytest.mark.parametrize("radius", [4, 9])
def test_values_that_are_not_finite(radius):
    """One logit makes its whole cell NaN, as in numpy, and the image's result a fault; the next run is sound again."""
    logits = logits_of("noise", 1, (1, 65, 10, 10))
    logits[0, 3, 4, 5] = np.nan
    logits[0, 9, 2, 2] = np.inf
    logits[0, 64, 7, 7] = np.nan  # the dustbin
    logits[0, :, 8, 1] = -np.inf
    logits[0, 5, 3, 8] = -np.inf  # a score of 0, and nothing else
    coarse = upload(np.ones((1, 256, 10, 10), np.float32))
    ours = score_map(upload(logits), coarse)
    with np.errstate(invalid="ignore"):
        theirs = decode.scores_from_logits(logits)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    assert np.isnan(theirs).sum() == 4 * 64
    for value in (np.nan, np.inf):
        both = np.concatenate([logits_of("noise", 1, (1, 65, 10, 10))] * 2)
        both[1, 7, 3, 3] = value
        twice = upload(np.ones((2, 256, 10, 10), np.float32))
        counts = download(decode_heads(upload(both), twice, DecodeOptions(radius)).num_keypoints).tolist()
        assert counts[0] > 0 and counts[1] == -1
        broken = np.ones((2, 256, 10, 10), np.float32)
        broken[0] = value
        counts = download(decode_heads(upload(both[:1]), upload(broken[:1]), DecodeOptions(radius)).num_keypoints)
        assert counts.tolist() == [-2]
        with pytest.raises(SuperPointError, match="coarse_descriptors holds NaN or infinite values"):
            check_counts(counts.tolist())


def test_zero_descriptors_stay_zero():
    logits = upload(logits_of("noise", 1, (1, 65, 10, 10)))
    _, _, descriptors = found_of(decode_heads(logits, upload(np.zeros((1, 256, 10, 10), np.float32))), 0)
    assert len(descriptors) and not descriptors.any()


def test_more_than_there_is_room_for_is_counted():
    logits = upload(logits_of("flat", 1, (1, 65, 30, 40)))  # every pixel survives
    coarse = upload(np.ones((1, 256, 30, 40), np.float32))
    result = decode_heads(logits, coarse, DecodeOptions(remove_borders_px=0))
    assert int(download(result.num_keypoints)[0]) == 30 * 40 * 64
    assert result.scores.shape == (1, USUAL_ROWS)


def test_what_is_refused():
    good, other = upload(np.zeros((1, 65, 4, 4), np.float32)), upload(np.zeros((1, 256, 4, 5), np.float32))
    with pytest.raises(SuperPointError, match="with S a power of two"):
        decode_heads(good, other)
    with pytest.raises(SuperPointError, match="both float32, float16 or bfloat16"):
        decode_heads(good, upload(np.zeros((1, 256, 4, 4), np.float16)))
    with pytest.raises(SuperPointError, match="one for each of 1 images"):
        decode_heads(good, upload(np.zeros((1, 256, 4, 4), np.float32)), placed_wh=[(8, 8), (8, 8)])
    turned = arrays.DeviceArray(good.address, good.shape, good.dtype, 0, good, (65 * 64, 64, 4, 16))
    with pytest.raises(SuperPointError, match="neither contiguous nor channels-last"):
        decode_heads(turned, upload(np.zeros((1, 256, 4, 4), np.float32)))
