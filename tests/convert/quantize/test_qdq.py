"""fp32 graph + ranges -> Q/DQ graph: where the pairs lie, what they hold, what builders make of them."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import COMPACT, photograph, random_compact
from helpers import cases, graph_of, run_in_onnxruntime
from numpy.lib.stride_tricks import sliding_window_view
from onnx import numpy_helper

from superpoint_trt.convert.cast import to_precision
from superpoint_trt.convert.engine import BuildOptions, build
from superpoint_trt.convert.engine_trt86 import constrain_types
from superpoint_trt.convert.export import ExportOptions, export, to_onnx
from superpoint_trt.convert.onnx_file import convolutions, load_onnx
from superpoint_trt.convert.quantize.calibrate import calibrate
from superpoint_trt.convert.quantize.equalize import equalize
from superpoint_trt.convert.quantize.options import COARSE, FirstConvolution, Method, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import (
    PARTS,
    fp16_with_int8_input,
    kept_layers,
    normalizations_after_relu,
    quantize,
    split_image,
)
from superpoint_trt.convert.quantize.ranges_file import Calibration
from superpoint_trt.core.types import OutputType, Precision, SuperPointError
from superpoint_trt.gpu import tensorrt_api
from superpoint_trt.gpu.tensorrt_api import Flavor

KINDS = ["dense", "keypoints", "heads"]


def ranges_of(model: onnx.ModelProto, value: float = 4.0) -> Calibration:
    """The same range for every tensor that a convolution reads."""
    inputs = dict.fromkeys(node.input[0] for node in convolutions(model).values())
    return Calibration(Method.MAX, None, "480x640", None, {"a.png": "0" * 64}, {name: value for name in inputs})


# ------------------------------------------------------------------------------------ int8 and fp8, worked out in numpy


def convolve(image: np.ndarray, weight: np.ndarray, bias: np.ndarray, node: onnx.NodeProto) -> np.ndarray:
    """(C, H, W) -> (O, h, w), zero padding, in float64."""
    side, said = weight.shape[2], {attribute.name: attribute.ints for attribute in node.attribute}
    step, edge = said.get("strides", [1])[0], said["pads"][0]
    padded = np.pad(image, ((0, 0), (edge, edge), (edge, edge)))
    windows = sliding_window_view(padded, (side, side), axis=(1, 2))[:, ::step, ::step]
    return np.einsum("chwyx,ocyx->ohw", windows, weight) + bias[:, None, None]


def to_int8(values: np.ndarray, largest) -> np.ndarray:
    """What is left of values in steps of 1/127 of the range."""
    scale = np.asarray(largest, np.float64) / 127
    return np.clip(np.rint(values / scale), -128, 127) * scale


def to_fp8(values: np.ndarray, largest) -> np.ndarray:
    """What is left of values in E4M3, whose largest number is 448."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    scale = np.asarray(largest, np.float64) / 448
    scaled = np.clip(values / scale, -448, 448).astype(np.float32)
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


PLACES = (0.375, 0.125, -0.125, -0.375)


def parts(image: np.ndarray) -> list[np.ndarray]:
    """[0, 1] as four quarters, each in steps of 1/510 up to 127; each rounds at another place."""
    return [np.clip(np.rint(image * 127.5 + place), -128, 127) / 510 for place in PLACES]


def simulate(
    model: onnx.ModelProto, image: np.ndarray, ranges: dict[str, float], kept, rounded, handed=()
) -> list[np.ndarray]:
    """Runs an fp32 graph node by node, convolutions reading rounded inputs and weights unless they are kept.

    Those `handed` over to read rounded inputs alone.
    """
    values = {w.name: numpy_helper.to_array(w).astype(np.float64) for w in model.graph.initializer}
    values["image"] = image.astype(np.float64)
    for node in model.graph.node:
        x, *constants = (values.get(name) for name in node.input)
        if node.op_type == "Conv":
            weight, bias = constants
            if node.name not in kept and node.input[0] == "image":
                steps = weight / np.abs(weight).max(axis=(1, 2, 3), keepdims=True) * 127
                apart = [np.clip(np.rint(steps + off), -127, 127) / steps * weight for off in PLACES]
                x, weight = np.concatenate(parts(x)), np.concatenate(apart, axis=1)
            elif node.name in handed:
                x = rounded(x, ranges[node.input[0]])
            elif node.name not in kept:
                x = rounded(x, ranges[node.input[0]])
                weight = rounded(weight, np.abs(weight).max(axis=(1, 2, 3), keepdims=True))
            y = convolve(x, weight, bias, node)
        elif node.op_type == "BatchNormalization":
            scale, shift, mean, variance = (c[:, None, None] for c in constants)
            epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
            y = (x - mean) / np.sqrt(variance + epsilon) * scale + shift
        elif node.op_type == "MaxPool":
            y = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2).max(axis=(2, 4))
        elif node.op_type == "Shape":
            y = np.array([1, *x.shape])
        elif node.op_type == "Resize":
            height, width = constants[-1][2:]
            y = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)[:, :height, :width]
        elif node.op_type in ("Add", "Concat"):
            y = x + constants[0] if node.op_type == "Add" else np.concatenate([x, *constants])
        else:
            assert node.op_type == "Relu", node.op_type
            y = np.maximum(x, 0)
        values[node.output[0]] = y
    return [values[output.name] for output in model.graph.output]


