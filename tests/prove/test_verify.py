"""`verify` on sound models, and on models with one planted fault each, which it must find by name."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import cv2
import numpy as np
import onnx
import pytest
from conftest import photograph
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.descriptor_map import DescriptorMap
from superpoint_trt.convert.export import ExportOptions, export, to_onnx
from superpoint_trt.core.files import file_sha256, sha256
from superpoint_trt.core.image import find_images
from superpoint_trt.core.types import DecodeOptions, ModelDescription, OutputType, Sampling, SuperPointError
from superpoint_trt.prove.comparison import Comparison
from superpoint_trt.prove.gates import GATE_NAMES
from superpoint_trt.prove.references import open_reference
from superpoint_trt.prove.verify import _notes, verify
from superpoint_trt.run.extractor import SuperPoint

HEIGHT, WIDTH = 120, 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three photographs."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "coffee", "chelsea"):
        cv2.imwrite(str(folder / f"{name}.png"), photograph(HEIGHT, WIDTH, name))
    return folder


class Bench:
    """Builds a model of a checkpoint, breaks it, verifies it against that checkpoint."""

    def __init__(self, weights, folder, tmp_path):
        self.weights, self.folder, self.path = weights, folder, tmp_path / "m.onnx"

    def verify(self, kind=OutputType.KEYPOINTS, fault=None, sampling=None, limits=None, **options):
        loaded = layouts.load(self.weights, sampling)
        settings = ExportOptions(kind, HEIGHT, WIDTH, max_keypoints=400, **options)
        model = to_onnx(loaded, settings)
        if fault:
            fault(model)
            onnx.checker.check_model(model, full_check=False)
        self.path.write_bytes(model.SerializeToString())
        return verify(self.path, self.weights, find_images(self.folder), limits)


@pytest.fixture(params=["v6", pytest.param("packaged", marks=pytest.mark.exhaustive)])
def bench(request, checkpoint_file, folder, tmp_path):
    return Bench(checkpoint_file(request.param), folder, tmp_path)


def node(model, output):
    return next(n for n in model.graph.node if output in n.output)


def insert_after(model, output, *nodes):
    """Lets everything that reads `output` read `output + "_faulty"`, which the new nodes make of it."""
    for reader in model.graph.node:
        reader.input[:] = [f"{output}_faulty" if name == output else name for name in reader.input]
    at = list(model.graph.node).index(node(model, output)) + 1
    for offset, new in enumerate(nodes):
        model.graph.node.insert(at + offset, new)


def constant(model, name, value):
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def shift_sampling(model):
    """Half a cell to the right and down, as a grid from corner to corner does it."""
    half = constant(model, "half_cell", np.float32(0.5))
    insert_after(model, "cell_xy", helper.make_node("Add", ["cell_xy", half], ["cell_xy_faulty"]))


def one_nan_score(model):
    """A single pixel of the score map, as an overflow in half precision leaves it."""
    spot = np.zeros((1, 1, HEIGHT, WIDTH), np.float32)
    spot[..., 50, 70] = np.nan
    name = constant(model, "one_nan", spot)
    insert_after(model, "score_map", helper.make_node("Add", ["score_map", name], ["score_map_faulty"]))


def nan_descriptors(model):
    """Those of the lower half only."""
    half = np.zeros((1, 1, HEIGHT // 8, WIDTH // 8), np.float32)
    half[..., HEIGHT // 16 :, :] = np.nan
    name = constant(model, "half_nan", half)
    insert_after(model, "convDb", helper.make_node("Add", ["convDb", name], ["convDb_faulty"]))


def keep_border(model):
    """The graph clears nothing; its metadata says that it does."""
    for mask in model.graph.initializer:
        if mask.name in ("inside_2", "inside_3"):
            mask.CopyFrom(numpy_helper.from_array(np.ones_like(numpy_helper.to_array(mask)), mask.name))


def drop_dustbin(model):
    softmax = node(model, "cell_probabilities")
    bounds = [constant(model, n, np.array([v], np.int64)) for n, v in (("s0", 0), ("s64", 64), ("s3", 3))]
    cut = helper.make_node("Slice", [softmax.input[0], *bounds], ["without_dustbin"])
    model.graph.node.insert(list(model.graph.node).index(softmax), cut)
    softmax.input[0] = "without_dustbin"


def transpose_cells(model):
    """Rows and columns of each cell change places."""
    unfolded = node(model, "score_map").input[0]
    (order,) = node(model, unfolded).attribute
    assert list(order.ints) == [0, 1, 3, 2, 4]
    order.ints[:] = [0, 1, 4, 2, 3]


def halve_indices(model):
    insert_after(
        model,
        "pixel_index",
        helper.make_node("Cast", ["pixel_index"], ["pixel_index_16"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["pixel_index_16"], ["pixel_index_faulty"], to=TensorProto.INT64),
    )


@pytest.mark.parametrize("kind", OutputType)
def test_a_sound_model_passes(kind, bench):
    result = bench.verify(kind)
    assert result.passed, [gate for gate in result.gates if not gate.passed]
    assert result.findings == []
    assert result.images[0].reference_keypoints > 20
    found = {gate.name: gate.value for gate in result.gates}
    assert found["keypoints_found_share"] == 1.0
    assert found["score_error_max"] < 1e-4
    assert 0.98 < found["matches_kept_share"] < 1.02


def test_heads_are_held_against_a_dense_references_scores(checkpoint_file, folder, tmp_path):
    """Its logits have no counterpart there; the scores that follow from them have."""
    loaded = layouts.load(checkpoint_file("v6"))
    dense, heads = tmp_path / "dense.onnx", tmp_path / "heads.onnx"
    dense.write_bytes(to_onnx(loaded, ExportOptions(OutputType.DENSE, HEIGHT, WIDTH)).SerializeToString())
    model = to_onnx(loaded, ExportOptions(OutputType.HEADS, HEIGHT, WIDTH))
    heads.write_bytes(model.SerializeToString())
    sound = {gate.name: gate.value for gate in verify(heads, dense, folder).gates}
    assert 0 <= sound["score_error_max"] < 1e-4
    bias = next(w for w in model.graph.initializer if w.name == "convPb.bias")
    louder = numpy_helper.to_array(bias).copy()
    louder[:-1] += 0.5  # against the dustbin
    bias.CopyFrom(numpy_helper.from_array(louder, bias.name))
    heads.write_bytes(model.SerializeToString())
    assert "score_error_max" in {gate.name for gate in verify(heads, dense, folder).gates if not gate.passed}


FAULTS = {
    "descriptor-sampling": (shift_sampling, {"descriptor_cosine_p1"}),
    "border": (keep_border, {"keypoints_found_share"}),
    "dustbin": (drop_dustbin, {"score_error_max"}),
    "cell-order": (transpose_cells, {"keypoints_found_share"}),
    "fp16-indices": (halve_indices, {"keypoints_found_share"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_name(name, bench):
    fault, gates = FAULTS[name]
    result = bench.verify(fault=fault)
    assert not result.passed
    assert [finding.name for finding in result.findings] == [name]
    failed = {gate.name for gate in result.gates if not gate.passed}
    assert failed >= gates | {"findings"}


@pytest.mark.parametrize("name", ["dustbin", "cell-order"])
@pytest.mark.parametrize("kind", [OutputType.DENSE])
def test_faults_of_dense_models_too(name, kind, bench):
    result = bench.verify(kind, fault=FAULTS[name][0])
    assert [finding.name for finding in result.findings] == [name]


@pytest.mark.parametrize(
    ("kind", "fault", "output"),
    [
        (OutputType.DENSE, one_nan_score, "scores"),
        (OutputType.DENSE, nan_descriptors, "descriptors"),
        (OutputType.KEYPOINTS, nan_descriptors, "descriptors"),
    ],
)
def test_values_that_are_not_finite_fail_and_are_named(kind, fault, output, bench):
    """A comparison with NaN is false either way, so that a limit alone would let it through."""
    result = bench.verify(kind, fault)
    assert not result.passed
    assert [finding.name for finding in result.findings] == ["not-finite"]
    assert output in result.findings[0].detail
    assert result.outputs[output].max == np.finfo(np.float32).max
    json.dumps(result.to_json(), allow_nan=False)


def test_nan_in_one_image_of_many_is_no_minority(checkpoint_file, folder, tmp_path):
    """A model that breaks on the one image with a white pixel, as an overflow does."""

    def overflow(model):
        top = helper.make_node("ReduceMax", ["image"], ["brightest"], keepdims=0)
        one = constant(model, "one", np.float32(1))
        zero, bad = constant(model, "zero", np.float32(0)), constant(model, "bad", np.float32(np.nan))
        bright = helper.make_node("Equal", ["brightest", one], ["bright"])
        model.graph.node.insert(0, top)
        model.graph.node.insert(1, bright)
        model.graph.node.insert(2, helper.make_node("Where", ["bright", bad, zero], ["spoilt"]))
        insert_after(model, "convDb", helper.make_node("Add", ["convDb", "spoilt"], ["convDb_faulty"]))

    for name in ("astronaut", "coffee", "chelsea", "page"):
        photo = np.minimum(photograph(HEIGHT, WIDTH, name), 254)
        photo[60, 80] = 255 if name == "page" else photo[60, 80]
        cv2.imwrite(str(tmp_path / f"{name}.png"), photo)
    result = Bench(checkpoint_file("v6"), tmp_path, tmp_path).verify(OutputType.DENSE, overflow)
    assert [finding.name for finding in result.findings] == ["not-finite"]
    assert "(1 of 4 images" in result.findings[0].detail
    assert not result.passed


def test_the_other_sampling_convention_is_named(bench):
    result = bench.verify(sampling=Sampling.LEGACY)
    assert "descriptor-sampling" in [finding.name for finding in result.findings]
    assert "legacy" in result.notes[0]


def test_a_reference_without_pytorch_says_that_it_is_not_independent(checkpoint_file, folder, tmp_path, monkeypatch):
    one = Bench(checkpoint_file("packaged"), folder, tmp_path)
    assert not any("independent" in note for note in one.verify(OutputType.DENSE).notes)
    monkeypatch.setattr("superpoint_trt.prove.references.util.find_spec", lambda name: None)
    note = one.verify(OutputType.DENSE).notes[-1]
    assert note.startswith(
        "without PyTorch the reference is this package's own export, run by onnxruntime; pip install"
    )
    assert "'.[torch]'" in note and note.endswith("makes it independent")


def test_indices_beyond_float16_are_named(checkpoint_file, folder, tmp_path):
    """Above 65,504 there is no float16 number left: points land outside the image."""

    class Large(Bench):
        def verify(self, **_):
            model = to_onnx(layouts.load(self.weights), ExportOptions(OutputType.KEYPOINTS, 480, 640))
            halve_indices(model)
            self.path.write_bytes(model.SerializeToString())
            return verify(self.path, self.weights, [large])

    large = tmp_path / "large.png"
    cv2.imwrite(str(large), photograph(480, 640))
    result = Large(checkpoint_file("v6"), folder, tmp_path).verify()
    assert not result.passed
    assert {"coordinates", "fp16-indices"} & {finding.name for finding in result.findings}


def test_all_failures_are_collected_and_limits_can_be_moved(bench):
    strict = {"score_error_max": -1.0, "matches_kept_share": 2.0}
    result = bench.verify(limits=strict)
    assert [gate.name for gate in result.gates if not gate.passed] == ["score_error_max", "matches_kept_share"]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"speed": 1.0}, "no gate is called 'speed'"),
        ({"": 1.0}, "no gate is called ''"),
        ({"findings": float("nan")}, "limit of gate findings is nan; expected a finite number"),
        ({"findings": float("inf")}, "limit of gate findings is inf; expected a finite number"),
    ],
)
def test_limits_that_nothing_can_keep_are_refused_before_the_work(limits, words, tmp_path):
    with pytest.raises(SuperPointError, match=words) as caught:
        verify(tmp_path / "no.onnx", tmp_path / "no.pth", tmp_path, limits)
    assert all(name in str(caught.value) for name in GATE_NAMES)


def test_faults_that_could_not_be_looked_for_are_not_zero(bench):
    """A model that keeps 15 points an image, one fewer than a diagnosis takes."""
    few = ExportOptions(OutputType.KEYPOINTS, HEIGHT, WIDTH, max_keypoints=15)
    bench.path.write_bytes(to_onnx(layouts.load(bench.weights), few).SerializeToString())
    result = verify(bench.path, bench.weights, bench.folder)
    gate = next(gate for gate in result.gates if gate.name == "findings")
    assert gate.value is None
    assert gate.passed
    assert "could not be looked for: the model finds fewer than 16 keypoints" in result.notes[0]
    found = {gate.name: gate.value for gate in bench.verify().gates}
    assert found["findings"] == 0.0


def test_an_onnx_may_be_the_reference(bench, tmp_path):
    bench.verify(OutputType.HEADS)
    reference = bench.path.rename(tmp_path / "reference.onnx")
    keypoints = ExportOptions(OutputType.KEYPOINTS, HEIGHT, WIDTH, max_keypoints=400)
    bench.path.write_bytes(to_onnx(layouts.load(bench.weights), keypoints).SerializeToString())
    assert verify(bench.path, reference, find_images(bench.folder)).passed
    with pytest.raises(SuperPointError, match="a reference is a checkpoint"):
        verify(bench.path, bench.path, find_images(bench.folder))


def test_the_report_as_json(bench):
    report = json.loads(json.dumps(bench.verify().to_json()))
    assert set(report) >= {"passed", "gates", "images"}
    assert set(report["gates"][0]) >= {"name", "value", "limit", "passed"}
    assert [image["name"] for image in report["images"]] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert report["outputs"]["descriptors"]["max"] < 1e-4


def test_blank_and_broken_images_do_not_stop_the_rest(checkpoint_file, folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    cv2.imwrite(str(tmp_path / "gray.png"), np.full((HEIGHT, WIDTH), 127, np.uint8))
    cv2.imwrite(str(tmp_path / "photo.png"), photograph(HEIGHT, WIDTH))
    bench = Bench(checkpoint_file("packaged"), tmp_path, tmp_path)
    result = bench.verify()
    assert result.passed
    assert [image.name for image in result.images] == ["gray.png", "photo.png"]
    assert len(result.problems) == 1
    assert "broken.png" in result.problems[0]
    gray = result.images[0]
    assert (gray.reference_keypoints, gray.model_keypoints, gray.cosine_median) == (0, 0, None)


def blank(folder, count):
    for index in range(count):
        cv2.imwrite(str(folder / f"blank{index}.png"), np.full((HEIGHT, WIDTH), 12 * index, np.uint8))


@pytest.mark.parametrize(
    "layout", ["v6", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("packaged", "real-v6"))]
)
def test_blank_images_alone_prove_nothing(layout, checkpoint_file, tmp_path):
    """Networks find a few points on black: the padding's doing, and the same in every image."""
    blank(tmp_path, 20)
    with pytest.raises(SuperPointError, match=r"finds 0 keypoints .* expected 16 or more, .* photographs"):
        Bench(checkpoint_file(layout), tmp_path, tmp_path).verify()


