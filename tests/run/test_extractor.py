"""`SuperPoint` from image to keypoints: random small networks for the mechanics, the real one for the meaning."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import photograph
from helpers import rarely
from onnx import TensorProto, helper

from superpoint_trt import Keypoints, SuperPoint, SuperPointError
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import DecodeOptions, OutputType

KINDS = [kind.value for kind in OutputType]
BORDER = 4
REACH_PX = 72
"""A score depends on pixels up to 46 px away (both heads see 84x84 px around a cell), after the suppression 66."""


@pytest.fixture(scope="session")
def model(tmp_path_factory, checkpoint_file):
    """Type, layout and export options -> an exported model, each made once."""
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def get(kind: str = "dense", layout: str = "v6", *, width: int = 320, height: int = 240, **options):
        options = {"max_keypoints": 4096, **options} if kind == "keypoints" else options
        key = (kind, layout, width, height, *sorted((name, str(value)) for name, value in options.items()))
        if key not in made:
            size = {"width_px": width, "height_px": height}
            path = folder / f"{len(made)}.onnx"
            made[key] = export(checkpoint_file(layout), path, ExportOptions(OutputType(kind), **size, **options))
        return made[key]

    return get


def extract(path, image, **options) -> Keypoints:
    with SuperPoint(path, **options) as superpoint:
        return superpoint.extract(image)


def assert_sound(found: Keypoints, image: np.ndarray) -> None:
    """What the docstrings promise of every result."""
    height, width = image.shape[:2]
    assert found.image_size == (width, height)
    assert found.xy.shape == (len(found), 2) and found.xy.dtype == np.float32
    assert found.scores.shape == (len(found),) and found.scores.dtype == np.float32
    assert found.descriptors.shape == (len(found), 32) and found.descriptors.dtype == np.float32
    assert (np.diff(found.scores) <= 0).all(), "scores must fall"
    assert ((found.scores > 0.005) & (found.scores <= 1)).all()
    np.testing.assert_allclose(np.linalg.norm(found.descriptors, axis=1), 1, atol=1e-5)
    assert len({tuple(point) for point in found.xy.tolist()}) == len(found), "a point appears twice"


def assert_same(found: Keypoints, expected: Keypoints, shift=(0.0, 0.0), inside=None) -> None:
    """The same points (order aside), scores and descriptors; `inside` is a rectangle (x0, y0, x1, y1) of expected's."""
    here = {tuple(point): row for row, point in enumerate((found.xy + np.float32(shift)).tolist())}
    there = {tuple(point): row for row, point in enumerate(expected.xy.tolist())}
    if inside:
        x0, y0, x1, y1 = inside
        here, there = (
            {point: row for point, row in rows.items() if x0 <= point[0] < x1 and y0 <= point[1] < y1}
            for rows in (here, there)
        )
    assert len(there) > 20, "too few points to prove anything"
    assert set(here) == set(there)
    rows, others = [here[point] for point in there], list(there.values())
    np.testing.assert_allclose(found.scores[rows], expected.scores[others], atol=1e-5)
    assert (found.descriptors[rows] * expected.descriptors[others]).sum(axis=1).min() > 0.9999


# ----------------------------------------------------------------------------------------------------------- any size

