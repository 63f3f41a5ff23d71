"""Exported graphs in onnxruntime against the PyTorch reference, for every layout, type, opset, batch and size."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import COMPACT, LAYOUTS, photograph, random_compact
from helpers import KINDS, cases, score_map
from onnx.utils import Extractor

from superpoint_trt import load_descriptor_map
from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint import reference as network
from superpoint_trt.checkpoint.descriptor_map import DescriptorMap
from superpoint_trt.cli.main import cli
from superpoint_trt.cli.main import run as run_cli
from superpoint_trt.convert.export import export, to_onnx
from superpoint_trt.convert.export_options import NEWEST_OPSET, ExportOptions
from superpoint_trt.convert.fold import reach_of_padding_px
from superpoint_trt.core.files import file_sha256
from superpoint_trt.core.types import DecodeOptions, ModelDescription, OutputType, Sampling, SuperPointError
from superpoint_trt.run import decode

OPSETS = sorted({11, 12, 13, 16, 17, 18, 20, NEWEST_OPSET})
REAL = ("packaged", "small", "real-v6", "real-amd")


def session(model: onnx.ModelProto | bytes) -> ort.InferenceSession:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, image: np.ndarray) -> dict[str, np.ndarray]:
    opened = session(model)
    return dict(zip([output.name for output in opened.get_outputs()], opened.run(None, {"image": image})))


def photographs(batch: int, height: int = 120, width: int = 160) -> np.ndarray:
    names = ["astronaut", "coffee", "camera"][:batch]
    return np.stack([photograph(height, width, name) for name in names])[:, None].astype(np.float32) / 255


def reference(checkpoint, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    net = network.network(checkpoint)
    with torch.no_grad():
        heads = net(torch.from_numpy(image))
        return (*heads, *network.dense(*heads))


def assert_same_points(outputs: dict[str, np.ndarray], index: int, expected: tuple[torch.Tensor, ...]) -> None:
    """The contract of a `keypoints` model for one image: same points, then padding."""
    xy, scores, descriptors = (part.numpy() for part in expected)
    count = int(outputs["num_keypoints"][index])
    assert count == len(xy)
    rows = {tuple(point): row for row, point in enumerate(outputs["keypoints"][index][:count].tolist())}
    assert set(rows) == {tuple(point) for point in xy.tolist()}
    order = [rows[tuple(point)] for point in xy.tolist()]
    np.testing.assert_allclose(outputs["scores"][index][order], scores, atol=1e-5)
    if count:
        cosine = (outputs["descriptors"][index][order] * descriptors).sum(axis=1)
        assert cosine.min() >= 0.99999
    assert (np.diff(outputs["scores"][index][:count]) <= 0).all(), "scores must fall"
    assert (outputs["keypoints"][index][count:] == -1).all()
    assert (outputs["scores"][index][count:] == 0).all()
    assert (outputs["descriptors"][index][count:] == 0).all()


def every_layout_and_every_opset(layout, opset, dynamic):
    """Not their product: what an opset changes does not depend on the weights."""
    if opset == 17:
        return layout in ("own", "packaged", "small", "compact") or (layout != "real-amd" and not dynamic)
    return layout in ("own", "compact") and not dynamic and opset in (11, 13, NEWEST_OPSET)


WHOLE_PIXELS = DecodeOptions(subpixel=False)
"""So that points can be compared exactly; sub-pixel ones: tests/run/test_subpixel.py."""


@pytest.mark.parametrize(
    ("layout", "opset", "dynamic"),
    cases([*LAYOUTS, "compact", *REAL], OPSETS, [False, True], fast=every_layout_and_every_opset),
)
def test_parity(layout, opset, dynamic, checkpoint):
    found = checkpoint(layout)
    for kind, batch in itertools.product(OutputType, (1, 3)):
        image = photographs(batch)
        height, width = (480, 640) if dynamic else image.shape[2:]  # a dynamic graph must not depend on its usual size
        options = ExportOptions(
            kind, height, width, dynamic, batch, max_keypoints=100, decode=WHOLE_PIXELS, opset=opset
        )
        outputs = run(to_onnx(found, options), image)
        logits, coarse, scores, descriptors = reference(found, image)
        if kind is OutputType.KEYPOINTS:
            decoded = network.decode(scores, descriptors, DecodeOptions(max_keypoints=100), found.sampling)
            for index, expected in enumerate(decoded):
                assert_same_points(outputs, index, expected)
        elif kind is OutputType.DENSE:
            np.testing.assert_allclose(outputs["scores"], scores.numpy(), atol=1e-5)
            np.testing.assert_allclose(outputs["descriptors"], descriptors.numpy(), atol=1e-5)
        else:
            np.testing.assert_allclose(outputs["logits"], logits.numpy(), atol=1e-3, rtol=1e-4)
            np.testing.assert_allclose(outputs["coarse_descriptors"], coarse.numpy(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("size", "dynamic", "opset"),
    cases(
        [(96, 160), (104, 88), (88, 160), (72, 200), (8, 8)],
        [False, True],
        [11, 13, 17, NEWEST_OPSET],
        fast=lambda size, dynamic, opset: opset == 17 or size == (104, 88),
    ),
)
def test_a_branch_at_a_sixteenth_fits_every_size(size, dynamic, opset, checkpoint):
    """13, 11, 9, 25 and 1 rows or columns of cells are odd: what comes from 1/16 is cut where it is added."""
    found, (height, width) = checkpoint("compact"), size
    image = photographs(2, height, width)
    asked = (480, 640) if dynamic else (height, width)
    model = to_onnx(found, ExportOptions(OutputType.HEADS, *asked, dynamic, 2, opset=opset))
    outputs = run(model, image)
    for output, expected in zip(outputs.values(), reference(found, image)):
        np.testing.assert_allclose(output, expected.numpy(), atol=1e-5)
    kinds = [node.op_type for node in model.graph.node]
    assert "Slice" not in kinds and kinds.count("Resize") == 1


def test_the_cut_at_odd_sizes_is_felt(checkpoint):
    """So that the test above can fail: without the branch the outputs are others, in the last row and column too."""
    found, image = checkpoint("compact"), photographs(1, 104, 88)
    layer = found.layers["features"]
    silent = replace(layer, weight=np.zeros_like(layer.weight), bias=np.zeros_like(layer.bias))
    without = replace(found, layers={**found.layers, "features": silent})
    with_branch, alone = (reference(one, image)[1].numpy() for one in (found, without))
    assert np.abs(with_branch - alone)[..., -1, -1].max() > 1e-3


def test_a_layer_with_the_name_of_another_tensor_is_refused():
    table = [tuple("scores" if part == "stem1" else part for part in row) for row in COMPACT]
    table = [(row[0], [("scores" if name == "stem1" else name) for name in row[1]], *row[2:]) for row in table]
    with pytest.raises(SuperPointError, match=r"two tensors would be called scores; rename the layer scores"):
        to_onnx(random_compact(table=table), ExportOptions())


@pytest.mark.parametrize("layout", cases(REAL, fast=lambda layout: layout in ("packaged", "small")))
def test_parity_at_full_size_with_more_slots_than_points(layout, checkpoint):
    found = checkpoint(layout)
    image = photographs(1, 480, 640)
    outputs = run(to_onnx(found, ExportOptions(OutputType.KEYPOINTS, max_keypoints=2000, decode=WHOLE_PIXELS)), image)
    *_, scores, descriptors = reference(found, image)
    (expected,) = network.decode(scores, descriptors, DecodeOptions(), found.sampling)
    assert 300 < len(expected[0]) < 2000
    assert_same_points(outputs, 0, expected)


@pytest.mark.parametrize("sampling", Sampling)
@pytest.mark.parametrize("opset", [11, 17])
def test_sampling_belongs_to_the_checkpoint_and_can_be_overridden(sampling, opset, checkpoint_file):
    found = layouts.load(checkpoint_file("magicleap"), sampling)
    image = photographs(1)
    outputs = run(to_onnx(found, ExportOptions(OutputType.KEYPOINTS, 120, 160, opset=opset)), image)
    *_, scores, descriptors = reference(found, image)
    (expected,) = network.decode(scores, descriptors, DecodeOptions(max_keypoints=1024), sampling)
    assert_same_points(outputs, 0, expected)
    other = next(s for s in Sampling if s is not sampling)
    (wrong,) = network.decode(scores, descriptors, DecodeOptions(max_keypoints=1024), other)
    assert (wrong[2] * expected[2]).sum(dim=1).min() < 0.999, "the two conventions must differ for this to prove much"


# ------------------------------------------------------------------------- the graph's decode, on score maps of our own


def decode_graph(checkpoint, scores: np.ndarray, **options) -> dict[str, np.ndarray]:
    """Runs only the decode of a `keypoints` graph."""
    height, width = scores.shape
    settings = ExportOptions(OutputType.KEYPOINTS, height, width, **options)
    whole = to_onnx(checkpoint, settings)
    names = [output.name for output in whole.graph.output]
    part = Extractor(whole).extract_model(["score_map", "dense_descriptors"], names)
    opened = session(part)
    rng = np.random.default_rng(0)
    shape = (1, checkpoint.descriptor_dim, height // 8, width // 8)
    descriptors = decode.normalize(rng.normal(size=shape), axis=1)
    feeds = {"score_map": scores[None, None], "dense_descriptors": descriptors}
    return {**dict(zip(names, opened.run(names, feeds))), "dense": descriptors}


@pytest.mark.parametrize(
    ("kind", "radius", "border", "number", "dynamic"),
    cases(
        KINDS,
        [0, 1, 4],
        [0, 4],
        [40, 3000],
        [False, True],
        fast=lambda kind, radius, border, number, dynamic: (
            (radius == border == 4 and dynamic is (number == 40)) or (kind == "plateaus" and not dynamic)
        ),
    ),
)
def test_graph_decode_on_hard_score_maps(kind, radius, border, number, dynamic, checkpoint):
    """Plateaus, ties all over, too few points, none at all: the same points in the same order as the numpy decode."""
    scores = score_map(kind, seed=5)
    options = DecodeOptions(nms_radius_px=radius, remove_borders_px=border, max_keypoints=number)
    outputs = decode_graph(checkpoint("magicleap"), scores, max_keypoints=number, decode=options, dynamic=dynamic)
    xy, found = decode.select(scores, options)
    count = int(outputs["num_keypoints"][0])
    np.testing.assert_array_equal(outputs["keypoints"][0][:count], xy)
    np.testing.assert_array_equal(outputs["scores"][0][:count], found)
    sampled = decode.sample_descriptors(xy, outputs["dense"][0], 8, Sampling.LEGACY)
    np.testing.assert_allclose(outputs["descriptors"][0][:count], sampled, atol=1e-5)


@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("opset", [11, 13, 17, NEWEST_OPSET])
def test_graph_decode_at_the_four_borders(border, opset, checkpoint):
    scores = np.zeros((32, 48), np.float32)
    near, far_x, far_y = border, 47 - border, 31 - border
    allowed = {(near, near), (far_x, near), (near, far_y), (far_x, far_y)}
    forbidden = {(near - 1, 16), (far_x + 1, 16), (24, near - 1), (24, far_y + 1)} if border else set()
    for x, y in allowed | forbidden:
        scores[y, x] = 0.5
    options = DecodeOptions(remove_borders_px=border)
    outputs = decode_graph(checkpoint("v6"), scores, max_keypoints=16, decode=options, opset=opset)
    found = outputs["keypoints"][0][: int(outputs["num_keypoints"][0])]
    assert {tuple(point) for point in found.tolist()} == allowed


def test_graph_keeps_every_pixel_of_a_plateau_inside_one_cell(checkpoint):
    """Twelve equal maxima in one cell: an argument from "at most 4 maxima a cell" would drop eight."""
    scores = np.zeros((32, 32), np.float32)
    scores[10:13, 10:14] = 0.25
    outputs = decode_graph(checkpoint("v6"), scores, max_keypoints=64)
    assert int(outputs["num_keypoints"][0]) == 12


@pytest.mark.parametrize("number", [1, 7, 30])
def test_top_k_is_exact_without_suppression(number, checkpoint):
    """All 2048 scores differ and compete: the N best and no others."""
    rng = np.random.default_rng(9)
    scores = rng.permutation(np.linspace(0.1, 0.9, 64 * 32)).astype(np.float32).reshape(32, 64)
    options = DecodeOptions(nms_radius_px=0, remove_borders_px=0)
    outputs = decode_graph(checkpoint("v6"), scores, max_keypoints=number, decode=options)
    np.testing.assert_array_equal(outputs["scores"][0], np.sort(scores.ravel())[::-1][:number])


@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_whose_logits_are_not_finite_has_scores_that_are_nan(value, dynamic, opset, checkpoint):
    """Not 0 keypoints, which would look like a blank image. The other images of the batch are as ever."""
    options = ExportOptions(OutputType.KEYPOINTS, 120, 160, dynamic, max_batch_size=3, max_keypoints=200, opset=opset)
    model = to_onnx(checkpoint("own"), options)
    images = photographs(3)
    alone = run(model, images[:1] if dynamic else images)
    images[1, 0, 50, 70] = value
    found = run(model, images)
    assert np.isnan(found["scores"][1]).all()
    for name, values in alone.items():
        np.testing.assert_allclose(found[name][0], values[0], atol=1e-5, err_msg=name)
    assert np.isfinite(found["scores"][[0, 2]]).all() and (found["num_keypoints"][[0, 2]] > 0).all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("opset", [11, 17])
def test_onnxruntime_leaves_the_softmax_on_the_last_axis(opset, dynamic, checkpoint, tmp_path):
    """There it takes a fourteenth of the time; onnxruntime moves it if that saves a Transpose."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the file fits this machine alone
    model = to_onnx(checkpoint("v6"), ExportOptions(height_px=64, width_px=96, opset=opset, dynamic=dynamic))
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (softmax,) = (node for node in onnx.load(tmp_path / "optimized.onnx").graph.node if node.op_type == "Softmax")
    assert [attribute.i for attribute in softmax.attribute if attribute.name == "axis"] in ([3], [-1])


