"""Reading images, turning them gray, fitting them into a model, and the way back: answers worked out by hand."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from superpoint_trt.core.image import RGB_TO_GRAY, Placement, as_array, load_image, place, to_gray, to_input, to_picture
from superpoint_trt.core.types import ModelDescription, OutputType, SuperPointError

# ------------------------------------------------------------------------------------------------------------ to_gray


def filled(pixel, dtype=np.uint8) -> np.ndarray:
    """An 8x8 image of one pixel value."""
    pixel = np.asarray(pixel, dtype)
    return np.broadcast_to(pixel, (8, 8, *pixel.shape))


@pytest.mark.parametrize(
    ("image", "gray"),
    [
        (filled(0), 0.0),
        (filled(51), 0.2),
        (filled(255), 1.0),
        (filled(13107, np.uint16), 0.2),
        (filled(65535, np.uint16), 1.0),
        (filled(True, bool), 1.0),
        (filled(False, bool), 0.0),
        (filled(0.25, np.float16), 0.25),
        (filled(0.25, np.float32), 0.25),
        (filled(0.25, np.float64), 0.25),
        (filled(1.0, np.float32), 1.0),
        (filled([51]), 0.2),
        (filled([13107], np.uint16), 0.2),
        (filled([True], bool), 1.0),
        (filled([0.25], np.float32), 0.25),
        (filled([255, 0, 0]), 0.299),
        (filled([0, 255, 0]), 0.587),
        (filled([0, 0, 255]), 0.114),
        (filled([51, 102, 204]), 0.2 * 0.299 + 0.4 * 0.587 + 0.8 * 0.114),
        (filled([0, 65535, 0], np.uint16), 0.587),
        (filled([13107, 13107, 13107], np.uint16), 0.2),
        (filled([1, 0, 1], bool), 0.413),
        (filled([0.5, 0.0, 1.0], np.float32), 0.2635),
        (filled([255, 0, 0, 255]), 0.299),
        (filled([255, 0, 0, 0]), 0.299),  # what lies under a transparent pixel is still the image
        (filled([0.0, 1.0, 0.0, 0.3], np.float64), 0.587),
    ],
)
def test_to_gray(image, gray):
    found = to_gray(image)
    assert found.shape == (8, 8)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, gray, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [8, 9, 319, 320, 321, 322, 640, 641, 642, 961, 1345, 3071, 4000])
def test_gray_has_the_bits_of_whole_rows(width):
    """A row is weighed in pieces, so that OpenBLAS takes no locks."""
    rgb = np.random.default_rng(width).integers(0, 256, (8, width, 3), dtype=np.uint8)
    expected = rgb.astype(np.float32) @ RGB_TO_GRAY / np.float32(255)
    np.testing.assert_array_equal(to_gray(rgb), expected)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "reversed"])
def test_gray_of_a_large_image_is_the_same(monkeypatch, kind):
    """Some rows at a time."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), np.uint8)
    if kind == "reversed":
        pixels = pixels[..., ::-1]
    elif kind != "uint8":
        pixels = pixels.astype(kind) / 255 if kind == "float32" else pixels.astype(kind)
    at_once = to_gray(pixels)
    monkeypatch.setattr("superpoint_trt.core.image.LARGE_PX", 5 * 53)
    np.testing.assert_array_equal(to_gray(pixels), at_once)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_gray_of_colors_in_reverse_is_the_same_to_the_bit(kind):
    """Image files give such arrays; a copy of them has its colors in order."""
    bgra = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (37, 53, 4), kind)
    for reverse in (bgra[..., 2::-1], bgra[::2, ::-1, 2::-1]):
        assert reverse.strides[2] < 0
        np.testing.assert_array_equal(to_gray(reverse), to_gray(np.ascontiguousarray(reverse)))


def test_to_gray_keeps_pixels_where_they_are():
    image = np.zeros((9, 17, 3), np.uint8)
    image[2, 11] = 255
    found = to_gray(image)
    assert np.argwhere(found).tolist() == [[2, 11]]


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros(64, np.uint8), ("(64,)", "(H, W)")),
        (np.zeros((3, 64, 64), np.uint8), ("(3, 64, 64)", "(H, W, 3)")),
        (np.zeros((64, 64, 2), np.uint8), ("(64, 64, 2)",)),
        (np.zeros((1, 1, 64, 64), np.float32), ("(1, 1, 64, 64)",)),
        (np.zeros((7, 64), np.uint8), ("64x7", "8x8")),
        (np.zeros((64, 7), np.uint8), ("7x64", "8x8")),
        (np.zeros((0, 0), np.uint8), ("0x0",)),
        (np.zeros((8, 8), np.int32), ("int32", "uint8")),
        (np.full((8, 8), 255.0), ("255", "[0, 1]", "uint8")),
        (np.full((8, 8), -0.5), ("-0.5", "[0, 1]")),
        (np.full((8, 8), np.nan), ("nan", "[0, 1]")),
        (np.full((8, 8), np.inf), ("inf", "[0, 1]")),
    ],
)
def test_to_gray_refuses(image, says):
    with pytest.raises(SuperPointError) as refused:
        to_gray(image)
    for words in says:
        assert words in str(refused.value)


