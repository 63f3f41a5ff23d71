"""Every command with every kind of bad input: exit code 2, one line that names the fault, nothing on disk changed."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from conftest import photograph, random_state
from onnx import TensorProto, helper
from safetensors.torch import save_file

from superpoint_trt.cli import guide
from superpoint_trt.cli.info import facts
from superpoint_trt.cli.main import cli, run
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import DecodeOptions, OutputType, SuperPointError
from superpoint_trt.gpu import tensorrt_api

ROOT = Path(__file__).resolve().parents[2]
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>proxy</body></html>\n"
LONGEST_MESSAGE = 1000
SHOWN_BY_PYTHON = (UserWarning, RuntimeWarning, FutureWarning, SyntaxWarning)

COMMANDS = {
    "superpoint": cli,
    "convert_to_onnx": guide.convert_to_onnx,
    "convert_to_tensorrt": guide.convert_to_tensorrt,
    "tensorrt_inference": guide.tensorrt_inference,
}


# ---------------------------------------------------------------------------------------------------------- the desk


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, and every file's content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.fixture(scope="session")
def stock(tmp_path_factory, checkpoint_file) -> Path:
    """Good inputs: a checkpoint, a picture, a model of each kind."""
    folder = tmp_path_factory.mktemp("stock")
    cv2.imwrite(str(folder / "good.png"), photograph(120, 160))
    good = shutil.copy(checkpoint_file("v6"), folder / "good.pth")
    export(good, folder / "dense.onnx", ExportOptions(height_px=120, width_px=160))
    keypoints = ExportOptions(
        OutputType.KEYPOINTS, height_px=120, width_px=160, max_keypoints=64, decode=DecodeOptions(threshold=0.02)
    )
    export(good, folder / "keypoints.onnx", keypoints)
    return folder


@pytest.fixture
def desk(tmp_path, stock, monkeypatch) -> Path:
    """A working folder with the good inputs, and a precious file under every name that commands write."""
    for path in stock.iterdir():
        shutil.copy(path, tmp_path)
    for ending in ("onnx", "png", "npz", "jpg", "safetensors", "trt", "txt", "pgm"):
        (tmp_path / f"precious.{ending}").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refuse(desk, capfd):
    """Runs a command line ("superpoint info x.pth") in process and asserts how it is refused."""

    def check(line: str, *says: str) -> tuple[str, str]:
        name, *arguments = line.split()
        arguments = ["" if argument == "''" else argument for argument in arguments]
        before = tree(desk)
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            code = run(COMMANDS[name], arguments)
        out, err = capfd.readouterr()  # of the file descriptors: what C++ libraries print counts too
        assert_refused(code, out, err, *says)
        assert [str(w.message) for w in shown if issubclass(w.category, SHOWN_BY_PYTHON)] == []
        assert tree(desk) == before
        return out, err

    return check


def assert_refused(code: int, out: str, err: str, *says: str) -> None:
    assert code == 2, (code, out, err)
    assert "Traceback" not in out
    assert err.startswith("error: "), err
    assert err.endswith("\n") and err.count("\n") == 1, f"expected one line:\n{err}"
    assert len(err) < LONGEST_MESSAGE, f"{len(err)} characters"
    for words in says:
        assert words in err, f"{words!r} is not in: {err}"


# -------------------------------------------------------------------------------------------------------- checkpoints


class Trap:
    """Unpickled, it makes a folder: what any code in a file could do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def without(name: str):
    return lambda state: {key: value for key, value in state.items() if not key.startswith(name)}


def replaced(key: str, change):
    return lambda state: {**state, key: change(state[key])}


def nan(array: torch.Tensor) -> torch.Tensor:
    return array.clone().fill_(float("nan"))


def mixed(state):
    return {**state, **random_state("magicleap")}


def stray_stage(number: int):
    """A stage that no SuperPoint has, of the shape that the last real one has."""
    return lambda _: {
        **random_state("magicleap"),
        **{f"conv{number}a.{key}": random_state("magicleap")[f"conv1a.{key}"] for key in ("weight", "bias")},
    }