OTHERS = ("huggingface", "own")
SIZES = [(160, 120), (161, 123), (320, 240), (200, 9), (9, 200), (8, 8), (17, 31), (500, 333)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("layout", ["v6", *rarely("magicleap")])
def test_a_dynamic_model_takes_any_size(model, kind, layout, width, height):
    image = photograph(height, width)
    found = extract(model(kind, layout, dynamic=True), image)
    assert_sound(found, image)
    assert len(found) >= (width - 8) * (height - 8) // 200
    if len(found):
        low, high = found.xy.min(axis=0), found.xy.max(axis=0)
        assert (low >= BORDER).all() and (high <= [width - 1 - BORDER, height - 1 - BORDER]).all()
    assert not (min(width, height) == 8 and len(found)), "the borders leave nothing of 8 pixels"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_a_static_model_takes_any_size(model, kind, width, height):
    """160x128; what is larger is shrunk, and its border with it."""
    image = photograph(height, width)
    found = extract(model(kind, width=160, height=128), image)
    assert_sound(found, image)
    assert len(found) > 0 or min(width, height) < 32
    shrunk = min(1, 160 / width, 128 / height)
    border = np.array([round(side * shrunk) for side in (width, height)]) / [width, height]
    border = (BORDER + 0.5) / border - 0.5  # to_image of the first pixel inside
    slack = 0.01
    assert (found.xy >= border - slack).all()
    assert (found.xy <= np.array([width - 1, height - 1]) - border + slack).all()


@pytest.mark.parametrize(
    ("layout", "dynamic"),
    [
        ("v6", True),
        ("magicleap", False),
        *rarely(("v6", False), ("magicleap", True), *((name, free) for name in OTHERS for free in (True, False))),
    ],
)
def test_the_types_agree(model, photo, layout, dynamic):
    dense, heads, keypoints = (
        extract(model(kind, layout, dynamic=dynamic), photo) for kind in ("dense", "heads", "keypoints")
    )
    assert_same(heads, dense)
    assert_same(keypoints, dense)


@pytest.mark.parametrize(("width", "height"), [(161, 123), (313, 239)])
def test_the_types_agree_on_odd_sizes(model, width, height):
    """A keypoints model suppresses before the padding is cut off, so its last 20 px may differ."""
    image = photograph(height, width)
    dense, heads, keypoints = (extract(model(kind, dynamic=True), image) for kind in ("dense", "heads", "keypoints"))
    assert_same(heads, dense)
    assert_same(keypoints, dense, inside=(0, 0, width - 20, height - 20))


def test_a_checkpoint_runs_as_its_onnx_does(model, checkpoint_file, photo):
    assert_same(extract(checkpoint_file("v6"), photo), extract(model(dynamic=True), photo))


@pytest.mark.parametrize("kind", KINDS)
def test_static_and_dynamic_agree(model, photo, kind):
    assert_same(extract(model(kind), photo), extract(model(kind, dynamic=True), photo))


# ------------------------------------------------------------------------------------------- coordinates of the caller


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "height"), [(320, 240), (320, 100), (130, 240)])
def test_a_larger_image_is_answered_in_its_own_pixels(model, kind, width, height):
    """Every pixel doubled, then shrunk by area: the network sees the original, and pixel k comes back as 2 k + 0.5."""
    image = photograph(height, width)
    small = extract(model(kind), image)
    large = extract(model(kind), image.repeat(2, axis=0).repeat(2, axis=1))
    assert len(small) > 20
    assert large.image_size == (2 * width, 2 * height)
    np.testing.assert_array_equal(large.xy, 2 * small.xy + 0.5)
    np.testing.assert_allclose(large.scores, small.scores, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_max_side_shrinks_first(model, kind):
    image = photograph(120, 160)
    small = extract(model(kind, dynamic=True), image)
    large = extract(model(kind, dynamic=True), image.repeat(3, axis=0).repeat(3, axis=1), max_side_px=160)
    np.testing.assert_allclose(large.xy, 3 * small.xy + 1, atol=1e-4)
    assert large.image_size == (480, 360)
    unchanged = extract(model(kind, dynamic=True), image, max_side_px=161)
    np.testing.assert_array_equal(unchanged.xy, small.xy)


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_image_lies_top_left_at_its_own_size(model, kind):
    """Away from the padding it is found as a model without padding finds it."""
    image = photograph(200, 280)
    padded, exact = extract(model(kind), image), extract(model(kind, dynamic=True), image)
    assert_same(padded, exact, inside=(0, 0, 280 - REACH_PX, 200 - REACH_PX))


# ------------------------------------------------------------------------------------------------------ kinds of image


def as_png(image, folder):
    cv2.imwrite(str(folder / "image.png"), image)
    return folder / "image.png"


def as_16_bit_png(image, folder):
    cv2.imwrite(str(folder / "deep.png"), image.astype(np.uint16) * 257)
    return str(folder / "deep.png")


def as_pil(image, _):
    from PIL import Image

    return Image.fromarray(image)


SAME_IMAGE = {
    "uint16": lambda image, _: image.astype(np.uint16) * 257,
    "float32": lambda image, _: image.astype(np.float32) / np.float32(255),
    "float64": lambda image, _: image / 255,
    "height-width-1": lambda image, _: image[..., None],
    "not-contiguous": lambda image, _: np.asfortranarray(image),
    "png": as_png,
    "16-bit-png": as_16_bit_png,
    "pil": as_pil,
}


@pytest.mark.parametrize("form", SAME_IMAGE)
def test_the_same_image_in_another_form(model, photo, tmp_path, form):
    expected = extract(model(), photo)
    found = extract(model(), SAME_IMAGE[form](photo, tmp_path))
    np.testing.assert_array_equal(found.xy, expected.xy)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("scale", [1, 257], ids=["uint8", "uint16"])
def test_gray_as_color(model, photo, channels, scale):
    """The luma weights add up to 1 only to seven digits, so scores move in the seventh."""
    image = photo[..., None].repeat(channels, axis=2).astype(np.uint8 if scale == 1 else np.uint16) * scale
    assert_same(extract(model(), image), extract(model(), photo))


def test_the_callers_array_is_not_written_to(model, photo):
    image = photo.astype(np.float32) / 255
    image.flags.writeable = False
    extract(model(), image)


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def album():
    sizes = [(120, 160), (120, 160), (240, 320), (240, 320), (240, 320), (123, 161), (240, 320), (8, 8), (480, 640)]
    names = ("astronaut", "coffee", "camera")
    return [photograph(*size, name=names[index % 3]) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("kind", "dynamic", "largest"),
    [
        ("dense", True, 2),
        ("dense", False, 8),
        ("heads", True, 8),
        ("keypoints", False, 2),
        *rarely(
            ("dense", True, 8),
            ("dense", False, 2),
            ("heads", True, 2),
            ("heads", False, 2),
            ("heads", False, 8),
            ("keypoints", True, 2),
            ("keypoints", True, 8),
            ("keypoints", False, 8),
            *((kind, dynamic, 1) for kind in KINDS for dynamic in (True, False)),
        ),
    ],
)
def test_a_batch_is_its_images_one_by_one(model, album, kind, dynamic, largest):
    with SuperPoint(model(kind, dynamic=dynamic, max_batch_size=largest)) as superpoint:
        together = superpoint.extract_batch(iter(album))
        alone = [superpoint.extract(image) for image in album]
    assert [found.image_size for found in together] == [image.shape[::-1] for image in album]
    for found, expected in zip(together, alone):
        np.testing.assert_array_equal(found.xy, expected.xy)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
        np.testing.assert_allclose(found.descriptors, expected.descriptors, atol=1e-5)


@pytest.mark.parametrize(
    ("dynamic", "largest", "runs"),
    [
        (True, 2, [2, 2, 1, 1, 1, 1, 1]),
        (True, 8, [2, 3, 1, 1, 1, 1]),
        (False, 8, [8, 1]),
        *rarely((True, 1, [1] * 9), (False, 1, [1] * 9), (False, 2, [2, 2, 2, 2, 1])),
    ],
)
def test_neighbors_of_one_size_share_a_run(model, album, monkeypatch, dynamic, largest, runs):
    """A dynamic model runs each size by itself; into a static one everything fits."""
    with SuperPoint(model(dynamic=dynamic, max_batch_size=largest)) as superpoint:
        backend, seen = superpoint._backend, []
        infer = backend.infer
        monkeypatch.setattr(backend, "infer", lambda image: (seen.append(len(image)), infer(image))[1])
        superpoint.extract_batch(album)
    assert seen == runs


def test_a_batch_of_nothing(model):
    with SuperPoint(model()) as superpoint:
        assert superpoint.extract_batch([]) == []


def test_a_bad_image_in_a_batch_is_named(model, photo):
    with SuperPoint(model()) as superpoint, pytest.raises(SuperPointError, match="no_such_file"):
        superpoint.extract_batch([photo, "no_such_file.jpg"])


# -------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_is_strict(model, photo, kind):
    everything = extract(model(kind), photo)
    fiftieth = float(everything.scores[49])
    found = extract(model(kind), photo, threshold=fiftieth)
    assert len(found) == 49
    np.testing.assert_array_equal(found.xy, everything.xy[:49])


@pytest.mark.parametrize("kind", KINDS)
def test_max_keypoints_keeps_the_best(model, photo, kind):
    everything = extract(model(kind), photo)
    best = extract(model(kind), photo, max_keypoints=7)
    np.testing.assert_array_equal(best.xy, everything.xy[:7])
    assert len(extract(model(kind), photo, max_keypoints=100_000)) == len(everything) > 7


def test_a_keypoints_model_finds_at_most_its_n(model, photo):
    few = extract(model("keypoints", max_keypoints=50), photo)
    np.testing.assert_array_equal(few.xy, extract(model("dense"), photo).xy[:50])


@pytest.mark.parametrize("kind", ["dense", "heads"])
@pytest.mark.parametrize("radius", [1, 4, 9])
def test_nms_radius(model, kind, radius):
    found = extract(model(kind, dynamic=True), photograph(64, 64), nms_radius_px=radius, threshold=0.0)
    apart = np.abs(found.xy[:, None] - found.xy[None]).max(axis=2) + np.eye(len(found)) * 1e9
    assert apart.min() == radius + 1, "as close together as the radius allows, and no closer"


@pytest.mark.parametrize("kind", ["dense", "heads"])
def test_nms_radius_0_keeps_every_pixel(model, kind):
    found = extract(model(kind, dynamic=True), photograph(64, 72), nms_radius_px=0, threshold=0.0)
    assert len(found) == (72 - 2 * BORDER) * (64 - 2 * BORDER)


@pytest.mark.parametrize("kind", ["dense", "heads"])
@pytest.mark.parametrize("border", [0, 4, 30])
def test_remove_borders(model, photo, kind, border):
    found = extract(model(kind), photo, remove_borders_px=border)
    everything = extract(model(kind), photo, remove_borders_px=0)
    x, y = everything.xy.T
    inside = (x >= border) & (x < 320 - border) & (y >= border) & (y < 240 - border)
    np.testing.assert_array_equal(found.xy, everything.xy[inside])
    assert inside.all() == (border == 0)


def test_a_border_wider_than_the_image_leaves_nothing(model, photo):
    found = extract(model(), photo, remove_borders_px=130)
    assert len(found) == 0 and found.descriptors.shape == (0, 32) and found.xy.shape == (0, 2)


@pytest.mark.parametrize(("width", "height"), [(8, 8), (39, 41), (100, 16), (100, 60)])
def test_an_in_graph_border_wider_than_the_image(model, width, height):
    wide = model("keypoints", dynamic=True, decode=DecodeOptions(remove_borders_px=20))
    image = photograph(height, width)
    found = extract(wide, image)
    assert_sound(found, image)
    assert (found.xy >= 20).all() and (found.xy < np.array([width, height]) - 20).all()


def test_options_in_force_of_a_keypoints_model_are_its_own(model):
    baked = DecodeOptions(nms_radius_px=3, remove_borders_px=6, threshold=0.02)
    with SuperPoint(model("keypoints", decode=baked)) as superpoint:
        assert superpoint.options == replace(baked, subpixel=superpoint.description.subpixel)
    with SuperPoint(model("keypoints", decode=baked), threshold=0.3, nms_radius_px=3) as superpoint:
        assert superpoint.options == DecodeOptions(3, 6, 0.3, subpixel=superpoint.description.subpixel)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"threshold": 0.01}, "threshold 0.01 .* up to 0.02 .*--threshold"),
        ({"nms_radius_px": 4}, "nms_radius_px 4 .* does 3"),
        ({"remove_borders_px": 4}, "remove_borders_px 4 .* does 6"),
    ],
)
def test_what_is_baked_in_cannot_be_asked_otherwise(model, asked, says):
    path = model("keypoints", decode=DecodeOptions(nms_radius_px=3, remove_borders_px=6, threshold=0.02))
    with pytest.raises(SuperPointError, match=says):
        SuperPoint(path, **asked)