# --------------------------------------------------------------------------------------------------------- load_image


def test_16_bit_png_keeps_its_depth(tmp_path):
    pixels = np.arange(80, dtype=np.uint16).reshape(8, 10) * 829
    cv2.imwrite(str(tmp_path / "deep.png"), pixels)
    found = load_image(tmp_path / "deep.png")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, pixels)


def save(path, pixels, mode=None, **options):
    image = Image.fromarray(np.asarray(pixels))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("alpha", [255, 128, 0])
def test_rgba_png_is_its_colors_whatever_the_alpha(tmp_path, alpha):
    path = save(tmp_path / "a.png", filled([255, 0, 0, alpha]))
    np.testing.assert_array_equal(load_image(path), filled([255, 0, 0]))
    np.testing.assert_allclose(to_gray(load_image(path)), 0.299, atol=1e-6)


def test_palette_png_is_its_colors_not_its_indices(tmp_path):
    indices = np.array([[0, 1, 2, 3]], np.uint8).repeat(8, axis=0).repeat(2, axis=1)
    image = Image.frombytes("P", (8, 8), indices.tobytes())
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 255, 255, 255])
    image.save(tmp_path / "palette.png")
    for found in (load_image(tmp_path / "palette.png"), as_array(image)):
        np.testing.assert_allclose(to_gray(found)[0, ::2], [0.299, 0.587, 0.114, 1], atol=1e-6)


def test_gray_png_with_alpha(tmp_path):
    path = save(tmp_path / "la.png", filled([90, 90, 90, 10]), "LA")
    np.testing.assert_allclose(to_gray(load_image(path)), 90 / 255, atol=1e-6)


def test_16_bit_color_png(tmp_path):
    cv2.imwrite(str(tmp_path / "deep.png"), filled([1000, 2000, 40000], np.uint16))  # OpenCV's order: blue first
    found = load_image(tmp_path / "deep.png")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, filled([40000, 2000, 1000], np.uint16))
    np.testing.assert_allclose(to_gray(found), (0.114 * 1000 + 0.587 * 2000 + 0.299 * 40000) / 65535, atol=1e-6)


def test_bilevel_png(tmp_path):
    board = np.indices((8, 8)).sum(axis=0) % 2 == 0
    save(tmp_path / "bits.png", board)
    np.testing.assert_array_equal(load_image(tmp_path / "bits.png"), board * np.uint8(255))


def test_unicode_path(tmp_path):
    path = save(tmp_path / "снимок 照片 é.png", filled(7))
    np.testing.assert_array_equal(load_image(path), filled(7))
    np.testing.assert_array_equal(as_array(str(path)), filled(7))


def test_pil_images_are_arrays_too():
    np.testing.assert_array_equal(as_array(Image.fromarray(np.array(filled([1, 2, 3])))), filled([1, 2, 3]))


def test_a_photograph_is_read_as_it_was_written(tmp_path):
    from skimage import data

    pixels = data.astronaut()[:200, :301]
    found = load_image(save(tmp_path / "photo.png", pixels))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(to_gray(found), to_gray(pixels))


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (filled(51), [51, 51, 51]),
        (filled([51]), [51, 51, 51]),
        (filled([10, 20, 30]), [10, 20, 30]),
        (filled([10, 20, 30, 0]), [10, 20, 30]),
        (filled([257, 514, 65535], np.uint16), [1, 2, 255]),
        (filled(65535, np.uint16), [255, 255, 255]),
        (filled(True, bool), [255, 255, 255]),
        (filled(0.2, np.float32), [51, 51, 51]),
        (filled([0.0, 1.0, 0.2], np.float64), [0, 255, 51]),
    ],
)
def test_to_picture(image, rgb):
    found = to_picture(image)
    assert found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"] and found.flags["WRITEABLE"]
    assert not np.shares_memory(found, image)
    np.testing.assert_array_equal(found, filled(rgb))


def upright() -> np.ndarray:
    """32x48, no two sides alike: dark top left, then lighter to the right, then below."""
    quadrants = np.array([[30, 100], [170, 240]], np.uint8)
    return quadrants.repeat(16, axis=0).repeat(24, axis=1)


