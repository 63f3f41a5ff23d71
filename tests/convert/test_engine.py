"""Engines built by the real TensorRT-RTX, without a GPU: every kind of model, and what is refused in which words."""

from __future__ import annotations

import json
import shlex

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import photograph
from helpers import cases, foreign
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.cast import to_precision
from superpoint_trt.convert.engine import BuildOptions, _leave_channels_last, _plan_name, build
from superpoint_trt.convert.engine_trt86 import shift_windows
from superpoint_trt.convert.export import export, to_onnx
from superpoint_trt.convert.export_options import NEWEST_OPSET, ExportOptions
from superpoint_trt.core.types import DecodeOptions, OutputType, Precision, ShapeRange, SuperPointError
from superpoint_trt.gpu import tensorrt_api
from superpoint_trt.gpu.engine_file import EngineMetadata, check_runs_here, read_plan, sidecar
from superpoint_trt.gpu.tensorrt_api import Flavor

pytest.importorskip("tensorrt_rtx")

RTX = {"runtime": Flavor.RTX, "targets": ("sm89",)}


@pytest.fixture(scope="session")
def model_file(checkpoint_file, tmp_path_factory):
    """(type, layout, opset, dynamic, ...) -> an exported .onnx; the same arguments give the same file."""
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def get(kind="dense", layout="v6", opset=17, dynamic=False, batch=1, **options):
        key = (kind, layout, opset, dynamic, batch, *options.items())
        if key not in made:
            settings = ExportOptions(OutputType(kind), opset=opset, dynamic=dynamic, max_batch_size=batch, **options)
            made[key] = export(checkpoint_file(layout), folder / f"{len(made)}.onnx", settings)
        return made[key]

    return get


def one_axis_at_a_time(kind, precision, dynamic, opset):
    """Every type in fp16, static and dynamic; every precision; every opset of the largest graph."""
    usual = (precision == "fp16") + (not dynamic) + (opset == 17)
    return usual >= 2 and (kind == "keypoints" or opset == 17) and (kind != "dense" or precision != "fp32")


@pytest.mark.parametrize(
    ("kind", "precision", "dynamic", "opset"),
    cases(
        ["dense", "keypoints", "heads"],
        ["fp32", "tf32", "fp16", "bf16"],
        [False, True],
        [11, 13, 16, 17, 20, NEWEST_OPSET],
        fast=one_axis_at_a_time,
    ),
)
def test_everything_builds(model_file, tmp_path, kind, precision, dynamic, opset):
    source = model_file(kind, "v6" if opset % 2 else "magicleap", opset, dynamic)
    metadata = build(source, tmp_path / "a.engine", BuildOptions(Precision(precision), **RTX))
    plan, beside = read_plan(tmp_path / "a.engine")
    assert beside == metadata and tensorrt_api.flavor_of(plan) is Flavor.RTX and len(plan) > 10_000
    described = onnx.load(source)
    assert metadata.description.type is OutputType(kind)
    assert metadata.description.precision is Precision(precision)
    sha = {p.key: p.value for p in described.metadata_props}["superpoint_trt.checkpoint_sha256"]
    assert metadata.description.checkpoint_sha256 == sha
    low, high = ((240, 320), (960, 1280)) if dynamic else ((480, 640), (480, 640))
    assert metadata.profile == ShapeRange((1, *low), (1, 480, 640), (1, *high))
    assert metadata.description.dynamic is dynamic
    assert (metadata.targets, metadata.gpu_name) == (("sm89",), None)


@pytest.mark.parametrize(
    ("kind", "precision", "dynamic", "opset", "height"),
    cases(
        ["dense", "keypoints", "heads"],
        ["fp32", "fp16", "bf16"],
        [False, True],
        [11, 13, 17, NEWEST_OPSET],
        [480, 488],
        fast=lambda kind, precision, dynamic, opset, height: (
            (precision == "fp16" and dynamic is (height == 480) and opset == 17)
            or (kind == "heads" and precision == "fp16" and height == 488)
        ),
    ),
)
def test_networks_with_a_topology_build(model_file, tmp_path, kind, precision, dynamic, opset, height):
    """480 is 60 rows of cells, 488 is 61: an odd number, where the branch at 1/16 is cut."""
    source = model_file(kind, "compact", opset, dynamic, height_px=height)
    shapes = {"min_shape_hw": (64, 64), "max_shape_hw": (488, 648)} if dynamic else {}
    metadata = build(source, tmp_path / "a.engine", BuildOptions(Precision(precision), **shapes, **RTX))
    assert (metadata.description.descriptor_dim, metadata.description.stride_px) == (64, 8)
    assert metadata.description.precision is Precision(precision)