STATES = {
    # A change of a good v6 state dict -> what the message must name.
    "layer-missing": (without("backbone.2.1"), "incomplete", "conv3b"),
    "head-missing": (without("descriptor.1"), "incomplete", "convDb"),
    "bias-missing": (without("backbone.1.0.conv.bias"), "conv2a", "bias"),
    "one-norm-missing": (without("backbone.0.1.bn."), "BatchNorm", "conv1b"),
    "norm-incomplete": (without("backbone.0.1.bn.running_var"), "conv1b", "bn.running_var"),
    "kernel": (replaced("backbone.0.0.conv.weight", lambda w: w[..., :2]), "conv1a.weight", "(8, 1, 3, 2)", "3, 3"),
    "channels": (replaced("backbone.2.0.conv.weight", lambda w: w[:, :5]), "conv3a.weight", "(16, 5, 3, 3)", "(16, 8"),
    "bias-shape": (replaced("detector.0.conv.bias", lambda b: b[:-1]), "convPa.bias", "(23,)", "(24,)"),
    "norm-shape": (replaced("detector.0.bn.weight", lambda b: b[None]), "convPa.bn.weight", "(1, 24)"),
    "scalar": (replaced("backbone.0.0.conv.weight", lambda w: w[0, 0, 0, 0]), "conv1a.weight"),
    "rgb-input": (replaced("backbone.0.0.conv.weight", lambda w: w.repeat(1, 3, 1, 1)), "conv1a.weight", "(8, 3, 3, 3"),
    "no-dustbin": (
        lambda s: {k: v[:64] if k.startswith("detector.1") and v.ndim else v for k, v in s.items()},
        "64 channels",
        "65",
    ),
    "nan": (replaced("descriptor.0.conv.weight", nan), "convDa.weight", "not finite"),
    "infinite": (replaced("detector.1.conv.bias", lambda b: b / 0), "convPb.bias", "not finite"),
    "float64-overflow": (replaced("detector.1.conv.bias", lambda b: b.double() + 1e300), "convPb.bias", "not finite"),
    "negative-variance": (replaced("backbone.0.0.bn.running_var", lambda v: v - 100), "conv1a", "running_var"),
    "mixed-layouts": (mixed, "not a SuperPoint checkpoint", "Magic Leap"),
    "stage-0": (stray_stage(0), "conv0a"),
    "stage-3000": (stray_stage(3000), "SuperPoint"),
    "another-network": (lambda _: {"layer1.0.conv1.weight": torch.zeros(4, 3, 3, 3)}, "layer1.0.conv1.weight"),
    "no-arrays": (lambda _: {}, "not a SuperPoint checkpoint", "0 arrays"),
    "no-dict": (lambda _: torch.zeros(3), "state_dict", "Tensor"),
    "not-arrays": (lambda _: {"epoch": 3}, "state_dict"),
}

CHECKPOINT_COMMANDS = {
    "export": "superpoint export --weights BAD --output precious.onnx",
    "info": "superpoint info BAD",
    "infer": "superpoint infer --model BAD --image good.png --output precious.png --save precious.npz",
    "convert": "superpoint weights convert BAD precious.safetensors",
    "convert_to_onnx": "convert_to_onnx --weights BAD --output precious.onnx",
    "tensorrt_inference": "tensorrt_inference --engine BAD --image good.png --output precious.jpg",
}


def with_checkpoint(name, faults, everywhere):
    """Each fault by `info`, and by the other commands those that are to be seen everywhere; all in `make test-all`."""
    return pytest.mark.parametrize(
        ("line", name),
        [
            pytest.param(
                line,
                fault,
                id=f"{command}-{fault}",
                marks=() if command == "info" or fault in everywhere else pytest.mark.exhaustive,
            )
            for command, line in CHECKPOINT_COMMANDS.items()
            for fault in faults
        ],
    )


@with_checkpoint("fault", STATES, ("layer-missing", "not-arrays"))
def test_checkpoint_with_a_fault(refuse, line, fault):
    change, *says = STATES[fault]
    torch.save(change(random_state("v6")), "bad.pth")
    refuse(line.replace("BAD", "bad.pth"), "bad.pth", *says)


def write(content: bytes):
    return lambda path: path.write_bytes(content)


def cut(source: str, share: float):
    """The first part of a good file."""

    def make(path: Path) -> None:
        if source.endswith(".safetensors"):
            save_file(random_state("huggingface"), source)
        data = Path(source).read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return make


def scripted(path: Path) -> None:
    """What tells a TorchScript archive from a state_dict is its constants.pkl."""
    torch.save(random_state("v6"), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/constants.pkl", b"\x80\x02).")


