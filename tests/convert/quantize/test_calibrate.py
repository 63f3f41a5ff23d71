"""From images to ranges: known answers, bytes that repeat, and sets of images that are no good."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from conftest import photograph
from helpers import cases
from onnx.reference import ReferenceEvaluator

from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.convert.onnx_file import load_onnx
from superpoint_trt.convert.quantize.calibrate import Activations, calibrate, split_images
from superpoint_trt.convert.quantize.equalize import equalize
from superpoint_trt.convert.quantize.histogram import BINS, Histogram, divergence, entropy_range, percentile_range
from superpoint_trt.convert.quantize.options import CalibrationOptions, Method
from superpoint_trt.convert.quantize.ranges_file import load_calibration, ranges_path, save_calibration
from superpoint_trt.core.types import OutputType, SuperPointError

SIZE = (48, 64)


@pytest.fixture(scope="module")
def model(checkpoint_file, tmp_path_factory) -> Path:
    """A small network for 64x48 px."""
    output = tmp_path_factory.mktemp("calibration") / "small.onnx"
    return export(checkpoint_file("magicleap"), output, ExportOptions(OutputType.HEADS, *SIZE))


def write_photos(folder: Path, count: int = 3, size=SIZE) -> Path:
    """Cut-outs of one photograph, each another."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = photograph(240, 320)
    for index in range(count):
        top = 5 * index
        cv2.imwrite(str(folder / f"{index}.png"), whole[top : top + size[0], 60 : 60 + size[1]])
    return folder


# ----------------------------------------------------------------------------------------------------- known answers


def histogram_of(*values: float) -> Histogram:
    made = Histogram()
    made.add(np.array(values, np.float32))
    return made


def test_a_histogram_counts_magnitudes():
    made = histogram_of(0, 0, -1, 2, 3.99)
    assert (made.end, made.zeros, made.largest) == (4.0, 2, pytest.approx(3.99))
    expected = {1.0: 1, 2.0: 1, 3.99: 1}
    assert {int(v / 4 * BINS): n for v, n in expected.items()} == {
        int(index): int(made.counts[index]) for index in np.flatnonzero(made.counts)
    }


def test_a_histogram_does_not_depend_on_the_order():
    parts = np.split(np.random.default_rng(0).exponential(size=4000).astype(np.float32) ** 3, 8)
    one, other = Histogram(), Histogram()
    for part in parts:
        one.add(part)
    for part in parts[::-1]:
        other.add(part)
    assert (one.end, one.largest, one.zeros) == (other.end, other.largest, other.zeros)
    np.testing.assert_array_equal(one.counts, other.counts)
    assert one.counts.sum() == 4000 and one.end >= one.largest > one.end / 2


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(SuperPointError, match="not finite"):
        histogram_of(1, float("nan"))
    with pytest.raises(SuperPointError, match="not finite"):
        histogram_of(1, float("inf"))


@pytest.mark.parametrize(("percentile", "expected"), [(99.0, 1.0), (99.5, 4000.0), (100.0, 4000.0)])
def test_percentile_of_a_hundred_values(percentile, expected):
    """99 values of 0.5 and one of 4000; bins are 1 wide, so 99 % lie below the edge at 1."""
    made = histogram_of(*[0.5] * 99, 4000.0)
    assert made.bin_width == 1.0
    assert percentile_range(made, percentile) == expected


def test_percentile_counts_zeros():
    assert percentile_range(histogram_of(*[0.0] * 900, *[0.5] * 99, 4000.0), 99.9) == 1.0


def test_divergence_of_two_bins_a_level():
    """P = 1/4, 3/4 in each pair of bins, Q = 1/2, 1/2: KL = 1/4 ln 1/2 + 3/4 ln 3/2 for every level."""
    counts = np.tile([1.0, 3.0], 128)
    expected = 0.25 * np.log(0.5) + 0.75 * np.log(1.5)
    assert divergence(counts, 256) == pytest.approx(expected)
    assert divergence(counts[:128], 128) == pytest.approx(0.0), "a bin a level loses nothing"


def test_entropy_clips_what_would_cost_the_rest_its_levels():
    """128 bins that differ, and one value far out: with 128 bins a level each, only that one is clipped."""
    made = histogram_of(4000.0)
    made.counts[:128] = np.tile([1000, 3000], 64)
    assert entropy_range(made) == 128.0
    assert percentile_range(made, 100.0) == 4000.0


def test_entropy_keeps_a_distribution_that_128_levels_hold_whole():
    made = histogram_of(4095.5)
    made.counts[:] = 0
    made.counts[31::32] = 7  # one occupied bin a level
    assert entropy_range(made) == 4095.5


