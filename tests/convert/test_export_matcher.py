"""A matcher's .onnx says what the torch reference says, in every form; TensorRT builds it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from matchers import plain_matcher, points, random_matcher, shuffled

from superpoint_trt.checkpoint.matcher import MatcherShape, save_matcher
from superpoint_trt.checkpoint.matcher_network import MatcherNet, PointSets, matches
from superpoint_trt.convert.engine_trt86 import constrain_types
from superpoint_trt.convert.export_matcher import MatcherExportOptions, export_matcher, matcher_to_onnx
from superpoint_trt.core.matcher import INPUTS, MatcherDescription
from superpoint_trt.core.types import Precision, SuperPointError

BATCH, ROWS = 2, 48


def feed_of(dim: int = 32, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Two pairs, of which the second is shorter in both images."""
    pairs = []
    for seed, counts in enumerate(((rows, rows - 5), (rows // 2, rows // 3))):
        first = points(rows, seed, dim)
        second, _ = shuffled(first, seed + 7, 0.1)
        pairs.append((first, second, counts))
    feed: dict[str, np.ndarray] = {}
    for image in (0, 1):
        stacked = [np.stack([getattr(pair[image], name) for pair in pairs]) for name in ("xy", "scores", "descriptors")]
        counts = np.array([pair[2][image] for pair in pairs], np.int32)
        sizes = np.array([pair[image].image_size for pair in pairs], np.float32)
        feed.update({f"{name}{image}": array for name, array in zip(INPUTS, (*stacked, counts, sizes))})
    return feed


def reference(weights, feed, layers: int) -> tuple[np.ndarray, np.ndarray]:
    sets = [PointSets(*(torch.from_numpy(feed[f"{name}{image}"]) for name in INPUTS)) for image in (0, 1)]
    with torch.no_grad():
        found = matches(MatcherNet.from_weights(weights)(*sets)[layers - 1], 0.02)
    return found[0].numpy(), found[1].numpy()


def run(model: onnx.ModelProto, feed) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)


@pytest.mark.parametrize("rows", [0, ROWS])
@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize(("precision", "half_softmax"), [("fp32", False), ("fp16", False), ("fp16", True)])
def test_onnx_and_torch_agree(rows, layers, precision, half_softmax):
    weights, feed = random_matcher(), feed_of()
    options = MatcherExportOptions(
        rows, layers, batch=BATCH, min_score=0.02, precision=Precision(precision), half_softmax=half_softmax
    )
    found, scores = run(matcher_to_onnx(weights, options), feed)
    expected, expected_scores = reference(weights, feed, layers or 2)
    assert found.dtype == np.int32 and found.shape == (BATCH, ROWS) and (expected >= 0).sum() > 10
    if precision == "fp32":
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-4)
    else:
        assert (found == expected).mean() > 0.97
        np.testing.assert_allclose(scores, expected_scores, atol=0.05)


def test_each_length_of_descriptors_has_its_projection():
    weights = random_matcher(MatcherShape((32, 24), 32, 2, 2))
    for dim in (32, 24):
        feed = feed_of(dim)
        model = matcher_to_onnx(weights, MatcherExportOptions(batch=BATCH, descriptor_dim=dim, min_score=0.02))
        np.testing.assert_array_equal(run(model, feed)[0], reference(weights, feed, 2)[0])
    with pytest.raises(SuperPointError, match="descriptors of 16 numbers were asked for; this matcher takes 32 or 24"):
        matcher_to_onnx(weights, MatcherExportOptions(descriptor_dim=16))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rows_that_fill_up_change_nothing(precision):
    """Neither by what they hold, nor where an image has no points at all."""
    weights, feed = random_matcher(), feed_of()
    model = matcher_to_onnx(weights, MatcherExportOptions(batch=BATCH, min_score=0.02, precision=Precision(precision)))
    found, scores = run(model, feed)
    rng = np.random.default_rng(3)
    for image in (0, 1):
        for pair, count in enumerate(feed[f"count{image}"]):
            for name in ("keypoints", "keypoint_scores", "descriptors"):
                filling = feed[f"{name}{image}"][pair, count:]
                filling[:] = rng.random(filling.shape)
    again, again_scores = run(model, feed)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_allclose(again_scores, scores, atol=1e-5 if precision == "fp32" else 2e-3)
    feed["count1"][0] = 0
    none, none_scores = run(model, feed)
    assert (none[0] == -1).all() and not none_scores[0].any()
    np.testing.assert_array_equal(none[1], found[1])


def test_the_graph_holds_nothing_that_waits():
    for rows in (0, 64):
        model = matcher_to_onnx(random_matcher(), MatcherExportOptions(rows, precision=Precision.FP16))
        assert not {node.op_type for node in model.graph.node} & {"NonZero", "Loop", "If", "Scan", "ArgMax"}
        assert [entry.version for entry in model.opset_import] == [17]


def test_fp16_keeps_what_is_delicate_in_float32():
    model = onnx.shape_inference.infer_shapes(
        matcher_to_onnx(random_matcher(), MatcherExportOptions(64, precision=Precision.FP16))
    )
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    full, half = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
    for node in model.graph.node:
        if node.op_type in ("Softmax", "LayerNormalization", "Cos", "Sin", "Sigmoid", "TopK"):
            assert types[node.output[0]] == full, node.name
    products = [types[node.output[0]] for node in model.graph.node if node.op_type == "MatMul"]
    assert products.count(half) > 20
    assert products.count(full) == 5, "positions; the head's two maps, its similarities, and sums over columns"


@pytest.mark.parametrize("half_softmax", [False, True])
def test_no_cast_lies_beside_moved_float32_numbers(half_softmax):
    """TensorRT 8.6 moves casts across what only moves numbers, and then refuses the float32 that was set there."""
    options = MatcherExportOptions(64, precision=Precision.FP16, half_softmax=half_softmax)
    nodes = matcher_to_onnx(random_matcher(), options).graph.node
    moving = {
        "Reshape",
        "Transpose",
        "Split",
        "Concat",
        "Squeeze",
        "Unsqueeze",
        "Gather",
        "Expand",
        "Slice",
        "Identity",
    }
    beside = {}
    for cast in (node for node in nodes if node.op_type == "Cast"):
        before = {node.op_type for node in nodes if cast.input[0] in node.output}
        after = {node.op_type for node in nodes if cast.output[0] in node.input}
        beside[cast.name] = {onnx.TensorProto.FLOAT: after, onnx.TensorProto.FLOAT16: before}.get(
            cast.attribute[0].i, set()
        )
    assert len(beside) > 20
    assert not {name: found & moving for name, found in beside.items() if found & moving}


MOVES = {"Reshape": "SHUFFLE", "Transpose": "SHUFFLE", "Squeeze": "SHUFFLE", "Unsqueeze": "SHUFFLE", "Split": "SLICE"}
MOVES.update(Expand="SLICE", Concat="CONCATENATION", Gather="GATHER", Cast="CAST", Shape="SHAPE")


class ParsedLayer:
    """A layer as TensorRT 8.6 parses it from a node: where types are set, and which."""

    def __init__(self, node: onnx.NodeProto, types: dict[str, str]) -> None:
        self.type, self.op = MOVES.get(node.op_type, "OTHER"), node.op_type
        self.inputs = [SimpleNamespace(name=name, dtype=types.get(name, "int32")) for name in node.input]
        self.outputs = [SimpleNamespace(name=name, dtype=types.get(name, "int32")) for name in node.output]
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)
        self.get_input, self.get_output = self.inputs.__getitem__, self.outputs.__getitem__
        self.precision = None
        self.set: dict[int, str] = {}

    def set_output_type(self, index: int, dtype: str) -> None:
        self.set[index] = dtype