FILES = {
    # File name -> how it is made and what the message must say.
    "missing.pth": (lambda path: None, "does not exist"),
    "missing.safetensors": (lambda path: None, "does not exist"),
    "folder.pth": (lambda path: path.mkdir(), "is a folder"),
    "empty.pth": (write(b""), "empty"),
    "empty.safetensors": (write(b""), "empty"),
    "page.pth": (write(HTML), "not a checkpoint"),
    "page.safetensors": (write(HTML), "not a checkpoint"),
    "zeros.pth": (write(bytes(4096)), "not a checkpoint"),
    "picture.pth": (lambda path: shutil.copy("good.png", path), "not a checkpoint"),
    "lfs.pth": (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"), "not a checkpoint"),
    "half.pth": (cut("good.pth", 0.5), "damaged", "truncated"),
    "nearly.pth": (cut("good.pth", 0.99), "damaged", "truncated"),
    "start.pth": (cut("good.pth", 0.01), "damaged", "truncated"),
    "half.safetensors": (cut("good.safetensors", 0.5), "safetensors"),
    "header.safetensors": (cut("good.safetensors", 0.01), "safetensors"),
    "lying.safetensors": (write((40).to_bytes(8, "little") + b'{"a":' + b" " * 60), "safetensors"),
    "scripted.pth": (scripted, "TorchScript"),
}


@with_checkpoint("name", FILES, ("missing.pth", "half.safetensors"))
def test_file_that_is_no_checkpoint(refuse, desk, line, name):
    make, *says = FILES[name]
    make(desk / name)
    refuse(line.replace("BAD", name), name, *says)


def dump(protocol: int):
    return lambda trap, path: path.write_bytes(pickle.dumps(trap, protocol))


PICKLES = {
    "zip": lambda trap, path: torch.save(trap, path),
    "legacy": lambda trap, path: torch.save(trap, path, _use_new_zipfile_serialization=False),
    "protocol-0": dump(0),
    "protocol-2": dump(2),
    "protocol-4": dump(4),
}


@with_checkpoint("kind", PICKLES, ("zip",))
def test_code_in_a_checkpoint_is_not_executed(refuse, desk, line, kind):
    state = {**random_state("v6"), "backbone.0.0.conv.weight": Trap(desk / "executed")}
    PICKLES[kind](state, desk / "evil.pth")
    _, said = refuse(line.replace("BAD", "evil.pth"), "evil.pth")
    assert not (desk / "executed").exists()
    if kind in ("zip", "legacy"):
        assert "mkdir" in said and "execute code" in said


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_that_trap_is_live(desk, kind):
    """Without this the test above could pass on a dud."""
    PICKLES[kind]({"a": Trap(desk / "executed")}, desk / "evil.pth")
    torch.load(desk / "evil.pth", weights_only=False)
    assert (desk / "executed").exists()


@pytest.mark.parametrize("form", [torch.nn.Parameter, torch.Tensor.to_sparse, torch.Tensor.half])
def test_arrays_in_another_form_are_read(desk, capfd, form):
    """`torch.save(dict(model.named_parameters()))` and the like: as good as a state_dict."""
    torch.save({key: form(value) for key, value in random_state("magicleap").items()}, "kept.pth")
    assert run(cli, ["info", "kept.pth"]) == 0
    assert "magicleap" in capfd.readouterr().out


# ------------------------------------------------------------------------------------------------------------- models


def another_tools(path: Path, inputs=(("x", [1, 3, 8, 8]),), outputs=(("y", [1, 3, 8, 8]),), dtype=TensorProto.FLOAT):
    """A model that copies its only input to every output."""
    (name, _), *_ = inputs
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [output]) for output, _ in outputs],
        "other",
        [helper.make_tensor_value_info(n, dtype, shape) for n, shape in inputs],
        [helper.make_tensor_value_info(n, dtype, shape) for n, shape in outputs],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def with_metadata(**changed: str):
    """A good model whose metadata says something else."""

    def make(path: Path) -> None:
        model = onnx.load("dense.onnx")
        entries = {entry.key: entry.value for entry in model.metadata_props}
        helper.set_model_props(model, {**entries, **{f"superpoint_trt.{k}": v for k, v in changed.items()}})
        onnx.save(model, path)

    return make


def without_metadata(key: str):
    """A good keypoints model that lacks one entry."""

    def make(path: Path) -> None:
        model = onnx.load("keypoints.onnx")
        entries = {entry.key: entry.value for entry in model.metadata_props if entry.key != f"superpoint_trt.{key}"}
        helper.set_model_props(model, entries)
        onnx.save(model, path)

    return make


def not_utf8(path: Path) -> None:
    """A good model with a comment in Latin-1 among its metadata."""
    model = onnx.load("dense.onnx")
    model.metadata_props.add(key="comment", value="EEEE")
    path.write_bytes(model.SerializeToString().replace(b"EEEE", "\xe9t\xe9!".encode("latin-1")))