@pytest.mark.parametrize("layout", ["v6", "magicleap"])
@pytest.mark.parametrize(
    ("precision", "first", "rounded"),
    [("int8", "parts", to_int8), ("int8", "fp16", to_int8), ("fp8", "fp16", to_fp8)],
)
def test_onnxruntime_computes_what_the_quantization_says(checkpoint, tmp_path, layout, precision, first, rounded):
    """Three ways: fp32, onnxruntime on the Q/DQ graph, and numpy on the fp32 graph with every rounding written out."""
    model = graph_of(checkpoint, "heads", layout, height_px=48, width_px=64)
    ranges = ranges_of(model)
    options = QuantizeOptions(Precision(precision), ("conv3b",), FirstConvolution(first))
    quantized = quantize(model, ranges, options)
    image = photograph(48, 64).astype(np.float32) / 255
    kept = {"conv3b"} if first == "parts" else {"conv1a", "conv3b"}
    expected = simulate(model, image[None], ranges.ranges, kept, rounded)
    full = run_in_onnxruntime(model, image, tmp_path)
    for ours, truth, plain in zip(run_in_onnxruntime(quantized, image, tmp_path), expected, full):
        assert np.abs(truth - plain).mean() > 0.003 * truth.std(), "not so fine that nothing is tested"
        np.testing.assert_allclose(ours, truth, atol=1e-5)


HEADS = ["detector_hidden", "detector", "descriptor_hidden", "descriptor"]


@pytest.mark.parametrize(
    ("precision", "first", "keep", "kept"),
    [
        ("int8", "parts", (COARSE,), HEADS),
        ("int8", "parts", (), []),
        ("int8", "fp16", (COARSE,), ["stem0", "patches", *HEADS]),
        ("int8", "parts", ("patches", COARSE), ["patches", *HEADS]),
        ("int8", "parts", ("stem0", COARSE), ["stem0", *HEADS]),
        ("fp8", "fp16", (COARSE,), ["stem0", "patches", *HEADS]),
    ],
)
def test_networks_with_a_topology_are_quantized_as_they_say(tmp_path, precision, first, keep, kept):
    """Strides, even kernels, a sum at 1/16 of an odd size, two convolutions that read the image, joined channels."""
    # Weights in float32: among those of the file, in float16, some lie half-way between two steps of int8.
    model = to_onnx(random_compact(), ExportOptions(OutputType.HEADS, 56, 72))
    ranges, options = ranges_of(model), QuantizeOptions(Precision(precision), keep, FirstConvolution(first))
    assert sorted(kept_layers(model, options)) == sorted(kept)
    quantized = quantize(model, ranges, options)
    image = photograph(56, 72).astype(np.float32) / 255
    rounded = to_int8 if precision == "int8" else to_fp8
    expected = simulate(model, image[None], ranges.ranges, kept, rounded)
    full = run_in_onnxruntime(model, image, tmp_path)
    for ours, truth, plain in zip(run_in_onnxruntime(quantized, image, tmp_path), expected, full):
        assert np.abs(truth - plain).mean() > 0.003 * truth.std(), "not so fine that nothing is tested"
        np.testing.assert_allclose(ours, truth, atol=1e-5)


