"""Channels-last tensors shown as (B, C, H, W): on the host, through DLPack, and to the decode. No GPU, no TensorRT."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from superpoint_trt.core.types import SuperPointError
from superpoint_trt.gpu import arrays, tensorrt_api
from superpoint_trt.gpu.arrays import DeviceArray
from superpoint_trt.gpu.engine import OutputTensor, check_formats
from superpoint_trt.gpu.kernels.decode import Head, _head
from superpoint_trt.run.decode import scores_from_logits

ELSEWHERE = 1 << 20
"""An address that nothing here reads."""

PADDING = 99


def tensor(shape: tuple[int, ...], pitch: int, dtype: type = np.float16, bfloat16: bool = False) -> OutputTensor:
    return OutputTensor("logits", shape, np.dtype(dtype), 256, bfloat16, pitch)


def test_padding_is_left_out():
    """One pixel high, two wide, three channels padded to four: written out by hand."""
    lying = np.array([[1, 2, 3, PADDING], [4, 5, 6, PADDING]], np.float16)
    block = np.zeros(256 + lying.nbytes, np.uint8)
    block[256:] = lying.view(np.uint8).ravel()
    padded = tensor((1, 3, 1, 2), 4)
    assert padded.nbytes == lying.nbytes == 16
    assert padded.of(block).tolist() == [[[[1, 4]], [[2, 5]], [[3, 6]]]]
    assert tensor((1, 4, 1, 2), 0).nbytes == 16
    assert tensor((1, 4, 1, 2), 0).of(block).tolist() == [[[[1, 2]], [[3, PADDING]], [[4, 5]], [[6, PADDING]]]]


@pytest.mark.parametrize("shape", [(1, 65, 3, 5), (4, 65, 2, 2), (2, 256, 3, 1), (3, 7, 1, 1)])
@pytest.mark.parametrize("multiple", [1, 8, 16])
def test_any_shape_comes_back(shape, multiple):
    values = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    pitch = -(-shape[1] // multiple) * multiple
    lying = np.full((shape[0], *shape[2:], pitch), PADDING, np.float16)
    lying[..., : shape[1]] = values.transpose(0, 2, 3, 1)
    block = np.concatenate([np.zeros(256, np.uint8), lying.view(np.uint8).ravel()])
    np.testing.assert_array_equal(tensor(shape, pitch).of(block), values)
    assert tensor(shape, pitch).nbytes == lying.nbytes


def test_bfloat16_is_widened():
    bits = (np.array([1.5, -2, 0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    block = np.concatenate([np.zeros(256, np.uint8), bits.view(np.uint8)])
    assert tensor((1, 2, 1, 1), 3, np.uint16, bfloat16=True).of(block).tolist() == [[[[1.5]], [[-2.0]]]]


def test_the_numpy_decode_takes_either():
    """Up to the order in which numpy sums."""
    logits = np.random.default_rng(1).normal(size=(2, 65, 4, 6)).astype(np.float16)
    padded = np.zeros((2, 4, 6, 72), np.float16)
    padded[..., :65] = logits.transpose(0, 2, 3, 1)
    strided = np.ndarray(logits.shape, np.float16, padded, 0, arrays.channels_last(logits.shape, 72, 2))
    np.testing.assert_allclose(scores_from_logits(strided), scores_from_logits(logits), rtol=1e-6)


def test_strides_go_through_dlpack_and_to_the_decode():
    shape = (2, 65, 4, 6)
    strides = arrays.channels_last(shape, 72, 2)
    assert strides == (2 * 4 * 6 * 72, 2, 2 * 6 * 72, 2 * 72)
    array = DeviceArray(ELSEWHERE, shape, np.dtype(np.float16), 0, None, strides)
    assert array.__cuda_array_interface__["strides"] == strides
    back = arrays._from_dlpack(array, gaps=True)
    assert (back.address, back.shape, back.dtype, back.strides) == (ELSEWHERE, shape, np.float16, strides)
    with pytest.raises(SuperPointError, match="not contiguous"):
        arrays._from_dlpack(array, gaps=False)
    assert _head(back) == Head(ELSEWHERE, shape, np.dtype(np.float16), 72)
    assert _head(back).pitches == (72, 1)


def test_what_the_decode_takes():
    def head(shape, strides):
        return _head(DeviceArray(ELSEWHERE, shape, np.dtype(np.float32), 0, None, strides))

    assert head((2, 65, 4, 6), None).pitches == (1, 24)
    assert head((1, 65, 4, 6), (7, 4, 4 * 6 * 65, 4 * 65)).pitches == (65, 1), "one image: its stride means nothing"
    assert head((2, 65, 1, 1), None).pitches == (65, 1), "one cell: the next image is 65 values on"
    for strides in ((4 * 24 * 64, 4, 4 * 6 * 64, 4 * 64), (4 * 65 * 24, 4 * 24, 4, 4 * 4), (4, 4, 4, 4 * 65)):
        with pytest.raises(SuperPointError, match="neither contiguous nor channels-last"):
            head((2, 65, 4, 6), strides)


class Engine:
    """What a plan says of its tensors, without one: name -> (format, shape)."""

    num_optimization_profiles = 1

    def __init__(self, **tensors: tuple[str, tuple[int, ...]]) -> None:
        self._tensors = tensors
        self.num_io_tensors = len(tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_format(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self._tensors[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1]


IMAGE = ("LINEAR", (1, 1, 480, 640))


@pytest.fixture
def tensorrt() -> tensorrt_api.TensorRT:
    made = tensorrt_api.TensorRT.__new__(tensorrt_api.TensorRT)  # of the library itself nothing is needed
    made.part = tensorrt_api.Part.FULL
    return made


@pytest.mark.parametrize(
    ("format_", "channels", "pitch"),
    [("LINEAR", 65, 0), ("HWC8", 65, 72), ("HWC8", 256, 256), ("HWC16", 65, 80), ("HWC", 65, 65)],
)
def test_pitches_of_tensorrts_formats(tensorrt, format_, channels, pitch):
    engine = Engine(image=IMAGE, logits=(format_, (-1, channels, -1, -1)))
    assert tensorrt.pixel_pitch(engine, "logits") == pitch
    check_formats(tensorrt, engine, Path("a.engine"))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {"image": IMAGE, "logits": ("CHW32", (1, 65, 60, 80))},
            r"logits \[1, 65, 60, 80\] has TensorRT's format CHW32",
        ),
        ({"image": IMAGE, "scores": ("HWC", (1, 480, 640))}, "scores .* format HWC; expected one of LINEAR, HWC, HWC8"),
        ({"image": ("HWC8", (1, 1, 480, 640))}, "image is padded to 8 channels"),
    ],
)
def test_other_formats_are_refused(tensorrt, tensors, says):
    with pytest.raises(SuperPointError, match=rf"^a\.engine: {says}") as caught:
        check_formats(tensorrt, Engine(**tensors), Path("a.engine"))
    assert "\n" not in str(caught.value)
