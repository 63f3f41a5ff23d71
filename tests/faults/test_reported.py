"""Every fault that was reported against 6c5b572, one test each; each failed there."""

from __future__ import annotations

import copy
import html
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import photograph
from faults.processes import COMMAND, UNKNOWN_UID, assert_refused, call, finish, needs_root, start
from fuzz import corpus
from fuzz.judge import Case
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt import Keypoints, SuperPoint, SuperPointError
from superpoint_trt.cli.guide import SuperPointTRT
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.default_model import default_model

pytest_plugins = ["faults.fixtures"]

INFER = ("infer", "--model", "dense.onnx", "--image", "good.png", "--save", "out.npz")


def model(stock: dict[str, bytes], name: str = "dense.onnx") -> onnx.ModelProto:
    return onnx.load_model_from_string(stock[name])


def with_metadata(source: onnx.ModelProto, **values: str) -> bytes:
    """The same model that says something else of itself."""
    changed = copy.deepcopy(source)
    entries = {entry.key: entry.value for entry in changed.metadata_props}
    helper.set_model_props(changed, {**entries, **{f"superpoint_trt.{key}": value for key, value in values.items()}})
    return bytes(changed.SerializeToString())


# ------------------------------------------------------------------------------------------------ silent wrong results

WRITING = {
    "infer": (*INFER, "--output", "out.png"),
    "match": ("match", "--model", "dense.onnx", "good.png", "good.png", "--save", "out.npz", "--output", "out.png"),
    "export": (
        "export",
        "--weights",
        "checkpoint.safetensors",
        "--height",
        "48",
        "--width",
        "64",
        "--output",
        "out.onnx",
    ),
    "weights": ("weights", "convert", "checkpoint.safetensors", "out.safetensors"),
    "cast": ("cast", "--onnx", "dense.onnx", "--output", "out.onnx"),
    "quantize": (
        "quantize",
        *("--onnx", "heads.onnx", "--calibration", "ranges.calibration.json", "--no-verify", "--output", "out.onnx"),
    ),
    "bench": ("bench", "--model", "dense.onnx", "--iterations", "2", "--json", "out.json"),
}


def outputs_of(arguments: tuple[str, ...]) -> list[str]:
    return [word for word in arguments if word.startswith("out.")]


@pytest.mark.parametrize("name", WRITING)
def test_files_are_written_though_nobody_reads_what_is_printed(small_desk, name):
    """`superpoint infer ... | true`."""
    read, write = os.pipe()
    os.close(read)
    process = start(WRITING[name], small_desk, stdout=write)
    os.close(write)
    done = finish(process)
    missing = [output for output in outputs_of(WRITING[name]) if not (small_desk / output).is_file()]
    assert missing == []
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("name", WRITING)
def test_standard_output_on_a_full_disk_is_one_line(small_desk, name):
    with open("/dev/full", "w") as full:
        done = call(WRITING[name], small_desk, stdout=full)
    assert_refused(done, "No space left")
    assert [output for output in outputs_of(WRITING[name]) if not (small_desk / output).is_file()] == []


def test_info_on_a_full_disk_is_one_line(small_desk):
    with open("/dev/full", "w") as full:
        assert_refused(call(("info", "dense.onnx"), small_desk, stdout=full), "No space left")


def overflowing(name: str, stock: dict[str, bytes]) -> bytes:
    """A model or checkpoint whose convolutions overflow float32 after a few layers."""
    if name.endswith(".safetensors"):
        from safetensors.torch import load, save

        arrays = load(stock["checkpoint.safetensors"])
        return bytes(save({key: value * 1e8 if key.endswith("weight") else value for key, value in arrays.items()}))
    changed = model(stock, name)
    for constant in changed.graph.initializer:
        if constant.name.startswith("conv") and len(constant.dims) == 4:
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant) * np.float32(1e8), constant.name))
    return bytes(changed.SerializeToString())


@pytest.mark.parametrize("name", ["dense.onnx", "heads.onnx", "keypoints.onnx", "static.onnx"])
def test_outputs_that_are_not_finite_are_an_error(small_stock, refuse_case, name):
    infer = ("infer", "--model", "odd.onnx", "--image", "good.png", "--save", "out.npz")
    refuse_case(Case({"odd.onnx": overflowing(name, small_stock)}, infer), "finite")


def test_outputs_of_torch_that_are_not_finite_are_an_error(refuse_case):
    state = {key: value * 1e8 if key.endswith("weight") else value for key, value in corpus.state("magicleap").items()}
    infer = ("infer", "--model", "odd.pth", "--image", "good.png", "--save", "out.npz")
    refuse_case(Case({"odd.pth": corpus.torch_bytes(state)}, infer), "finite", "scores")


def test_an_image_whose_outputs_are_not_finite_keeps_its_place(small_stock, tmp_path):
    (tmp_path / "odd.onnx").write_bytes(overflowing("dense.onnx", small_stock))
    with SuperPoint(tmp_path / "odd.onnx", device="cpu") as superpoint:
        found = list(superpoint.extract_many([corpus.picture(), corpus.picture()]))
    assert all(isinstance(one, SuperPointError) and "finite" in str(one) for one in found), found