def test_both_convolutions_of_the_image_read_one_split_image(checkpoint):
    model = quantize(*(lambda m: (m, ranges_of(m)))(graph_of(checkpoint, "heads", "compact")))
    found = convolutions(model)
    assert found["stem0"].input[0] == found["patches"].input[0] == f"{PARTS}.dq"
    names = {constant.name for constant in model.graph.initializer}
    assert {"stem0.weight.parts", "patches.weight.parts"} < names
    assert not names & {"stem0.weight", "patches.weight"}
    model = graph_of(checkpoint, "heads", "compact")
    alone = quantize(model, ranges_of(model), QuantizeOptions(keep_fp16=("patches",)))
    assert convolutions(alone)["patches"].input[:2] == ["image", "patches.weight"]
    assert convolutions(alone)["stem0"].input[0] == f"{PARTS}.dq"


def test_without_a_branch_the_coarse_layers_are_all_at_an_eighth():
    table = [row for row in COMPACT if row[0] not in ("wide0", "features")]
    table = [(row[0], ["eighth1" if name == "features" else name for name in row[1]], *row[2:]) for row in table]
    model = to_onnx(random_compact(table=table), ExportOptions(OutputType.HEADS))
    assert sorted(kept_layers(model, QuantizeOptions(keep_fp16=(COARSE,)))) == sorted(["eighth1", *HEADS])


def test_between_quantized_branches_the_sum_is_fp16(checkpoint):
    """The sum, the repeated branch and the joined channels belong to no convolution's kernel."""
    model = graph_of(checkpoint, "heads", "compact")
    for keep in ((COARSE,), ()):
        typed = to_precision(quantize(model, ranges_of(model), QuantizeOptions(keep_fp16=keep)), Precision.FP16)
        kinds = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
        half = {name for name in ("features.sum", "features.repeated", "detector_hidden.inputs") if kinds[name] == 10}
        assert half == {"features.sum", "features.repeated", "detector_hidden.inputs"}
        assert kinds["features"] == kinds["eighth1.relu"] == kinds["patches.relu"] == 1, "as their pairs say"


@pytest.mark.parametrize(("keep", "hand_over"), [((COARSE,), True), (("conv4*", "convP*", "convD*"), False)])
def test_int8_goes_as_far_as_the_last_pool(checkpoint, tmp_path, keep, hand_over):
    """Kept as coarse, the convolution behind it reads 127 steps; kept by name, what the pool gives."""
    model = graph_of(checkpoint, "heads", "magicleap", height_px=48, width_px=64)
    ranges, image = ranges_of(model), photograph(48, 64).astype(np.float32) / 255
    kept = ["conv4a", "conv4b", "convPa", "convPb", "convDa", "convDb"]
    quantized = quantize(model, ranges, QuantizeOptions(keep_fp16=keep))
    pairs = {node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    reads = {name: [tensor in pairs for tensor in node.input[:2]] for name, node in convolutions(quantized).items()}
    assert reads == {name: [name not in kept, name not in kept] for name in reads} | {"conv4a": [hand_over, False]}
    expected = simulate(model, image[None], ranges.ranges, kept, to_int8, ["conv4a"] if hand_over else [])
    other = simulate(model, image[None], ranges.ranges, kept, to_int8, [] if hand_over else ["conv4a"])
    for ours, truth, wrong in zip(run_in_onnxruntime(quantized, image, tmp_path), expected, other):
        assert np.abs(truth - wrong).mean() > 0.001 * truth.std(), "the two differ"
        np.testing.assert_allclose(ours, truth, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "keep", "handed"),
    [
        ("magicleap", (COARSE,), ["conv4a"]),
        ("magicleap", (COARSE, "conv1*"), ["conv4a"]),
        ("magicleap", (COARSE, "conv4a"), []),  # asked for by name
        ("magicleap", (COARSE, "conv3b"), []),  # int8 ends before the pool
        ("magicleap", ("conv2a", "conv4a"), []),
        ("v6", (COARSE,), []),  # a BatchNorm between
    ],
)
def test_what_int8_is_handed_over_to(checkpoint, layout, keep, handed):
    model = graph_of(checkpoint, "heads", layout)
    options = QuantizeOptions(keep_fp16=keep)
    assert fp16_with_int8_input(model, options, kept_layers(model, options)) == handed


@pytest.mark.parametrize(("layout", "count"), [("v6", 8), ("magicleap", 0)])
def test_batch_norms_that_int8_does_not_pay_for_are_counted(checkpoint, layout, count):
    assert len(normalizations_after_relu(graph_of(checkpoint, "dense", layout))) == count