STORED = {
    # EXIF 2.3, tag 274: where the stored row 0 and column 0 are on the upright picture.
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def as_stored(picture: np.ndarray, row_0: str, column_0: str) -> np.ndarray:
    if row_0 in ("left", "right"):
        picture = picture.T
    step = {"top": 1, "left": 1, "bottom": -1, "right": -1}
    return picture[:: step[row_0], :: step[column_0]]


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_exif_orientation(tmp_path, orientation, mode):
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(as_stored(upright(), *STORED[orientation]))
    path = save(tmp_path / "camera.jpg", stored, mode, quality=95, exif=exif)
    found = load_image(path)
    assert found.shape == ((32, 48) if mode == "L" else (32, 48, 3))
    np.testing.assert_allclose(to_gray(found) * 255, upright(), atol=4)


def test_the_eight_orientations_differ():
    """The test above proves something: all eight stored pictures are different."""
    stored = {
        as_stored(upright(), *sides).tobytes() + bytes(as_stored(upright(), *sides).shape) for sides in STORED.values()
    }
    assert len(stored) == 8


# ------------------------------------------------------------------------------------------------- place and to_image


def static(width: int, height: int) -> ModelDescription:
    return ModelDescription(OutputType.DENSE, width_px=width, height_px=height)


DYNAMIC = ModelDescription(OutputType.DENSE, width_px=640, height_px=480, dynamic=True)
WIDE_BORDER = ModelDescription(OutputType.KEYPOINTS, dynamic=True, remove_borders_px=20)
CHECKPOINT = ModelDescription(OutputType.DENSE, dynamic=True)


@pytest.mark.parametrize(
    ("image", "model", "max_side", "placed", "model_input"),
    [
        # Width x height throughout.
        ((640, 480), DYNAMIC, None, (640, 480), (640, 480)),
        ((161, 123), DYNAMIC, None, (161, 123), (168, 128)),
        ((8, 8), DYNAMIC, None, (8, 8), (8, 8)),
        ((9, 200), CHECKPOINT, None, (9, 200), (16, 200)),
        ((1280, 960), DYNAMIC, 640, (640, 480), (640, 480)),
        ((960, 1280), DYNAMIC, 640, (480, 640), (480, 640)),
        ((161, 123), DYNAMIC, 100, (100, 76), (104, 80)),  # 123 * 100 / 161 = 76.4
        ((161, 123), DYNAMIC, 2000, (161, 123), (168, 128)),
        ((20000, 10), DYNAMIC, 100, (100, 1), (104, 8)),
        ((16, 100), WIDE_BORDER, None, (16, 100), (40, 104)),
        ((640, 480), static(640, 480), None, (640, 480), (640, 480)),
        ((1280, 960), static(640, 480), None, (640, 480), (640, 480)),
        ((320, 240), static(640, 480), None, (320, 240), (640, 480)),
        ((639, 479), static(640, 480), None, (639, 479), (640, 480)),
        ((641, 480), static(640, 480), None, (640, 479), (640, 480)),  # 480 * 640 / 641 = 479.3
        ((480, 640), static(640, 480), None, (360, 480), (640, 480)),
        ((1000, 480), static(640, 480), None, (640, 307), (640, 480)),
        ((1280, 960), static(640, 480), 320, (320, 240), (640, 480)),
        ((320, 240), static(640, 480), 1000, (320, 240), (640, 480)),
        ((20000, 8), static(640, 480), None, (640, 1), (640, 480)),
        ((8, 20000), static(640, 480), None, (1, 480), (640, 480)),
    ],
)
def test_place(image, model, max_side, placed, model_input):
    found = place(image[::-1], model, max_side)
    assert (found.image_width_px, found.image_height_px) == image
    assert (found.placed_width_px, found.placed_height_px) == placed
    assert (found.input_width_px, found.input_height_px) == model_input


@pytest.mark.parametrize(
    ("image", "model", "point", "expected"),
    [
        ((1280, 960), static(640, 480), (0, 0), (0.5, 0.5)),
        ((1280, 960), static(640, 480), (639, 479), (1278.5, 958.5)),
        ((1280, 960), static(640, 480), (100, 200), (200.5, 400.5)),
        ((1920, 1440), static(640, 480), (0, 0), (1, 1)),
        ((2560, 1920), static(640, 480), (10, 0), (41.5, 1.5)),
        ((960, 720), static(640, 480), (2, 5), (3.25, 7.75)),
        ((1000, 480), static(640, 480), (0, 0), (0.28125, 0.5 * 480 / 307 - 0.5)),
        ((320, 240), static(640, 480), (17, 33), (17, 33)),
        ((161, 123), DYNAMIC, (160, 122), (160, 122)),
    ],
)
def test_to_image(image, model, point, expected):
    placement = place(image[::-1], model)
    found = placement.to_image(np.array([point], np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected], atol=1e-4)


def test_to_image_without_points():
    assert place((960, 1280), static(640, 480)).to_image(np.zeros((0, 2), np.float32)).shape == (0, 2)


SHRUNK = [((1280, 960), (640, 480)), ((1000, 480), (640, 480)), ((161, 123), (64, 64)), ((50, 777), (64, 64))]


@pytest.mark.parametrize(("image", "size"), SHRUNK)
def test_the_corners_of_the_image_are_the_corners_of_what_is_placed(image, size):
    """Pixels are squares around their centres: the outer corners lie half a pixel outside the outermost centres."""
    (w, h), p = image, place(image[::-1], static(*size))
    across, down = p.placed_width_px, p.placed_height_px
    placed = [[-0.5, -0.5], [across - 0.5, -0.5], [-0.5, down - 0.5], [across - 0.5, down - 0.5]]
    corners = [[-0.5, -0.5], [w - 0.5, -0.5], [-0.5, h - 0.5], [w - 0.5, h - 0.5]]
    np.testing.assert_allclose(p.to_image(np.array(placed, np.float32)), corners, atol=1e-3)


@pytest.mark.parametrize(("image", "size"), SHRUNK)
def test_the_map_back_is_the_inverse_of_the_shrinking(image, size):
    """A ramp whose value is its own x (then y): after shrinking, a pixel's value is where it came from."""
    (w, h), placement = image, place(image[::-1], static(*size))
    for axis, side in enumerate((w, h)):
        ramp = np.indices((h, w), dtype=np.float32)[1 - axis] / side
        shrunk = to_input(ramp, placement)[: placement.placed_height_px, : placement.placed_width_px]
        y, x = np.indices(shrunk.shape)
        back = placement.to_image(np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32))[:, axis]
        # An area average of whole pixels is off by a quarter of a pixel at most; k * s would be off by (s - 1) / 2.
        assert np.abs(back - shrunk.ravel() * side).max() <= 0.26