def copy(source: str):
    return lambda path: shutil.copy(source, path)


NO_MODEL = {
    "missing.onnx": (lambda path: None, "does not exist"),
    "folder.onnx": (lambda path: path.mkdir(), "is a folder"),
    "empty.onnx": (write(b""), "empty"),
    "text.onnx": (write(b"the model is on the other disk\n"), "not"),
    "page.onnx": (write(HTML), "not"),
    "half.onnx": (cut("dense.onnx", 0.5), "not"),
    "nearly.onnx": (cut("dense.onnx", 0.99), "not"),
    "checkpoint.onnx": (copy("good.pth"), "not"),
    "type.onnx": (with_metadata(type="banana"), "metadata", "banana"),
    "json.onnx": (with_metadata(height_px="{"), "metadata"),
    "height.onnx": (with_metadata(height_px='"tall"'), "metadata"),
    "stride.onnx": (with_metadata(stride_px="0"), "metadata"),
}
OTHER_MODEL = {
    "latin1.onnx": (not_utf8, "metadata"),
    "other.onnx": (another_tools, "not one of this project's models", "x", "y", "superpoint export"),
    "ranks.onnx": (
        lambda path: another_tools(
            path, [("image", [1, 1, 8, 8])], [("scores", [1, 1, 8, 8]), ("descriptors", [1, 1, 8, 8])]
        ),
        "not one of this project's models",
        "scores",
    ),
}


INFER_AND_GUIDE = [
    "superpoint infer --model",
    pytest.param("tensorrt_inference --engine", marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("name", [*NO_MODEL, *OTHER_MODEL])
@pytest.mark.parametrize("program", INFER_AND_GUIDE)
def test_model_that_cannot_be_run(refuse, desk, program, name):
    make, *says = {**NO_MODEL, **OTHER_MODEL}[name]
    make(desk / name)
    line = f"{program} {name} --image good.png --output precious.png"
    refuse(line, *([] if "metadata" in says else [name]), *says)


def test_keypoints_model_that_does_not_say_its_threshold(desk, capfd):
    """Metadata of another version of this package: what is not there is unknown, not a crash."""
    without_metadata("threshold")(desk / "older.onnx")
    assert run(cli, ["info", "older.onnx"]) == 0
    assert "keypoints outputs" in capfd.readouterr().out


@pytest.mark.parametrize("name", NO_MODEL)
def test_info_of_a_broken_model(refuse, desk, name):
    make, *says = NO_MODEL[name]
    make(desk / name)
    refuse(f"superpoint info {name}", *([] if "metadata" in says else [name]), *says)


@pytest.mark.parametrize(
    ("kind", "image", "says"),
    [(TensorProto.FLOAT, [1, 3, 120, 160], "3"), (TensorProto.FLOAT16, [1, 1, 120, 160], "float16")],
    ids=["colour", "float16"],
)
def test_model_with_the_right_names_that_fails_when_run(refuse, desk, kind, image, says):
    another_tools(desk / "odd.onnx", [("image", image)], [("logits", image), ("coarse_descriptors", image)], kind)
    refuse("superpoint infer --model odd.onnx --image good.png --save precious.npz", says)


def test_model_that_fails_inside_the_runtime(refuse, desk):
    """A reshape to a size that only a run finds wrong: onnxruntime logs such failures itself."""
    shape = helper.make_tensor("shape", TensorProto.INT64, [4], [1, 65, 3, 7])
    names = ("logits", "coarse_descriptors")
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["image", "shape"], [name]) for name in names],
        "odd",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, "height", "width"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 65, 3, 7]) for name in names],
        [shape],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), desk / "odd.onnx")
    refuse("superpoint infer --model odd.onnx --image good.png --save precious.npz", "onnxruntime failed on 160x120")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("superpoint infer --model keypoints.onnx --image good.png --threshold 0.01", ("0.01", "0.02", "export")),
        ("tensorrt_inference --engine keypoints.onnx --type keypoints --image good.png --threshold 0.01", ("0.02",)),
        ("tensorrt_inference --engine keypoints.onnx --image good.png --threshold 0.5", ("keypoints.onnx", "--type")),
        ("tensorrt_inference --engine dense.onnx --type keypoints --image good.png", ("dense.onnx", "dense", "--type")),
    ],
)
def test_model_of_another_kind_than_asked(refuse, line, says):
    refuse(line, *says)


# ------------------------------------------------------------------------------------------------- engines, TensorRT