@pytest.mark.parametrize("name", ["descriptor-sampling", pytest.param("fp16-indices", marks=pytest.mark.exhaustive)])
def test_a_fault_is_named_among_more_blank_images_than_photographs(name, checkpoint_file, tmp_path):
    blank(tmp_path, 5)
    for photo in ("astronaut", "chelsea"):
        cv2.imwrite(str(tmp_path / f"{photo}.png"), photograph(HEIGHT, WIDTH, photo))
    result = Bench(checkpoint_file("packaged"), tmp_path, tmp_path).verify(fault=FAULTS[name][0])
    assert [finding.name for finding in result.findings] == [name]
    assert not result.passed
    assert len(result.images) == 7


def test_a_model_that_finds_nothing_fails(bench):
    """Nothing found, nothing wrong with it? The share must be 0, not undefined."""

    def blind(model):
        scores = node(model, "cell_probabilities")
        zero = constant(model, "nothing", np.float32(0))
        insert_after(
            model, scores.output[0], helper.make_node("Mul", [scores.output[0], zero], ["cell_probabilities_faulty"])
        )

    result = bench.verify(fault=blind)
    assert not result.passed
    assert {gate.name: gate.value for gate in result.gates}["keypoints_found_share"] == 0.0


def test_another_checkpoint_is_noted(checkpoint_file, folder, tmp_path):
    from conftest import write_checkpoint

    other = write_checkpoint("v6", tmp_path, seed=1)
    bench = Bench(checkpoint_file("v6"), folder, tmp_path)
    bench.verify()
    result = verify(bench.path, other, find_images(folder))
    assert not result.passed
    assert sha256(other.read_bytes())[:12] in result.notes[0]