@pytest.mark.parametrize("layout", ["v6", "magicleap"])
def test_equalizing_changes_no_result(checkpoint, tmp_path, layout):
    model = graph_of(checkpoint, "heads", layout, height_px=48, width_px=64)
    image = photograph(48, 64).astype(np.float32) / 255
    (tmp_path / "fp32.onnx").write_bytes(model.SerializeToString())
    factors = calibrate(tmp_path / "fp32.onnx", [("photo", photograph(48, 64))]).channels
    assert any(min(values) < 0.5 for values in factors.values()), "and there is something to bring together"
    equal = run_in_onnxruntime(equalize(model, factors), image, tmp_path)
    for ours, plain in zip(equal, run_in_onnxruntime(model, image, tmp_path)):
        np.testing.assert_allclose(ours, plain, atol=1e-4)


def test_every_pair_is_where_and_as_it_should_be(checkpoint):
    model = quantize(graph_of(checkpoint, "heads", "v6"), ranges_of(graph_of(checkpoint, "heads", "v6"), 2.54))
    constants = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
    made = {node.output[0]: node for node in model.graph.node}
    for name, node in convolutions(model).items():
        data, weight, bias = (made.get(tensor) for tensor in node.input)
        assert bias is None, "no pair on the bias"
        step = 1 / 510 if name == "conv1a" else 0.02
        assert constants[data.input[1]] == pytest.approx(step) and constants[data.input[1]].shape == ()
        plain = constants[made[weight.input[0]].input[0]]
        np.testing.assert_allclose(constants[weight.input[1]] * 127, np.abs(plain).max(axis=(1, 2, 3)), rtol=1e-6)
        assert not constants[data.input[2]].any() and not constants[weight.input[2]].any(), "zero points are 0"
    outputs = {name for node in convolutions(model).values() for name in node.output}
    assert not any(node.op_type == "QuantizeLinear" and node.input[0] in outputs for node in model.graph.node)
    heads = [convolutions(model)[name].input[0] for name in ("convPa", "convDa")]
    assert heads[0] == heads[1], "both heads read one pair"


# ------------------------------------------------------------------------------------------------- the image in parts-


def test_parts_hold_every_8_bit_pixel_but_white_and_halve_the_rounding_of_floats():
    pixels = np.arange(256, dtype=np.float64)
    lost = sum(parts(pixels / 255)) * 255 - pixels
    np.testing.assert_allclose(lost[:255], 0, atol=1e-9)
    assert lost[255] == pytest.approx(-1), "white loses one step of 255"
    floats = np.linspace(0, 254 / 255, 10007)
    assert np.abs(sum(parts(floats)) - floats).max() == pytest.approx(1 / 1020, rel=0.01)


def test_int8_costs_an_8_bit_image_nothing_but_its_white(checkpoint, tmp_path):
    """Onnxruntime's first convolution on parts against fp32: as far off as its weights alone are."""
    model = graph_of(checkpoint, "heads", "magicleap", height_px=48, width_px=64)
    image = np.random.default_rng(0).integers(0, 255, (48, 64)).astype(np.float32) / np.float32(255)
    kept = tuple(name for name in convolutions(model) if name != "conv1a")
    known = {w.name: w for w in model.graph.initializer}
    weight = numpy_helper.to_array(known["conv1a.weight"])
    known["conv1a.weight"].CopyFrom(numpy_helper.from_array(np.sign(weight), "conv1a.weight"))  # exact in int8
    exact = run_in_onnxruntime(model, image, tmp_path)
    split = run_in_onnxruntime(quantize(model, ranges_of(model), QuantizeOptions(keep_fp16=kept)), image, tmp_path)
    whole = quantize(
        model, ranges_of(model, 1.0), QuantizeOptions(keep_fp16=kept, first_convolution=FirstConvolution.WHOLE)
    )
    for ours, truth, coarse in zip(split, exact, run_in_onnxruntime(whole, image, tmp_path)):
        np.testing.assert_allclose(ours, truth, atol=2e-4)
        assert np.abs(coarse - truth).max() > 0.01, "which one int8 image does lose"


