"""The page in real headless Chromium, served by `superpoint web`: pictures, keyboard, camera, and what can go wrong."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import cv2
import numpy as np
import onnx
import pytest
from matchers import random_matcher
from page_tools import CHROMIUM, FIREFOX, WEB, needs_browser, needs_node
from skimage import data

from superpoint_trt import SuperPoint, match_images, packaged
from superpoint_trt.checkpoint.matcher import MatcherShape, save_matcher
from superpoint_trt.convert.export_matcher import export_matcher
from superpoint_trt.match.learned import LearnedMatcher
from superpoint_trt.match.nearest import match
from superpoint_trt.pipeline.web import WebOptions, save_page

pytestmark = pytest.mark.exhaustive

CAMERA_WH = (320, 240)
FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-file-for-fake-video-capture={video}")
ALLOWED = "--use-fake-ui-for-media-stream"
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")


@pytest.fixture(scope="module")
def serve():
    """Model -> address of the page; the servers end with the module."""
    started = []

    def start(model: str, *options: str) -> str:
        command = [
            sys.executable,
            "-m",
            "superpoint_trt",
            "web",
            "--no-open",
            "--port",
            "0",
            "--model",
            model,
            *options,
        ]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(server)
        for line in server.stdout:
            if line.startswith("page"):
                return line.split()[1]
        raise AssertionError("the server ended")

    yield start
    for server in started:
        server.terminate()
        server.wait(20)
        server.stdout.close()


@pytest.fixture(scope="module")
def model(exported):
    """A small random network: fast, and its points are as good as any for a comparison."""
    return str(exported("compact", dynamic=True))


@pytest.fixture
def act(tmp_path):
    """Scenario, address and flags -> what web/tests/browser.mjs saw in Chromium."""
    return partial(use_page, needs_browser(CHROMIUM), tmp_path)


@pytest.fixture(params=[CHROMIUM, FIREFOX], ids=["chromium", "firefox"])
def act_in_each(tmp_path, request):
    """As `act`, in each browser."""
    return partial(use_page, needs_browser(request.param), tmp_path)


def use_page(
    browser: str, folder: Path, scenario: str, address: str, *flags: str, pictures: tuple[str, ...] = ()
) -> dict:
    """What a browser saw; it has asked no other machine for anything."""
    settings = {"browser": browser, "address": address, "folder": str(folder), "flags": flags, "pictures": pictures}
    command = [needs_node(), WEB / "tests" / "browser.mjs", scenario, json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    home = address.partition("?")[0]
    elsewhere = [url for url in seen["requests"] if not url.startswith((home, "data:", f"blob:{home}"))]
    assert not elsewhere, "the page asks other machines"
    return seen


def write_pictures(folder: Path) -> list[np.ndarray]:
    """Two overlapping parts of a photograph in color, as PNG; RGB."""
    photo = data.astronaut()
    parts = [photo[40:283, 60:381], photo[60:297, 90:400]]
    for name, part in zip("ab", parts):
        cv2.imwrite(str(folder / f"{name}.png"), cv2.cvtColor(part, cv2.COLOR_RGB2BGR))
    return parts


def assert_same(page: dict, package, most_apart: int = 1) -> None:
    """The same points within 0.1 px, and there the same scores and descriptors within 1e-3."""
    xy = np.array(page["xy"], np.float32).reshape(-1, 2)
    scores = np.array(page["scores"], np.float32)
    descriptors = np.array(page["descriptors"], np.float32).reshape(len(xy), -1)
    assert len(package) > 50
    apart = np.linalg.norm(xy[:, None] - package.xy[None], axis=2)
    nearest, distance = apart.argmin(axis=1), apart.min(axis=1)
    # A point whose score lies at the threshold, or at the last place, may be in one and not in the other.
    there = distance < 0.1
    assert (~there).sum() <= most_apart and (apart.min(axis=0) >= 0.1).sum() <= most_apart
    np.testing.assert_allclose(scores[there], package.scores[nearest[there]], atol=1e-4)
    np.testing.assert_allclose(descriptors[there], package.descriptors[nearest[there]], atol=1e-3)


@pytest.mark.parametrize("network", ["full", "small", "compact"])
def test_the_page_finds_and_matches_what_the_package_does(network, serve, model, act_in_each, tmp_path):
    parts = write_pictures(tmp_path)
    name = model if network == "compact" else network
    seen = act_in_each("pictures", serve(name) + "?backend=wasm&threads=2")
    with SuperPoint(name, device="cpu", max_keypoints=500) as superpoint:
        package = [superpoint.extract(part) for part in parts]
    for slot, keypoints in zip("ab", package):
        assert_same(seen["features"][slot], keypoints)
    rows = {tuple(row) for row in np.reshape(seen["rows"], (-1, 2))}
    expected = {tuple(row) for row in match(package[0].descriptors, package[1].descriptors).rows}
    assert len(rows ^ expected) <= 0.02 * len(expected) + 2
    assert seen["isolated"] and seen["backend"] == "WASM, 2 threads"
    assert seen["complaints"] == [] and seen["problem"] == ""
    assert seen["desktop"]["over"] <= 0 and seen["phone"]["over"] <= 0, "the page is wider than its window"
    if network != "compact":
        found = match_images(*package).geometry.inliers.mean()
        assert np.mean(seen["agree"]) > max(0.7, found - 0.05), "the second picture is the first, moved"


def test_a_learned_matcher_matches_as_in_the_package(serve, act_in_each, tmp_path):
    """Random weights whose answers depend on places, scores and descriptors."""
    parts = write_pictures(tmp_path)
    weights = save_matcher(random_matcher(MatcherShape((64,), 64, 2, 2)), tmp_path / "m.safetensors")
    path = export_matcher(weights, tmp_path / "random.onnx")
    seen = act_in_each("pictures", serve("small", "--matcher", str(path)) + "?backend=wasm")
    with SuperPoint("small", device="cpu", max_keypoints=500) as superpoint, LearnedMatcher(path, "cpu") as matcher:
        expected = {tuple(row) for row in matcher.match(*map(superpoint.extract, parts)).rows}
    nearest = {tuple(row) for row in match(*(superpoint_descriptors(seen, slot) for slot in "ab")).rows}
    rows = {tuple(row) for row in np.reshape(seen["rows"], (-1, 2))}
    assert len(rows) > 20 and len(rows ^ expected) <= 0.02 * len(expected) + 2 < len(rows ^ nearest)
    assert seen["matcher"] == "random" and seen["complaints"] == []


def superpoint_descriptors(seen: dict, slot: str) -> np.ndarray:
    one = seen["features"][slot]
    return np.array(one["descriptors"], np.float32).reshape(len(one["scores"]), -1)


def set_orientation(path: Path, orientation: int) -> None:
    """Puts an EXIF orientation into a JPEG file, behind its first marker."""
    tiff = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    jpeg, exif = path.read_bytes(), b"Exif\0\0" + tiff
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])


def test_dropped_jpegs_are_read_upright(serve, act_in_each, model, tmp_path):
    for name, part in zip("ab", write_pictures(tmp_path)):
        cv2.imwrite(str(tmp_path / f"{name}.jpg"), cv2.cvtColor(part, cv2.COLOR_RGB2BGR))
    set_orientation(tmp_path / "b.jpg", 6)
    seen = act_in_each("dropped", serve(model))
    with SuperPoint(model, device="cpu", max_keypoints=500) as superpoint:
        found = {name: superpoint.extract(tmp_path / f"{name}.jpg") for name in "ab"}
    assert found["b"].image_size == (237, 310), "the test's own picture is turned"
    for name in "ab":
        assert_same(seen["features"][name], found[name])


def test_webgpu_finds_the_same(serve, act, model, tmp_path):
    """On Chromium's software adapter, which the page takes only if it is told to."""
    parts = write_pictures(tmp_path)
    seen = act("pictures", serve(model) + "?backend=webgpu", *SOFTWARE_GPU)
    if seen["backend"] != "WebGPU":
        pytest.skip(f"this Chromium has no WebGPU: {seen['note']}")
    with SuperPoint(model, device="cpu", max_keypoints=500) as superpoint:
        for slot, part in zip("ab", parts):
            assert_same(seen["features"][slot], superpoint.extract(part))