@pytest.mark.parametrize(
    ("layout", "kind"),
    cases(
        ["packaged", "compact", "real-v6"],
        ["dense", "keypoints", "heads"],
        fast=lambda layout, kind: layout != "real-v6",
    ),
)
def test_the_network_has_the_types_of_the_graph(model_file, layout, kind):
    """What TensorRT's own parser makes of the typed graph: fp16 convolutions, three casts, nothing else fp16."""
    tensorrt = tensorrt_api.load(Flavor.RTX)
    module = tensorrt.module
    builder = module.Builder(tensorrt.logger)
    network = tensorrt.create_network(builder)
    parser = module.OnnxParser(network, tensorrt.logger)
    model = to_precision(onnx.load(model_file(kind, layout)), Precision.FP16)
    assert parser.parse(model.SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    half = {layer.name for layer in layers if layer.get_output(0).dtype == module.float16}
    convolutions = [layer for layer in layers if layer.type == module.LayerType.CONVOLUTION]
    assert len(convolutions) == 12
    for layer in convolutions:
        assert [layer.get_input(0).dtype, layer.get_output(0).dtype] == [module.float16, module.float16]
    for kind_ in (module.LayerType.SOFTMAX, module.LayerType.REDUCE, module.LayerType.TOPK):
        assert not half & {layer.name for layer in layers if layer.type == kind_}
    casts = [
        layer.name
        for layer in layers
        if layer.type == module.LayerType.CAST
        and {layer.get_input(0).dtype, layer.get_output(0).dtype} == {module.float16, module.float32}
    ]
    assert len(casts) == (1 if kind == "heads" else 3), casts


@pytest.mark.parametrize(
    ("kind", "precision", "dynamic", "linear", "expected"),
    [
        ("heads", "fp16", False, False, ["logits", "coarse_descriptors"]),
        ("heads", "fp16", True, False, ["logits", "coarse_descriptors"]),
        ("heads", "fp16", False, True, []),
        ("heads", "fp32", False, False, []),
        ("dense", "fp16", False, False, []),
    ],
)
@pytest.mark.parametrize("layout", cases(["packaged", "real-v6"], fast=lambda layout: layout == "packaged"))
def test_fp16_heads_stay_channels_last(
    model_file, tmp_path, monkeypatch, capsys, kind, precision, dynamic, linear, expected, layout
):
    """What the network asks for; what an engine says of itself needs a GPU: tests/gpu/test_lanes.py."""
    asked = {}

    def noted(tensorrt, network):
        found = _leave_channels_last(tensorrt, network)
        outputs = [network.get_output(index) for index in range(network.num_outputs)]
        asked.update({output.name: output.allowed_formats for output in outputs})
        return found

    monkeypatch.setattr("superpoint_trt.convert.engine._leave_channels_last", noted)
    options = BuildOptions(Precision(precision), linear_heads=linear, **RTX)
    metadata = build(model_file(kind, layout, dynamic=dynamic), tmp_path / "a.engine", options)
    only = 1 << int(tensorrt_api.load(Flavor.RTX).module.TensorFormat.HWC8)
    assert [name for name, formats in asked.items() if formats == only] == expected == metadata.build["channels_last"]
    assert ("--linear-heads" in metadata.rebuild) is linear
    assert run(cli, ["info", str(tmp_path / "a.engine")]) == 0
    assert ("logits, coarse_descriptors" in capsys.readouterr().out) is bool(expected)


def test_other_tools_models_build(checkpoint, tmp_path):
    model = foreign(to_onnx(checkpoint("magicleap"), ExportOptions(OutputType.DENSE)))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    metadata = build(tmp_path / "a.onnx", tmp_path / "a.engine", BuildOptions(Precision.FP16, **RTX))
    assert metadata.description.type is OutputType.DENSE
    assert metadata.description.precision is Precision.FP16
    assert metadata.description.checkpoint_sha256 is None


def test_an_already_typed_model_is_taken_as_it_is(model_file, tmp_path):
    typed = tmp_path / "typed.onnx"
    typed.write_bytes(to_precision(onnx.load(model_file()), Precision.FP16).SerializeToString())
    build(typed, tmp_path / "a.engine", BuildOptions(Precision.FP16, **RTX))
    with pytest.raises(SuperPointError, match="is already fp16, but bf16 was asked for; use --precision fp16"):
        build(typed, tmp_path / "b.engine", BuildOptions(Precision.BF16, **RTX))


def test_shapes_batches_and_several_targets(model_file, tmp_path):
    options = BuildOptions(
        min_shape_hw=(64, 64), opt_shape_hw=(240, 320), max_shape_hw=(320, 320), max_batch_size=4,
        runtime=Flavor.RTX, targets=("sm86", "sm120"),
    )  # fmt: skip
    metadata = build(model_file(dynamic=True), tmp_path / "a.engine", options)
    assert metadata.profile == ShapeRange((1, 64, 64), (4, 240, 320), (4, 320, 320))
    assert metadata.targets == ("sm86", "sm120")
    assert str(metadata.profile) == "64x64 to 320x320 px, batch 1 to 4"
    static = build(model_file("keypoints", batch=3), tmp_path / "b.engine", BuildOptions(**RTX))
    assert static.profile == ShapeRange((1, 480, 640), (3, 480, 640), (3, 480, 640))


def test_the_rebuild_command_rebuilds(model_file, tmp_path):
    options = BuildOptions(Precision.FP16, 2.0, (240, 320), None, (480, 640), 2, optimization_level=2, **RTX)
    metadata = build(model_file(dynamic=True), tmp_path / "a.engine", options)
    before = json.loads(sidecar(tmp_path / "a.engine").read_text())
    program, *words = shlex.split(metadata.rebuild)
    assert program == "superpoint" and run(cli, words) == 0
    after = json.loads(sidecar(tmp_path / "a.engine").read_text())
    same = ("description", "profile", "targets", "rebuild", "onnx_sha256", "flavour", "tensorrt_version")
    assert {key: before[key] for key in same} == {key: after[key] for key in same}


def test_progress_comes_from_the_builder(model_file, tmp_path):
    told = []
    build(model_file(), tmp_path / "a.engine", BuildOptions(**RTX), lambda *report: told.append(report))
    assert len(told) > 3
    assert all(isinstance(phase, str) and 0 < done <= steps for phase, done, steps in told)


@pytest.mark.parametrize("radius", cases([1, 4, 8, 9], fast=lambda radius: radius in (4, 9)))
def test_the_form_for_tensorrt_8_finds_the_same(model_file, radius):
    """Run in onnxruntime; on the GPU tests/gpu hold it against PyTorch."""
    source = onnx.load(model_file("keypoints", "packaged", decode=DecodeOptions(nms_radius_px=radius)))
    shifted = shift_windows(source)
    pools = [node for node in shifted.graph.node if node.op_type == "MaxPool" and "pool_" in node.name]
    assert len(pools) == (10 if radius == 9 else 0)
    onnx.checker.check_model(shifted, full_check=True)
    image = (photograph(480, 640).astype(np.float32) / 255)[None, None]
    one, other = (
        onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"image": image})
        for model in (source, shifted)
    )
    assert one[3] > 100
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


