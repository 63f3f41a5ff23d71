"""Names of packaged networks in place of paths: which texts are names, and that every command takes them."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
from conftest import photograph

from superpoint_trt import SuperPoint, packaged
from superpoint_trt.checkpoint import layouts
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.default_model import default_model
from superpoint_trt.core.networks import packaged_network, weights_path
from superpoint_trt.core.types import SuperPointError


@pytest.fixture
def small(checkpoint_file, monkeypatch, tmp_path):
    """One more network, as a line in `packaged` adds it, and a folder to work in."""
    files = checkpoint_file("compact"), packaged.MODEL_CARD, packaged.TRAINING_LOG
    network = packaged.Network("toy", *files, "a test's")
    monkeypatch.setattr(packaged, "NETWORKS", (*packaged.NETWORKS, network))
    monkeypatch.setenv("SUPERPOINT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return network


def test_a_name_wins_over_a_file_and_a_path_is_a_path(small, tmp_path):
    (tmp_path / "toy").write_bytes(b"a file")
    assert packaged_network("toy") is small
    assert weights_path("toy") == small.weights
    for path in ("./toy", str(tmp_path / "toy"), Path("toy"), "toy.onnx", "toy.safetensors", ""):
        assert packaged_network(path) is None
        assert weights_path(path) == path


@pytest.mark.parametrize("name", ["nobody", "FULL", "a b", "x" * 3000, "a\nb", "\0"])
def test_other_names_are_refused_in_one_line(small, name):
    for use in (packaged_network, layouts.load, SuperPoint, default_model):
        with pytest.raises(SuperPointError, match=r"is no packaged network and no file here; the networks") as error:
            use(name)
        assert "toy (superpoint weights list)" in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_file_without_an_ending_is_still_read(small, tmp_path):
    (tmp_path / "mine").write_bytes(small.weights.read_bytes())
    assert layouts.load("mine").descriptor_dim == 64
    with pytest.raises(SuperPointError, match="mine is a file, not the name of a packaged network"):
        default_model("mine")


def test_every_command_takes_a_name(small, tmp_path, capsys):
    for index, name in enumerate(("astronaut", "coffee")):
        cv2.imwrite(str(tmp_path / f"{index}.png"), photograph(128, 160, name))
    for words in (
        "export --weights toy --output a.onnx --type heads --height 128 --width 160",
        "info toy",
        "infer --model toy --image 0.png --save f.npz",
        "match --model toy 0.png 0.png",
        "bench --model toy --model full --iterations 1 --size 64x64 --device cpu",
        "verify --model toy --weights toy --images .",
        "verify --model a.onnx --weights toy --images .",
        "weights convert toy b.safetensors",
        "demo --model toy",
    ):
        assert run(cli, words.split()) == 0, words
    out = capsys.readouterr().out
    assert out.count("model         toy") >= 5 and "PASSED" in out and "12 convolutions: stem0, stem1" in out
    assert [path.name.split("-")[1] for path in sorted((tmp_path / "cache").iterdir())] == ["full", "toy"]
    assert run(cli, ["weights", "list"]) == 0
    assert "toy (packaged): a test's" in capsys.readouterr().out


def test_an_unknown_name_on_the_command_line_is_one_line(small, capsys):
    for words in (
        "export --weights nobody --output a.onnx",
        "infer --model nobody --image 0.png",
        "verify --model toy --weights nobody --images .",
        "info nobody",
        "bench --model nobody",
    ):
        cv2.imwrite("0.png", photograph(64, 64))
        assert run(cli, words.split()) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert "'nobody' is no packaged network" in line and "full" in line and "toy" in line
