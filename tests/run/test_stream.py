"""`extract_many` on the CPU: order, ragged tails, errors in their places, back-pressure, and an early end."""

from __future__ import annotations

import threading
from functools import partial

import cv2
import numpy as np
import pytest
from conftest import photograph, write_checkpoint

from superpoint_trt import SuperPoint, SuperPointError
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import OutputType
from superpoint_trt.run import runner as runner_module
from superpoint_trt.run.backends.onnxruntime import OnnxRuntimeBackend

SIZE = (96, 128)


@pytest.fixture(scope="module", params=["dense", "heads", "keypoints"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    options = ExportOptions(OutputType(request.param), *SIZE, max_batch_size=4, max_keypoints=400)
    return export(write_checkpoint("v6", folder), folder / "model.onnx", options)


def different(count: int) -> list[np.ndarray]:
    picture = photograph(*SIZE)
    return [np.roll(picture, 9 * index, axis=1) for index in range(count)]


def assert_same(found, expected) -> None:
    np.testing.assert_array_equal(found.xy, expected.xy)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_allclose(found.descriptors, expected.descriptors, atol=1e-3)


@pytest.mark.parametrize(("batch_size", "in_flight"), [(None, 2), (1, 1), (3, 1), (4, 3)])
def test_in_order_with_a_ragged_tail(model, batch_size, in_flight):
    images = different(7)
    with SuperPoint(model) as superpoint:
        expected = [superpoint.extract(image) for image in images]
        assert len({len(one) for one in expected}) > 1 or not np.array_equal(expected[0].xy, expected[1].xy)
        found = list(superpoint.extract_many(iter(images), batch_size, in_flight))
    assert len(found) == len(images)
    for one, other in zip(found, expected):
        assert_same(one, other)


def test_the_next_batch_runs_while_one_is_decoded(model, monkeypatch):
    """The first batch's keypoints are held back until the second batch's run has begun."""
    begun, honest_infer = [], OnnxRuntimeBackend._infer
    second_begun = threading.Event()

    def infer(self, image):
        begun.append(threading.current_thread())
        if len(begun) == 2:
            second_begun.set()
        return honest_infer(self, image)

    def finish(self, outputs, batch, honest=runner_module.HostRunner.finish):
        assert second_begun.wait(timeout=60)
        return honest(self, outputs, batch)

    monkeypatch.setattr(OnnxRuntimeBackend, "_infer", infer)
    monkeypatch.setattr(runner_module.HostRunner, "finish", finish)
    with SuperPoint(model) as superpoint:
        assert len(list(superpoint.extract_many(different(3), batch_size=1))) == 3
    assert len(begun) == 3 and threading.current_thread() not in begun
    assert not any(thread.is_alive() for thread in begun), "a closed model leaves no thread"


def test_files_and_sizes_mixed(model, tmp_path):
    images = [photograph(height, width) for height, width in ((96, 128), (60, 90), (96, 128), (200, 150), (60, 90))]
    paths = [tmp_path / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images):
        cv2.imwrite(str(path), image)
    with SuperPoint(model) as superpoint:
        found = list(superpoint.extract_many([*paths, *images], loaders=3))
        for one, image in zip(found, [*images, *images]):
            assert one.image_size == image.shape[::-1]
            assert_same(one, superpoint.extract(image))


def test_errors_stay_with_their_image(model, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no image")
    good = different(3)
    stream = [
        tmp_path / "missing.png",
        good[0],
        text,
        np.zeros((2, 2), np.uint8),
        good[1],
        np.full((9, 9), 2.0),
        good[2],
    ]
    with SuperPoint(model) as superpoint:
        found = list(superpoint.extract_many(stream, batch_size=2))
    for index, told in ((0, "does not exist"), (2, "not an image"), (3, "smallest usable"), (5, r"expected \[0, 1\]")):
        assert isinstance(found[index], SuperPointError)
        with pytest.raises(SuperPointError, match=told):
            raise found[index]
    assert [isinstance(one, SuperPointError) for one in found] == [True, False, True, True, False, True, False]


def test_nothing_but_errors_ends_too(model):
    with SuperPoint(model) as superpoint:
        found = list(superpoint.extract_many(["missing.png"] * 50, batch_size=2))
    assert len(found) == 50 and all(isinstance(one, SuperPointError) for one in found)


def test_a_run_that_fails_costs_only_its_own_image(model, monkeypatch):
    images = different(5)
    with SuperPoint(model) as superpoint:
        poison = superpoint.prepare(images[2])[0].sum()
        infer = superpoint._backend._infer

        def fails(inputs):
            if any(
                abs(one.sum() - poison) < 1e-3 and one[0, 0, 0] == images[2][0, 0] / np.float32(255) for one in inputs
            ):
                raise SuperPointError("the runtime failed")
            return infer(inputs)

        monkeypatch.setattr(superpoint._backend, "_infer", fails)
        found = list(superpoint.extract_many(images, batch_size=4))
    assert [str(one) if isinstance(one, SuperPointError) else "" for one in found] == [
        "",
        "",
        "the runtime failed",
        "",
        "",
    ]


@pytest.mark.parametrize("step", ["prepare", "submit", "collect"])
def test_memory_that_runs_out_costs_only_its_own_image(model, monkeypatch, step):
    """One large image among small ones; memory is back as soon as that image is given up."""
    images = different(5)
    large = images[2] = np.full_like(images[2], 7)

    def is_large(image) -> bool:
        return image is large or bool(np.ptp(getattr(image, "pixels", image)) == 0)

    with SuperPoint(model) as superpoint:
        runner = superpoint._runner

        def failing(work, place=0):
            """Fails where the argument at that place is the large image, or a batch with it."""

            def wrapped(*given):
                if any(map(is_large, given[place] if isinstance(given[place], list) else [given[place]])):
                    raise MemoryError
                return work(*given)

            return wrapped

        if step == "prepare":
            monkeypatch.setattr(runner, "prepare", failing(runner.prepare))
        elif step == "collect":
            monkeypatch.setattr(runner, "finish", failing(runner.finish, place=1))
        else:
            for slot in (runner_module._AsyncSlot, runner_module._HostSlot):  # of the stream; of an image run again
                monkeypatch.setattr(
                    slot, "submit", lambda self, *given, submit=slot.submit: failing(partial(submit, self))(*given)
                )
        found = list(superpoint.extract_many(images, batch_size=4))
    assert [isinstance(one, SuperPointError) for one in found] == [False, False, True, False, False]
    assert "memory ran out" in str(found[2])


@pytest.mark.parametrize(("batch_size", "in_flight"), [(1, 1), (2, 1), (2, 3)])
def test_reads_no_further_than_it_must(model, batch_size, in_flight):
    taken = 0

    def stream():
        nonlocal taken
        for image in different(4) * 25:
            taken += 1
            yield image

    with SuperPoint(model) as superpoint:
        found = superpoint.extract_many(stream(), batch_size, in_flight)
        assert taken == 0, "nothing is read before it is asked for"
        for done in range(1, 9):
            next(found)
            assert taken - done <= (in_flight + 2) * batch_size + 1
        found.close()
    assert taken < 40


def test_an_early_end_leaves_nothing_behind(model, tmp_path):
    paths = []
    for index, image in enumerate(different(30)):
        paths.append(tmp_path / f"{index}.png")
        cv2.imwrite(str(paths[-1]), image)
    before = threading.active_count()
    with SuperPoint(model) as superpoint:
        for found in superpoint.extract_many(paths, batch_size=2, loaders=4):
            assert len(found)
            break
        several = superpoint.extract_many(paths, batch_size=2, loaders=4)
        next(several)
        several.close()
        assert not [thread for thread in threading.enumerate() if "superpoint-loader" in thread.name]
        assert threading.active_count() <= before + 2
        assert_same(superpoint.extract(paths[0]), next(superpoint.extract_many(paths[:1])))


def test_a_stream_that_fails_is_its_owners_matter(model):
    def stream():
        yield from different(2)
        raise KeyError("camera")

    with SuperPoint(model) as superpoint:
        found = superpoint.extract_many(stream(), batch_size=1, in_flight=1)
        with pytest.raises(KeyError, match="camera"):
            list(found)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 5}, "batch_size is 5; expected 1 to 4"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"in_flight": 0}, "in_flight is 0; expected 1 to 64"),
        ({"loaders": 0}, "loaders is 0"),
    ],
)
def test_what_is_refused(model, options, told):
    with SuperPoint(model) as superpoint, pytest.raises(SuperPointError, match=told):
        superpoint.extract_many([], **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_an_error_on_every_way(model, monkeypatch, value):
    (image,) = different(1)
    with SuperPoint(model) as superpoint:
        infer = superpoint._backend.infer
        for output in infer(superpoint.prepare(image).pixels[None, None]):

            def broken(inputs, output=output):
                outputs = {name: values.copy() for name, values in infer(inputs).items()}
                outputs[output].flat[-1] = value
                return outputs

            monkeypatch.setattr(superpoint._backend, "infer", broken)
            told = f"output {output} holds NaN or infinite values"
            with pytest.raises(SuperPointError, match=told):
                superpoint.extract(image)
            for way in (superpoint.extract_batch, superpoint.extract_timed):
                with pytest.raises(SuperPointError, match=told):
                    way([image])
            assert not np.isfinite(superpoint.infer(superpoint.prepare(image).pixels[None, None])[output]).all()


def test_half_descriptors(model):
    with SuperPoint(model, half_descriptors=True) as half, SuperPoint(model) as full:
        image = different(1)[0]
        one, other = half.extract(image), full.extract(image)
        assert one.descriptors.dtype == np.float16 and other.descriptors.dtype == np.float32
        np.testing.assert_array_equal(one.descriptors, other.descriptors.astype(np.float16))


def test_only_heads_engines_leave_results_on_the_gpu(model):
    with SuperPoint(model) as superpoint, pytest.raises(SuperPointError, match="heads engine only"):
        superpoint.extract_device(different(1)[0])


def test_the_run_says_where_heads_are_decoded(model):
    with SuperPoint(model) as superpoint:
        is_heads = superpoint.description.type is OutputType.HEADS
        assert ("decode on the CPU (numpy)" in str(superpoint.runtime)) == is_heads
