"""Networks with a topology: the file, what is refused in it, and the torch network that it makes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMPACT, compact_arrays, photograph, random_compact

from superpoint_trt import packaged
from superpoint_trt.checkpoint import layouts, reference
from superpoint_trt.checkpoint.compact import CompactNet
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.checkpoint.topology import Convolution, from_json, to_json
from superpoint_trt.core.types import Family, Sampling, SuperPointError
from superpoint_trt.run.extractor import SuperPoint

METADATA = {"format": "superpoint-trt", "norm": "before-relu", "sampling": "half-pixel"}


def load(topology, arrays, **metadata):
    written = topology if isinstance(topology, str) else to_json(topology)
    return layouts.from_arrays(arrays, metadata={**METADATA, "topology": written, **metadata}, source="odd.safetensors")


def changed(topology, name, **fields):
    return tuple(replace(layer, **fields) if layer.name == name else layer for layer in topology)


def test_the_file_keeps_everything(tmp_path):
    made = random_compact(norm=NormPlacement.BEFORE_RELU)
    found = layouts.load(layouts.save(made, tmp_path / "a.safetensors"))
    assert found.topology == made.topology and list(found.layers) == [row[0] for row in COMPACT]
    assert (found.family, found.norm, found.sampling, found.subpixel) == (
        Family.SUPERPOINT_TRT,
        NormPlacement.BEFORE_RELU,
        Sampling.HALF_PIXEL,
        True,
    )
    for name, layer in made.layers.items():
        np.testing.assert_array_equal(found.layers[name].weight, layer.weight)
        np.testing.assert_array_equal(found.layers[name].norm.running_var, layer.norm.running_var)
    again = layouts.load(layouts.save(found, tmp_path / "b.safetensors", half=True))
    np.testing.assert_array_equal(
        again.layers["patches"].weight, made.layers["patches"].weight.astype(np.float16).astype(np.float32)
    )


def test_what_a_checkpoint_says_of_itself():
    found = random_compact()
    assert (found.stride_px, found.descriptor_dim, found.stages) == (8, 64, 0)
    assert found.channels == (8, 16, 16, 24, 24, 32, 24, 12, 24, 24)
    weights = [8 * 16, 16 * 8 * 4, 16 * 16 * 9, 24 * 16 * 4, 24 * 24 * 9, 32 * 24 * 9, 24 * 32, 12 * 64]
    weights += [24 * 36 * 9, 65 * 24, 24 * 24 * 9, 64 * 24]
    assert found.parameters == sum(weights) + sum(row[2] for row in COMPACT)
    places = [240 * 320, 120 * 160, 120 * 160, 4800, 4800, 1200, 1200, 4800, 4800, 4800, 4800, 4800]
    assert found.gflop() == pytest.approx(2e-9 * sum(w * p for w, p in zip(weights, places)))
    assert found.gflop(960, 1280) == pytest.approx(4 * found.gflop())


def test_the_paper_s_network_takes_52_gflop():
    assert layouts.load(packaged.WEIGHTS).gflop() == pytest.approx(52.1, abs=0.05)


def test_batch_norm_folds_by_layer():
    trained = random_compact(norm=NormPlacement.BEFORE_RELU)
    image = torch.from_numpy(photograph(120, 152)[None, None].astype(np.float32) / 255)
    with torch.no_grad():
        before, after = (reference.network(one)(image) for one in (trained, layouts.without_batchnorm(trained)))
    for ours, expected in zip(after, before):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_a_network_in_torch_gives_its_checkpoint():
    made = random_compact(norm=NormPlacement.BEFORE_RELU)
    found = CompactNet.from_checkpoint(made).checkpoint()
    assert found.topology == made.topology and found.norm is made.norm and found.subpixel
    for name, layer in made.layers.items():
        for field in ("weight", "bias"):
            np.testing.assert_array_equal(getattr(found.layers[name], field), getattr(layer, field))
        np.testing.assert_array_equal(found.layers[name].norm.bias, layer.norm.bias)


def test_a_network_worked_out_by_hand():
    """Three layers of ones: sums of 8x8 pixels, the branch at 1/16 repeated and cut to three cells."""
    topology = (
        Convolution("cells", ("image",), 8, False),
        Convolution("pairs", ("cells",), 2, False, "cells"),
        Convolution("detector", ("pairs",), 1, False),
        Convolution("descriptor", ("pairs", "cells"), 1, False),
    )
    net = CompactNet(topology, {"cells": (1, 8), "pairs": (1, 3), "detector": (65, 1), "descriptor": (2, 1)})
    with torch.no_grad():
        for name, value in net.state_dict().items():
            value.fill_(1.0 if name.endswith("weight") else 0.0)
        image = torch.zeros(1, 1, 8, 24)
        image[..., 0, [0, 8, 16]] = torch.tensor([1.0, 10.0, 100.0])  # sums of the cells: 1, 10, 100
        logits, descriptors = net(image)
    # Kernel 3, stride 2, a zero on each side: 0+1+10 and 10+100+0; repeated 11 11 110 (110), added to 1 10 100.
    assert logits[0, 7, 0].tolist() == [12, 21, 210]
    assert descriptors[0, 1, 0].tolist() == [13, 31, 310]


def test_the_published_interface_takes_it(tmp_path):
    path = layouts.save(random_compact(), tmp_path / "a.safetensors")
    model = reference.SuperPoint.from_file(path, max_num_keypoints=50)
    image = torch.from_numpy(photograph(120, 160)[None, None].astype(np.float32) / 255)
    with torch.inference_mode():
        found = model({"image": image})
    with SuperPoint(path, device="cpu", max_keypoints=50) as superpoint:
        keypoints = superpoint.extract(photograph(120, 160))
    assert found["descriptors"][0].shape == keypoints.descriptors.shape == (50, 64)
    np.testing.assert_allclose(found["keypoints"][0].numpy(), keypoints.xy, atol=1e-3)
    state = model.state_dict()
    model.load_state_dict(state)  # its own


def without(layer):
    """The JSON of the usual topology with one layer left out."""
    return to_json(tuple(one for one in compact_arrays()[0] if one.name != layer))


def edited(layer, **fields):
    entries = json.loads(to_json(compact_arrays()[0]))
    next(entry for entry in entries if entry["name"] == layer).update(fields)
    return json.dumps(entries)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("", "it is not JSON"),
        ("{}", r"it is \{\}; expected a list of 2 to 128 layers"),
        ("[]", "expected a list of 2 to 128 layers"),
        (json.dumps([{"name": f"l{i}", "inputs": ["image"]} for i in range(129)]), "expected a list of 2 to 128"),
        ("[1, 2]", "layer 0 is 1; expected an object"),
        (edited("wide0", dilation=2), 'layer wide0 has "dilation"; expected some of name, inputs, stride'),
        (edited("wide0", name="Wide.0"), 'a layer\'s name is "Wide.0"; expected up to 40 of a-z'),
        (edited("wide0", name=3), "a layer's name is 3; expected a text"),
        (edited("wide0", name="stem0"), "two layers are called stem0"),
        (edited("wide0", name="image"), "a layer is called image"),
        (edited("wide0", inputs=[]), "inputs of wide0 is empty"),
        (edited("wide0", inputs="image"), 'inputs of wide0 is "image"; expected a list of texts'),
        (edited("wide0", inputs=["wide0"]), 'layer wide0 reads "wide0", which is no earlier layer'),
        (edited("wide0", inputs=["descriptor"]), "which is no earlier layer"),
        (edited("features", added_to="descriptor"), 'layer features reads "descriptor", which is no earlier'),
        (edited("features", added_to="image"), "layer features is added to the image"),
        (edited("wide0", stride=3), "stride of wide0 is 3; expected one of 1, 2, 4, 8"),
        (edited("wide0", stride=True), "stride of wide0 is true"),
        (edited("wide0", stride="2"), 'stride of wide0 is "2"'),
        (edited("wide0", stride=[2]), r"stride of wide0 is \[2\]"),
        (edited("wide0", relu=1), "relu of wide0 is 1; expected true or false"),
        (edited("detector", relu=True), "layer detector is a head; expected relu false and no added_to"),
        (edited("descriptor", added_to="features"), "layer descriptor is a head"),
        (without("descriptor"), "there is no layer descriptor; expected the heads detector and descriptor"),
        (without("detector"), "there is no layer detector"),
        ("[" * 40 + "]" * 40, "brackets are nested"),
        ("[" + " " * 70000 + "]", "it has 70002 characters"),
    ],
)
def test_a_topology_that_cannot_be_read_is_refused(written, says):
    with pytest.raises(SuperPointError, match=says) as error:
        from_json(written, "odd.safetensors")
    assert str(error.value).startswith("odd.safetensors has a topology that cannot be read: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def nothing(topology, arrays):
    return topology, arrays


def resized(name, shape):
    def change(topology, arrays):
        return topology, {**arrays, name: np.zeros(shape, np.float32)}

    return change


def restrided(**strides):
    def change(topology, arrays):
        for name, stride in strides.items():
            topology = changed(topology, name, stride=stride)
        return topology, arrays

    return change


def dropped(prefix):
    def change(topology, arrays):
        return topology, {key: value for key, value in arrays.items() if not key.startswith(prefix)}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dropped("wide0."), "is incomplete: no layer wide0"),
        (dropped("wide0.bias"), "is incomplete: layer wide0 has no bias"),
        (dropped("wide0.bn"), "is incomplete: BatchNorm is missing for wide0"),
        (resized("wide1.weight", (1,)), "found wide1.weight; expected the weight, bias and"),
        (resized("conv1a.weight", (1,)), "found conv1a.weight; expected the weight, bias and"),
        (resized("wide0.weight", (32, 24)), r"wide0.weight is \(32, 24\); expected \(O, 24, K, K\)"),
        (resized("wide0.weight", (32, 23, 3, 3)), r"wide0.weight is \(32, 23, 3, 3\), expected \(32, 24, 3, 3\)"),
        (resized("wide0.weight", (32, 24, 3, 5)), r"wide0.weight is \(32, 24, 3, 5\), expected \(32, 24, 3, 3\)"),
        (resized("wide0.weight", (0, 24, 3, 3)), r"wide0.weight is \(0, 24, 3, 3\); expected \(O, 24, K, K\) with O"),
        (resized("wide0.weight", (5000, 24, 3, 3)), "O up to 4096"),
        (resized("wide0.weight", (32, 24, 17, 17)), "K from 2, the stride, to 16"),
        (resized("wide0.weight", (32, 24, 1, 1)), "K from 2, the stride, to 16"),
        (resized("wide0.bias", (33,)), r"wide0.bias is \(33,\), expected \(32,\)"),
        (resized("features.weight", (16, 32, 1, 1)), "features has 16 channels and is added to eighth1, which has 24"),
        (resized("detector.weight", (64, 24, 1, 1)), "its detector has 64 channels; expected 65"),
        (restrided(wide0=1), r"features has 1 values? along 8 px|features has 2 values along 16 px, eighth1"),
        (restrided(stem0=1), r"detector_hidden reads features, patches, which have 2, 1 values along 8 px"),
        (restrided(descriptor_hidden=2), r"its descriptor has 1 values along 16 px; expected 2, one a cell of 8 px"),
        (restrided(wide0=2, stem1=2, quarter0=2, eighth0=2, eighth1=2, descriptor_hidden=2), "for 128 px|which have"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, says):
    topology, arrays = change(*compact_arrays())
    with pytest.raises(SuperPointError, match=says) as error:
        load(topology, arrays)
    assert str(error.value).startswith("odd.safetensors") and "\n" not in str(error.value)


def test_an_even_kernel_without_stride_would_shift_the_grid():
    topology, arrays = compact_arrays()
    with pytest.raises(SuperPointError, match=r"which have 2, 1 values|expected 1, one a cell"):
        load(topology, {**arrays, "eighth1.weight": np.zeros((24, 24, 2, 2), np.float32)})


def test_an_even_kernel_to_a_sixteenth_loses_the_odd_row():
    """2x2/2 makes 1 of 3: repeated they are 2, too few to be added. 3x3/2 makes 2."""
    topology, arrays = compact_arrays()
    with pytest.raises(SuperPointError, match=r"features has 0 values along 8 px, eighth1, .* 1; expected half"):
        load(topology, {**arrays, "wide0.weight": np.zeros((32, 24, 2, 2), np.float32)})


def test_values_and_metadata_are_checked():
    topology, arrays = compact_arrays()
    load(topology, arrays)
    bad = {**arrays, "patches.weight": np.full_like(arrays["patches.weight"], np.nan)}
    with pytest.raises(SuperPointError, match=r"patches.weight holds values that are not finite"):
        load(topology, bad)
    with pytest.raises(SuperPointError, match=r"format is 'other'; expected 'superpoint-trt'"):
        load(topology, arrays, format="other")
    with pytest.raises(SuperPointError, match=r"BatchNorm after the ReLU; expected it before"):
        load(topology, arrays, norm="after-relu")
    with pytest.raises(SuperPointError, match=r"metadata '' *; expected one of half-pixel, legacy"):
        load(topology, arrays, sampling="")
    assert not load(topology, arrays, subpixel="no").subpixel


def test_names_that_torch_has_for_itself_are_refused():
    table = [("train" if row[0] == "stem0" else row[0], *row[1:]) for row in COMPACT]
    table[1] = ("stem1", ["train"], *table[1][2:])
    with pytest.raises(SuperPointError, match=r"a layer cannot be called train, which PyTorch has for itself"):
        reference.network(random_compact(table=table))


def test_the_example_in_the_documentation_is_one():
    page = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    topology = from_json(page.split("```json\n")[1].split("```")[0], "the page")
    sides = {"stem0": 4, "eighth0": 4, "wide0": 3, "features": 1, "patches": 8, "detector_hidden": 3}
    table = [
        (
            one.name,
            one.inputs,
            {"detector": 65}.get(one.name, 8),
            sides.get(one.name, 1),
            one.stride,
            one.relu,
            one.added_to,
        )
        for one in topology
    ]
    found = random_compact(table=table)
    assert from_json(to_json(found.topology), "again") == topology
    image = torch.from_numpy(photograph(104, 88)[None, None].astype(np.float32) / 255)
    logits, descriptors = reference.network(found)(image)
    assert (logits.shape, descriptors.shape) == ((1, 65, 13, 11), (1, 8, 13, 11))