ENGINE_COMMANDS = [
    "superpoint infer --model FILE --image good.png --output precious.png",
    "tensorrt_inference --engine FILE --image good.png --output precious.jpg",
]


@pytest.fixture
def no_tensorrt(monkeypatch):
    monkeypatch.setattr(tensorrt_api, "MODULES", {flavor: f"no_such_{flavor.value}" for flavor in tensorrt_api.Flavor})
    monkeypatch.setattr(tensorrt_api, "RUNTIME_MODULES", {})


@pytest.mark.parametrize("line", ENGINE_COMMANDS)
@pytest.mark.parametrize("ending", ["engine", "trt", "plan"])
def test_engine_without_tensorrt(refuse, desk, no_tensorrt, line, ending):
    (desk / f"model.{ending}").write_bytes(b"ftrt" + bytes(100))
    says = ("TensorRT is not installed", "pip install", "[tensorrt]", ".onnx")
    refuse(line.replace("FILE", f"model.{ending}"), *says)


def test_the_runtime_asked_for_is_the_one_to_install(refuse, no_tensorrt):
    _, said = refuse(
        "superpoint build --onnx dense.onnx --engine a.engine --runtime rtx", "TensorRT-RTX is not installed"
    )
    assert "'.[rtx]'" in said and "'.[tensorrt]'" not in said


@pytest.mark.parametrize("line", [*ENGINE_COMMANDS, "superpoint info FILE"])
def test_engine_that_is_missing(refuse, line):
    refuse(line.replace("FILE", "missing.engine"), "missing.engine", "does not exist")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--onnx dense.onnx", ("TensorRT is not installed", "pip install")),
        ("--onnx dense.onnx --fp16 --dynamic-shapes --test", ("TensorRT is not installed",)),
        ("--onnx dense.onnx --int8", ("--int8", "calibration")),
        ("--onnx missing.onnx", ("missing.onnx", "does not exist")),
        ("--onnx folder", ("folder", "is a folder")),
        ("--onnx dense.onnx --engine nowhere/a.trt", ("nowhere", "does not exist")),
        ("--onnx dense.onnx --engine folder", ("folder", "expected a file name")),
        ("--onnx dense.onnx --workspace much", ("--workspace", "much")),
        ("", ("--onnx",)),
    ],
)
def test_convert_to_tensorrt(refuse, no_tensorrt, options, says):
    engine = "" if "--engine" in options else "--engine precious.trt"
    refuse(f"convert_to_tensorrt {options} {engine}", *says)


# ------------------------------------------------------------------------------------------------------------- images


def pixels(height: int, width: int):
    return lambda path: cv2.imwrite(str(path), np.zeros((height, width), np.uint8))


