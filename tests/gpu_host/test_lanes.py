"""Slots, lanes, runners and streams on a stand-in for the GPU: buffers, results, errors, and which GPU is current."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from gpu_host import fake_gpu

from superpoint_trt.core.image_file import ReadOptions
from superpoint_trt.core.types import DecodeOptions, SuperPointError
from superpoint_trt.run.lanes import MOST_LANES, MOST_LOANS, Lanes
from superpoint_trt.run.runner import DeviceRunner
from superpoint_trt.run.stream import StreamOptions, stream_keypoints

pytest_plugins = ["gpu_host.gpu_fixtures"]


def opened(engine, half: bool = False, **options) -> DeviceRunner:
    return DeviceRunner(Lanes(engine, DecodeOptions(**options), half), engine.description, None, ReadOptions())


def picture(seed: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def expected(image: np.ndarray) -> np.ndarray:
    """The scores of an image of whole cells, in reading order."""
    height, width = image.shape
    return (image / np.float32(255)).reshape(height // 8, 8, width // 8, 8).mean(axis=(1, 3)).ravel()


def run(runner: DeviceRunner, *images: np.ndarray):
    return runner.run([runner.prepare(image) for image in images])


@pytest.mark.parametrize("half", [False, True])
def test_each_image_gets_its_own_results(engine, half):
    runner = opened(engine, half)
    images = [picture(seed) for seed in range(3)]
    for batch in ([0], [1, 2], [2, 1, 0], [0]):
        found = run(runner, *(images[index] for index in batch))
        for one, index in zip(found, batch):
            np.testing.assert_allclose(one.scores, expected(images[index]), atol=1e-6)
            assert one.xy.tolist() == [[0, 0], [8, 0], [0, 8], [8, 8]]
            assert one.descriptors.dtype == (np.float16 if half else np.float32)
            assert one.image_size == (16, 16)


def test_float_images_and_padded_ones(engine):
    runner = opened(engine)
    image = picture(0, 16, 24)
    (as_bytes,), (as_float,) = run(runner, image), run(runner, image.astype(np.float32) / 255)
    np.testing.assert_allclose(as_bytes.scores, as_float.scores, atol=1e-6)
    (part,) = run(runner, image[:, :17])
    assert part.xy.tolist() == [[x, y] for y in (0, 8) for x in (0, 8, 16)]
    np.testing.assert_allclose(part.scores[:2], as_bytes.scores[:2], atol=1e-6)


def test_results_stay_while_they_are_used(engine):
    """More than are lent from page-locked memory; the rest are copies."""
    runner = opened(engine)
    images = [picture(seed) for seed in range(MOST_LOANS + 3)]
    found = [run(runner, image)[0] for image in images]
    for one, image in zip(found, images):
        np.testing.assert_allclose(one.scores, expected(image), atol=1e-6)
    runner.close()
    for one, image in zip(found, images):
        np.testing.assert_allclose(one.scores, expected(image), atol=1e-6)


def test_more_points_than_rows_repeat_the_run_with_room(engine):
    runner = opened(engine)
    image = picture(1, 64, 64)
    for _ in range(2):
        (found,) = run(runner, image)
        np.testing.assert_allclose(found.scores, expected(image), atol=1e-6)
    assert len(found) == 64


def test_a_limit_on_points_needs_no_more_room(engine):
    (found,) = run(opened(engine, max_keypoints=5), picture(1, 64, 64))
    assert len(found) == 5


def test_shapes_stay_bounded_and_memory_comes_back(gpu, engine):
    runner = opened(engine)
    for _ in range(2):
        for width in range(16, 16 + 8 * (MOST_LANES - 2), 8):
            for height in (16, 24):
                run(runner, picture(2, height, width))
    with runner.lanes.borrow(1) as (slot,):
        assert len(slot.lanes) == MOST_LANES
    runner.close()
    del runner, slot
    gc.collect()
    assert gpu.memory == {} and gpu.streams == 0


def test_results_on_the_gpu(engine):
    runner = opened(engine)
    image = picture(3, 64, 64)
    found = runner.run_on_device(image)
    assert found.scores.shape == (64,) and found.keypoints.shape == (64, 2) and found.descriptors.shape == (64, 4)
    assert found.scores.device == engine.gpu.index
    np.testing.assert_allclose(fake_gpu.at(found.scores.address, (64,), np.float32), expected(image), atol=1e-6)


def test_steps_are_timed(engine):
    spans = opened(engine).run_timed([picture(0), picture(1)])
    assert list(spans) == ["preprocess", "host_to_device", "network", "decode"]
    assert all(span >= 0 for span in spans.values())


@pytest.mark.parametrize(("batch_size", "in_flight"), [(1, 1), (2, 3), (4, 2)])
def test_a_stream_equals_single_images(engine, batch_size, in_flight):
    runner = opened(engine)
    images = [picture(seed, 16, 16 if seed % 5 else 24) for seed in range(11)]
    images[4] = np.zeros((2, 2), np.uint8)
    found = list(stream_keypoints(runner, images, StreamOptions(batch_size, in_flight)))
    for index, (one, image) in enumerate(zip(found, images)):
        if index == 4:
            assert isinstance(one, SuperPointError)
        else:
            np.testing.assert_allclose(one.scores, expected(image), atol=1e-6)
    full = {shape for shape in engine.prepared if shape[0] != batch_size}
    assert full <= {(1, 1, 16, 16), (1, 1, 16, 24)}, "a smaller group uses the lane of full ones"


def test_a_stream_that_ends_early_gives_its_slots_back(engine):
    runner = opened(engine)
    images = [picture(seed) for seed in range(8)]
    found = stream_keypoints(runner, images, StreamOptions(1, 3))
    next(found)
    found.close()
    with runner.slots(3) as slots:
        assert len(slots) == 3
    assert len(runner.lanes._slots) == 3, "none was lost"
    np.testing.assert_allclose(run(runner, images[0])[0].scores, expected(images[0]), atol=1e-6)


def test_a_run_that_fails_is_an_error_and_the_next_one_works(engine):
    runner = opened(engine)
    run(runner, picture(0))
    engine.refuses = True
    with pytest.raises(SuperPointError, match="running the engine failed"):
        run(runner, picture(0))
    assert all(isinstance(one, SuperPointError) for one in stream_keypoints(runner, [picture(0)], StreamOptions(1, 1)))
    engine.refuses = False
    np.testing.assert_allclose(run(runner, picture(1))[0].scores, expected(picture(1)), atol=1e-6)
    assert len(runner.lanes._slots) <= 2


@pytest.mark.parametrize("head", ["logits", "coarse_descriptors"])
def test_a_head_that_is_not_finite_is_its_images_error_on_every_way(engine, head):
    runner = opened(engine)
    engine.broken_head = head
    images = [picture(seed) for seed in range(4)]
    for image, white in zip(images, (0, 0, 255, 0)):
        image[0, 0] = white
    told = f"output {head} holds NaN or infinite values"
    for way in (
        lambda: run(runner, images[2]),
        lambda: run(runner, *images),
        lambda: runner.run_timed(images),
        lambda: runner.run_on_device(images[2]),
    ):
        with pytest.raises(SuperPointError, match=told):
            way()
    found = list(stream_keypoints(runner, images, StreamOptions(4, 2)))
    assert told in str(found.pop(2)) and len(found) == 3
    for one, image in zip(found, [*images[:2], images[3]]):
        np.testing.assert_allclose(one.scores, expected(image), atol=1e-6)


def test_what_the_engine_does_not_take_is_refused(engine):
    with pytest.raises(SuperPointError, match="this engine was built for"):
        run(opened(engine), picture(0, 72, 64))


def test_the_callers_gpu_stays_current(gpu, engine):
    runner = opened(engine)
    run(runner, picture(0))
    next(stream_keypoints(runner, [picture(0), picture(1)], StreamOptions(1, 2)))
    assert gpu.current == 0
    assert bool(gpu.set_devices) == (gpu.gpus > 1), "with one GPU there is nothing to set"