def test_other_models_keep_their_form_for_tensorrt_8(model_file, checkpoint):
    for kind, dynamic in (("dense", False), ("heads", False), ("keypoints", True)):
        source = onnx.load(model_file(kind, dynamic=dynamic))
        assert shift_windows(source) is source
    theirs = foreign(to_onnx(checkpoint("magicleap"), ExportOptions(OutputType.KEYPOINTS)))
    assert shift_windows(theirs) is theirs


# ------------------------------------------------------------------------------------------------------------- refused

GIB_TOO_SMALL = 0.01


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ({}, {"min_shape_hw": (240, 320)}, "takes 480x640 .HxW. only.*--dynamic"),
        ({}, {"max_batch_size": 2}, "takes 1 only; export it with --max-batch-size 2"),
        ({}, {"precision": Precision.INT8}, "int8 needs ranges measured on images: give --calibration-images FOLDER"),
        ({}, {"keep_fp16": ("conv*",)}, "for int8 and fp8, but fp32 was asked for"),
        ({"dynamic": True}, {"min_shape_hw": (244, 320)}, "--min-shape is 244x320.*multiples of 8, 248x320 say"),
        ({"dynamic": True}, {"opt_shape_hw": (200, 320)}, "240x320 over 200x320 to 960x1280.*min <= opt <= max"),
        ({"dynamic": True}, {"workspace_gib": GIB_TOO_SMALL}, "TensorRT-RTX 1.7.*OutOfMemory.*--workspace"),
        ({"kind": "keypoints", "max_keypoints": 4000}, {}, "4000 keypoints.*TopK takes 3840 at most"),
        ({}, {"timing_cache": "cache"}, "leave out --timing-cache"),
        ({}, {"targets": ()}, "no GPU to build for.*--target sm86,sm89"),
    ],
)
def test_what_cannot_be_built_is_refused_in_words(model_file, tmp_path, model, options, says):
    target = tmp_path / "a.engine"
    target.write_bytes(b"precious")
    with pytest.raises(SuperPointError, match=says):
        build(model_file(**model), target, BuildOptions(**{**RTX, **options}))
    assert target.read_bytes() == b"precious" and not sidecar(target).exists()