def half_image(path: Path) -> None:
    """A copy that was cut off: half an image must not pass for one."""
    data = cv2.imencode(path.suffix, photograph(120, 160))[1].tobytes()
    path.write_bytes(data[: len(data) // 2])


IMAGES = {
    "missing.jpg": (lambda path: None, "missing.jpg", "does not exist"),
    "folder.jpg": (lambda path: path.mkdir(), "folder.jpg", "is a folder"),
    "empty.jpg": (write(b""), "empty.jpg", "empty"),
    "text.png": (write(b"not an image"), "text.png", "not an image"),
    "page.jpg": (write(HTML), "page.jpg", "not an image"),
    "model.png": (copy("dense.onnx"), "model.png", "not an image"),
    "start.png": (cut("good.png", 0.005), "start.png", "not an image"),
    "half.png": (half_image, "half.png", "not an image"),
    "half.jpg": (half_image, "half.jpg", "not an image"),
    "half.bmp": (half_image, "half.bmp", "not an image"),
    "half.tiff": (half_image, "half.tiff", "not an image"),
    "drawing.svg": (write(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "drawing.svg", "not an image"),
    "dot.png": (pixels(1, 1), "dot.png is 1x1", "8x8"),
    "line.png": (pixels(3, 20000), "line.png is 20000x3", "8x8"),
    "narrow.png": (pixels(100, 7), "narrow.png is 7x100", "8x8"),
    "float.tiff": (lambda path: cv2.imwrite(str(path), np.full((32, 32), 300, np.float32)), "300", "[0, 1]"),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("program", INFER_AND_GUIDE)
@pytest.mark.parametrize("model", ["dense.onnx", pytest.param("good.pth", marks=pytest.mark.exhaustive)])
def test_file_that_is_no_image(refuse, desk, program, model, name):
    make, *says = IMAGES[name]
    make(desk / name)
    refuse(f"{program} {model} --image {name} --output precious.jpg", *says)


# ------------------------------------------------------------------------------------------------------ feature files


def features(save=np.savez, **changed):
    arrays = {
        "keypoints": np.zeros((2, 2), np.float32),
        "scores": np.array([0.5, 0.25], np.float32),
        "descriptors": np.zeros((2, 32), np.float32),
        "image_size": np.array([16, 16]),
        **changed,
    }
    return lambda path: save(path, **{key: value for key, value in arrays.items() if value is not None})


def one_array(path: Path) -> None:
    with path.open("wb") as handle:
        np.save(handle, np.zeros(3))


FEATURES = {
    "missing.npz": (lambda path: None, "does not exist"),
    "empty.npz": (write(b""), "empty"),
    "text.npz": (write(b"text"), "not a feature file"),
    "half.npz": (lambda path: (features()(path), path.write_bytes(path.read_bytes()[:300])), "not a feature file"),
    "other.npz": (features(scores=None), "not a feature file", "scores"),
    "objects.npz": (features(scores=np.array([{}, {}])), "not a feature file"),
    "single.npz": (one_array, "not a feature file"),
    "flat.npz": (features(descriptors=np.zeros(64, np.float32)), "not a feature file"),
    "shapes.npz": (features(keypoints=np.zeros((5, 2), np.float32)), "not a feature file"),
    "words.npz": (features(scores=np.array(["a", "b"])), "not a feature file"),
}


@pytest.mark.parametrize("name", FEATURES)
def test_file_that_holds_no_features(refuse, desk, name):
    make, *says = FEATURES[name]
    make(desk / name)
    refuse(f"superpoint info {name}", name, *says)


# ------------------------------------------------------------------------------------------------------ failing disks

GOOD_FILES = {
    "good.npz": features(),
    "packed.npz": features(np.savez_compressed),
    "good.pth": lambda path: torch.save(random_state("magicleap"), path),
    "legacy.pth": lambda path: torch.save(random_state("v6"), path, _use_new_zipfile_serialization=False),
    "good.safetensors": lambda path: save_file(random_state("huggingface"), path),
    "dense.onnx": lambda path: None,
}
HEAD_AND_TAIL = 1500


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("flip", "step"),
    [(0xFF, 35), *(pytest.param(flip, 5, marks=pytest.mark.exhaustive) for flip in (0xFF, 0x01))],
)
@pytest.mark.parametrize("name", GOOD_FILES)
def test_a_flipped_byte_is_an_error_or_harmless(desk, name, flip, step):
    """Nothing but SuperPointError may come out of a damaged file."""
    GOOD_FILES[name](desk / name)
    data = (desk / name).read_bytes()
    damaged = desk / f"damaged{Path(name).suffix}"
    escaped = {}
    places = [place for place in range(len(data)) if not HEAD_AND_TAIL < place < len(data) - HEAD_AND_TAIL]
    for place in places[::step]:
        damaged.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
        try:
            list(facts(damaged))
        except SuperPointError:
            pass
        except Exception as error:
            escaped[f"{type(error).__name__}: {error}"[:100]] = place
    assert escaped == {}


# ------------------------------------------------------------------------------------------------------------- options

EXPORT = "superpoint export --weights good.pth --output precious.onnx"
EXPORT_KEYPOINTS = f"{EXPORT} --type keypoints"
GUIDE_EXPORT = "convert_to_onnx --weights good.pth --output precious.onnx"
INFER = "superpoint infer --model dense.onnx --image good.png --output precious.png --save precious.npz"
GUIDE_INFER = "tensorrt_inference --engine dense.onnx --image good.png --output precious.jpg"
HUGE = "100000000000000000000"


@pytest.mark.parametrize("program", [EXPORT, GUIDE_EXPORT], ids=["export", "convert_to_onnx"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        *((f"--{side} {value}", (side, value)) for side in ("height", "width") for value in ("0", "-8", "4", "100000")),
        ("--height 481", ("height 481", "multiple of 8", "480", "488")),
        ("--width 15", ("width 15", "multiple of 8", "8 or 16")),
        ("--height 480.0", ("--height", "480.0")),
        ("--width wide", ("--width", "wide")),
        ("--opset 10", ("opset", "10", "11 to")),
        ("--opset 999", ("opset", "999", "11 to")),
        ("--opset -1", ("opset", "-1")),
        ("--type sparse", ("--type", "sparse", "dense", "keypoints", "heads")),
        ("--type keypoints --max-keypoints 0", ("keypoints", "0")),
        ("--type keypoints --max-keypoints -5", ("keypoints", "-5")),
        ("--no-such-option 1", ("--no-such-option",)),
    ],
)
def test_export_option(refuse, program, options, says):
    refuse(f"{program} {options}", *says)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--nms-radius -1", ("NMS radius", "-1")),
        ("--remove-borders -1", ("border", "-1")),
        ("--remove-borders 241", ("border", "241", "640x480")),
        ("--threshold 2", ("threshold", "2")),
        ("--threshold 1", ("threshold", "1")),
        ("--threshold -0.1", ("threshold", "-0.1")),
        ("--threshold nan", ("threshold", "nan")),
        ("--threshold low", ("--threshold", "low")),
        ("--max-batch-size 0", ("batch", "0")),
        ("--height 16 --width 16 --max-keypoints 257", ("257", "16x16", "256")),
        (f"--dynamic --max-keypoints {HUGE}", (HUGE,)),
        (f"--nms-radius {HUGE}", (HUGE,)),
        ("--sampling bicubic", ("--sampling", "bicubic", "half-pixel", "legacy")),
    ],
)
def test_export_option_of_keypoints_models(refuse, options, says):
    refuse(f"{EXPORT_KEYPOINTS} {options}", *says)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        *((f"{program} --threshold {t}", ("threshold", t)) for program in (INFER, GUIDE_INFER) for t in ("2", "-1")),
        *((f"{program} --top-k {k}", ("keypoints", k)) for program in (INFER, GUIDE_INFER) for k in ("0", "-3")),
        (f"{INFER} --threshold nan", ("threshold", "nan")),
        (f"{INFER} --max-side 0", ("max_side", "0")),
        (f"{INFER} --max-side -640", ("max_side", "-640")),
        (f"{INFER} --threads 0", ("threads", "0")),
        (f"{INFER} --threads {HUGE}", ("threads", HUGE)),
        (f"{INFER} --device tpu", ("--device", "tpu", "cuda")),
        (f"{GUIDE_INFER} --type heads", ("--type", "heads")),
        ("superpoint infer", ("--image",)),
        ("superpoint infer --model dense.onnx", ("--image",)),
        ("superpoint export --weights good.pth", ("--output",)),
        ("superpoint info", ("FILE",)),
        ("superpoint weights", ("command",)),
        ("superpoint weights convert good.pth", ("OUTPUT",)),
        ("superpoint weights fetch v7", ("v7", "v6", "magicleap")),
        ("superpoint weights list extra", ("extra",)),
        ("superpoint train", ("train",)),
    ],
)
def test_option_and_argument(refuse, line, says):
    refuse(line, *says)