def test_tensorrt_8_may_choose_the_type_of_fp16_numbers_that_only_move():
    model = matcher_to_onnx(random_matcher(), MatcherExportOptions(64, precision=Precision.FP16))
    names = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {value.name: names.get(value.type.tensor_type.elem_type, "int32") for value in values}
    layers = [ParsedLayer(node, types) for node in model.graph.node]
    bias = ParsedLayer(onnx.helper.make_node("Unsqueeze", ["layers.0.self.read.bias"], ["(Unnamed Layer* 7)"]), {})
    bias.inputs[0].dtype = bias.outputs[0].dtype = "float16"
    layers.append(bias)
    kinds = ("CONSTANT", "SHAPE", "CAST", "QUANTIZE", "DEQUANTIZE", "CONVOLUTION", *set(MOVES.values()))
    module = SimpleNamespace(
        LayerType=SimpleNamespace(**{kind: kind for kind in kinds}), float32="float32", float16="float16"
    )
    network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__, num_outputs=0)
    constrain_types(module, network, model)
    moved = [layer for layer in layers if layer.type in ("SHUFFLE", "SLICE", "CONCATENATION", "GATHER")]
    assert {layer.precision for layer in moved if layer.outputs[0].dtype == "float16"} == {None}
    # Places in px and similarities have more digits than fp16 holds.
    assert {layer.precision for layer in moved if layer.outputs[0].dtype == "float32"} == {"float32"}
    computed = [layer for layer in layers if layer.op in ("MatMul", "Softmax", "Mul", "Add", "LayerNormalization")]
    assert all(layer.set[0] == layer.precision == layer.outputs[0].dtype for layer in computed)