def test_nothing_is_written_where_the_json_cannot_be(model_file, tmp_path):
    sidecar(tmp_path / "a.engine").mkdir()
    with pytest.raises(SuperPointError, match=r"a\.engine\.json is a folder"):
        build(model_file(), tmp_path / "a.engine", BuildOptions(**RTX))
    assert not (tmp_path / "a.engine").exists()


def test_a_model_that_is_no_superpoint_is_refused_before_the_build(tmp_path, monkeypatch):
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 64, 64])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 4, 64, 64])
    weights = numpy_helper.from_array(np.ones((4, 1, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["image", "w"], ["out"], pads=[1] * 4)
    graph = helper.make_graph([node], "g", [image], [out], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    monkeypatch.setattr("superpoint_trt.convert.engine.EngineBuilder", None)
    with pytest.raises(SuperPointError, match=r"other\.onnx is not one of this project's models.*out\[1, 4, 64, 64\]"):
        build(tmp_path / "other.onnx", tmp_path / "a.engine", BuildOptions(**RTX))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"workspace_gib": 0.0}, "more than 0"),
        ({"workspace_gib": float("nan")}, "more than 0"),
        ({"optimization_level": 6}, "0 to 5"),
        ({"max_batch_size": 0}, "1 or more"),
        ({"targets": ("sm90",)}, "'sm90' is unknown.*sm89"),
    ],
)
def test_options_out_of_range(options, says):
    with pytest.raises(SuperPointError, match=says):
        BuildOptions(**options)


def test_what_the_parser_refuses_carries_its_words(model_file, tmp_path):
    model = onnx.load(model_file())
    model.graph.node[5].op_type = "NoSuchOperator"
    model.graph.node[5].domain = "nobody's"  # ONNX's checker knows its own domains only
    model.opset_import.add(domain="nobody's", version=1)
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SuperPointError, match=r"TensorRT-RTX 1\.7.*NoSuchOperator"):
        build(tmp_path / "a.onnx", tmp_path / "a.engine", BuildOptions(**RTX))