# ---------------------------------------------------------------------------------------------------- opening, closing


def test_closed_on_leaving(model, photo):
    with SuperPoint(model()) as superpoint:
        superpoint.extract(photo)
    with pytest.raises(SuperPointError, match="closed"):
        superpoint.extract(photo)


def test_closing_twice_is_harmless(model):
    with SuperPoint(model()) as superpoint:
        superpoint.close()
    superpoint.close()


def test_an_error_inside_comes_through(model):
    with pytest.raises(KeyError, match="mine"), SuperPoint(model()):
        raise KeyError("mine")


def test_the_runtime_is_named(model, checkpoint_file):
    with SuperPoint(model(), device="cpu", threads=2) as superpoint:
        assert superpoint.runtime.backend == f"onnxruntime {onnxruntime.__version__}"
        assert superpoint.runtime.device == "cpu (CPUExecutionProvider, 2 threads)"
        assert superpoint.runtime.precision == "fp32"
        assert superpoint._backend._session.get_session_options().intra_op_num_threads == 2
    before = torch.get_num_threads()
    try:
        with SuperPoint(checkpoint_file("v6"), device="cpu", threads=1) as superpoint:
            assert superpoint.runtime.backend.startswith(f"torch {torch.__version__}")
            assert superpoint.runtime.device == "cpu (1 threads)"
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or os.cpu_count() == 1, reason="needs two CPUs to take one off"
)
def test_default_threads_are_those_used(model):
    """In a container or under taskset the runtime uses the CPUs it may, not those the machine has."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with SuperPoint(model(), device="cpu") as superpoint:
            claimed = re.findall(r"\d+", superpoint.runtime.device)
    finally:
        os.sched_setaffinity(0, allowed)
    assert claimed in ([], ["1"])


# -------------------------------------------------------------------------------------------------- other tools' models


def stripped(path, folder, change=lambda graph: None):
    """The same graph as another tool would write it: no metadata."""
    foreign = onnx.load(path)
    del foreign.metadata_props[:]
    foreign.producer_name = "another tool"
    change(foreign.graph)
    onnx.checker.check_model(foreign, full_check=True)
    onnx.save(foreign, folder / "foreign.onnx")
    return folder / "foreign.onnx"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("image", [(240, 320), (123, 161)], ids=["320x240", "161x123"])
def test_a_model_without_metadata(model, tmp_path, kind, dynamic, image):
    image = photograph(*image)
    ours = model(kind, dynamic=dynamic)
    with SuperPoint(stripped(ours, tmp_path)) as superpoint:
        found = superpoint.extract(image)
        assert superpoint.description.family is None
        assert superpoint.description.type.value == kind
        assert superpoint.description.descriptor_dim == 32
    expected = extract(ours, image)
    if kind == "keypoints":  # its border on the padded sides is not known
        assert_same(found, expected, inside=(0, 0, image.shape[1] - BORDER, image.shape[0] - BORDER))
    else:
        np.testing.assert_array_equal(found.xy, expected.xy)


def without_count(graph):
    graph.output.remove(next(output for output in graph.output if output.name == "num_keypoints"))


def whole_pixels(graph):
    """Keypoints as int64, as LightGlue's exporter writes them."""
    for node in graph.node:
        node.output[:] = ["float_keypoints" if name == "keypoints" else name for name in node.output]
    graph.node.append(helper.make_node("Cast", ["float_keypoints"], ["keypoints"], to=TensorProto.INT64))
    graph.output[0].type.tensor_type.elem_type = TensorProto.INT64