def test_who_keeps_the_first_convolution_gets_it_in_fp16(checkpoint):
    model = graph_of(checkpoint, "heads", "v6")
    for chosen in (
        {"keep_fp16": ("conv1a",)},
        {"keep_fp16": ("conv1*",)},
        {"first_convolution": FirstConvolution.FP16},
    ):
        quantized = quantize(model, ranges_of(model), QuantizeOptions(**chosen))
        noted = {entry.key.rpartition(".")[2]: entry.value for entry in quantized.metadata_props}
        assert noted["first_convolution"] == "fp16" and "conv1a" in noted["kept_layers"].split()
        assert convolutions(quantized)["conv1a"].input[:2] == ["image", "conv1a.weight"]


def test_the_metadata_say_parts(checkpoint):
    model = graph_of(checkpoint, "heads", "v6")
    noted = {e.key.rpartition(".")[2]: e.value for e in quantize(model, ranges_of(model)).metadata_props}
    assert (noted["first_convolution"], noted["kept_layers"]) == ("parts", "")


def test_fp8_leaves_the_first_convolution_alone(checkpoint):
    model = graph_of(checkpoint, "heads", "v6")
    assert kept_layers(model, QuantizeOptions(Precision.FP8)) == ["conv1a"]
    with pytest.raises(SuperPointError, match=r"parts make an image fit for int8; fp8 .* --first-convolution fp16"):
        quantize(model, ranges_of(model), QuantizeOptions(Precision.FP8, (), FirstConvolution.PARTS))


def test_an_image_that_something_else_reads_first_is_not_split(checkpoint):
    """Another tool's network that scales its image: the default is fp16, and to ask for parts is refused."""
    model = graph_of(checkpoint, "heads", "magicleap")
    half = numpy_helper.from_array(np.float32(0.5), "half")
    model.graph.initializer.append(half)
    model.graph.node.insert(0, onnx.helper.make_node("Mul", ["image", "half"], ["scaled"], name="scaled"))
    convolutions(model)["conv1a"].input[0] = "scaled"
    assert kept_layers(model) == ["conv1a"]
    with pytest.raises(SuperPointError, match=r"conv1a reads scaled, not image; int8 .* --first-convolution fp16"):
        quantize(model, ranges_of(model), QuantizeOptions(first_convolution=FirstConvolution.PARTS))
    with pytest.raises(SuperPointError, match="conv1a reads scaled"):
        split_image(model, ranges_of(model), ["conv1a"])


# ---------------------------------------------------------------------------------------------------- the coarse layers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["v6", "magicleap"])
def test_coarse_layers_are_those_behind_the_last_pooling(checkpoint, layout, kind):
    """Of any type: suppression's pools come behind, and count for nothing."""
    model = graph_of(checkpoint, kind, layout)
    coarse = ["conv4a", "conv4b", "convPa", "convPb", "convDa", "convDb"]
    assert sorted(kept_layers(model, QuantizeOptions(keep_fp16=(COARSE,)))) == sorted(coarse)
    assert sorted(
        kept_layers(
            model,
            QuantizeOptions(
                keep_fp16=(
                    COARSE,
                    "conv1b",
                )
            ),
        )
    ) == sorted(["conv1b", *coarse])


def test_without_pooling_no_layer_is_coarse(checkpoint):
    model = graph_of(checkpoint, "heads", "magicleap")
    pools = [node for node in model.graph.node if node.op_type == "MaxPool"]
    for node in pools:
        node.op_type = "AveragePool"
    assert len(kept_layers(model, QuantizeOptions(keep_fp16=(COARSE,)))) == 6, "any pooling counts"
    for node in pools:
        del node.attribute[:]
    assert kept_layers(model, QuantizeOptions(keep_fp16=(COARSE,))) == []


# ------------------------------------------------------------------------------------------------- what TensorRT builds