@pytest.mark.parametrize("model", ["dense.onnx", "good.pth"])
def test_gpu_that_is_not_there(refuse, monkeypatch, model):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuse(f"superpoint infer --model {model} --image good.png --device cuda", "device cuda", "--device cpu")


# ------------------------------------------------------------------------------------------------------------- outputs

OUTPUTS = {
    "export": "superpoint export --weights good.pth --height 120 --width 160 --output OUT.onnx",
    "convert": "superpoint weights convert good.pth OUT.safetensors",
    "infer-output": "superpoint infer --model dense.onnx --image good.png --output OUT.png",
    "infer-save": "superpoint infer --model dense.onnx --image good.png --save OUT.npz",
    "convert_to_onnx": "convert_to_onnx --weights good.pth --height 120 --width 160 --output OUT.onnx",
    "convert_to_tensorrt": "convert_to_tensorrt --onnx dense.onnx --engine OUT.trt",
    "tensorrt_inference": "tensorrt_inference --engine dense.onnx --image good.png --output OUT.jpg",
}
with_output = pytest.mark.parametrize("line", OUTPUTS.values(), ids=OUTPUTS)


@with_output
@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("nowhere/out", ("nowhere", "does not exist")),
        ("nowhere/deeper/out", ("nowhere/deeper", "does not exist")),
        ("good.png/out", ("good.png",)),
        ("n" * 300, ("n" * 40, "too long")),
    ],
    ids=["no-folder", "no-folders", "parent-is-a-file", "name-too-long"],
)
def test_output_that_cannot_be_written(refuse, line, out, says):
    printed, _ = refuse(line.replace("OUT", out), *says)
    assert printed == "", "refused after the work, not before"


@with_output
def test_output_that_is_a_folder(refuse, desk, line):
    target = line.replace("OUT", "taken")
    (desk / target.split()[-1]).mkdir()
    printed, _ = refuse(target, "taken", "is a folder")
    assert printed == "", "refused after the work, not before"


