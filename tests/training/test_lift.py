"""The map from a small network's descriptors to the full one's: found where it is known, never from held-out ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import photograph, random_compact, write_photographs
from training import lift
from training.lift import LiftPlan, Moments, split

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.reference import network
from superpoint_trt.core.files import file_sha256
from superpoint_trt.core.types import SuperPointError

TINY = LiftPlan(photographs=3, judged=1, points=60, side_px=160)
CPU = torch.device("cpu")


def columns(rows: int, dim: int) -> np.ndarray:
    """Orthonormal ones."""
    return np.linalg.qr(np.random.default_rng(1).normal(size=(rows, dim)))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> tuple[Path, Path]:
    """A small network, and a full one whose descriptors are the small one's in 80 numbers."""
    out = tmp_path_factory.mktemp("networks")
    small = random_compact(3)
    full = layouts.with_mapped_descriptors(small, columns(80, 64))
    return layouts.save(small, out / "small.safetensors"), layouts.save(full, out / "full.safetensors")


def descriptors(checkpoint) -> np.ndarray:
    """(cells, D), unit length, of a photograph without its border, which no points are near to."""
    image = torch.from_numpy(photograph(96, 120)[None, None].astype(np.float32) / 255)
    with torch.no_grad():
        rows = network(checkpoint)(image)[1][0, :, 2:-2, 2:-2].flatten(1).T.numpy()
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_known_map_is_found():
    rng, wanted = np.random.default_rng(0), np.random.default_rng(1).normal(size=(12, 5))
    moments = Moments(5, 12)
    for _ in range(2):
        small = rng.normal(size=(20, 5)).astype(np.float32)
        moments.add(small, (small @ wanted.T).astype(np.float32))
    np.testing.assert_allclose(moments.fit(), wanted, atol=1e-5)
    assert moments.count == 40


def test_too_few_points_make_no_map():
    moments = Moments(5, 12)
    moments.add(np.ones((4, 5), np.float32), np.ones((4, 12), np.float32))
    with pytest.raises(SuperPointError, match="finds 4 points in the photographs; a map of 5 numbers needs more"):
        moments.fit()


def test_a_map_splits_into_a_rotation_and_a_metric():
    matrix = np.random.default_rng(2).normal(size=(12, 5))
    turned, metric = split(matrix)
    np.testing.assert_allclose(turned.T @ turned, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(metric, metric.T, atol=1e-12)
    assert np.linalg.eigvalsh(metric).min() > 0 and np.square(metric).sum() == pytest.approx(5)
    together = turned @ metric
    np.testing.assert_allclose(together * (matrix[0, 0] / together[0, 0]), matrix, atol=1e-12)


@pytest.mark.parametrize("fold", [False, True])
def test_lifted_descriptors_are_the_full_networks(fold, networks, folder):
    small, full = networks
    found, points, closeness = lift.lift(small, full, [folder], replace(TINY, fold=fold), CPU, lambda *_: None)
    assert found.descriptor_map.target_sha256 == file_sha256(full)
    assert found.descriptor_map.matrix.shape == (80, 64)
    assert 64 <= points <= 180 and closeness > 0.999
    theirs = descriptors(layouts.load(full))
    ours = descriptors(layouts.lifted(found, file_sha256(full)))
    assert (ours * theirs).sum(axis=1).min() > 0.99


def test_folding_keeps_what_is_lifted_and_gives_the_small_network_its_metric(networks, folder, tmp_path):
    small = networks[0]
    full = layouts.save(random_compact(4), tmp_path / "other.safetensors")  # no map leads to it exactly
    either = [
        lift.lift(small, full, [folder], replace(TINY, fold=fold), CPU, lambda *_: None)[0] for fold in (False, True)
    ]
    before, after = (descriptors(layouts.lifted(one, file_sha256(full))) for one in either)
    np.testing.assert_allclose(before, after, atol=1e-4)
    plain, folded = (descriptors(one) for one in either)
    np.testing.assert_allclose(folded @ folded.T, after @ after.T, atol=1e-4)
    assert np.abs(plain @ plain.T - before @ before.T).max() > 0.01
    for name in set(either[0].layers) - {"descriptor"}:
        np.testing.assert_array_equal(either[0].layers[name].weight, either[1].layers[name].weight)


def test_held_out_photographs_only_judge(networks, folder, monkeypatch):
    looked: dict[str, list[str]] = {"photographs": [], "held-out photographs": []}
    before = lift.pairs

    def watched(nets, paths, plan, device, progress):
        looked[progress.args[0]] += [path.name for path in paths]
        return before(nets, paths, plan, device, progress)

    monkeypatch.setattr(lift, "pairs", watched)
    lift.lift(*networks, [folder], TINY, CPU, lambda *_: None)
    assert looked["held-out photographs"] == ["kodim07.png"]
    assert len(looked["photographs"]) == 3 and "kodim07.png" not in looked["photographs"]


def test_the_command_writes_the_small_checkpoint_with_its_map(networks, folder, tmp_path):
    small, full = networks
    output = tmp_path / "lifted.safetensors"
    words = [
        "--photos",
        str(folder),
        "--small",
        str(small),
        "--full",
        str(full),
        "--photographs",
        "2",
        "--points",
        "60",
    ]
    done = CliRunner().invoke(lift.main, [*words, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert f"written: {output}" in done.output and "mean cosine" in done.output
    found = layouts.load(output)
    assert found.descriptor_map.target_sha256 == file_sha256(full) and found.descriptor_dim == 64
    turned = found.descriptor_map.matrix
    np.testing.assert_allclose(turned.T @ turned, np.eye(64), atol=2e-3)  # float16
    refused = CliRunner().invoke(lift.main, [*words, "--output", str(small)])
    assert refused.exit_code == 2 and "would overwrite" in refused.output
    shorter = [full if word == str(small) else small if word == str(full) else word for word in words]
    refused = CliRunner().invoke(lift.main, [*map(str, shorter), "--output", str(output)])
    assert refused.exit_code == 2 and "descriptors of 64 numbers" in refused.output