@pytest.mark.parametrize(
    ("keep", "layout", "precision", "kind", "dynamic"),
    cases(
        ["convPb", COARSE],
        ["v6", "magicleap"],
        ["int8", "fp8"],
        KINDS,
        [False, True],
        fast=lambda keep, layout, precision, kind, dynamic: (
            (keep == COARSE and layout == "magicleap" and dynamic is (kind == "dense"))
            or (kind == "heads" and precision == "int8" and not dynamic)
        ),
    ),
)
def test_tensorrt_rtx_builds_every_type(checkpoint_file, tmp_path, keep, layout, precision, kind, dynamic):
    """For SM89, no GPU needed; the parser refuses Q/DQ that it cannot take, and then nothing is built."""
    pytest.importorskip("tensorrt_rtx")
    options = ExportOptions(OutputType(kind), dynamic=dynamic, height_px=96, width_px=128)
    model = export(checkpoint_file(layout), tmp_path / "a.onnx", options)
    (tmp_path / "ranges.json").write_bytes(ranges_of(load_onnx(model)).to_json())
    shapes = {"min_shape_hw": (64, 64), "max_shape_hw": (128, 128)} if dynamic else {}
    built = build(
        model,
        tmp_path / "a.engine",
        BuildOptions(
            Precision(precision),
            runtime=Flavor.RTX,
            targets=("sm89",),
            calibration=tmp_path / "ranges.json",
            keep_fp16=(keep,),
            **shapes,
        ),
    )
    assert built.description.precision is Precision(precision)
    first = "parts" if precision == "int8" else "fp16"
    kept = "convPb" if keep == "convPb" else "conv4a conv4b convPa convPb convDa convDb"
    assert built.description.kept_layers == (kept if first == "parts" else f"conv1a {kept}")
    assert built.description.first_convolution == first


@pytest.mark.parametrize(
    ("kind", "keep", "dynamic", "height"),
    cases(
        KINDS,
        [COARSE, "patches"],
        [False, True],
        [96, 104],
        fast=lambda kind, keep, dynamic, height: keep == COARSE and dynamic is (kind == "heads") is (height == 96),
    ),
)
def test_tensorrt_rtx_builds_networks_with_a_topology(checkpoint_file, tmp_path, kind, keep, dynamic, height):
    pytest.importorskip("tensorrt_rtx")
    options = ExportOptions(OutputType(kind), dynamic=dynamic, height_px=height, width_px=128)
    model = export(checkpoint_file("compact"), tmp_path / "a.onnx", options)
    (tmp_path / "ranges.json").write_bytes(ranges_of(load_onnx(model)).to_json())
    shapes = {"min_shape_hw": (64, 64), "max_shape_hw": (128, 128)} if dynamic else {}
    how = BuildOptions(
        Precision.INT8, runtime=Flavor.RTX, targets=("sm89",), calibration=tmp_path / "ranges.json", keep_fp16=(keep,),
        **shapes,
    )  # fmt: skip
    built = build(model, tmp_path / "a.engine", how)
    assert built.description.precision is Precision.INT8 and built.description.descriptor_dim == 64
    assert built.description.kept_layers.split() == (HEADS if keep == COARSE else ["patches"])


@pytest.mark.parametrize(("first", "behind_pairs"), [("parts", 12), ("fp16", 11)])
def test_the_built_network_reads_int8(checkpoint_file, tmp_path, first, behind_pairs):
    """TensorRT's parser on the graph that is built: the convolutions behind int8 pairs, everything else fp16."""
    pytest.importorskip("tensorrt_rtx")
    tensorrt = tensorrt_api.load(Flavor.RTX)
    module = tensorrt.module
    builder = module.Builder(tensorrt.logger)
    network = tensorrt.create_network(builder)
    parser = module.OnnxParser(network, tensorrt.logger)
    model = load_onnx(export(checkpoint_file("magicleap"), tmp_path / "a.onnx", ExportOptions(OutputType.HEADS)))
    typed = to_precision(
        quantize(model, ranges_of(model), QuantizeOptions(first_convolution=FirstConvolution(first))), Precision.FP16
    )
    assert parser.parse(typed.SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    into = {layer.get_output(0).name: layer for layer in layers}
    dequantized = 0
    for layer in layers:
        if layer.type == module.LayerType.CONVOLUTION:
            source = into.get(layer.get_input(0).name)
            if source is not None and source.type == module.LayerType.DEQUANTIZE:
                assert source.get_input(0).dtype == module.int8
                dequantized += 1
    assert dequantized == behind_pairs


# ----------------------------------------------------------------------------------------------------- what 8.6 is told


class Layer(enum.Enum):
    CONSTANT, SHAPE, CAST, QUANTIZE, DEQUANTIZE, CONVOLUTION, OTHER = range(7)


class FakeLayer:
    """As much of TensorRT 8.6's ILayer as the constraints touch."""

    def __init__(self, node: onnx.NodeProto, types: dict[str, str]) -> None:
        self.name = node.output[0]
        kinds = {"Conv": "CONVOLUTION", "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE"}
        self.type = Layer[
            kinds.get(node.op_type, node.op_type.upper() if node.op_type in ("Cast", "Shape") else "OTHER")
        ]
        self.inputs = [SimpleNamespace(name=n, dtype=types.get(n, "float32")) for n in node.input]
        self.outputs = [SimpleNamespace(name=n, dtype=types.get(n, "float32")) for n in node.output]
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)
        self.precision = None
        self.output_type = None

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]

    def set_output_type(self, index, dtype):
        self.output_type = dtype


