"""The weights in the package: what they are, that commands fall back on them, and that they find what is there."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import photograph

from superpoint_trt import SuperPoint, packaged
from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.checkpoint.matcher import load_matcher
from superpoint_trt.cli.demo import match_with_warped_copy
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert import default_model
from superpoint_trt.core.files import sha256
from superpoint_trt.core.networks import packaged_network
from superpoint_trt.core.types import Family, Sampling, SuperPointError
from superpoint_trt.match.images import match_images
from superpoint_trt.match.matcher import HostMatcher


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


EVERY = pytest.mark.parametrize("network", packaged.NETWORKS, ids=lambda network: network.name)


@EVERY
def test_the_files_are_small_plain_and_half(network):
    loaded = layouts.load(network.name)
    assert (loaded.family, loaded.norm, loaded.sampling) == (
        Family.SUPERPOINT_TRT,
        NormPlacement.NONE,
        Sampling.HALF_PIXEL,
    )
    assert loaded.subpixel and loaded.stride_px == 8
    most = 1.5e6 if loaded.topology else 2.7e6
    assert network.weights.stat().st_size < most
    for layer in loaded.layers.values():
        np.testing.assert_array_equal(layer.weight, layer.weight.astype(np.float16))


@EVERY
def test_a_map_leads_to_the_packaged_full_network(network):
    """A new full network, or a small one that learned on, needs a new map: python -m training.lift."""
    found = layouts.load(network.name).descriptor_map
    if found is None:
        pytest.skip(f"{network.name} has no map")
    assert found.target_sha256 == sha256(packaged.WEIGHTS.read_bytes())
    assert found.matrix.shape == (layouts.load("full").descriptor_dim, layouts.load(network.name).descriptor_dim)


@EVERY
def test_cards_belong_to_their_files(network):
    assert sha256(network.weights.read_bytes()) in network.card.read_text()


@EVERY
def test_every_network_finds_and_matches_points(network, cache):
    """By its name, through the exported .onnx: a photograph that was never trained on, and its copy moved by 24 px."""
    image = photograph(240, 320)
    with SuperPoint(network.name, device="cpu", max_keypoints=500) as superpoint:
        found = match_images(superpoint.extract(image[:, :-24]), superpoint.extract(image[:, 24:]))
        assert repr(superpoint).startswith(f"SuperPoint({network.name!r}, dense, ")
    assert found.geometry.inliers.sum() > 50
    assert [path.name.startswith(f"superpoint-{network.name}-") for path in cache.iterdir()] == [True]


def test_names_are_names():
    names = [network.name for network in packaged.NETWORKS]
    assert len(set(names)) == len(names) and packaged.DEFAULT in names
    assert all(re.fullmatch("[a-z][a-z0-9-]*", name) for name in names)
    assert layouts.load("full").sha256 == sha256(packaged.WEIGHTS.read_bytes())


def stages_of(network):
    """The stages of a log, in order."""
    log = [json.loads(line) for line in network.log.read_text().splitlines()]
    return list(dict.fromkeys(entry["stage"] for entry in log if "stage" in entry and "resumed" not in entry))


@EVERY
def test_cards_name_the_stages_of_their_logs(network):
    stages = stages_of(network)
    assert stages and all(f"| {stage} |" in network.card.read_text() for stage in stages)


def test_logs_are_not_exchanged():
    assert stages_of(packaged_network("full-v1")) == ["shapes", "first", "second", "third", "fourth"]
    assert packaged_network("full").log == packaged.TRAINING_LOG
    assert stages_of(packaged_network("full"))[:3] == ["first run", "second run", "third run"]


def test_the_first_version_is_the_one_that_was_packaged():
    """Results made with it can be repeated."""
    assert layouts.load("full-v1").sha256 == "a8a54c981342f2e9109c8e001078207cd8263c00ddde086e4620967cdfa16b0e"
    assert layouts.load("full-v1").sha256 != layouts.load("full").sha256


def test_the_small_network_is_small():
    """What its card and the pages say of it."""
    small, full = layouts.load("small"), layouts.load("full")
    assert small.topology and small.descriptor_dim == 64
    assert small.gflop() <= 4 and full.gflop() / small.gflop() > 13
    assert packaged.PAGE_NETWORK == "small"
    card = packaged_network("small").card.read_text()
    assert f"{small.parameters:,} parameters" in card and f"{small.gflop():.2f} GFLOP" in card


def test_a_packaged_matcher_has_its_card_and_log():
    if not packaged.MATCHER.is_file():
        assert not packaged.MATCHER_CARD.exists() and not packaged.MATCHER_LOG.exists()
        pytest.skip("this version comes without a matcher")
    found, card = load_matcher(packaged.MATCHER), packaged.MATCHER_CARD.read_text()
    assert sha256(packaged.MATCHER.read_bytes()) in card and f"{found.parameters:,} parameters" in card
    assert found.features[256] == sha256(packaged.WEIGHTS.read_bytes()), "it learned the points of full"
    log = [json.loads(line) for line in packaged.MATCHER_LOG.read_text().splitlines()]
    for stage in ("from nothing", "second sitting"):
        steps = max(entry.get("step", 0) for entry in log if entry["stage"] == stage)
        assert f"| {stage} |" in card and f"| {steps:,} |" in card
    assert packaged.MATCHER.stat().st_size < 8e6


def test_features_of_two_networks_are_not_matched(cache):
    image = photograph(96, 128)
    found = []
    for name in ("full", "small"):
        with SuperPoint(name, device="cpu", max_keypoints=50) as superpoint:
            found.append(superpoint.extract(image))
    with pytest.raises(SuperPointError, match=r"\(\d+, 256\) and \(\d+, 64\).*with one network\.$"):
        match_images(*found)
    with HostMatcher() as matcher:
        prepared = tuple(matcher.prepare_keypoints(one) for one in found)
        with pytest.raises(SuperPointError, match=r"256 and 64 numbers.*with one network\.$"):
            matcher.match([prepared])


def test_the_default_model_is_made_once(cache):
    first = default_model.default_model()
    assert first.parent == cache and list(cache.iterdir()) == [first]
    made = first.stat().st_mtime_ns
    assert default_model.default_model() == first and first.stat().st_mtime_ns == made


def test_a_cache_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SuperPointError, match="cannot be made"):
        default_model.default_model()


def test_the_demo_finds_the_warp_that_is_known(tmp_path):
    with SuperPoint(default_model.default_model()) as superpoint:
        shown = match_with_warped_copy(superpoint, tmp_path)
    assert len(shown.found.matches) > 300
    assert shown.correct > 0.75
    assert shown.corner_error_px < 3
    assert all(path.stat().st_size > 10_000 for path in shown.pictures)


@pytest.mark.parametrize("name", ["astronaut", "camera"])
def test_a_turned_and_dimmed_photograph_is_matched(name):
    """Photographs that were never trained on, turned by 20 degrees about the centre."""
    import cv2

    image = photograph(480, 640, name)
    turn = cv2.getRotationMatrix2D((319.5, 239.5), 20, 0.9)
    copy = np.round(cv2.warpAffine(image, turn, (640, 480), borderMode=cv2.BORDER_REFLECT) * 0.6).astype(np.uint8)
    with SuperPoint(default_model.default_model(), max_keypoints=1000) as superpoint:
        found = match_images(superpoint.extract(image), superpoint.extract(copy))
    assert found.geometry.matrix is not None
    np.testing.assert_allclose(found.geometry.matrix[:2], turn, atol=0.02 * np.abs(turn).max())
    assert found.geometry.inliers.sum() > 200


def test_commands_take_them_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photo = str(packaged.PHOTO)
    assert run(cli, ["export", "--output", "m.onnx", "--height", "240", "--width", "320"]) == 0
    assert str(layouts.load(packaged.DEFAULT).sha256) in capsys.readouterr().out
    for arguments in (
        ["infer", "--image", photo, "--save", "f.npz"],
        ["match", photo, photo],
        ["bench", "--iterations", "1", "--size", "64x64"],
        ["demo", "--output", "pictures/of/it"],
    ):
        assert run(cli, arguments) == 0, arguments
    assert f"model         {packaged.DEFAULT} (dense)" in capsys.readouterr().out
    assert (tmp_path / "pictures/of/it/matches.jpg").is_file()


def test_the_list_shows_them_first(capsys):
    assert run(cli, ["weights", "list"]) == 0
    out = capsys.readouterr().out
    assert f"{packaged.DEFAULT} (packaged, the default): " in out
    for network in packaged.NETWORKS:
        found = layouts.load(network.name)
        assert out.index(f"{network.name} (packaged") < out.index("v6: ")
        assert str(network.weights) in out and f"{found.parameters:,} parameters, {found.gflop():.1f} GFLOP" in out
        assert f"{found.descriptor_dim} a descriptor" in out


def test_a_demo_without_a_place_for_pictures_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_bytes(b"x")
    assert run(cli, ["demo", "--output", str(tmp_path / "file")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_a_demo_of_a_bad_model_leaves_no_folder(tmp_path, capsys):
    (tmp_path / "bad.onnx").write_bytes(b"x")
    assert run(cli, ["demo", "--model", str(tmp_path / "bad.onnx"), "--output", str(tmp_path / "pictures")]) == 2
    assert not (tmp_path / "pictures").exists()