def test_no_top_k_sees_the_whole_map(checkpoint):
    """The exact two-level top-k: a plain one over 307,200 scores costs TensorRT 1.1 ms (docs/architecture.md)."""
    model = to_onnx(checkpoint("v6"), ExportOptions(OutputType.KEYPOINTS, max_keypoints=1024))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    lengths = [shapes[node.input[0]][-1] for node in model.graph.node if node.op_type == "TopK"]
    assert lengths
    assert max(lengths) <= 480 * 640 // 16
    assert not [node.op_type for node in model.graph.node if node.op_type in ("NonZero", "ScatterND", "Loop", "If")]


# ------------------------------------------------------------------------------------------------- the file's frame


@pytest.mark.parametrize("kind", OutputType)
def test_the_file_says_what_it_is(kind, checkpoint_file, tmp_path):
    import hashlib

    weights = checkpoint_file("v6")
    options = ExportOptions(kind, 120, 160, max_keypoints=99, decode=DecodeOptions(3, 5, 0.01), opset=13)
    path = export(weights, tmp_path / "m.onnx", options)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert list(tmp_path.iterdir()) == [path], "one file, no sidecar"
    assert path.stat().st_mode & 0o777 == 0o644
    assert model.producer_name == "superpoint-trt"
    described = ModelDescription.from_metadata({entry.key: entry.value for entry in model.metadata_props})
    assert described.type is kind
    assert described.checkpoint_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (described.height_px, described.width_px, described.opset) == (120, 160, 13)
    decoding = (described.nms_radius_px, described.remove_borders_px, described.threshold, described.max_keypoints)
    assert decoding == ((3, 5, 0.01, 99) if kind is OutputType.KEYPOINTS else (None,) * 4)


