"""The matcher's weights and network: files, shapes, layers, padding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matchers import SMALL, plain_matcher, points, random_matcher, shuffled
from safetensors.numpy import save_file

from superpoint_trt.checkpoint.matcher import MatcherShape, load_matcher, save_matcher
from superpoint_trt.checkpoint.matcher_network import ATTENDED, MatcherNet, PointSets, _turn, matches, neighborhoods
from superpoint_trt.core.types import SuperPointError


def as_sets(found, rows: int) -> PointSets:
    def padded(array):
        filled = np.full((rows, *array.shape[1:]), 0.5, np.float32)  # what is in the filling must not matter
        filled[: len(array)] = array
        return torch.from_numpy(filled)[None]

    arrays = [padded(array) for array in (found.xy, found.scores, found.descriptors)]
    return PointSets(*arrays, torch.tensor([len(found)]), torch.tensor([found.image_size]).float())


def test_a_file_keeps_everything(tmp_path):
    weights = replace(random_matcher(), features={32: "abc"})
    back = load_matcher(save_matcher(weights, tmp_path / "m.safetensors", half=False))
    assert back.shape == SMALL and back.features == {32: "abc"} and back.sha256
    for name, array in weights.arrays.items():
        np.testing.assert_array_equal(back.arrays[name], array)
    half = save_matcher(weights, tmp_path / "h.safetensors")
    assert half.stat().st_size < 0.6 * (tmp_path / "m.safetensors").stat().st_size
    np.testing.assert_allclose(load_matcher(half).arrays["positions.weight"], weights.arrays["positions.weight"], 1e-3)


def test_the_usual_shape_is_small_enough():
    """8 MB in float16 is the limit of the file, 1.9 M parameters that of the time."""
    for dim in (256, 64):
        assert sum(int(np.prod(size)) for size in MatcherShape((dim,)).arrays().values()) < 1.9e6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays, metadata: arrays.pop("positions.weight"), "lacks positions.weight"),
        (lambda arrays, metadata: arrays.update(more=np.zeros(1, np.float32)), "has a strange array more"),
        (lambda arrays, metadata: arrays.update({"positions.weight": np.zeros((3, 2), np.float32)}), r"is \(3, 2\)"),
        (lambda arrays, metadata: arrays["positions.weight"].fill(np.nan), "not finite"),
        (lambda arrays, metadata: metadata.update(heads="3"), "two times the heads divide"),
        (lambda arrays, metadata: metadata.update(width="x"), "lack a size"),
        (lambda arrays, metadata: metadata.update(format="superpoint-trt"), "is not a matcher"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, said):
    arrays = {name: array.copy() for name, array in random_matcher().arrays.items()}
    metadata = {"format": "superpoint-trt-matcher", "descriptor_dims": "32", "width": "32", "heads": "2", "layers": "2"}
    change(arrays, metadata)
    save_file(arrays, tmp_path / "m.safetensors", metadata)
    with pytest.raises(SuperPointError, match=said):
        load_matcher(tmp_path / "m.safetensors")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(SuperPointError, match="not a readable safetensors"):
        load_matcher(tmp_path / "m.safetensors")
    with pytest.raises(SuperPointError, match="does not exist"):
        load_matcher(tmp_path / "none.safetensors")


def test_the_plain_matcher_finds_every_point_again():
    first = points(40)
    second, there = shuffled(first)
    found, scores = matches(MatcherNet.from_weights(plain_matcher())(as_sets(first, 40), as_sets(second, 40))[-1], 0.1)
    np.testing.assert_array_equal(found[0], there)
    assert (scores > 0.5).all()


def test_attention_begins_where_there_is_something_to_see():
    """Before any training: a point looks at its like in the other image, and the last head at the points nearby."""
    torch.manual_seed(3)
    net = MatcherNet(MatcherShape((64,), 64, 4, 1))
    layer = net.layers[0]
    descriptors = F.normalize(torch.randn(1, 40, 64), dim=-1)
    state = net.project["64"](torch.cat([descriptors, torch.zeros(1, 40, 1)], dim=-1))
    asked = layer.cross.read(state)[..., :64]
    likeness = (asked @ asked.transpose(1, 2))[0].detach()
    assert torch.equal(likeness.argmax(dim=1), torch.arange(40))
    assert likeness.diagonal().mean() / 4 / 16**0.5 == pytest.approx(ATTENDED, rel=0.2), "of each head"
    xy, size = torch.rand(1, 40, 2) * torch.tensor([640.0, 480]), torch.tensor([[640.0, 480]])
    constant = layer.get_submodule("self").read.bias[:64].expand(1, 40, 64)
    asked = _turn(constant.view(1, 40, 4, 16).transpose(1, 2), net._angles(xy, size))
    looks = (asked @ asked.transpose(2, 3))[0].detach() / 4
    assert looks.diagonal(dim1=1, dim2=2).mean(dim=1).tolist() == pytest.approx([0, 2, 4, 6], abs=1e-3)
    apart = torch.cdist(xy, xy)[0]
    assert looks[3][apart < 20].mean() > 2 * looks[3][apart > 100].mean()


def test_neighborhoods_grow_with_the_room_of_a_point():
    """300 px^2 a point: the deviation is 1.75 sqrt(300) px. No point is near itself."""
    xy = torch.tensor([[[0.0, 0], [30, 0], [0, 40]], [[0.0, 0], [60, 0], [0, 80]]])
    near = neighborhoods(xy, torch.tensor([3, 3]), torch.tensor([[30.0, 30], [60.0, 60]]))
    expected = np.exp(-np.array([900, 1600]) / (2 * 1.75**2 * 300))
    np.testing.assert_allclose(near[0, 0], [0, *expected], rtol=1e-5)
    np.testing.assert_allclose(near[1], near[0], rtol=1e-5, err_msg="zoom does not matter")
    assert neighborhoods(xy[:1], torch.tensor([0]), torch.tensor([[30.0, 30]])).isfinite().all()


def test_neighbors_decide_between_equal_points():
    """Two points of the second image look like the first one's; the one whose neighbors fit is its partner."""
    descriptors = torch.eye(32)[[0, 1, 2, 3]][None]
    first = torch.tensor([[[100.0, 100], [110, 100], [100, 110], [300, 200]]])
    second = torch.tensor([[[20.0, 200], [10.0, 190], [205, 50], [200, 55], [200.0, 50]]])
    alike = descriptors[:, [3, 0, 1, 2, 0]]
    size, rows = torch.tensor([[320.0, 240]]), torch.tensor([5])
    pad = [F.pad(part, (0, 0, 0, 1)) for part in (first, descriptors)]
    sets = [
        PointSets(pad[0], torch.zeros(1, 5), pad[1], rows - 1, size),
        PointSets(second, torch.zeros(1, 5), alike, rows, size),
    ]
    weights = plain_matcher()
    for name, array in weights.arrays.items():
        if name.endswith("support"):
            array[:] = 4, 2
    found, scores = matches(MatcherNet.from_weights(weights)(*sets)[-1], 0.1)
    assert found.tolist() == [[4, 2, 3, 0, -1]] and scores[0, 0] > 0.65
    undecided, chance = matches(MatcherNet.from_weights(plain_matcher())(*sets)[-1], 0.1)
    assert chance[0, 0] < 0.55 and undecided[0, 1:].tolist() == [2, 3, 0, -1]