@pytest.mark.parametrize("change", [without_count, whole_pixels])
def test_a_keypoints_model_of_another_tool(model, tmp_path, photo, change):
    found = extract(stripped(model("keypoints"), tmp_path, change), photo)
    assert_sound(found, photo)
    assert_same(found, extract(model("keypoints"), photo))


# ------------------------------------------------------------------------------------- the real network, real meanings


@pytest.fixture(scope="module", params=KINDS)
def real(request, model):
    return model(request.param, "packaged", dynamic=True)


def test_the_corners_of_a_square_are_found(real):
    """Pixels 100 to 219 across and 80 to 159 down are white: the corners lie between pixels, at 99.5 and so on."""
    image = np.zeros((240, 320), np.uint8)
    image[80:160, 100:220] = 255
    found = extract(real, image).top(10)
    for corner in [(99.5, 79.5), (219.5, 79.5), (99.5, 159.5), (219.5, 159.5)]:
        assert np.linalg.norm(found.xy - corner, axis=1).min() <= 1.5, corner


def test_nothing_is_found_on_an_even_surface(real):
    assert len(extract(real, np.full((240, 320), 128, np.uint8))) == 0


@pytest.mark.parametrize("name", ["astronaut", *rarely("coffee")])
def test_a_cut_moves_nothing_away_from_it(real, name):
    """A part whose sides are no multiples of 8, cut out on whole cells, so that both see the same pixels in a cell."""
    image = photograph(480, 640, name)
    x, y, width, height = 24, 16, 557, 403
    whole, part = extract(real, image), extract(real, image[y : y + height, x : x + width])
    inside = (x + REACH_PX, y + REACH_PX, x + width - REACH_PX, y + height - REACH_PX)
    assert_same_points_nearly(part, whole, (x, y), inside)