@pytest.fixture(scope="module")
def mapped(tmp_path_factory) -> dict[str, Path]:
    """A small checkpoint with a map to the descriptors of a full one, and both of those."""
    out = tmp_path_factory.mktemp("mapped")
    full = layouts.save(random_compact(1), out / "full.safetensors")
    columns = np.linalg.qr(np.random.default_rng(0).normal(size=(96, 64)))[0].astype(np.float32)
    small = replace(random_compact(), descriptor_map=DescriptorMap(columns, file_sha256(full)))
    return {"full": full, "small": layouts.save(small, out / "small.safetensors", half=True)}


def test_a_lifted_model_computes_what_lifting_does(mapped, tmp_path):
    size = {"height_px": 120, "width_px": 160}
    image, to_full = photographs(2), load_descriptor_map(mapped["small"])
    for kind in (OutputType.DENSE, OutputType.HEADS, OutputType.KEYPOINTS):
        plain = ExportOptions(kind, max_batch_size=2, max_keypoints=60, **size)
        own, lifted = (
            run(onnx.load(export(mapped["small"], tmp_path / "m.onnx", options)), image)
            for options in (plain, replace(plain, descriptors_of=mapped["full"]))
        )
        for name in own:
            if "descriptors" not in name:
                np.testing.assert_array_equal(own[name], lifted[name])
                continue
            rows, found = (
                np.moveaxis(each, -1 if name == "descriptors" and kind is OutputType.KEYPOINTS else 1, -1)
                for each in (own[name], lifted[name])
            )
            assert found.shape[-1] == 96
            if kind is OutputType.HEADS:
                np.testing.assert_allclose(found, rows @ to_full.matrix.T, atol=1e-4)
                continue
            expected = decode.lift_descriptors(rows.reshape(-1, 64), to_full)
            np.testing.assert_allclose(found.reshape(-1, 96), expected, atol=1e-4)


