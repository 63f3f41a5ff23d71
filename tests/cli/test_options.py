"""Options that several commands share: one name and one meaning, defaults read from the package, forms checked."""

from __future__ import annotations

import inspect
from dataclasses import fields

import click
import cv2
import numpy as np
import pytest
from conftest import photograph

from superpoint_trt.cli import guide, terminal
from superpoint_trt.cli.main import cli, run
from superpoint_trt.cli.options import ExportArgs, ExtractArgs, RuntimeArgs
from superpoint_trt.convert.export import ExportOptions
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.types import OutputType
from superpoint_trt.run.extractor import SuperPoint


@pytest.fixture
def desk(exported, tmp_path, monkeypatch):
    """A folder with a model and a picture."""
    (tmp_path / "m.onnx").write_bytes(exported("v6", dynamic=True).read_bytes())
    cv2.imwrite(str(tmp_path / "a.png"), photograph(120, 160))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["--max-keypoints", "--top-k"])
def test_both_names_limit_the_keypoints(name, desk, capsys):
    """Of each image in `infer` and `match`, of the graph in `export`, and in the guide's scripts."""
    lines = {
        "f.npz": (cli, f"infer --model m.onnx --image a.png --save f.npz {name} 7"),
        "p.npz": (cli, f"match --model m.onnx a.png a.png --save p.npz {name} 7"),
        "k.onnx": (cli, f"export --type keypoints --output k.onnx --height 64 --width 64 {name} 7"),
        "g.onnx": (guide.convert_to_onnx, f"--type keypoints --output g.onnx {name} 7"),
        "g.jpg": (guide.tensorrt_inference, f"--engine m.onnx --image a.png --output g.jpg {name} 7"),
    }
    told = {}
    for output, (command, line) in lines.items():
        assert run(command, line.split()) == 0, capsys.readouterr()
        assert (desk / output).exists()
        told[output] = capsys.readouterr().out
    assert len(np.load("f.npz")["keypoints"]) == len(np.load("p.npz")["keypoints1"]) == 7
    assert "keypoints [1, 7, 2]" in told["k.onnx"] and "keypoints [batch, 7, 2]" in told["g.onnx"]
    assert "keypoints     7 in " in told["g.jpg"]


def test_the_defaults_are_the_package_s():
    """What `export` passes on when nothing is asked for is `ExportOptions()`."""
    passed = {}

    @click.command()
    @ExportArgs.declare("arguments")
    @RuntimeArgs.declare("runtime", threads={"default": 1})
    def command(arguments, runtime):
        passed["options"], passed["runtime"] = arguments.options(), runtime

    assert run(command, []) == 0
    assert passed == {"options": ExportOptions(), "runtime": RuntimeArgs("auto", 1)}
    assert run(command, ["--type", "heads", "--dynamic", "--nms-radius", "2", "--device", "cpu"]) == 0
    assert passed["options"].type is OutputType.HEADS and passed["options"].dynamic
    assert (passed["options"].decode.nms_radius_px, passed["runtime"].device) == (2, "cpu")


def test_help_shows_the_defaults(capsys):
    assert run(cli, ["export", "-h"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for default in ("[default: dense]", "[default: 480]", "[default: 640]", "[default: 17]", "[default: 0.005]"):
        assert default in told
    assert run(guide.convert_to_onnx, ["--help"]) == 0
    assert "[default: 11]" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["infer --image a.png", "match a.png a.png", "demo", "bench"])
@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "cuda:0:1", "CPU", ""])
def test_a_device_that_is_none_is_refused(command, device, capsys):
    assert run(cli, [*command.split(), "--device", device]) == 2
    error = capsys.readouterr().err
    assert "--device" in error and "auto, cpu, cuda, cuda:N" in error and repr(device) in error


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_by_its_number_is_passed_on(device, monkeypatch):
    seen = []

    def opened(*_, device, **__):
        seen.append(device)
        raise KeyError(device)

    monkeypatch.setattr("superpoint_trt.run.extractor.SuperPoint", opened)
    with pytest.raises(KeyError):
        terminal.open_model("m.onnx", RuntimeArgs(device, None))
    assert seen == [device]


def test_every_option_of_an_extraction_is_a_parameter_of_superpoint():
    """`open_model` passes them by name, so a new option needs the parameter's name and type."""
    taken = inspect.signature(SuperPoint).parameters
    for field in fields(ExtractArgs):
        assert field.name in taken, field.name
        assert field.type == taken[field.name].annotation, field.name
    assert ExtractArgs(nms_radius_px=7).settings()["nms_radius_px"] == 7


@pytest.mark.parametrize(
    "line", ["infer --model m.onnx --image a.png --save f.npz", "match --model m.onnx a.png a.png --save f.npz"]
)
def test_radius_and_border_are_free_at_run_time(desk, line):
    found = {}
    for words in ("", " --nms-radius 12", " --remove-borders 30"):
        assert run(cli, (line + words).split()) == 0
        arrays = np.load("f.npz")
        found[words] = arrays["keypoints" if "keypoints" in arrays else "keypoints0"]
    apart = np.abs(found[" --nms-radius 12"][:, None] - found[" --nms-radius 12"][None]).max(axis=2)
    assert apart[~np.eye(len(apart), dtype=bool)].min() > 12 and len(apart) < len(found[""])
    bordered = found[" --remove-borders 30"]
    assert len(bordered) and (bordered >= 30).all() and (bordered < [130, 90]).all() and (found[""] < 30).any()


def test_a_radius_that_the_graph_does_not_have_is_refused(exported, desk, capsys):
    (desk / "k.onnx").write_bytes(exported("v6", type=OutputType.KEYPOINTS, height_px=120, width_px=160).read_bytes())
    assert run(cli, ["infer", "--model", "k.onnx", "--image", "a.png", "--nms-radius", "9"]) == 2
    assert "nms_radius_px 9 was asked for, but this model does 4 in its graph" in capsys.readouterr().err


def test_useless_options_are_named(desk, capsys):
    line = "export --output d.onnx --height 64 --width 64 --top-k 9 --nms-radius 3"
    assert run(cli, line.split()) == 0
    assert capsys.readouterr().err == (
        "note: --max-keypoints, --nms-radius changes nothing: a dense model decodes at run time\n"
    )


def test_what_is_missing_is_installed_from_a_clone():
    """The package is on no registry: `pip install 'superpoint-trt[torch]'` fails in a fresh environment."""
    assert install_hint("torch") == "pip install '.[torch]' (in your clone of superpoint-trt)"
    assert install_hint("tensorrt", "rtx").startswith("pip install '.[tensorrt]' or pip install '.[rtx]' (")