def test_the_keyboard_is_enough(serve, act):
    """The example by Enter; sliders by arrow keys. Its own true warp says that the matches are right."""
    seen = act("keyboard", serve("full"))
    right = re.search(r"(\d+)% lie within 3 px", seen["example"]["said"])
    assert int(right[1]) > 80
    assert 100 < seen["example"]["drawn"] <= 150
    assert [len(seen["fewer"]["features"][slot]["scores"]) for slot in "ab"] == [50, 50]
    for slot in "ab":
        assert len(seen["strong"]["features"][slot]["scores"]) < len(seen["example"]["features"][slot]["scores"])
    assert min(seen["strong"]["features"]["a"]["scores"]) > 0.3, "the slider ends at 0.32"
    whole = np.array(seen["whole"]["features"]["a"]["xy"])
    np.testing.assert_array_equal(whole, np.round(whole))
    assert not np.array_equal(seen["fewer"]["features"]["a"]["xy"], whole)
    assert seen["reached"] == ["example", "file-a", "file-b", "camera", "threshold", "count", "side", "subpixel"]
    assert seen["example"]["network"].startswith("full, ") and seen["complaints"] == []


def write_video(path: Path) -> Path:
    """An uncompressed video for Chromium's fake camera: a window that moves over a photograph."""
    width, height = CAMERA_WH
    photo = cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2BGR)
    frames = [f"YUV4MPEG2 W{width} H{height} F10:1 Ip A1:1 C420mpeg2\n".encode()]
    for left in (*range(20, 60, 2), *range(60, 20, -2)):
        yuv = cv2.cvtColor(photo[60 : 60 + height, left : left + width], cv2.COLOR_BGR2YUV_I420)
        frames += [b"FRAME\n", yuv.tobytes()]
    path.write_bytes(b"".join(frames))
    return path