CONTRADICTIONS = {
    # A claim of the metadata that the graph's shapes contradict; and what the message must name.
    "stride": ("dense.onnx", {"stride_px": "16"}, "stride"),
    "stride-of-heads": ("heads.onnx", {"stride_px": "8"}, "stride"),
    "stride-of-static": ("static.onnx", {"stride_px": "8"}, "stride"),
    "descriptors": ("dense.onnx", {"descriptor_dim": "256"}, "descriptor"),
    "height": ("static.onnx", {"height_px": "96"}, "height"),
    "width": ("static.onnx", {"width_px": "96"}, "width"),
    "not-dynamic": ("dense.onnx", {"dynamic": "false"}, "dynamic"),
    "dynamic": ("static.onnx", {"dynamic": "true"}, "dynamic"),
    "keypoints": ("keypoints.onnx", {"max_keypoints": "64"}, "keypoints"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_metadata_that_contradicts_the_graph_is_refused(small_stock, refuse_case, name):
    source, values, says = CONTRADICTIONS[name]
    infer = ("infer", "--model", "odd.onnx", "--image", "good.png", "--save", "out.npz")
    refuse_case(Case({"odd.onnx": with_metadata(model(small_stock, source), **values)}, infer), says, "metadata")


def photographs(folder: Path, *names: str) -> list[str]:
    for name in names:
        cv2.imwrite(str(folder / f"{name}.png"), photograph(240, 320, name))
    return [f"{name}.png" for name in names]


def test_a_geometry_that_chance_explains_is_not_claimed(tmp_path, monkeypatch, capfd):
    """Photographs that have nothing in common: a few matches always fit some homography."""
    monkeypatch.chdir(tmp_path)
    pair = photographs(tmp_path, "astronaut", "coffee")
    assert run(cli, ["match", "--model", str(default_model()), *pair, "--save", "out.npz"]) == 0
    assert "not supported" in capfd.readouterr().out
    with np.load("out.npz") as arrays:
        assert not arrays["geometry_supported"]


def test_a_geometry_that_is_there_is_claimed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (first,) = photographs(tmp_path, "astronaut")
    moved = cv2.warpAffine(photograph(240, 320), np.float32([[1, 0.05, 6], [-0.05, 1, 9]]), (320, 240))
    cv2.imwrite("moved.png", moved)
    assert run(cli, ["match", "--model", str(default_model()), first, "moved.png", "--save", "out.npz"]) == 0
    assert "not supported" not in capfd.readouterr().out
    with np.load("out.npz") as arrays:
        assert arrays["geometry_supported"]


@pytest.mark.exhaustive
def test_a_static_keypoints_model_is_calibrated_on_images_of_other_proportions(tmp_path, monkeypatch, capfd):
    """The network is measured on the image without padding; nodes that decode have the size of the model in them."""
    monkeypatch.chdir(tmp_path)
    Path("album").mkdir()
    for index, name in enumerate(("astronaut", "coffee", "chelsea")):
        cv2.imwrite(f"album/{name}.png", photograph(100 + 20 * index, 320, name))
    assert run(cli, ["export", "--type", "keypoints", "--height", "120", "--width", "160", "--output", "k.onnx"]) == 0
    quantize = ["quantize", "--onnx", "k.onnx", "--calibration-images", "album", "--no-verify", "--rounding", "nearest"]
    code = run(cli, [*quantize, "--output", "out.onnx"])
    out, err = capfd.readouterr()
    assert code == 0, err
    assert "3 images" in out


def test_compare_takes_a_keypoints_model(small_desk):
    image = corpus.picture()
    engine = SuperPointTRT("keypoints.onnx", "keypoints")
    with SuperPoint("keypoints.onnx", device="cpu") as superpoint:
        found = superpoint.extract(image)
    reference = {
        "keypoints": [torch.from_numpy(found.xy)],
        "keypoint_scores": [torch.from_numpy(found.scores)],
        "descriptors": [torch.from_numpy(found.descriptors)],
    }
    said = engine.compare(reference, engine.infer(image))
    assert "100.00%" in said and f"{len(found)} in PyTorch" in said


def damaged_jpeg() -> bytes:
    """A JPEG of which libjpeg complains and yet returns an image: half of its data is missing."""
    data = cv2.imencode(".jpg", photograph(240, 320))[1].tobytes()
    return bytes(data[: len(data) // 2] + data[-2:])


def test_a_damaged_jpeg_is_an_error(refuse_case):
    infer = ("infer", "--model", "dense.onnx", "--image", "odd.jpg", "--save", "out.npz")
    refuse_case(Case({"odd.jpg": damaged_jpeg()}, infer), "odd.jpg", "damaged", "--allow-damaged")


def test_a_damaged_jpeg_is_read_where_that_is_asked_for(accept_case):
    infer = ("infer", "--model", "dense.onnx", "--image", "odd.jpg", "--save", "out.npz", "--allow-damaged")
    accept_case(Case({"odd.jpg": damaged_jpeg()}, infer, outputs=("out.npz",)))


def test_a_damaged_png_is_one_line(refuse_case):
    data = bytearray(cv2.imencode(".png", photograph(48, 64))[1].tobytes())
    data[200:240] = bytes(40)
    infer = ("infer", "--model", "dense.onnx", "--image", "odd.png", "--save", "out.npz")
    refuse_case(Case({"odd.png": bytes(data)}, infer), "odd.png")


def test_a_png_that_libpng_warns_about_is_read_in_silence(accept_case):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(corpus.picture()).save(buffer, "PNG", icc_profile=b"no profile", dpi=(300, 300))
    infer = ("infer", "--model", "dense.onnx", "--image", "odd.png", "--save", "out.npz")
    accept_case(Case({"odd.png": buffer.getvalue()}, infer, outputs=("out.npz",)))


@needs_root
def test_onnxruntime_is_silent_without_a_home(open_desk):
    """Its default logger says that it finds no folder for its telemetry."""
    done = call(INFER[:-2], open_desk, uid=UNKNOWN_UID, env={"HOME": None, "XDG_CACHE_HOME": None})
    assert (done.code, done.err) == (0, "")


def test_onnxruntime_sends_nothing(small_desk):
    """From 1.32 on onnxruntime has telemetry on Linux too; whoever runs `superpoint` was not asked."""
    code = (
        "import sys; from superpoint_trt.cli.main import cli, run; assert run(cli, sys.argv[1:]) == 0;"
        "import os; assert os.environ.get('ORT_DISABLE_TELEMETRY') == '1'"
    )
    done = call(INFER[:-2], small_desk, program=(sys.executable, "-c", code), env={"ORT_DISABLE_TELEMETRY": None})
    assert (done.code, done.err) == (0, "")


def test_features_beyond_float32_are_refused_in_one_line(refuse_case):
    """A warning of numpy in store.load_features."""
    arrays = {**corpus.features(), "scores": np.array([1e300, 0.5, 0.4, 0.3, 0.2])}
    refuse_case(Case({"odd.npz": corpus.npz(arrays)}, ("info", "odd.npz")), "odd.npz", "scores")


def changed_ranges(stock: dict[str, bytes], **values: object) -> dict[str, bytes]:
    ranges = {**json.loads(stock["ranges.calibration.json"]), **values}
    return {
        "odd.calibration.json": json.dumps(ranges).encode(),
        "odd.calibration.int8.safetensors": stock["ranges.calibration.int8.safetensors"],
    }


QUANTIZE = ("quantize", "--onnx", "heads.onnx", "--calibration", "odd.calibration.json", "--no-verify")
QUANTIZE += ("--keep-fp16", "none", "--output", "out.onnx")


@pytest.mark.parametrize("factor", ["0", "-1", "nan", "inf", "1e-45", "1e39"])
def test_channel_factors_that_are_no_positive_numbers_are_refused(small_stock, refuse_case, factor):
    """A warning of numpy in equalize."""
    channels = json.loads(small_stock["ranges.calibration.json"])["channels"]
    name, factors = next(iter(channels.items()))
    channels[name] = " ".join([factor, *factors.split()[1:]])
    refuse_case(Case(changed_ranges(small_stock, channels=channels), QUANTIZE), "odd.calibration.json")


def test_descriptors_near_the_end_of_float32_are_normalized(small_stock, accept_case):
    """A warning of numpy in decode.normalize: squares overflow, so that descriptors became 0."""
    changed = model(small_stock, "heads.onnx")
    for constant in changed.graph.initializer:
        if constant.name.startswith("convDb"):
            constant.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(constant) * np.float32(1e20), constant.name)
            )
    infer = ("infer", "--model", "odd.onnx", "--image", "good.png", "--save", "out.npz")
    case = Case({"odd.onnx": changed.SerializeToString()}, infer, outputs=("out.npz",))
    accept_case(case)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_cast(small_stock, refuse_case, value):
    """A warning of numpy in cast."""
    changed = model(small_stock)
    weight = next(c for c in changed.graph.initializer if len(c.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] = value
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    for precision in ("fp16", "bf16"):
        cast = ("cast", "--onnx", "odd.onnx", "--precision", precision, "--output", "out.onnx")
        refuse_case(Case({"odd.onnx": changed.SerializeToString()}, cast), "finite")


# ------------------------------------------------------------------------------------------- memory, time and hangs


@pytest.mark.parametrize("shape", [(1 << 32,), (1 << 16, 1 << 14, 3, 3)])
@pytest.mark.parametrize("command", ["info", "export --output out.onnx --weights", "infer --image good.png --model"])
def test_a_small_checkpoint_of_a_gigantic_tensor_is_refused_at_once(refuse_case, shape, command):
    state = {**corpus.state("magicleap"), "conv1a.weight": torch.zeros(1).expand(*shape)}
    refuse_case(Case({"odd.pth": corpus.torch_bytes(state)}, (*command.split(), "odd.pth")), "odd.pth", "conv1a.weight")


def test_a_gigantic_sparse_tensor_is_refused_at_once(refuse_case):
    sparse = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (1 << 33,))
    state = {**corpus.state("magicleap"), "conv1a.weight": sparse}
    refuse_case(Case({"odd.pth": corpus.torch_bytes(state)}, ("info", "odd.pth")), "odd.pth", "conv1a.weight")


def gray_png(side_px: int) -> bytes:
    """A black PNG that packs a thousandfold, made without its pixels."""
    import struct

    rows = 8
    block = bytes(rows * (side_px + 1))
    packer = zlib.compressobj(9)
    begin = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    times = side_px // rows
    check = 1
    for _ in range(times):
        check = zlib.adler32(block, check)
    packed = begin + again * (times - 1) + b"\x03\x00" + struct.pack(">I", check)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_a_png_of_too_many_pixels_is_refused_at_once(refuse_case):
    data = gray_png(30_000)
    assert len(data) < 3_000_000
    refuse_case(
        Case({"odd.png": data}, (*INFER[:3], "--image", "odd.png", "--max-side", "512")), "30000", "--max-pixels"
    )


def test_the_most_pixels_can_be_chosen(refuse_case, accept_case):
    refuse_case(Case({}, (*INFER[:5], "--max-pixels", "3071")), "64x48", "--max-pixels")
    accept_case(Case({}, (*INFER[:5], "--max-pixels", "3072")))


def test_a_large_png_that_is_shrunk_takes_little_more_than_its_bytes(judge, accept_case):
    """144 million pixels of one byte; as float32 they would take 550 MiB, and twice that on the way."""
    accept_case(Case({"odd.png": gray_png(12_000)}, (*INFER[:3], "--image", "odd.png", "--max-side", "512")))
    assert judge.last.peak_mib < 350


def test_a_large_jpeg_that_is_shrunk_is_decoded_small(judge, accept_case):
    data = cv2.imencode(".jpg", np.zeros((8000, 8000), np.uint8))[1].tobytes()
    accept_case(Case({"odd.jpg": data}, (*INFER[:3], "--image", "odd.jpg", "--max-side", "512")))
    assert judge.last.peak_mib < 60, "64 MB of pixels were decoded in full"


@pytest.mark.parametrize("counts", [(5, 3 << 16, 1024), (3 << 16, 3 << 16, 1024)], ids=["contradictory", "large"])
def test_a_feature_file_that_unpacks_to_much_is_refused_at_once(refuse_case, counts):
    """800 kB of zeros that become 768 MiB."""
    few, many, dim = counts

    def header(*shape: int) -> dict[str, object]:
        return {"descr": "<f4", "fortran_order": False, "shape": shape}

    members = {
        "keypoints.npy": (header(few, 2), bytes(few * 8)),
        "scores.npy": (header(few), bytes(few * 4)),
        "image_size.npy": ({"descr": "<i8", "fortran_order": False, "shape": (2,)}, (64).to_bytes(8, "little") * 2),
    }
    packed = corpus.npz_of_headers(members)
    import io
    import zipfile

    buffer = io.BytesIO(packed)
    with (
        zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open("descriptors.npy", "w", force_zip64=True) as member,
    ):
        text = repr(header(many, dim)).encode() + b"\n"
        member.write(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        piece = bytes(1 << 24)
        for _ in range(many * dim * 4 >> 24):
            member.write(piece)
    refuse_case(Case({"odd.npz": buffer.getvalue()}, ("info", "odd.npz")), "odd.npz")


READING = {
    # A command that reads ODD, and what ODD's name ends in.
    "image": ("infer --model dense.onnx --image ODD", ".png"),
    "onnx": ("infer --image good.png --model ODD", ".onnx"),
    "pth": ("infer --image good.png --model ODD", ".pth"),
    "safetensors": ("export --output out.onnx --weights ODD", ".safetensors"),
    "engine": ("infer --image good.png --model ODD", ".engine"),
    "features": ("info ODD", ".npz"),
    "calibration": ("quantize --onnx heads.onnx --no-verify --output out.onnx --calibration ODD", ".json"),
    "calibration-images": ("quantize --onnx heads.onnx --no-verify --output out.onnx --calibration-images ODD", ".png"),
    "cast": ("cast --output out.onnx --onnx ODD", ".onnx"),
}


@pytest.mark.parametrize("kind", ["fifo", "link:/dev/zero"])
@pytest.mark.parametrize("name", READING)
def test_what_is_no_regular_file_is_refused_at_once(refuse_case, name, kind):
    command, suffix = READING[name]
    odd = f"odd{suffix}"
    refuse_case(Case({}, command.replace("ODD", odd).split(), special={odd: kind}), odd, "regular file")


def test_an_engine_beside_a_fifo_is_refused_at_once(refuse_case):
    case = Case({"odd.engine": corpus.PLAN}, ("info", "odd.engine"), special={"odd.engine.json": "fifo"})
    refuse_case(case, "odd.engine.json", "regular file")


@pytest.mark.parametrize("name", ["dense.onnx", "checkpoint.safetensors"])
def test_no_more_threads_than_the_machine_has(judge, small_stock, name):
    judge.judge(Case({}, ("infer", "--model", name, "--image", "good.png", "--threads", "1024")))
    assert judge.last.code == 0, judge.last.err
    assert "1024 threads" not in judge.last.out
    assert f"{os.cpu_count()} threads" in judge.last.out
    assert "1024" in judge.last.err, "it is said that fewer are taken"


# ----------------------------------------------------------------------------------- an image's error stays with it


class Raising:
    """What claims to be an array and is none."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __array__(self, *_, **__):
        raise self.error


BAD_IMAGES = {
    "nul": lambda: "a\0b.png",
    "surrogate": lambda: "\udcff\ud800.png",
    "ragged": lambda: [[1, 2], [3]],
    "raises": lambda: Raising(RuntimeError("no")),
    "raises-type-error": lambda: Raising(TypeError("no")),
    "no-memory": lambda: Raising(MemoryError()),
    "none": lambda: None,
    "text": lambda: np.array(["a"]),
    "objects": lambda: np.array([{}, {}]),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_bad_image_does_not_end_the_stream(small_desk, name, batch):
    images = [corpus.picture(), BAD_IMAGES[name](), "good.png"]
    with SuperPoint("dense.onnx", device="cpu") as superpoint:
        first, bad, last = superpoint.extract_many(images, loaders=1)
    assert isinstance(first, Keypoints) and isinstance(last, Keypoints)
    assert isinstance(bad, SuperPointError)


@pytest.mark.parametrize("name", [name for name in BAD_IMAGES if name != "no-memory"])
def test_a_bad_image_is_an_error_of_ours(small_desk, name):
    with SuperPoint("dense.onnx", device="cpu") as superpoint, pytest.raises(SuperPointError):
        superpoint.extract(BAD_IMAGES[name]())


def test_an_interrupt_ends_the_stream(small_desk):
    images = [corpus.picture(), Raising(KeyboardInterrupt()), corpus.picture()]
    with SuperPoint("dense.onnx", device="cpu") as superpoint, pytest.raises(KeyboardInterrupt):
        list(superpoint.extract_many(images))


def test_a_bug_of_ours_ends_the_stream(small_desk, monkeypatch):
    """It must not pass for a bad image."""

    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("superpoint_trt.run.runner.place", broken)
    with SuperPoint("dense.onnx", device="cpu") as superpoint, pytest.raises(ZeroDivisionError):
        list(superpoint.extract_many([corpus.picture()]))


# --------------------------------------------------------------------------------------------------------- tracebacks


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["csr", "meta", "quantized", "nested", "complex", "bits8", "float8", "conjugate"])
def test_a_checkpoint_of_strange_tensors_is_one_line(refuse_case, kind):
    tensor = corpus.strange_tensor(kind, torch.ones(2, 1, 3, 3))
    state = {**corpus.state("magicleap"), "conv1a.weight": tensor}
    if kind in ("csr", "float8"):  # of another shape, or torch may read it: what matters is one line, if any
        state["conv1a.bias"] = torch.ones(7)
    refuse_case(Case({"odd.pth": corpus.torch_bytes(state)}, ("info", "odd.pth")), "odd.pth", "conv1a")


STRANGE_METADATA = {
    "deep": {"height_px": "[" * 100_000},
    "deep-object": {"opset": '{"a":' * 50_000},
    "fraction": {"height_px": "48.5"},
    "true": {"stride_px": "true"},
    "huge": {"stride_px": str(10**30)},
    "huge-height": {"height_px": str(10**12)},
    "huge-fraction": {"width_px": "1e300"},
    "infinite": {"width_px": "Infinity"},
    "nan": {"threshold": "NaN"},
    "threshold": {"threshold": "7"},
    "batch": {"max_batch_size": "1.5"},
    "long": {"height_px": "9" * 5000},
    "dynamic": {"dynamic": "0.5"},
}
ON_MODELS = {
    "info": "info odd.onnx",
    "infer": "infer --model odd.onnx --image good.png",
    "cast": "cast --onnx odd.onnx --output out.onnx",
    "quantize": "quantize --onnx odd.onnx --calibration ranges.calibration.json --no-verify --output out.onnx",
    "build": "build --onnx odd.onnx --engine out.engine --runtime rtx --target sm89",
}


def needs_builder(command: str) -> None:
    if command == "build":
        pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("name", STRANGE_METADATA)
@pytest.mark.parametrize("command", ON_MODELS)
def test_strange_metadata_is_one_line(small_stock, refuse_case, command, name):
    """Read by one typed reader with limits of depth, size and range, and refused by every command alike."""
    needs_builder(command)
    data = with_metadata(model(small_stock, "heads.onnx"), **STRANGE_METADATA[name])
    refuse_case(Case({"odd.onnx": data}, ON_MODELS[command].split()), "metadata", next(iter(STRANGE_METADATA[name])))


def odd_dims(*dims: int):
    def change(graph: onnx.GraphProto) -> None:
        weight = next(c for c in graph.initializer if len(c.dims) == 4)
        weight.dims[:] = dims or (*weight.dims, 0)

    return change


def dangling_bias(graph: onnx.GraphProto) -> None:
    conv = [node for node in graph.node if node.op_type == "Conv"][1]
    conv.input[2] = "nobody"


def no_outputs(graph: onnx.GraphProto) -> None:
    del graph.node[1].output[:]


def no_inputs(graph: onnx.GraphProto) -> None:
    del [node for node in graph.node if node.op_type == "Conv"][1].input[:]


def one_input(graph: onnx.GraphProto) -> None:
    del [node for node in graph.node if node.op_type == "Conv"][1].input[1:]


def empty_constant(graph: onnx.GraphProto) -> None:
    graph.node.append(helper.make_node("Constant", [], ["nothing"]))


def unknown_type(graph: onnx.GraphProto) -> None:
    next(c for c in graph.initializer if len(c.dims) == 4).data_type = 99


def unknown_operator(graph: onnx.GraphProto) -> None:
    graph.node[2].op_type = "Nonsense"


def circle(graph: onnx.GraphProto) -> None:
    graph.node[0].input[0] = graph.node[4].output[0]


def twice(graph: onnx.GraphProto) -> None:
    graph.node.append(copy.deepcopy(graph.node[0]))


def no_graph_inputs(graph: onnx.GraphProto) -> None:
    del graph.input[:]


def flat_image(graph: onnx.GraphProto) -> None:
    del graph.input[0].type.tensor_type.shape.dim[2:]


ODD_GRAPHS = {
    "dims": odd_dims(1 << 62, 1, 3, 3),
    "negative-dims": odd_dims(-1, 1, 3, 3),
    "extra-zero": odd_dims(),
    "renamed-bias": dangling_bias,
    "no-outputs": no_outputs,
    "no-inputs": no_inputs,
    "one-input": one_input,
    "empty-constant": empty_constant,
    "unknown-type": unknown_type,
    "unknown-operator": unknown_operator,
    "circle": circle,
    "twice": twice,
    "no-graph-inputs": no_graph_inputs,
    "flat-image": flat_image,
}


@pytest.mark.parametrize("name", ODD_GRAPHS)
@pytest.mark.parametrize("command", [name for name in ON_MODELS if name != "info"])
def test_an_inconsistent_graph_is_one_line(small_stock, refuse_case, command, name):
    needs_builder(command)
    changed = model(small_stock, "heads.onnx")
    ODD_GRAPHS[name](changed.graph)
    refuse_case(Case({"odd.onnx": changed.SerializeToString()}, ON_MODELS[command].split()))


def with_a_name_that_is_no_text(stock: dict[str, bytes]) -> bytes:
    changed = model(stock, "heads.onnx")
    conv = [node for node in changed.graph.node if node.op_type == "Conv"][1]
    return bytes(changed.SerializeToString().replace(conv.output[0].encode(), b"\xff" * len(conv.output[0])))


@pytest.mark.parametrize("command", ["cast", "quantize", "build"])
def test_names_that_are_no_text_are_one_line(small_stock, refuse_case, command):
    needs_builder(command)
    case = Case({"odd.onnx": with_a_name_that_is_no_text(small_stock)}, ON_MODELS[command].split())
    refuse_case(case, "odd.onnx")


@pytest.mark.parametrize("command", ["info", "infer"])
def test_names_that_are_no_text_do_no_harm(small_stock, accept_case, command):
    """To onnxruntime a name is bytes."""
    accept_case(Case({"odd.onnx": with_a_name_that_is_no_text(small_stock)}, ON_MODELS[command].split()))


def test_outputs_of_another_grid_are_one_line(small_stock, refuse_case):
    """The scores lack rows: every command that puts them beside the image's, or a reference's."""
    changed = model(small_stock)
    last = next(node for node in changed.graph.node if "scores" in node.output)
    last.output[0] = "all_scores"
    for name, value in {"start": 0, "end": -8, "axis": 1}.items():
        changed.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    changed.graph.node.append(helper.make_node("Slice", ["all_scores", "start", "end", "axis"], ["scores"]))
    scores = next(value for value in changed.graph.output if value.name == "scores")
    scores.CopyFrom(helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["b", "h", "w"]))
    del changed.graph.value_info[:]
    files = {"odd.onnx": changed.SerializeToString()}
    refuse_case(
        Case(files, ("verify", "--model", "odd.onnx", "--weights", "dense.onnx", "--images", "good.png")), "scores"
    )
    refuse_case(Case(files, ("infer", "--model", "odd.onnx", "--image", "good.png")), "scores")


STRANGE_ENGINES = {
    "targets": {"targets": [1]},
    "targets-text": {"targets": "sm89"},
    "build": {"build": "x"},
    "channels-last": {"build": {"channels_last": [1]}},
    "channels-last-text": {"build": {"channels_last": 7}},
    "profile": {"profile": {"min": [1.5, 8, 8], "opt": [1, 8, 8], "max": [1, 8, 8]}},
    "profile-order": {"profile": {"min": [1, 80, 80], "opt": [1, 8, 8], "max": [1, 16, 16]}},
    "profile-huge": {"profile": {"min": [1, 8, 8], "opt": [1, 8, 8], "max": [10**30, 8, 8]}},
    "version": {"tensorrt_version": 3},
    "gpu": {"gpu_name": [1]},
    "rebuild": {"rebuild": {"a": 1}},
    "sha": {"plan_sha256": 3},
    "description": {"description": [1]},
}


@pytest.mark.parametrize("name", STRANGE_ENGINES)
def test_strange_engine_metadata_is_one_line(refuse_case, name):
    metadata = {**corpus.engine_metadata(), **STRANGE_ENGINES[name]}
    files = {"odd.engine": corpus.PLAN, "odd.engine.json": corpus.as_json(metadata)}
    refuse_case(Case(files, ("info", "odd.engine")), "odd.engine.json")


def test_deep_engine_metadata_is_one_line(refuse_case):
    files = {"odd.engine": corpus.PLAN, "odd.engine.json": b'{"format": ' + b"[" * 100_000}
    refuse_case(Case(files, ("info", "odd.engine")), "odd.engine.json")


STRANGE_RANGES = {
    "percentile": {"percentile": "x"},
    "percentile-range": {"percentile": 1e9},
    "checkpoint": {"checkpoint_sha256": 3},
    "approximation": {"approximation": 3},
    "size": {"size": {"a": 1}},
    "images": {"images": [1]},
    "weights": {"weights_sha256": 3},
    "ranges-text": {"ranges": {"image": "0x10"}},
    "ranges-subnormal": {"ranges": {"image": 1e-320}},
    "ranges-beyond-float32": {"ranges": {"image": 1e300}},
}


@pytest.mark.parametrize("name", STRANGE_RANGES)
def test_strange_calibration_is_one_line(small_stock, refuse_case, name):
    refuse_case(Case(changed_ranges(small_stock, **STRANGE_RANGES[name]), QUANTIZE), "odd.calibration.json")


def test_deep_calibration_is_one_line(refuse_case):
    refuse_case(Case({"odd.calibration.json": b"[" * 100_000}, QUANTIZE), "odd.calibration.json")


@pytest.fixture
def open_desk(small_stock: dict[str, bytes]) -> Iterator[Path]:
    """A desk that every user of the machine may read and write."""
    with tempfile.TemporaryDirectory() as folder:
        desk = Path(folder)
        desk.chmod(0o777)
        for name, content in small_stock.items():
            (desk / name).write_bytes(content)
            (desk / name).chmod(0o644)
        yield desk


@needs_root
def test_a_user_without_a_home_is_told_what_to_set(open_desk):
    """In a container that runs as some number: Path.home raises RuntimeError."""
    nothing = {"HOME": None, "XDG_CACHE_HOME": None, "SUPERPOINT_CACHE": None}
    done = call(("infer", "--image", "good.png"), open_desk, uid=UNKNOWN_UID, env=nothing)
    assert_refused(done, "SUPERPOINT_CACHE")


STRICT = {"PYTHONIOENCODING": "utf-8:strict"}
UNDECODABLE = os.fsdecode(b"\xff-odd")


@pytest.mark.parametrize(
    "command",
    [
        "info ODD.onnx",
        "infer --model dense.onnx --image good.png --save ODD.npz --output ODD.png",
        "export --weights checkpoint.safetensors --height 48 --width 64 --output ODD.onnx",
        "bench --model ODD.onnx --iterations 2 --json ODD.json",
        "verify --model dense.onnx --weights dense.onnx --images album --report ODD.html --json ODD.json",
    ],
)
def test_a_name_that_is_no_text_can_be_printed(small_desk, command):
    (small_desk / f"{UNDECODABLE}.onnx").write_bytes((small_desk / "dense.onnx").read_bytes())
    (small_desk / "album").mkdir()
    for index in range(4):
        cv2.imwrite(str(small_desk / "album" / "a.png"), photograph(240, 320))
        (small_desk / "album" / "a.png").rename(small_desk / "album" / f"{UNDECODABLE}{index}.png")
    done = call(command.replace("ODD", UNDECODABLE).split(), small_desk, env=STRICT)
    assert "Traceback" not in done.err, done.err
    assert done.code == 0, done.err


def test_a_missing_file_whose_name_is_no_text_is_one_line(small_desk):
    assert_refused(call(("info", f"{UNDECODABLE}-missing.onnx"), small_desk, env=STRICT), "does not exist")


GUIDE_SCRIPT = (sys.executable, str(Path(__file__).parents[2] / "tensorrt_inference.py"))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("program", "arguments"),
    [(COMMAND, ("info", "dense.onnx")), (GUIDE_SCRIPT, ("--engine", "dense.onnx", "--image", "good.png"))],
    ids=["superpoint", "guide"],
)
def test_an_interrupt_during_start_up_shows_no_traceback(small_desk, program, arguments):
    """At 36 moments of the first second: imports take most of it."""
    began = time.monotonic()
    assert call(arguments, small_desk, program=program).code == 0
    took = time.monotonic() - began
    shown = []
    for moment in range(36):
        process = start(arguments, small_desk, program=program)
        time.sleep(took * (moment + 1) / 36)
        process.send_signal(signal.SIGINT)
        done = finish(process)
        # Before Python has reached this package nothing can be done about it.
        if "superpoint_trt" in done.err or done.code not in (0, 1, 130, -signal.SIGINT):
            shown.append(f"{done.code}: {done.err[-300:]}")
    assert shown == [], f"{len(shown)} of 36"


# ------------------------------------------------------------------------------------------------------ long commands


@pytest.mark.exhaustive
def test_a_long_command_says_how_far_it_is_in_a_pipe(small_desk):
    """About ten seconds; nothing is said of commands that are done sooner."""
    done = call(("bench", "--model", "dense.onnx", "--iterations", "200"), small_desk)
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if " of " in line]
    assert told, "nothing was said in all that time"
    assert "\x1b" not in done.err and "\r" not in done.err


def test_the_guides_benchmark_takes_a_number(small_desk, capfd):
    from superpoint_trt.cli import guide

    infer = ["--engine", "dense.onnx", "--image", "good.png", "--output", "out.png"]
    assert run(guide.tensorrt_inference, [*infer, "--benchmark", "5"]) == 0, capfd.readouterr().err
    assert "ms of 5 calls" in capfd.readouterr().out


def test_the_guides_benchmark_still_needs_none():
    from superpoint_trt.cli import guide

    context = guide.tensorrt_inference.make_context("x", ["--engine", "a.onnx", "--image", "b.png", "--benchmark"])
    assert context.params["benchmark"]


CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(path).exists()), None)
MEASURE = """<script>
addEventListener("load", () => {
  const cut = [], narrow = [], wide = [];
  for (const table of document.querySelectorAll("table")) {
    let box = table.parentElement;
    while (box && getComputedStyle(box).overflowX !== "auto") box = box.parentElement;
    const room = box ? box.clientWidth : document.documentElement.clientWidth;
    if (table.scrollWidth > room + 1) (box ? wide : cut).push(table.rows[0].innerText);
    for (const cell of table.querySelectorAll("td, th")) {
      if (cell.scrollWidth > cell.clientWidth + 1) cut.push(cell.innerText.slice(0, 60));
      const range = document.createRange();
      range.selectNodeContents(cell);
      const rows = new Set([...range.getClientRects()].map(r => Math.round(r.top))).size;
      if (rows > 2 && cell.innerText.length / rows < 8) narrow.push(cell.innerText.slice(0, 60));
    }
  }
  const page = document.documentElement;
  const found = {page: page.scrollWidth, window: page.clientWidth, cut: cut, narrow: narrow, wide: wide};
  parent.postMessage("MEASURED" + JSON.stringify(found) + "MEASURED", "*");
});
</script>"""
FRAME = """<!DOCTYPE html><body><pre id="out"></pre><script>
addEventListener("message", event => { document.getElementById("out").textContent = event.data; });
</script>
<iframe src="report.html" scrolling="no" style="border: 0; width: {width}px; height: 20000px"></iframe></body>"""


@pytest.mark.exhaustive
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("width", [420, 1280])
def test_the_report_can_be_read(small_desk, capfd, width, count):
    """No table is cut off, no name is broken into letters, on a telephone and on a screen."""
    pytest.importorskip("jinja2")
    album = small_desk / "album" / "a-folder-whose-name-is-rather-long" / "and-another-one-below-it-for-good-measure"
    album.mkdir(parents=True)
    for index in range(count):
        name = f"photograph_of_a_market_square_at_noon_{index:03}_with_a_long_name.png"
        cv2.imwrite(str(album / name), np.roll(photograph(120, 160), 3 * index, axis=1))
    verify = ["verify", "--model", "dense.onnx", "--weights", "dense.onnx", "--images", "album"]
    assert run(cli, [*verify, "--report", "report.html"]) in (0, 1), capfd.readouterr().err
    page = (small_desk / "report.html").read_text()
    (small_desk / "report.html").write_text(page.replace("</body>", MEASURE + "</body>"))
    (small_desk / "frame.html").write_text(FRAME.replace("{width}", str(width)))  # windows are never so narrow
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1600,3000", "--dump-dom"]
    command += [f"--user-data-dir={small_desk / 'browser'}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, f"file://{small_desk / 'frame.html'}"], capture_output=True, text=True, timeout=120, check=False
    )
    measured = json.loads(html.unescape(done.stdout.split("MEASURED")[1]))
    assert measured["window"] == width and measured["page"] <= width, measured
    assert measured["cut"] == [] and measured["narrow"] == [], measured
    if width == 1280:
        assert measured["wide"] == [], "numbers can be seen only by scrolling"
