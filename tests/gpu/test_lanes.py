"""`heads` engines from image to keypoints in one graph: against their own heads decoded in numpy. Needs TensorRT."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from heads import download, found_of, upload

from superpoint_trt import SuperPoint
from superpoint_trt.convert.engine import BuildOptions, build
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import OUTPUT_NAMES, Keypoints, OutputType, Precision, SuperPointError
from superpoint_trt.gpu import cuda, kernels
from superpoint_trt.gpu.kernels.decode import decode_heads
from superpoint_trt.run.backends.tensorrt import TensorRTBackend
from superpoint_trt.run.lanes import MOST_LOANS


@pytest.fixture(scope="module")
def images(photos) -> list[np.ndarray]:
    """Gray uint8 640x480."""
    import cv2

    return [cv2.resize(cv2.imread(str(photo), cv2.IMREAD_GRAYSCALE), (640, 480)) for photo in photos]


def in_numpy(superpoint: SuperPoint, image: np.ndarray) -> Keypoints:
    """The engine's own heads, decoded on the host."""
    prepared, placement = superpoint.prepare(image)
    return superpoint.decode(superpoint.infer(prepared[None, None]), [placement])[0]


SAME_PLACE_PX = 1e-3
"""Sub-pixel places follow the rounding of the scores."""


def assert_same(found: Keypoints, expected: Keypoints, least: int = 100) -> None:
    """Up to softmax's rounding, which may let neighbours in the order change places."""
    assert len(found) == len(expected) >= least
    assert found.image_size == expected.image_size
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    equal = (np.abs(found.xy - expected.xy) < SAME_PLACE_PX).all(axis=1)
    assert equal.mean() > 0.99
    moved = np.abs(np.sort(found.xy[~equal], axis=0) - np.sort(expected.xy[~equal], axis=0)) >= SAME_PLACE_PX
    assert moved.any(axis=1).sum() <= 2
    off = np.abs(found.descriptors[equal].astype(np.float32) - expected.descriptors[equal]).max()
    assert off < (1e-3 if found.descriptors.dtype == np.float16 else 1e-5)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("options", [{}, {"max_keypoints": 1024}, {"nms_radius_px": 9, "remove_borders_px": 0}])
@pytest.mark.parametrize("half", [False, True])
def test_equals_the_host_decode(engine, images, precision, options, half):
    with SuperPoint(engine("heads", precision), half_descriptors=half, **options) as superpoint:
        assert "decode on the GPU (CUDA)" in str(superpoint.runtime)
        for image in images[:4]:  # plain, captured, replayed
            found = superpoint.extract(image)
            assert found.descriptors.dtype == (np.float16 if half else np.float32)
            assert_same(found, in_numpy(superpoint, image))


LAYOUTS = pytest.mark.parametrize(
    ("dynamic", "batch", "linear"),
    [(False, 1, False), (False, 1, True), (False, 8, False), (False, 8, True), (True, 8, False)],
    ids=["static", "static-linear", "batch", "batch-linear", "dynamic"],
)


@LAYOUTS
def test_heads_of_both_layouts(engine, images, dynamic, batch, linear):
    """One image at a time and a whole batch, against numpy on the very heads of that run."""
    with SuperPoint(engine("heads", "fp16", dynamic, batch, linear_heads=linear), max_keypoints=500) as superpoint:
        formats = superpoint._backend.engine.formats()
        assert {formats[name] for name in HEADS} == {"LINEAR" if linear else "HWC8"}
        assert_same(superpoint.extract(images[0]), in_numpy(superpoint, images[0]))
        together = images[:batch]
        prepared, placements = zip(*(superpoint.prepare(image) for image in together))
        expected = superpoint.decode(superpoint.infer(np.stack(prepared)[:, None]), placements)
        for _ in range(3):  # plain, captured, replayed
            found = list(superpoint.extract_many(together, batch, 1))
            assert len(found) == batch
            for one, truth in zip(found, expected):
                assert_same(one, truth)


HEADS = OUTPUT_NAMES[OutputType.HEADS]


@pytest.mark.parametrize("batch", [1, 8])
def test_heads_read_back_are_the_linear_ones(engine, images, batch):
    """NCHW without the padding, on the host and on the GPU; to what another choice of kernels may change."""
    stack = np.stack(images[:batch])[:, None].astype(np.float32) / np.float32(255)
    with TensorRTBackend(engine("heads", "fp16", batch=batch, linear_heads=True)) as backend:
        linear = {name: value.astype(np.float32) for name, value in backend.infer(stack).items()}
    with TensorRTBackend(engine("heads", "fp16", batch=batch)) as backend:
        for _ in range(3):  # plain, captured, replayed
            found = backend.infer(stack)
            on_gpu = backend.infer_device(upload(stack))
            assert found["logits"].shape == on_gpu["logits"].shape == (batch, 65, 60, 80)
            for name in HEADS:
                assert found[name].dtype == np.float16
                np.testing.assert_array_equal(download(on_gpu[name]), found[name])
                off = np.abs(found[name].astype(np.float32) - linear[name]) / np.abs(linear[name]).max()
                assert off.max() < 2e-2 and off.mean() < 1e-3
        with pytest.raises(SuperPointError, match=r"channels-last, 72 values a pixel.*--linear-heads"):
            backend.infer_device(upload(stack), out={"logits": upload(np.zeros((batch, 65, 60, 80), np.float16))})


def test_heads_on_the_gpu_are_decoded_where_they_are(engine, images):
    with SuperPoint(engine("heads", "fp16"), max_keypoints=400) as superpoint:
        expected = superpoint.extract(images[0])
        heads = superpoint._backend.infer_device(upload(images[0][None, None].astype(np.float32) / np.float32(255)))
        description = superpoint._backend.description
        found = decode_heads(*(heads[n] for n in HEADS), superpoint.options, sampling=description.sampling)
        for array, truth in zip(found_of(found, 0), (expected.xy, expected.scores, expected.descriptors)):
            np.testing.assert_array_equal(array, truth)