def constrained(model: onnx.ModelProto) -> tuple[dict[str, FakeLayer], dict[str, str]]:
    """Layers by name, and the types of the outputs, as `_constrain_types` leaves them."""
    layers = [FakeLayer(node, {}) for node in model.graph.node]
    outputs = [SimpleNamespace(name=value.name, dtype="float32") for value in model.graph.output]
    network = SimpleNamespace(
        num_layers=len(layers),
        get_layer=layers.__getitem__,
        num_outputs=len(outputs),
        get_output=outputs.__getitem__,
    )
    tensorrt_api = SimpleNamespace(LayerType=Layer, float32="float32", float16="float16")
    constrain_types(tensorrt_api, network, model)
    return {layer.name: layer for layer in layers}, {output.name: output.dtype for output in outputs}


def test_tensorrt_8_is_told_nothing_about_quantized_convolutions(checkpoint):
    model = graph_of(checkpoint, "dense", "magicleap")
    layers, outputs = constrained(quantize(model, ranges_of(model), QuantizeOptions(keep_fp16=("conv3b",))))
    assert {name for name, layer in layers.items() if layer.precision == "float16"} == {"conv3b"}
    free = [name for name, layer in layers.items() if layer.precision is None]
    assert set(convolutions(model)) - {"conv3b"} <= set(free)
    assert layers[PARTS].precision == "float32", "so are the parts: fp16 has too few digits for them"
    assert layers["cell_probabilities"].precision == "float32", "softmax stays fp32"
    assert outputs == {"scores": "float32", "descriptors": "float32"}


def test_tensorrt_8_computes_the_coarse_layers_in_fp16(checkpoint):
    """conv4a reads what int8 hands over, and is left alone for all that."""
    model = graph_of(checkpoint, "heads", "magicleap")
    layers, outputs = constrained(quantize(model, ranges_of(model), QuantizeOptions(keep_fp16=(COARSE,))))
    in_fp16 = {name for name, layer in layers.items() if layer.precision == "float16"}
    assert in_fp16 == {"conv4a", "conv4b", "convPa", "logits", "convDa", "coarse_descriptors"}
    assert layers["conv3b.relu"].precision is None and layers["conv3b.pool"].precision is None
    assert outputs == {"logits": "float16", "coarse_descriptors": "float16"}


def test_tensorrt_8_chooses_the_type_of_a_sum_between_quantized_convolutions(checkpoint):
    """Fp32 it is told of none: the sum would be computed at half the speed, between two conversions."""
    model = graph_of(checkpoint, "heads", "compact")
    for keep in ((COARSE,), ()):
        layers, _ = constrained(quantize(model, ranges_of(model), QuantizeOptions(keep_fp16=keep)))
        free = {name for name, layer in layers.items() if layer.precision is None}
        assert {"features.sum", "features.repeated", "detector_hidden.inputs", "features"} <= free
        in_fp16 = {name for name, layer in layers.items() if layer.precision == "float16"}
        assert in_fp16 == ({"detector_hidden", "logits", "descriptor_hidden", "coarse_descriptors"} if keep else set())


def test_tensorrt_8_computes_a_kept_first_convolution_in_fp16(checkpoint):
    model = graph_of(checkpoint, "dense", "magicleap")
    layers, _ = constrained(quantize(model, ranges_of(model), QuantizeOptions(keep_fp16=("conv1a",))))
    assert {name for name, layer in layers.items() if layer.precision == "float16"} == {"conv1a"}


def test_tensorrt_8_gives_raw_heads_in_fp16(checkpoint):
    model = graph_of(checkpoint, "heads", "magicleap")
    _, outputs = constrained(quantize(model, ranges_of(model)))
    assert outputs == {"logits": "float16", "coarse_descriptors": "float16"}


def test_tensorrt_8_gets_fp16_as_before(checkpoint):
    layers, _ = constrained(to_precision(graph_of(checkpoint, "heads", "v6"), Precision.FP16))
    assert {layer.precision for layer in layers.values() if layer.type is not Layer.CAST} == {"float16"}
