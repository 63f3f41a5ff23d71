"""Large images are shrunk early, in the same place; damaged and too large ones are refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image

from superpoint_trt.core import image, image_file
from superpoint_trt.core.image import as_loaded, load_image, needed_side_px, place, placed_gray, shrink, to_gray
from superpoint_trt.core.image_file import LoadedImage, ReadOptions, read_image_file
from superpoint_trt.core.types import ModelDescription, OutputType, SuperPointError

DYNAMIC = ModelDescription(OutputType.DENSE, dynamic=True)


@pytest.fixture
def everything_is_large(monkeypatch):
    """Small images take the way of large ones."""
    monkeypatch.setattr(image_file, "LARGE_PX", 1000)
    monkeypatch.setattr(image, "LARGE_PX", 1000)


def ramps(width: int, height: int) -> np.ndarray:
    """Red rises to the right and blue downwards, so that gray tells where a pixel came from."""
    y, x = np.indices((height, width), dtype=np.float64)
    across, down = 255 * (x + 0.5) / width, 255 * (y + 0.5) / height
    return np.stack([across, (across + down) / 2, down], axis=2).round().astype(np.uint8)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize(
    ("width", "height", "side", "reduction"),
    # 7 of 8 pixels of the last column are outside the image in the first four.
    [
        (1001, 801, 60, 8),
        (801, 1001, 61, 8),
        (513, 513, 64, 4),
        (521, 409, 65, 4),
        (257, 201, 64, 2),
        (250, 100, 126, 1),
    ],
)
def test_a_jpeg_that_is_decoded_small_lies_where_it_lay(tmp_path, width, height, side, reduction):
    path = tmp_path / "large.jpg"
    Image.fromarray(ramps(width, height)).save(path, quality=100, subsampling=0)
    found = read_image_file(path, side_px=side)
    assert found.reduction == reduction and found.full_hw == (height, width)
    assert found.pixels.shape == (-(-height // reduction), -(-width // reduction), 3)
    placement = place(found.full_hw, DYNAMIC, side)
    expected = shrink(to_gray(load_image(path)), placement)
    # A column of the result is 2 levels or more wide: a third of it would be seen.
    np.testing.assert_allclose(placed_gray(found, placement) * 255, expected * 255, atol=0.7)


@pytest.mark.usefixtures("everything_is_large")
def test_a_turned_jpeg_is_decoded_in_full(tmp_path):
    path, exif = tmp_path / "turned.jpg", Image.Exif()
    exif[274] = 6
    Image.fromarray(ramps(257, 201)).save(path, exif=exif)
    found = read_image_file(path, side_px=16)
    assert found.reduction == 1 and found.full_hw == found.pixels.shape[:2] == (257, 201)


@pytest.mark.usefixtures("everything_is_large")
@pytest.mark.parametrize("shape", [(201, 257), (201, 257, 1), (201, 257, 3), (201, 257, 4), (12, 900, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("reverse", [False, True])
def test_integers_are_shrunk_before_they_are_gray(shape, dtype, reverse):
    levels = 257 if dtype == np.uint16 else 1
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(dtype) * dtype(levels)
    pixels = pixels[..., ::-1] if reverse and len(shape) == 3 else pixels
    placement = place(pixels.shape[:2], DYNAMIC, 40)
    found = placed_gray(LoadedImage(pixels, pixels.shape[:2]), placement)
    assert found.dtype == np.float32 and found.shape == (placement.placed_height_px, 40)
    np.testing.assert_allclose(found * 255, shrink(to_gray(pixels), placement) * 255, atol=0.6)


def test_a_usual_image_is_not_touched(tmp_path):
    path = tmp_path / "usual.jpg"
    Image.fromarray(ramps(640, 480)).save(path)
    found = as_loaded(path, ReadOptions(), 64)
    assert found.reduction == 1
    placement = place(found.full_hw, DYNAMIC, 64)
    np.testing.assert_array_equal(placed_gray(found, placement), shrink(to_gray(load_image(path)), placement))


@pytest.mark.parametrize(
    ("model", "max_side", "needed"),
    [
        (DYNAMIC, None, None),
        (DYNAMIC, 300, 300),
        (ModelDescription(OutputType.DENSE, height_px=48, width_px=64), None, 64),
        (ModelDescription(OutputType.DENSE, height_px=48, width_px=64), 32, 32),
        (ModelDescription(OutputType.DENSE, height_px=48, width_px=64, dynamic=True), None, None),
    ],
)
def test_the_side_that_is_needed(model, max_side, needed):
    assert needed_side_px(model, max_side) == needed


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".hdr"])
def test_too_many_pixels(tmp_path, suffix):
    path = tmp_path / f"large{suffix}"
    cv2.imwrite(str(path), ramps(40, 30).astype(np.float32) / 255 if suffix == ".hdr" else ramps(40, 30))
    assert load_image(path, ReadOptions(max_pixels=1200)).shape == (30, 40, 3)
    with pytest.raises(SuperPointError, match=r"40x30 px, more than 1199 pixels.*1200 with --max-pixels"):
        load_image(path, ReadOptions(max_pixels=1199))


@pytest.mark.parametrize("most", [0, -1, (1 << 30) + 1])
def test_the_range_of_max_pixels(most):
    with pytest.raises(SuperPointError, match="max_pixels is"):
        ReadOptions(max_pixels=most).check()


def write_damaged(path) -> None:
    data = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8))[1].tobytes()
    path.write_bytes(data[: len(data) // 2] + data[-2:])


def test_a_damaged_jpeg_is_read_only_if_asked_for(tmp_path, capfd):
    write_damaged(tmp_path / "bad.jpg")
    with pytest.raises(
        SuperPointError, match=r"bad\.jpg is damaged \(Corrupt JPEG data: premature end.*--allow-damaged"
    ):
        load_image(tmp_path / "bad.jpg")
    assert load_image(tmp_path / "bad.jpg", ReadOptions(allow_damaged=True)).shape == (64, 96)
    assert capfd.readouterr().err == ""


def test_each_of_many_threads_learns_of_its_own_image(tmp_path, capfd):
    write_damaged(tmp_path / "bad.jpg")
    cv2.imwrite(str(tmp_path / "good.jpg"), ramps(96, 64))

    def is_read(index: int) -> bool:
        try:
            load_image(tmp_path / ("bad.jpg" if index % 5 == 0 else "good.jpg"))
        except SuperPointError:
            return False
        return True

    before = threading.active_count()
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(is_read, range(300)))
    assert found == [index % 5 != 0 for index in range(300)]
    assert capfd.readouterr().err == "" and threading.active_count() == before