def test_the_camera_is_matched_with_a_kept_frame(serve, act, model, tmp_path):
    video = write_video(tmp_path / "camera.y4m")
    flags = [flag.format(video=video) for flag in FAKE_CAMERA]
    seen = act("camera", serve(model), ALLOWED, *flags)
    assert list(seen["alone"]["features"]) == ["b"] and seen["alone"]["said"].startswith("Press Keep this frame")
    with SuperPoint(model, device="cpu", max_keypoints=500) as superpoint:
        for slot in "ab":
            assert_same(seen["both"]["features"][slot], superpoint.extract(tmp_path / f"seen-{slot}.png"))
    assert len(seen["both"]["rows"]) > 50 and seen["isClosed"] and seen["streams"] == 1
    assert seen["complaints"] == [] and seen["both"]["problem"] == ""


def test_a_camera_that_may_not_be_used_is_said(serve, act, model, tmp_path):
    flags = [flag.format(video=write_video(tmp_path / "camera.y4m")) for flag in FAKE_CAMERA]
    assert act("refusedCamera", serve(model), "--deny-permission-prompts", *flags)["problem"].startswith(
        "The camera may not be used"
    )


def test_no_camera_is_said(serve, act, model):
    assert act("refusedCamera", serve(model), ALLOWED)["problem"] == "There is no camera on this computer."