def test_the_largest_value_is_the_reference_evaluators(model, tmp_path):
    """ONNX's own Python evaluator shares nothing with onnxruntime."""
    folder = write_photos(tmp_path / "photos", 2)
    paths = sorted(folder.iterdir())
    found = calibrate(model, paths, CalibrationOptions(Method.MAX))
    source = equalize(load_onnx(model), found.channels)
    names = [name for name in found.ranges if name != "image"]
    del source.graph.output[:]
    source.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    largest = dict.fromkeys(found.ranges, 0.0)
    for path in paths:
        image = (cv2.imread(str(path), cv2.IMREAD_GRAYSCALE).astype(np.float32) / 255)[None, None]
        values = dict(zip(names, ReferenceEvaluator(source).run(None, {"image": image})))
        for name, value in {**values, "image": image}.items():
            largest[name] = max(largest[name], float(np.abs(value).max()))
    assert found.ranges == pytest.approx(largest, rel=1e-3)
    assert len(found.ranges) == 11, "twelve convolutions, of which two read one tensor"


# ------------------------------------------------------------------------------------------------------ reproducible


@pytest.mark.parametrize("method", cases(Method, fast=lambda method: method is Method.PERCENTILE))
def test_equal_work_gives_equal_bytes_wherever_it_is_done(model, tmp_path, method):
    """Two machines: the photographs lie elsewhere, and two of them have one name."""
    written = []
    for place in ("here", "there/deeper"):
        folder = tmp_path / place / "photos"
        write_photos(folder / "a", 2)
        (folder / "b").mkdir()
        shutil.copy(folder / "a" / "1.png", folder / "b" / "0.png")
        chosen = split_images(folder, 200)
        found = calibrate(model, chosen.calibration, CalibrationOptions(method))
        assert list(found.images) == ["a/0.png", "a/1.png", "b/0.png"]
        written.append(save_calibration(found, tmp_path / place / "ranges.json").read_bytes())
        assert load_calibration(tmp_path / place / "ranges.json") == found
    assert written[0] == written[1]
    assert str(tmp_path) not in written[0].decode()


def test_images_are_chosen_evenly_and_the_proof_is_held_out(tmp_path):
    folder = write_photos(tmp_path, 40, (16, 16))
    chosen = split_images(folder, 10)
    assert len(chosen.calibration) == 10 and len(chosen.held_out) == 4
    assert not set(chosen.calibration) & set(chosen.held_out)
    assert split_images(folder, 10) == chosen
    assert len(split_images(folder, 1000).calibration) == 36


def test_padding_is_not_measured_but_for_whole_cells(model, monkeypatch):
    seen = []
    measure = Activations.__call__
    monkeypatch.setattr(Activations, "__call__", lambda s, i: seen.append(i.shape) or measure(s, i))
    calibrate(model, [("small", photograph(20, 40)), ("large", photograph(96, 128))])
    assert set(seen) == {(24, 40), (48, 64)}


def test_a_network_of_free_size_measures_on_a_bounded_one(checkpoint_file, tmp_path, monkeypatch):
    monkeypatch.setattr("superpoint_trt.convert.quantize.calibrate.LONGEST_SIDE_PX", 64)
    model = export(checkpoint_file("magicleap"), tmp_path / "m.onnx", ExportOptions(OutputType.HEADS, dynamic=True))
    seen = []
    measure = Activations.__call__
    monkeypatch.setattr(Activations, "__call__", lambda s, i: seen.append(i.shape) or measure(s, i))
    calibrate(model, [("large", photograph(240, 320))])
    assert set(seen) == {(48, 64)}


# --------------------------------------------------------------------------------------------------- bad image sets


def quantize(model: Path, folder: Path | str, output: Path, *more: str) -> int:
    words = ["--onnx", model, "--output", output, "--calibration-images", folder, "--no-verify", *more]
    return run(cli, ["quantize", *map(str, words)])


def gray(folder: Path) -> None:
    cv2.imwrite(str(folder / "a.png"), np.full(SIZE, 127, np.uint8))


def broken(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"\x89PNG no more")
    (folder / "b.jpg").write_bytes(b"")


def nothing(folder: Path) -> None:
    (folder / "notes.txt").write_text("no image")