def test_networks_of_other_shape_are_refused(checkpoint_file, folder, tmp_path):
    from conftest import write_checkpoint

    bench = Bench(checkpoint_file("v6"), folder, tmp_path)
    bench.verify()
    with pytest.raises(
        SuperPointError, match=r"has descriptor_dim 32, the reference .* 64: not the same network.*--weights"
    ):
        verify(bench.path, write_checkpoint("v6", tmp_path, seed=2, dim=64), find_images(folder))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The same file name in two folders."""
    tree = tmp_path_factory.mktemp("tree")
    for place, name in (("day/1.png", "astronaut"), ("night/1.png", "chelsea"), ("night/rain/2.png", "coffee")):
        (tree / place).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tree / place), photograph(HEIGHT, WIDTH, name))
    return tree


def names(result):
    return [image.name for image in result.images]


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_folder_is_as_good_as_its_images(kind, checkpoint_file, tree):
    weights = checkpoint_file("v6")
    result = verify(weights, weights, kind(tree))
    assert names(result) == ["day/1.png", "night/1.png", "night/rain/2.png"]
    assert names(verify(weights, weights, kind(tree), most_images=1)) == ["day/1.png"], "though it has no brother"
    assert names(verify(weights, weights, kind(tree / "day/1.png"))) == ["1.png"]


def test_names_of_given_files_tell_them_apart(checkpoint_file, tree, monkeypatch):
    weights = checkpoint_file("v6")
    assert names(verify(weights, weights, sorted(tree.rglob("1.png")))) == ["day/1.png", "night/1.png"]
    assert names(verify(weights, weights, (tree / "night/1.png" for _ in range(1)))) == ["1.png"]
    monkeypatch.chdir(tree / "night")
    assert names(verify(weights, weights, ["1.png", "rain/2.png", tree / "day/1.png"])) == [
        "night/1.png",
        "night/rain/2.png",
        "day/1.png",
    ]
    with pytest.raises(SuperPointError, match="none was given"):
        verify(weights, weights, [])


def test_a_problem_names_its_image(checkpoint_file, folder, tmp_path):
    cv2.imwrite(str(tmp_path / "dot.png"), np.zeros((4, 4), np.uint8))
    weights = checkpoint_file("v6")
    (problem,) = verify(weights, weights, [tmp_path / "dot.png", *find_images(folder)]).problems
    assert problem.startswith(f"{tmp_path / 'dot.png'} is 4x4 px")


@pytest.mark.parametrize("torch_there", [True, False])
def test_a_lifted_model_is_held_against_the_lifted_checkpoint(
    torch_there, checkpoint_file, folder, tmp_path, monkeypatch
):
    small, full = layouts.load(checkpoint_file("compact")), checkpoint_file("v6")
    columns = np.linalg.qr(np.random.default_rng(0).normal(size=(96, 64)))[0].astype(np.float32)
    mapped = replace(small, descriptor_map=DescriptorMap(columns, file_sha256(full)))
    weights = layouts.save(mapped, tmp_path / "small.safetensors")
    model = export(weights, tmp_path / "m.onnx", ExportOptions(dynamic=True, descriptors_of=full))
    if not torch_there:
        monkeypatch.setattr("superpoint_trt.prove.references.util.find_spec", lambda name: None)
    found = verify(model, weights, folder)
    assert found.passed and found.outputs
    with pytest.raises(SuperPointError, match="has no map to another network's descriptors"):
        verify(model, checkpoint_file("compact"), folder)


def test_no_descriptors_and_no_maps_are_kept(checkpoint_file, folder):
    """A descriptor of this network takes 128 bytes in each of two sets; places, cosine and score error take 24."""
    weights = checkpoint_file("v6")
    for image in verify(weights, weights, folder).images:
        kept = len(pickle.dumps(image))
        assert kept < 30 * max(image.reference_keypoints, image.model_keypoints) + 3000
    with SuperPoint(weights) as superpoint:
        comparison = Comparison(superpoint, open_reference(weights))
        comparison.run("a", find_images(folder)[0])
        samples = [part for parts in comparison._samples.values() for part in parts]
        assert samples
        assert all(part.base is None for part in samples), "a view keeps the whole map in memory"


def test_find_images(folder, tmp_path):
    assert [path.name for path in find_images(folder)] == ["astronaut.png", "chelsea.png", "coffee.png"]
    assert len(find_images(folder, limit=2)) == 2
    assert find_images(folder / "coffee.png") == [folder / "coffee.png"]
    with pytest.raises(SuperPointError, match="holds no image"):
        find_images(tmp_path)
    with pytest.raises(SuperPointError, match="do not exist"):
        find_images(tmp_path / "nowhere")


def test_metadata_is_what_the_gates_are_chosen_by(bench):
    """The precision in the metadata, not the caller's word."""
    bench.verify()
    model = onnx.load(bench.path)
    described = ModelDescription.from_metadata({e.key: e.value for e in model.metadata_props})
    from dataclasses import replace

    from superpoint_trt.core.types import Precision

    helper.set_model_props(model, replace(described, precision=Precision.FP16).to_metadata())
    bench.path.write_bytes(model.SerializeToString())
    result = verify(bench.path, bench.weights, find_images(bench.folder))
    assert {gate.name: gate.limit for gate in result.gates}["keypoints_found_share"] == 0.98
    assert DecodeOptions().threshold == described.threshold


@pytest.mark.parametrize(
    ("model", "reference", "words"),
    [
        ("folded", None, "the model alone was exported with an approximation: folded"),
        (None, "folded", "the reference alone was exported with an approximation: folded"),
        ("folded", "folded", "both were exported with an approximation, which this verdict does not see: folded"),
        (None, None, None),
    ],
)
def test_an_approximation_is_noted(model, reference, words):
    one, other = (ModelDescription(OutputType.HEADS, approximation=told) for told in (model, reference))
    assert _notes(one, other, voters=1) == ([words] if words else [])