# ----------------------------------------------------------------------------------------------------------- to_input


def test_padding_repeats_the_last_row_and_column():
    gray = np.arange(81, dtype=np.float32).reshape(9, 9) / 81
    found = to_input(gray, place((9, 9), DYNAMIC))
    assert found.shape == (16, 16) and found.dtype == np.float32
    np.testing.assert_array_equal(found[:9, :9], gray)
    np.testing.assert_array_equal(found[:9, 9:], gray[:, 8:].repeat(7, axis=1))
    np.testing.assert_array_equal(found[9:, :9], gray[8:].repeat(7, axis=0))
    assert (found[9:, 9:] == gray[8, 8]).all()


def test_shrinking_averages():
    gray = np.zeros((16, 16), np.float32)
    gray[0, 0], gray[15, 14] = 1.0, 0.5
    found = to_input(gray, place((16, 16), static(8, 8)))
    expected = np.zeros((8, 8))
    expected[0, 0], expected[7, 7] = 0.25, 0.125
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("image", "model", "max_side"),
    [
        ((33, 21), static(16, 16), None),
        ((33, 21), static(40, 24), None),
        ((17, 40), static(16, 40), None),
        ((33, 21), DYNAMIC, None),
        ((33, 21), DYNAMIC, 20),
        ((33, 21), static(40, 24), 11),
    ],
)
def test_every_pixel_of_the_image_reaches_the_network(image, model, max_side):
    w, h = image
    placement = place((h, w), model, max_side)
    unseen = []
    for y in range(h):
        for x in range(w):
            impulse = np.zeros((h, w), np.float32)
            impulse[y, x] = 1
            inside = to_input(impulse, placement)[: placement.placed_height_px, : placement.placed_width_px]
            if inside.max() <= 0:
                unseen.append((x, y))
    assert unseen == []


@pytest.mark.parametrize(("image", "size"), [*SHRUNK, ((161, 123), (640, 480)), ((20000, 8), (64, 64))])
def test_the_input_has_the_models_size_and_range(image, size):
    rng = np.random.default_rng(1)
    found = to_input(rng.random(image[::-1], dtype=np.float32), place(image[::-1], static(*size)))
    assert found.shape == size[::-1] and found.flags["C_CONTIGUOUS"]
    assert found.min() >= 0 and found.max() <= 1


def test_nothing_is_done_to_an_image_that_fits():
    gray = np.random.default_rng(0).random((16, 24), dtype=np.float32)
    placement = place((16, 24), static(24, 16))
    assert placement == Placement(24, 16, 24, 16, 24, 16) and not placement.resized
    np.testing.assert_array_equal(to_input(gray, placement), gray)