written_late = pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "convert_to_tensorrt"])


@written_late
@pytest.mark.parametrize(
    ("step", "code", "says"),
    [("os.fsync", errno.ENOSPC, "No space left"), ("pathlib.Path.replace", errno.EPERM, "not permitted")],
)
def test_disk_that_fails_while_writing(refuse, monkeypatch, name, step, code, says):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(step, fail)
    refuse(OUTPUTS[name].replace("OUT", "precious"), "precious", says)


@written_late
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc, a folder where nothing can be made")
def test_folder_that_takes_no_files(refuse, name):
    refuse(OUTPUTS[name].replace("OUT", "/proc/precious"), "/proc")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("superpoint export --weights good.pth --output precious.txt", ("precious.txt", ".onnx")),
        ("superpoint export --weights good.pth --output good.pth", ("good.pth", ".onnx")),
        ("convert_to_onnx --weights good.pth --output precious.txt", ("precious.txt", ".onnx")),
        ("superpoint weights convert good.pth precious.txt", ("precious.txt", ".safetensors")),
        ("superpoint weights convert good.pth precious.onnx", ("precious.onnx", ".safetensors")),
        ("superpoint infer --model dense.onnx --image good.png --output precious.txt", ("precious.txt", ".png")),
        ("superpoint infer --model dense.onnx --image good.png --output precious", ("precious", ".png")),
        ("superpoint infer --model dense.onnx --image good.png --output precious.pgm", ("precious.pgm", ".png")),
        ("superpoint infer --model precious.txt --image good.png", ("precious.txt", ".onnx", ".pth", ".safetensors")),
        ("superpoint infer --model folder --image good.png", ("folder", ".onnx")),
        ("superpoint infer --model '' --image good.png", (".onnx",)),
        ("superpoint info precious.txt", ("precious.txt", ".onnx", ".pth", ".npz")),
        ("superpoint info folder", ("folder", ".onnx")),
        ("superpoint info good.png", ("good.png", ".onnx")),
        ("tensorrt_inference --engine dense.onnx --image good.png --output precious.txt", ("precious.txt", ".jpg")),
        ("tensorrt_inference --engine precious.txt --image good.png", ("precious.txt", ".onnx")),
    ],
)
def test_file_ending(refuse, line, says):
    printed, _ = refuse(line, *says)
    assert printed == "", "refused after the work, not before"


def test_a_name_of_two_lines_is_named_in_one(desk, capfd):
    code = run(cli, ["info", "two\nlines.pth"])
    assert_refused(code, *capfd.readouterr(), "two lines.pth")


def test_fetch_where_weights_is_a_file(refuse, desk):
    (desk / "weights").write_bytes(b"precious")
    refuse("superpoint weights fetch v6", "weights")


# ------------------------------------------------------------------------------------------------- as real processes


def exhaustive(*values):
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("convert_to_onnx.py --weights page.pth --output precious.onnx", "page.pth"),
        exhaustive("convert_to_onnx.py --weights good.pth --output precious.onnx --opset 10", "opset"),
        ("convert_to_tensorrt.py --onnx missing.onnx --engine precious.trt", "missing.onnx"),
        ("tensorrt_inference.py --engine dense.onnx --image page.jpg --output precious.jpg", "page.jpg"),
        exhaustive("-m superpoint_trt infer --model odd.onnx --image good.png", "odd.onnx"),
        ("-m superpoint_trt export --weights evil.pth --output precious.onnx", "execute code"),
    ],
)
def test_in_a_process_of_its_own(desk, line, says):
    for name in ("page.pth", "page.jpg"):
        (desk / name).write_bytes(HTML)
    torch.save({**random_state("v6"), "extra": Trap(desk / "executed")}, desk / "evil.pth")
    another_tools(desk / "odd.onnx")
    before = tree(desk)
    program, *rest = line.split()
    program = program if program == "-m" else str(ROOT / program)
    done = subprocess.run([sys.executable, program, *rest], cwd=desk, capture_output=True, text=True, check=False)
    assert_refused(done.returncode, done.stdout, done.stderr, says)
    assert tree(desk) == before


def test_a_good_run_is_not_refused(desk, capfd):
    """The desk itself is sound: what the tests above refuse is the fault, not the rest of the command line."""
    for line in [*OUTPUTS.values(), "superpoint info keypoints.onnx"]:
        if "convert_to_tensorrt" in line:
            continue
        name, *arguments = line.replace("OUT", "new").split()
        assert run(COMMANDS[name], arguments) == 0, capfd.readouterr()