def test_other_formats_are_refused_when_opened(tensorrt, weights, tmp_path, monkeypatch):
    def pairs_of_channels(self, output):
        output.allowed_formats = 1 << int(self.module.TensorFormat.CHW2)

    monkeypatch.setattr(type(tensorrt), "allow_channels_last", pairs_of_channels)
    model = export(weights, tmp_path / "a.onnx", ExportOptions(OutputType.HEADS, 64, 64))
    build(model, tmp_path / "a.engine", BuildOptions(Precision.FP16, optimization_level=0))
    with pytest.raises(SuperPointError, match=r"a\.engine: logits \[.*\] has TensorRT's format CHW2; expected one of"):
        SuperPoint(tmp_path / "a.engine")


def test_float_and_uint8_images_agree(engine, images):
    with SuperPoint(engine("heads", "fp16"), max_keypoints=500) as superpoint:
        for image in images[:3]:
            a, b = superpoint.extract(image), superpoint.extract(image.astype(np.float32) / np.float32(255))
            for name in ("xy", "scores", "descriptors"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("size", [(637, 475), (640, 473), (201, 99), (1000, 800)])
def test_padded_and_shrunk_images(engine, images, size):
    """What lies beside the image takes no part."""
    import cv2

    with SuperPoint(engine("heads", "fp16")) as superpoint:
        image = cv2.resize(images[0], size)
        assert_same(superpoint.extract(image), in_numpy(superpoint, image), least=20)


def test_results_survive_later_calls(engine, images):
    with SuperPoint(engine("heads", "fp16"), max_keypoints=300) as superpoint:
        alone = [superpoint.extract(image) for image in images]
        copies = [(one.xy.copy(), one.scores.copy(), one.descriptors.copy()) for one in alone]
        again = [superpoint.extract(image) for image in images]
        assert len(again) > MOST_LOANS
    for one, other, copy in zip(alone, again, copies):
        for part in (one, other):
            for value, kept in zip((part.xy, part.scores, part.descriptors), copy):
                np.testing.assert_array_equal(value, kept)


def test_all_keypoints_however_many(engine, images):
    with SuperPoint(engine("heads", "fp16"), nms_radius_px=0, threshold=1e-4) as superpoint:
        for image in images[:3]:
            assert_same(superpoint.extract(image), in_numpy(superpoint, image), least=5000)


def test_stays_on_the_gpu(engine, images):
    with SuperPoint(engine("heads", "fp16"), max_keypoints=400) as superpoint:
        for image in images[:3]:
            expected, found = superpoint.extract(image), superpoint.extract_device(image)
            np.testing.assert_array_equal(download(found.keypoints), expected.xy)
            np.testing.assert_array_equal(download(found.scores), expected.scores)
            np.testing.assert_array_equal(download(found.descriptors), expected.descriptors)


def test_nothing_else_stays_there(engine, images):
    with SuperPoint(engine("dense", "fp16")) as superpoint, pytest.raises(SuperPointError, match="heads engine only"):
        superpoint.extract_device(images[0])


@pytest.mark.parametrize(("batch_size", "in_flight"), [(1, 1), (1, 3), (4, 2), (8, 2)])
def test_many_are_the_single_ones(engine, images, photos, batch_size, in_flight):
    with SuperPoint(engine("heads", "fp16", batch=8), max_keypoints=256) as superpoint:
        stream = [*images, str(photos[0]) + ".missing", *images[:3], np.zeros((3, 3), np.uint8), *images[::-1]]
        expected = [superpoint.extract(image) if np.shape(image) == (480, 640) else None for image in stream]
        for _ in range(3):
            found = list(superpoint.extract_many(stream, batch_size, in_flight))
            assert len(found) == len(stream)
            for one, truth in zip(found, expected):
                if truth is None:
                    assert isinstance(one, SuperPointError)
                else:
                    # A batch runs other kernels of TensorRT's than a single image.
                    distance = np.linalg.norm(one.xy[:, None] - truth.xy[None], axis=2).min(axis=1)
                    assert (distance <= 1).mean() > 0.97
        several = superpoint.extract_many(images * 4, batch_size, in_flight)
        next(several)
        several.close()
        assert len(superpoint.extract(images[0])) == 256, "usable afterwards"


def test_without_nvrtc_the_host_decodes_and_says_so(engine, images, monkeypatch, caplog):
    expected = None
    with SuperPoint(engine("heads", "fp16")) as superpoint:
        expected = in_numpy(superpoint, images[0])

    def missing(*_: object) -> None:
        raise SuperPointError("compiling kernels needs NVRTC")

    monkeypatch.setattr(kernels, "function", missing)
    with caplog.at_level(logging.WARNING), SuperPoint(engine("heads", "fp16")) as superpoint:
        assert "decode on the CPU (numpy): compiling kernels needs NVRTC" in str(superpoint.runtime)
        assert_same(superpoint.extract(images[0]), expected)
    assert "heads are decoded on the CPU" in caplog.text


def test_memory_stays_constant(engine, images):
    with SuperPoint(engine("heads", "fp16"), max_keypoints=1024, half_descriptors=True) as superpoint:
        for image in images:
            superpoint.extract(image)
        free, _ = cuda.call("cudaMemGetInfo")
        first = superpoint.extract(images[0])
        for index in range(2000):
            superpoint.extract(images[index % len(images)])
        assert cuda.call("cudaMemGetInfo")[0] == free
        np.testing.assert_array_equal(superpoint.extract(images[0]).descriptors, first.descriptors)