@pytest.mark.parametrize(
    ("fill", "words"),
    [
        (nothing, ("holds no image", ".png")),
        (gray, ("none of the 1 calibration images can be used", "a.png is blank: one gray everywhere")),
        (broken, ("none of the 2 calibration images can be used", "a.png is not an image")),
    ],
)
def test_images_that_are_no_good_are_refused_in_one_line(model, tmp_path, capsys, fill, words):
    folder = tmp_path / "photos"
    folder.mkdir()
    fill(folder)
    assert quantize(model, folder, tmp_path / "q.onnx") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(word in told for word in words), told
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no/such/folder",), "images no/such/folder do not exist"),
        (("photos", "--calibration-count", "0"), "the number of calibration images is 0; expected 1 to 10000"),
        (("photos", "--keep-fp16", "nonsense*"), "no convolution is called 'nonsense*'; there are: conv1a"),
        (("photos", "--keep-fp16", "*"), "nothing is left to quantise"),
        (("photos", "--gate", "speed=1"), "no gate is called 'speed'"),
        (("synthetic", "--auto"), "--auto tries layers on photographs"),
        (("synthetic", "--sensitivity"), "--sensitivity tries layers on photographs"),
        (("photos", "--json", "a.json"), "--json holds the figures of --sensitivity or --auto"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(model, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write_photos(tmp_path / "photos", 1)
    assert quantize(model, arguments[0], tmp_path / "q.onnx", *arguments[1:]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], errors
    assert not (tmp_path / "q.onnx").exists()


def test_doubtful_images_are_used_with_a_warning(model, tmp_path, capsys):
    folder = write_photos(tmp_path / "photos", 3, (32, 40))
    gray(folder)
    (folder / "b.png").write_bytes(b"no image")
    assert quantize(model, folder, tmp_path / "q.onnx") == 0
    told = capsys.readouterr().err
    assert "left out:" in told and "b.png is not an image" in told and "a.png is blank" in told
    assert "only 3 images" in told and "too few to hold any out: verified on the images of calibration" in told
    assert "no image fills the network's input (the first is 40x32 of 64x48 px)" in told
    assert list(load_calibration(ranges_path(model)).images) == ["0.png", "1.png", "2.png"]


def test_images_larger_than_the_network_are_shrunk_and_said_so(model, tmp_path, capsys):
    assert quantize(model, write_photos(tmp_path / "photos", 2, (96, 128)), tmp_path / "q.onnx") == 0
    assert "every image is larger than the network's 64x48 px and was shrunk" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage",
    [
        lambda flat: {**flat, "format": 99},
        lambda flat: {**flat, "ranges": {}},
        lambda flat: {**flat, "ranges": {"image": 0}},
        lambda flat: {**flat, "ranges": {"image": float("nan")}},
        lambda flat: {**flat, "method": "guess"},
        lambda flat: {},
        lambda flat: [],
    ],
)
def test_damaged_ranges_are_refused_in_one_line(model, tmp_path, capsys, damage):
    found = calibrate(model, [("photo", photograph(*SIZE))])
    (tmp_path / "r.json").write_text(json.dumps(damage(json.loads(found.to_json()))))
    words = ["quantize", "--onnx", model, "--output", tmp_path / "q.onnx", "--calibration", tmp_path / "r.json"]
    assert run(cli, list(map(str, words))) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "r.json cannot be read as calibration ranges" in told
    assert "--calibration-images FOLDER" in told


def test_ranges_of_another_network_are_refused(model, checkpoint_file, tmp_path, capsys):
    other = export(checkpoint_file("own"), tmp_path / "other.onnx", ExportOptions(OutputType.HEADS, *SIZE))
    save_calibration(calibrate(other, [("photo", photograph(*SIZE))]), tmp_path / "r.json")
    words = ["quantize", "--onnx", model, "--output", tmp_path / "q.onnx", "--calibration", tmp_path / "r.json"]
    assert run(cli, list(map(str, words))) == 2
    assert "ranges belong to one network" in capsys.readouterr().err


def test_ranges_of_the_exact_network_are_not_the_folded_ones(checkpoint_file, tmp_path, capsys):
    """The same checkpoint, two networks; and the file says of which one it is."""
    exact, folded = (
        export(checkpoint_file("v6"), tmp_path / f"{f}.onnx", ExportOptions(OutputType.HEADS, *SIZE, fold_batchnorm=f))
        for f in (False, True)
    )
    found = calibrate(folded, [("photo", photograph(*SIZE))])
    ranges = save_calibration(found, tmp_path / "r.json")
    assert load_calibration(ranges).approximation == found.approximation and "folded" in found.approximation
    words = ["quantize", "--output", str(tmp_path / "q.onnx"), "--calibration", str(ranges), "--no-verify"]
    assert run(cli, [*words, "--onnx", str(exact)]) == 2
    assert "of a network with BatchNorm folded" in capsys.readouterr().err
    assert run(cli, [*words, "--onnx", str(folded)]) == 0


@pytest.mark.parametrize(("fold", "count", "advice"), [(False, 8, True), (True, 2, False)])
def test_batch_norms_behind_a_relu_are_warned_of(checkpoint_file, tmp_path, capsys, fold, count, advice):
    """Not advised to fold where it is done as far as it goes: some of this checkpoint's scales are negative."""
    options = ExportOptions(OutputType.HEADS, *SIZE, fold_batchnorm=fold)
    model = export(checkpoint_file("v6"), tmp_path / "a.onnx", options)
    ranges = save_calibration(calibrate(model, [("photo", photograph(*SIZE))]), tmp_path / "r.json")
    words = ["quantize", "--onnx", model, "--output", tmp_path / "q.onnx", "--calibration", ranges, "--no-verify"]
    assert run(cli, list(map(str, words))) == 0
    told = capsys.readouterr().err
    assert f"warning: {count} BatchNorms follow a ReLU (conv" in told and ("--fold-batchnorm" in told) is advice
