"""The PyTorch reference itself: known answers worked out by hand, and the published interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import LAYOUTS, photograph, random_state

from superpoint_trt.checkpoint import layouts, reference
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.core.types import DecodeOptions, Family, Sampling, SuperPointError


def test_dense_unfolds_cells_in_reading_order_and_drops_the_dustbin():
    logits = torch.full((1, 65, 2, 3), -50.0)
    logits[0, 8 * 5 + 2, 1, 2] = 50.0  # row 5, column 2 of the cell in row 1, column 2
    logits[0, 64, 0, 0] = 50.0  # the dustbin
    scores, descriptors = reference.dense(logits, torch.tensor([3.0, 4.0]).reshape(1, 2, 1, 1))
    assert scores.shape == (1, 16, 24)
    assert scores[0, 8 + 5, 16 + 2] == pytest.approx(1.0)
    assert scores[0, :8, :8].max() < 1e-6
    # A cell whose logits are all equal gives 1/65 to each of its pixels.
    assert scores[0, 0, 8] == pytest.approx(1 / 65)
    assert descriptors.flatten().tolist() == pytest.approx([0.6, 0.8])


def test_suppression_works_in_two_rounds():
    # Radius 1 on a line: 5 kills 4, so 3 survives (second round), and kills 2; 1 survives (third look).
    scores = torch.zeros(1, 3, 7)
    scores[0, 1, 1:6] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert reference.suppress(scores, 1)[0, 1].tolist() == [0, 5, 0, 3, 0, 1, 0]


def test_equal_neighbors_all_survive():
    scores = torch.zeros(1, 5, 5)
    scores[0, 2, 1:4] = 0.5
    assert torch.equal(reference.suppress(scores, 4), scores)


@pytest.mark.parametrize("sampling", Sampling)
def test_sampling_known_answers(sampling):
    """A descriptor that is its own column number shows where a pixel lands. The figures are computed by hand.

    W = 64, so 8 columns. Half-pixel: (x + 0.5) / 8 - 0.5. Legacy: (x - 3.5) / (64 - 4.5) * 7.
    """
    columns = torch.arange(8.0)
    grid = torch.stack([columns, torch.full((8,), 10.0)])[:, None].expand(2, 4, 8)
    xy = torch.tensor([[3.5, 3.5], [31.5, 3.5], [59.5, 3.5]])
    sampled = reference.sample_descriptors(xy, grid, 8, sampling)
    landed = (sampled[:, 0] / sampled[:, 1] * 10).tolist()
    expected = {
        Sampling.HALF_PIXEL: [0.0, 3.5, 7.0],
        Sampling.LEGACY: [0.0, 28 / 59.5 * 7, 56 / 59.5 * 7],
    }
    assert landed == pytest.approx(expected[sampling], abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognized_with_their_conventions(layout, checkpoint):
    found = checkpoint(layout)
    expected = {
        "v6": (Family.V6, NormPlacement.AFTER_RELU, Sampling.HALF_PIXEL),
        "magicleap": (Family.MAGICLEAP, NormPlacement.NONE, Sampling.LEGACY),
        "huggingface": (Family.HUGGINGFACE, NormPlacement.NONE, Sampling.LEGACY),
        "own": (Family.SUPERPOINT_TRT, NormPlacement.AFTER_RELU, Sampling.HALF_PIXEL),
    }
    assert (found.family, found.norm, found.sampling) == expected[layout]
    assert found.channels == (8, 8, 16, 16, 24)
    assert (found.descriptor_dim, found.stride_px) == (32, 8)


def test_batch_norm_is_applied_after_the_relu():
    """One block worked out by hand: conv 2x - 1, ReLU, then (x - 0.5) / sqrt(0.249 + 0.001) * 3 + 0.25."""
    block = reference.Block(1, 1, 1, NormPlacement.AFTER_RELU).eval()
    state = {"conv.weight": [[[[2.0]]]], "conv.bias": [-1.0], "bn.weight": [3.0], "bn.bias": [0.25]}
    state.update({"bn.running_mean": [0.5], "bn.running_var": [0.249]})
    block.load_state_dict({key: torch.tensor(value) for key, value in state.items()}, strict=False)
    with torch.no_grad():
        out = block(torch.tensor([0.25, 2.0]).reshape(1, 1, 1, 2)).flatten().tolist()
    assert out == pytest.approx([(0 - 0.5) / 0.5 * 3 + 0.25, (3 - 0.5) / 0.5 * 3 + 0.25], rel=1e-5)


def test_batch_norm_before_the_relu_too():
    block = reference.Block(1, 1, 1, NormPlacement.BEFORE_RELU)
    assert [type(module).__name__ for module in block] == ["Conv2d", "BatchNorm2d", "ReLU"]


def test_published_interface(photo):
    from superpoint_pytorch import SuperPoint

    state = random_state("v6")
    model = SuperPoint(max_num_keypoints=50).eval()
    model.load_state_dict(state)
    image = torch.from_numpy(photo).float()[None, None] / 255
    with torch.no_grad():
        gray = model({"image": image})
        rgb = model({"image": image.expand(-1, 3, -1, -1)})
        pair = model({"image": torch.cat([image, image.flip(3)])})
    assert gray["keypoints"][0].shape == (50, 2)
    assert gray["keypoint_scores"][0].shape == (50,)
    assert gray["descriptors"][0].shape == (50, 32)
    assert torch.equal(rgb["keypoints"][0], gray["keypoints"][0])
    assert torch.equal(pair["keypoints"][0], gray["keypoints"][0])
    assert not torch.equal(pair["keypoints"][1], gray["keypoints"][0])
    # Its own state_dict goes round.
    again = SuperPoint(channels=(8, 8, 16, 16, 24), descriptor_dim=32, max_num_keypoints=50).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again({"image": image})["descriptors"][0], gray["descriptors"][0])


def test_state_of_other_layouts_and_of_other_networks():
    model = reference.SuperPoint()
    model.load_state_dict(random_state("magicleap"))
    assert model.sampling is Sampling.LEGACY
    with pytest.raises(SuperPointError, match=r"not a SuperPoint checkpoint.*fc\.weight"):
        model.load_state_dict({"fc.weight": torch.zeros(3, 3)})
    with pytest.raises(SuperPointError, match="no option 'nms'"):
        reference.SuperPoint(nms=4)


def test_other_numbers_of_stages_are_other_cell_sizes():
    """`channels` of the v6 layout may be longer or shorter; five stages make cells of 16 px."""
    state = random_state("v6", channels=(4, 4, 8, 8, 8, 16))
    found = layouts.from_arrays({key: value.numpy() for key, value in state.items()})
    assert found.stride_px == 16
    net = reference.SuperPointNet.from_checkpoint(found)
    with torch.no_grad():
        scores, descriptors = reference.dense(*net(torch.rand(1, 1, 64, 96)))
    assert scores.shape == (1, 64, 96)
    assert descriptors.shape == (1, 32, 4, 6)


def test_saved_in_half_precision_stays_close(checkpoint, tmp_path):
    original = checkpoint("v6")
    halved = layouts.load(layouts.save(original, tmp_path / "half.safetensors", half=True))
    for name, layer in original.layers.items():
        np.testing.assert_allclose(halved.layers[name].weight, layer.weight, rtol=1e-3, atol=1e-6)
        np.testing.assert_array_equal(halved.layers[name].norm.running_var, layer.norm.running_var)


def test_real_checkpoint_finds_structure(checkpoint_file):
    """The trained weights, not random ones: points sit on structure, none on a blank wall."""
    model = reference.SuperPoint.from_file(checkpoint_file("packaged"))
    image = torch.from_numpy(photograph(480, 640)).float()[None, None] / 255
    with torch.no_grad():
        found = model({"image": image})["keypoint_scores"][0]
        blank = model({"image": torch.full((1, 1, 480, 640), 0.5)})["keypoint_scores"][0]
    assert 300 < len(found) < 1500
    assert found[0] > 0.3
    assert len(blank) == 0


def test_decode_options_say_what_is_wrong():
    for options, word in (
        ({"nms_radius_px": -1}, "NMS radius"),
        ({"remove_borders_px": -1}, "border"),
        ({"threshold": 1.5}, "threshold"),
        ({"max_keypoints": 0}, "number of keypoints"),
    ):
        with pytest.raises(SuperPointError, match=word):
            DecodeOptions(**options)
