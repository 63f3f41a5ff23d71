"""All eight EXIF orientations, in each format that has them: pixels upright, and coordinates back in stored pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from superpoint_trt.core.image_file import read_image_file
from superpoint_trt.core.image_header import read_header
from superpoint_trt.core.orientation import ORIENTATIONS, stored_size, to_stored, turn_upright

STORED = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def encoded(kind: str, orientation: int) -> bytes:
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("no WebP in Pillow")
    exif, directory = Image.Exif(), ImageFileDirectory_v2()
    exif[274] = directory[274] = orientation
    options = {
        "JPEG": {"exif": exif, "quality": 100, "subsampling": 0},
        "PNG": {"exif": exif},
        "WEBP": {"exif": exif, "lossless": True},
        "TIFF": {"tiffinfo": directory},
    }
    buffer = io.BytesIO()
    Image.fromarray(STORED).save(buffer, kind, **options[kind])
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_is_read_upright(kind, orientation, tmp_path):
    """As Pillow turns it."""
    path = tmp_path / "image"
    path.write_bytes(encoded(kind, orientation))
    header = read_header(path.read_bytes())
    assert header is not None and header.orientation == orientation and (header.width_px, header.height_px) == (40, 24)
    found = read_image_file(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert found.orientation == orientation and found.full_hw == expected.shape[:2]
    np.testing.assert_allclose(found.pixels.astype(int), expected, atol=3 if kind == "JPEG" else 0)
    assert stored_size(found.full_hw[::-1], orientation) == (40, 24)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_points_return_to_the_stored_pixels(orientation):
    upright = turn_upright(STORED, orientation)
    rows, columns = np.indices(upright.shape[:2])
    xy = np.stack([columns.ravel(), rows.ravel()], axis=1).astype(np.float32)
    x, y = to_stored(xy, orientation, (40, 24)).T.astype(int)
    np.testing.assert_array_equal(STORED[y, x], upright.reshape(-1, 3))
    assert to_stored(xy, orientation, (40, 24)).dtype == np.float32


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none(orientation):
    header = read_header(encoded("JPEG", orientation))
    assert header is not None and header.orientation == 1