def test_weights_that_do_not_fit_carry_tensorrts_words(model_file, tmp_path):
    model = onnx.load(model_file())
    weight = next(w for w in model.graph.initializer if w.name == "conv2a.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, :-1], weight.name))
    (tmp_path / "a.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(SuperPointError, match=r"building .* failed: TensorRT-RTX 1\.7.*conv2a"):
        build(tmp_path / "a.onnx", tmp_path / "a.engine", BuildOptions(**RTX))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--engine a.onnx", "ends in one of .engine, .trt, .plan"),
        ("--engine a.engine --precision int4", "int4"),
        ("--engine a.engine --min-shape 240", "HEIGHTxWIDTH"),
        (
            "--engine a.engine --runtime tensorrt",
            "TensorRT is not installed here: pip install '.[tensorrt]' (in your clone of superpoint-trt).",
        ),
        ("--engine nowhere/a.engine", "does not exist"),
        ("--engine a.engine --runtime rtx", "--target"),
    ],
)
def test_the_command_says_one_line(model_file, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert run(cli, ["build", "--onnx", str(model_file()), *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x08\x08\x12\x00"])
def test_no_onnx(tmp_path, content):
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(SuperPointError, match=r"a\.onnx"):
        build(tmp_path / "a.onnx", tmp_path / "a.engine", BuildOptions(**RTX))


# ------------------------------------------------------------------------------------------ the plan and what is beside


@pytest.fixture
def built(model_file, tmp_path):
    build(model_file("heads"), tmp_path / "a.engine", BuildOptions(Precision.FP16, **RTX))
    return tmp_path / "a.engine"


def test_info_reads_the_json_anywhere(built, capsys):
    assert run(cli, ["info", str(built)]) == 0
    told = capsys.readouterr().out
    for words in ("heads outputs, fp16", "640x480 px, batch 1", "rtx 1.7.1.116, sm89", "superpoint build --onnx"):
        assert words in told
    sidecar(built).unlink()
    assert run(cli, ["info", str(built)]) == 0
    assert "rtx engine without a .json" in capsys.readouterr().out
    built.write_bytes(b"\x7fELF" + bytes(100))
    assert run(cli, ["info", str(built)]) == 2
    assert "is not a TensorRT engine" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.9999])
def test_a_truncated_plan_is_one_line(built, share, capsys):
    whole = built.read_bytes()
    built.write_bytes(whole[: int(len(whole) * share)])
    assert run(cli, ["info", str(built)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cut short, or replaced" in line and "superpoint build --onnx" in line


def test_truncated_without_a_json_carries_tensorrts_words(built):
    """The runtime itself refuses it, before it looks for a GPU."""
    tensorrt = tensorrt_api.load(Flavor.RTX)
    plan = built.read_bytes()
    for wrong in (plan[:-100], b"ftrt" + plan[4:], b"garbage" * 100):
        with tensorrt.explaining("loading failed") as log:
            assert tensorrt.module.Runtime(tensorrt.logger).deserialize_cuda_engine(wrong) is None
            told = str(log.failed())
        assert "loading failed: TensorRT-RTX 1.7.1.116 says: " in told
        assert "copy or build it again" in told or "build it here again" in told


@pytest.mark.parametrize("spoil", [b"{", b"[]", b'{"format": 99}', b"\xff\xfe"])
def test_a_broken_json_is_refused_with_both_remedies(built, spoil):
    sidecar(built).write_bytes(spoil)
    with pytest.raises(SuperPointError, match=r"build the engine again, or remove the \.json"):
        read_plan(built)


def test_what_was_made_elsewhere_is_refused_with_the_command(built):
    _, metadata = read_plan(built)
    assert isinstance(metadata, EngineMetadata)
    check_runs_here(metadata, built, Flavor.RTX, "1.7.1.116", "sm89")
    for here, told in (
        ((Flavor.TENSORRT, "10.3.0", "sm89"), "was built by rtx 1.7.1.116, here is tensorrt 10.3.0"),
        ((Flavor.RTX, "1.8.0", "sm89"), "here is rtx 1.8.0"),
        ((Flavor.RTX, "1.7.1.116", "sm86"), "was built for sm89, this GPU is sm86"),
    ):
        with pytest.raises(SuperPointError, match=told) as caught:
            check_runs_here(metadata, built, *here)
        assert metadata.rebuild in str(caught.value)


def test_an_engine_without_a_gpu_says_so(built, capsys, tmp_path):
    """This machine has none; on one with a GPU tests/gpu look further."""
    import cv2

    from superpoint_trt.gpu import cuda

    try:
        cuda.current_device()
    except SuperPointError:
        pass
    else:
        pytest.skip("there is a GPU here")
    cv2.imwrite(str(tmp_path / "a.png"), photograph(480, 640))
    assert run(cli, ["infer", "--model", str(built), "--image", str(tmp_path / "a.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "driver" in line and (".onnx" if cuda.driver() is None else "nvidia-smi") in line


def test_the_model_describes_itself_inside_the_plan(model_file):
    """The .json may get lost; the network's name says the same."""
    model = onnx.load(model_file("keypoints"))
    inside = json.loads(_plan_name(model))
    assert inside["superpoint_trt.type"] == "keypoints" and inside["superpoint_trt.max_keypoints"] == "1024"