def test_a_lifted_model_names_both_checkpoints(mapped, tmp_path):
    path = export(mapped["small"], tmp_path / "m.onnx", ExportOptions(descriptors_of=mapped["full"]))
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    described = ModelDescription.from_metadata(metadata)
    small, full = (file_sha256(mapped[name]) for name in ("small", "full"))
    assert (described.checkpoint_sha256, described.descriptors_of, described.features_sha256) == (small, full, full)
    assert described.descriptor_dim == 96
    plain = onnx.load(export(mapped["small"], tmp_path / "own.onnx"))
    described = ModelDescription.from_metadata({entry.key: entry.value for entry in plain.metadata_props})
    assert (described.descriptors_of, described.features_sha256, described.descriptor_dim) == (None, small, 64)


def test_descriptors_of_another_network_are_refused_in_one_line(mapped, tmp_path, capsys):
    other = tmp_path / "other.pth"
    other.write_bytes(b"another")
    cases = (
        (mapped["full"], mapped["small"], r"full\.safetensors has no map to another network's descriptors"),
        (mapped["small"], other, r"small\.safetensors has a map to the descriptors of checkpoint [0-9a-f]{12}, not to"),
        (mapped["small"], tmp_path / "none.pth", r"none\.pth cannot be read: No such file"),
    )
    output = tmp_path / "m.onnx"
    for weights, of, message in cases:
        words = ["export", "--weights", str(weights), "--output", str(output), "--descriptors-of", str(of)]
        assert run_cli(cli, words) == 2
        told = capsys.readouterr().err
        assert re.search(message, told) and told.count("\n") == 1 and not output.exists()
    words = ["export", "--weights", str(mapped["small"]), "--output", str(output)]
    assert run_cli(cli, [*words, "--descriptors-of", str(mapped["full"])]) == 0 and output.exists()