SAME_PLACE_PX = 0.05
"""Sub-pixel places follow the scores, which differ in the fifth digit."""


def assert_same_points_nearly(part, whole, shift, inside):
    x0, y0, x1, y1 = inside

    def within(xy):
        return (xy >= [x0, y0]).all(axis=1) & (xy < [x1, y1]).all(axis=1)

    here, there = within(part.xy + np.float32(shift)), within(whole.xy)
    assert there.sum() > 50
    distance = np.linalg.norm((part.xy[here] + np.float32(shift))[:, None] - whole.xy[there][None], axis=2)
    near = distance.min(axis=0) < SAME_PLACE_PX
    assert near.mean() >= 0.99 and (distance.min(axis=1) < SAME_PLACE_PX).mean() >= 0.99
    partner = distance.argmin(axis=0)[near]
    cosine = (part.descriptors[here][partner] * whole.descriptors[there][near]).sum(axis=1)
    assert cosine.min() > 0.999
    np.testing.assert_allclose(part.scores[here][partner], whole.scores[there][near], atol=1e-4)


def test_a_photograph_and_its_mirror_image(real):
    """The same number of points within a fifth, and most of them mirrored within 3 px: the geometry is not skewed."""
    image = photograph(240, 320)
    found, mirrored = extract(real, image), extract(real, image[:, ::-1])
    assert abs(len(found) - len(mirrored)) <= 0.2 * len(found)
    back = np.stack([319 - mirrored.xy[:, 0], mirrored.xy[:, 1]], axis=1)
    nearest = np.linalg.norm(found.xy[:, None] - back[None], axis=2).min(axis=1)
    assert (nearest <= 3).mean() > 0.7


def test_half_the_size_finds_the_same_places(model):
    """A static 320x240 model on a 640x480 photograph: a good part of the full-size points, in full-size pixels."""
    image = photograph(480, 640)
    full = extract(model("dense", "packaged", dynamic=True), image, max_keypoints=300)
    half = extract(model("dense", "packaged"), image)
    nearest = np.linalg.norm(full.xy[:, None] - half.xy[None], axis=2).min(axis=1)
    assert half.image_size == (640, 480)
    assert (nearest <= 3).mean() > 0.4
    assert half.xy.max(axis=0)[0] > 320 and half.xy.max(axis=0)[1] > 240