def test_filling_up_changes_nothing():
    first, second = points(30), shuffled(points(30), noise=0.3)[0].rows(slice(0, 25))
    net = MatcherNet.from_weights(random_matcher())
    plain, plain_scores = matches(net(as_sets(first, 30), as_sets(second, 30))[-1], 0.0)
    more, more_scores = matches(net(as_sets(first, 64), as_sets(second, 64))[-1], 0.0)
    assert (plain >= 0).sum() > 3
    np.testing.assert_array_equal(more[:, :30], plain)
    np.testing.assert_allclose(more_scores[:, :30].detach(), plain_scores.detach(), atol=1e-5)
    assert (more[:, 30:] == -1).all() and not more_scores[:, 30:].any()
    assert more.max() < 25


def test_an_image_without_points_has_no_matches():
    net = MatcherNet.from_weights(plain_matcher())
    for rows in (1, 4):
        found, _ = matches(net(as_sets(points(rows), rows), as_sets(points(0), rows))[-1], 0.0)
        assert (found == -1).all()


def test_swapping_the_images_swaps_the_matches():
    first, second = points(30), shuffled(points(30), noise=0.3)[0]
    net = MatcherNet.from_weights(random_matcher())
    there = net(as_sets(first, 30), as_sets(second, 30))[-1].log_probability()
    back = net(as_sets(second, 30), as_sets(first, 30))[-1].log_probability()
    torch.testing.assert_close(there, back.transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_fewer_layers_are_the_first_ones():
    weights = random_matcher()
    sets = as_sets(points(20), 20), as_sets(points(20, 3), 20)
    said = MatcherNet.from_weights(weights)(*sets)
    cut = MatcherNet.from_weights(weights.with_layers(1))(*sets)
    assert (len(said), len(cut)) == (2, 1)
    torch.testing.assert_close(said[0].similarity, cut[0].similarity)
    with pytest.raises(SuperPointError, match="3 layers were asked for; this matcher has 2"):
        weights.with_layers(3)


def test_positions_matter_only_relatively():
    """Rotary positions: two images' points moved by the same amount attend to each other as before."""
    weights = random_matcher(MatcherShape((32,), 32, 2, 1))
    first = points(20, size=(200, 200))
    moved = replace(first, xy=first.xy + np.float32(30))
    net = MatcherNet.from_weights(weights)
    a, b = (net(as_sets(one, 20), as_sets(one, 20))[-1].similarity for one in (first, moved))
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    squeezed = replace(first, xy=first.xy * np.float32(0.5))
    assert (net(as_sets(squeezed, 20), as_sets(squeezed, 20))[-1].similarity - a).abs().max() > 0.01