def test_same_input_same_bytes(checkpoint_file, tmp_path):
    first, second = (export(checkpoint_file("v6"), tmp_path / f"{n}.onnx").read_bytes() for n in "ab")
    assert first == second


def test_exact_folding_only(checkpoint):
    """Of the twelve BatchNorms, the output layers' and the heads' hidden ones fold; before a 3x3 none does."""
    model = to_onnx(checkpoint("v6"), ExportOptions())
    kept = [node.name for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert kept == [f"conv{stage}{half}.bn" for stage in range(1, 5) for half in "ab"]
    plain = to_onnx(checkpoint("magicleap"), ExportOptions())
    assert "BatchNormalization" not in {node.op_type for node in plain.graph.node}


def test_batch_norm_before_the_relu_folds_away(checkpoint):
    found = replace(checkpoint("v6"), norm=layouts.NormPlacement.BEFORE_RELU)
    model = to_onnx(found, ExportOptions(height_px=120, width_px=160))
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    image = photographs(1)
    *_, scores, descriptors = reference(found, image)
    outputs = run(model, image)
    np.testing.assert_allclose(outputs["scores"], scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(outputs["descriptors"], descriptors.numpy(), atol=1e-5)


BACKBONE = tuple(f"conv{stage}{half}" for stage in range(1, 5) for half in "ab")


@pytest.mark.parametrize(
    ("layout", "names"),
    cases(
        ["v6", "real-v6"],
        [("conv1a",), ("conv4b", "conv2a"), BACKBONE],
        fast=lambda layout, names: layout == "v6" and names != ("conv1a",),
    ),
)
def test_shifts_through_a_channel_are_exact_up_to_the_border(layout, names, checkpoint):
    """Large shifts and scales of both signs; what a bias would get wrong shows in the outermost cells."""
    found = checkpoint(layout)
    rng = np.random.default_rng(0)
    layers = dict(found.layers)
    if layout == "v6":
        for name in BACKBONE:
            norm, size = layers[name].norm, len(layers[name].bias)
            signs = np.where(rng.random(size) < 0.3, -1, 1) if name != "conv2b" else np.ones(size)
            beta = rng.normal(0, 1, size).astype(np.float32)
            gamma = (np.abs(norm.weight) * signs).astype(np.float32)
            layers[name] = replace(layers[name], norm=replace(norm, weight=gamma, bias=beta))
    found = replace(found, layers=layers)
    model = to_onnx(found, ExportOptions(OutputType.HEADS, 64, 96, shift_channels=names))
    rising = {name for name in BACKBONE if (found.layers[name].norm.scale_and_shift()[0] > 0).all()}
    gone = {name for name in names if name in rising or name == "conv4b" or name.endswith("a")}
    kept = {node.name[: -len(".bn")] for node in model.graph.node if node.op_type == "BatchNormalization"}
    assert kept == set(BACKBONE) - gone
    if layout == "v6" and names == BACKBONE:
        assert kept == {"conv1b", "conv3b"}
    image = photographs(1, 64, 96)
    logits, coarse, *_ = (part.numpy() for part in reference(found, image))
    outputs = run(model, image)
    for name, expected in (("logits", logits), ("coarse_descriptors", coarse)):
        off = np.abs(outputs[name] - expected)
        assert off.max() < 2e-5 * np.abs(expected).max(), (name, off.max())
        border = np.concatenate([off[..., [0, -1], :].ravel(), off[..., [0, -1]].ravel()])
        assert border.max() < 2e-5 * np.abs(expected).max()


def test_shifts_of_unknown_layers_are_refused(checkpoint):
    with pytest.raises(SuperPointError, match=r"shift_channels names 'conv9a'; expected some of conv1a, conv1b"):
        to_onnx(checkpoint("v6"), ExportOptions(shift_channels=("conv9a",)))


def test_folded_batch_norms_differ_near_the_border_alone(checkpoint):
    """Shifts as biases: the padding's zeros become shifts, which is felt five cells deep and no further.

    And half a cell further in descriptors, which are sampled between the cells.
    """
    found, cells = rising(checkpoint("v6")), 5
    assert reach_of_padding_px(found) == cells * 8 + 4
    exact, folded = (to_onnx(found, ExportOptions(OutputType.HEADS, 144, 160, fold_batchnorm=f)) for f in (False, True))
    assert [node.op_type for node in exact.graph.node].count("BatchNormalization") == 8
    assert {node.op_type for node in folded.graph.node} == {"Conv", "Relu", "MaxPool"}
    image = photographs(1, 144, 160)
    ours, truth = run(folded, image), run(exact, image)
    for name, expected in truth.items():
        off = np.abs(ours[name] - expected) / np.abs(expected).max()
        inside = off[..., cells:-cells, cells:-cells]
        assert inside.shape[2:] == (8, 10) and inside.max() < 2e-5
        assert off[..., 0, :].max() > 1e-3, "and it is felt there"
        assert max(off[..., cells - 1, :].max(), off[..., cells - 1].max()) > 1e-6, "as deep as it is said to be"
    y, x = (grid.ravel() for grid in np.mgrid[30:114, 30:130])
    points = np.stack([x, y], axis=1).astype(np.float32)
    ours, truth = (
        decode.sample_descriptors(points, decode.normalize(heads["coarse_descriptors"], axis=1)[0], 8, found.sampling)
        for heads in (ours, truth)
    )
    off = np.abs(ours - truth).max(axis=1)
    near = np.minimum(np.minimum(x, 159 - x), np.minimum(y, 143 - y))
    assert off[near >= 44].max() < 1e-5 < 1e-4 < off[near == 43].max()


def rising(found):
    """The checkpoint with positive scales alone: a max-pool commutes with its BatchNorms."""
    layers = {
        name: replace(layer, norm=layer.norm and replace(layer.norm, weight=np.abs(layer.norm.weight)))
        for name, layer in found.layers.items()
    }
    return replace(found, layers=layers)


def test_batch_norms_that_do_not_commute_with_a_pool_stay_where_they_are(checkpoint):
    found = checkpoint("v6")
    falling = [n for n in BACKBONE if n[-1] == "b" and n != "conv4b" and (found.layers[n].norm.weight < 0).any()]
    assert falling, "or nothing is tested"
    exact, folded = (to_onnx(found, ExportOptions(OutputType.HEADS, 144, 160, fold_batchnorm=f)) for f in (False, True))
    assert [n.name for n in folded.graph.node if n.op_type == "BatchNormalization"] == [f"{n}.bn" for n in falling]
    image = photographs(1, 144, 160)
    for ours, truth in zip(run(folded, image).values(), run(exact, image).values()):
        assert np.abs(ours - truth)[..., 5:-5, 5:-5].max() < 2e-5 * np.abs(truth).max()


def test_a_folded_model_says_so(checkpoint_file, tmp_path, capsys):
    arguments = ["export", "--weights", str(checkpoint_file("v6")), "--height", "64", "--width", "64"]
    assert run_cli(cli, [*arguments, "--output", str(tmp_path / "plain.onnx")]) == 0
    assert "approximation" not in capsys.readouterr().out
    assert run_cli(cli, [*arguments, "--output", str(tmp_path / "folded.onnx"), "--fold-batchnorm"]) == 0
    assert "BatchNorm folded: differs within 44 px of the input's border" in capsys.readouterr().out


@pytest.mark.parametrize("layout", ["magicleap", "packaged"])
def test_folding_where_there_is_nothing_to_fold_is_refused(checkpoint_file, tmp_path, capsys, layout):
    output = tmp_path / "a.onnx"
    arguments = ["export", "--weights", str(checkpoint_file(layout)), "--output", str(output), "--fold-batchnorm"]
    assert run_cli(cli, arguments) == 2
    error = capsys.readouterr().err
    assert "this one has none: leave --fold-batchnorm out" in error and error.count("\n") == 1
    assert not output.exists()


def test_two_ways_to_fold_are_one_too_many(checkpoint):
    with pytest.raises(SuperPointError, match="choose one"):
        to_onnx(checkpoint("v6"), ExportOptions(shift_channels=("conv1a",), fold_batchnorm=True))


def test_export_needs_no_torch(checkpoint_file, tmp_path):
    """From safetensors, in an interpreter where importing torch fails."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from superpoint_trt.convert.export import export\n"
        f"export({str(checkpoint_file('huggingface'))!r}, {str(tmp_path / 'm.onnx')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"height_px": 481}, "480 or 488"),
        ({"width_px": 0}, "width is 0"),
        ({"height_px": 1 << 20}, "height is"),
        ({"opset": 10}, "opset is 10; expected 11"),
        ({"opset": NEWEST_OPSET + 1}, f"expected 11 to {NEWEST_OPSET}"),
        ({"max_batch_size": 0}, "largest batch"),
        ({"max_keypoints": 0}, "number of keypoints"),
        ({"height_px": 8, "width_px": 8, "max_keypoints": 65}, "only 64 pixels"),
        ({"height_px": 16, "decode": DecodeOptions(remove_borders_px=9)}, "leaves nothing"),
    ],
)
def test_unusable_options(options, word, checkpoint):
    with pytest.raises(SuperPointError, match=word):
        to_onnx(checkpoint("v6"), ExportOptions(type=OutputType.KEYPOINTS, **options))


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", OutputType)
def test_every_opset_makes_a_checked_model(kind, checkpoint):
    for opset in range(11, NEWEST_OPSET + 1):
        model = to_onnx(checkpoint("v6"), ExportOptions(kind, 64, 64, opset=opset))
        assert session(model).get_inputs()[0].shape == [1, 1, 64, 64]