def test_the_file_says_what_it_is(tmp_path):
    weights = save_matcher(plain_matcher(), tmp_path / "w.safetensors")
    path = export_matcher(weights, tmp_path / "m.onnx", MatcherExportOptions(64, 1, min_score=0.3))
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    description = MatcherDescription.from_metadata(found, path)
    assert (description.descriptor_dim, description.rows, description.layers) == (32, 64, 1)
    assert description.min_score == 0.3 and description.weights_sha256
    with pytest.raises(SuperPointError, match="is not a matcher of this package"):
        MatcherDescription.from_metadata({}, path)
    with pytest.raises(SuperPointError, match=r"an exported matcher's name ends in .onnx"):
        export_matcher(weights, tmp_path / "m.engine")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_keypoints": -1}, "number of keypoints is -1"),
        ({"batch": 0}, "batch of 0 pairs"),
        ({"min_score": 1.0}, "least score is 1"),
        ({"precision": Precision.INT8}, "precision int8 is not for matchers"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(SuperPointError, match=said):
        MatcherExportOptions(**options)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_builds_it(tmp_path, precision):
    """The real builder of TensorRT-RTX, which needs no GPU."""
    pytest.importorskip("tensorrt_rtx")
    from superpoint_trt.convert.matcher_engine import build_matcher
    from superpoint_trt.gpu.tensorrt_api import Flavor, flavor_of

    weights = save_matcher(random_matcher(), tmp_path / "w.safetensors")
    options = MatcherExportOptions(64, precision=Precision(precision))
    model = export_matcher(weights, tmp_path / "m.onnx", options)
    built = build_matcher(model, tmp_path / "m.engine", Flavor.RTX, ("sm89",))
    plan = (tmp_path / "m.engine").read_bytes()
    assert flavor_of(plan) is Flavor.RTX and len(plan) > 10_000
    assert built.precision is Precision(precision) and built.rows == 64
    free = export_matcher(weights, tmp_path / "free.onnx")
    with pytest.raises(SuperPointError, match="takes any number of keypoints, an engine only one"):
        build_matcher(free, tmp_path / "free.engine", Flavor.RTX, ("sm89",))
