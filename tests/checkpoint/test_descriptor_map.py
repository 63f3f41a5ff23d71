"""The map in a small network's file: kept, refused where it is damaged, and multiplied into the network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import photograph, random_compact, random_state
from safetensors.numpy import load_file, save_file

from superpoint_trt import load_descriptor_map
from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.descriptor_map import ARRAY, TARGET, DescriptorMap
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.checkpoint.reference import network
from superpoint_trt.core.types import SuperPointError

FULL = "f" * 64


def some_map(rows: int = 80, dim: int = 64) -> DescriptorMap:
    drawn = np.random.default_rng(0).normal(0, 0.1, (rows, dim))
    return DescriptorMap(drawn.astype(np.float16).astype(np.float32), FULL)


def coarse(checkpoint) -> np.ndarray:
    image = torch.from_numpy(photograph(64, 80)[None, None].astype(np.float32) / 255)
    with torch.no_grad():
        return network(checkpoint)(image)[1].numpy()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["compact", "vgg"])
def test_a_file_keeps_its_map(kind, half, tmp_path):
    plain = random_compact()
    if kind == "vgg":
        plain = layouts.from_arrays({key: value.numpy() for key, value in random_state("magicleap").items()})
    path = layouts.save(plain, tmp_path / "plain.safetensors", half)
    assert layouts.load(path).descriptor_map is None
    with pytest.raises(SuperPointError, match=r"plain\.safetensors has no map to another network's descriptors; "):
        load_descriptor_map(path)
    given = some_map(dim=plain.descriptor_dim)
    path = layouts.save(replace(plain, descriptor_map=given), tmp_path / "mapped.safetensors", half)
    again = layouts.save(layouts.load(path), tmp_path / "again.safetensors", half)
    for file in (path, again):
        found = load_descriptor_map(file)
        np.testing.assert_array_equal(found.matrix, given.matrix)
        assert found.target_sha256 == FULL and load_file(file)[ARRAY].dtype == np.float16
    assert layouts.load(again).layers.keys() == plain.layers.keys()
    np.testing.assert_array_equal(coarse(layouts.load(again)), coarse(layouts.load(tmp_path / "plain.safetensors")))


def test_what_is_no_map_is_refused_in_one_line(tmp_path):
    path = layouts.save(replace(random_compact(), descriptor_map=some_map()), tmp_path / "a.safetensors")
    arrays, metadata = layouts.read_safetensors(path.read_bytes(), path)
    good = arrays[ARRAY]
    nan = good.copy()
    nan[3, 4] = np.nan
    cases = (
        ({ARRAY: good.T.copy()}, {}, rf"{ARRAY} is \(64, 80\), expected \(64, 64\)"),
        ({ARRAY: good[0].copy()}, {}, rf"{ARRAY} is float16 \(64,\); expected float16 \(T, D\)"),
        ({ARRAY: good[:0].copy()}, {}, r"is float16 \(0, 64\); expected"),
        ({ARRAY: np.ones((4097, 64), np.float16)}, {}, "with T up to 4096"),
        ({ARRAY: good.astype(np.int32)}, {}, "is int32 "),
        ({ARRAY: nan}, {}, f"is damaged: {ARRAY} holds values that are not finite"),
        ({ARRAY: np.full((80, 64), 1e6, np.float32)}, {}, "not finite in float16"),
        ({ARRAY: None}, {}, "has half a map of descriptors"),
        ({}, {TARGET: ""}, "has half a map of descriptors"),
        ({}, {TARGET: "F" * 64}, "has half a map of descriptors"),
    )
    for strange, told, message in cases:
        changed = {name: array for name, array in {**arrays, **strange}.items() if array is not None}
        save_file(changed, tmp_path / "odd.safetensors", metadata={**metadata, **told})
        with pytest.raises(SuperPointError, match=message) as error:
            layouts.load(tmp_path / "odd.safetensors")
        assert "odd.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_network_is_lifted_by_its_map():
    small = random_compact()
    given = DescriptorMap(np.eye(64, dtype=np.float32)[[5, 0, 63]] * np.float32([[2], [1], [-4]]), FULL)
    found = layouts.lifted(replace(small, descriptor_map=given), FULL)
    assert (found.descriptor_dim, found.descriptors_of, found.descriptor_map) == (3, FULL, None)
    own = coarse(small)
    np.testing.assert_allclose(coarse(found), np.stack([2 * own[:, 5], own[:, 0], -4 * own[:, 63]], 1), atol=1e-5)


def test_a_network_with_batchnorm_is_lifted_behind_it():
    small = replace(random_compact(norm=NormPlacement.BEFORE_RELU), descriptor_map=some_map())
    expected = np.einsum("td,bdhw->bthw", small.descriptor_map.matrix, coarse(small))
    np.testing.assert_allclose(coarse(layouts.lifted(small, FULL)), expected, atol=1e-4)
    assert layouts.without_batchnorm(small).descriptor_map is small.descriptor_map


def test_lifting_to_another_network_is_refused():
    small = random_compact()
    with pytest.raises(SuperPointError, match=r"^s\.safetensors has no map to another network's descriptors; "):
        layouts.lifted(small, FULL, "s.safetensors")
    with pytest.raises(SuperPointError, match="has a map to the descriptors of checkpoint ffffffffffff, not to those"):
        layouts.lifted(replace(small, descriptor_map=some_map()), "e" * 64)