def test_bad_pictures_are_said_and_the_page_goes_on(serve, act_in_each, model, tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    (tmp_path / "words.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    cv2.imwrite(str(tmp_path / "dot.png"), np.full((1, 1, 3), 200, np.uint8))
    cv2.imwrite(str(tmp_path / "black.png"), np.zeros((48, 64, 3), np.uint8))
    bad = ("broken.png", "words.jpg", "empty.png", "dot.png", "black.png")
    seen = act_in_each("badPictures", serve("small"), pictures=bad)
    for name in bad[:3]:
        assert seen["told"][name].startswith(f"{name} is no picture that this browser can read")
    assert seen["told"]["dot.png"] == "dot.png is 1x1 px; the smallest usable is 8x8."
    assert seen["told"]["black.png"].startswith("0 keypoints: lower the threshold")
    assert seen["words"].startswith("What was dropped is no file")
    assert seen["mended"]["problem"] == "" and len(seen["mended"]["features"]["a"]["scores"]) > 50


def test_large_and_transparent_pictures_are_taken(serve, act, tmp_path):
    """12 and 30 megapixels; transparent pixels are white."""
    photo = cv2.cvtColor(data.astronaut(), cv2.COLOR_RGB2BGR)
    for name, size in (("large.jpg", (4000, 3000)), ("larger.jpg", (6400, 4800))):
        cv2.imwrite(str(tmp_path / name), cv2.resize(photo, size))
    clear = np.dstack([photo, np.zeros(photo.shape[:2], np.uint8)])
    cv2.imwrite(str(tmp_path / "clear.png"), clear)
    write_pictures(tmp_path)
    seen = act("badPictures", serve("small"), pictures=("large.jpg", "larger.jpg", "clear.png"))
    for name in ("large.jpg", "larger.jpg"):
        assert seen["told"][name].startswith("500 keypoints."), name
    assert seen["told"]["clear.png"].startswith("0 keypoints")
    assert seen["complaints"] == []


@pytest.mark.parametrize("head", ["detector", "descriptor"])
def test_a_network_of_no_numbers_is_said(serve, act, model, tmp_path, head):
    network = onnx.load(model)
    weights = next(one for one in network.graph.initializer if one.name.startswith(f"{head}.") and "weight" in one.name)
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) * np.nan, weights.name))
    onnx.save(network, tmp_path / "nan.onnx")
    write_pictures(tmp_path)
    seen = act("noNumbers", serve(str(tmp_path / "nan.onnx")))
    assert seen["problem"].startswith("The network's answer has values that are no numbers (NaN), on WASM")
    assert seen["keypoints"] == "–" and seen["said"] == ""


def test_wrong_settings_in_the_address_are_said(serve, act, model):
    told = act("badAddress", serve(model))["told"]
    assert told.pop("backend=gpu") == "?backend=gpu in the address: expected webgpu, wasm or auto."
    assert len(told) == 3 and all("expected a whole number from 1 to 64" in text for text in told.values())


def test_the_saved_page_works_on_a_plain_server(act, model, tmp_path):
    """Below another page, without the headers that allow threads."""
    parts = write_pictures(tmp_path)
    save_page(tmp_path / "site" / "points", WebOptions(model))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        seen = act("pictures", f"http://127.0.0.1:{server.server_port}/points/?backend=wasm&threads=2")
        server.shutdown()
    assert seen["backend"] == "WASM, 1 thread" and not seen["isolated"] and seen["complaints"] == []
    with SuperPoint(model, device="cpu", max_keypoints=500) as superpoint:
        for slot, part in zip("ab", parts):
            assert_same(seen["features"][slot], superpoint.extract(part))


def test_the_page_is_small(serve):
    """Under 4 MB to load besides onnxruntime-web."""
    needs_browser()
    page = sum(file.stat().st_size for file in packaged.PAGE.rglob("*") if file.is_file() and "ort" not in file.parts)
    with urlopen(serve(packaged.PAGE_NETWORK) + "model.json") as answer:
        network = json.load(answer)["bytes"]
    assert 1e6 < page + network < 4e6


def test_a_missing_network_is_said(serve, act, model):
    told = act("missingNetwork", serve(model))["told"]
    assert told["model.json"] == "There is no network here: open this page with superpoint web."
    assert re.fullmatch(r"The network .* is missing: .*model\.onnx answered 404\.", told["model.onnx"])
