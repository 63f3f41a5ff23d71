"""Model repositories: their files, their configurations by Triton's own schema, and a server that answers.

SUPERPOINT_TRITON_PYTHON names a Python with this package (pip install -e .) and nvidia-pytriton. The latter's wheel
carries a Triton server with the Python backend only, so the other configurations are checked, not run.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import photograph

from superpoint_trt import SuperPoint
from superpoint_trt.cli.main import cli, run
from superpoint_trt.core.files import sha256
from superpoint_trt.core.types import ModelDescription, OutputType, Precision, ShapeRange, SuperPointError
from superpoint_trt.gpu.engine_file import EngineMetadata, sidecar
from superpoint_trt.gpu.tensorrt_api import Flavor
from superpoint_trt.pipeline.triton import TritonOptions, make_repository

SCRIPT = Path(__file__).with_name("triton_server.py")


def in_triton(*arguments: object) -> str:
    """Runs triton_server.py in the Python that has Triton; skips without one."""
    python = os.environ.get("SUPERPOINT_TRITON_PYTHON")
    if not python:
        pytest.skip("SUPERPOINT_TRITON_PYTHON names no Python with nvidia-pytriton")
    command = [python, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout


def engine(folder: Path, kind: OutputType, batch: int = 1) -> Path:
    """A file that stands for an engine, with the .json that a real one has."""
    path = folder / f"{kind.value}.engine"
    path.write_bytes(b"ftrt plan")
    count = 512 if kind is OutputType.KEYPOINTS else None
    description = ModelDescription(
        kind, Precision.FP16, height_px=480, width_px=640, max_batch_size=batch, max_keypoints=count
    )
    profile = ShapeRange((1, 480, 640), (batch, 480, 640), (batch, 480, 640))
    digest = sha256(path.read_bytes())
    metadata = EngineMetadata(
        description, Flavor.TENSORRT, "8.6.0", ("sm90",), None, profile, digest, digest, "superpoint build", {}
    )
    sidecar(path).write_bytes(metadata.to_json())
    return path


@pytest.fixture()
def repository(exported, tmp_path):
    """Models of every kind in one repository; name -> what `make_repository` says."""
    one = exported("packaged", OutputType.KEYPOINTS, 240, 320, max_keypoints=100)
    many = exported("packaged", OutputType.KEYPOINTS, 240, 320, max_keypoints=100, max_batch_size=4)
    free = exported("packaged", OutputType.KEYPOINTS, 240, 320, max_keypoints=100, dynamic=True, max_batch_size=8)
    heads = exported("packaged", OutputType.HEADS, 240, 320)
    models = {"one": one, "many": many, "free": free, "heads": heads}
    models["plan"] = engine(tmp_path, OutputType.KEYPOINTS, 8)
    models["heads_plan"] = engine(tmp_path, OutputType.HEADS)
    return {name: make_repository(model, tmp_path / "models", TritonOptions(name)) for name, model in models.items()}


def test_every_model_has_its_files(repository):
    found = {name: (served.backend, served.max_batch_size) for name, served in repository.items()}
    assert found == {
        "one": ("onnxruntime", 0),
        "many": ("onnxruntime", 4),
        "free": ("onnxruntime", 8),
        "heads": ("python", 0),
        "plan": ("tensorrt", 8),
        "heads_plan": ("python", 0),
    }
    files = {name: sorted(path.name for path in (served.folder / "1").iterdir()) for name, served in repository.items()}
    assert files["one"] == files["many"] == files["free"] == ["model.onnx"] and files["plan"] == ["model.plan"]
    assert files["heads_plan"] == ["heads.engine", "heads.engine.json", "model.py"]
    assert "model.py" in files["heads"] and len(files["heads"]) == 2


def test_configurations_by_tritons_own_schema(repository):
    told = in_triton("schema", *(served.folder / "config.pbtxt" for served in repository.values())).splitlines()
    configs = dict(zip(repository, map(json.loads, told)))
    shapes = {
        name: {one["name"]: one["dims"] for one in (*config["input"], *config["output"])}
        for name, config in configs.items()
    }
    rows = {"keypoints": ["100", "2"], "scores": ["100"], "descriptors": ["100", "256"], "num_keypoints": ["1"]}
    assert shapes["many"] == {"image": ["1", "240", "320"], **rows}
    assert shapes["free"] == {"image": ["1", "-1", "-1"], **rows}
    batch = {name: ["1", *dims] for name, dims in rows.items() if name != "num_keypoints"}
    assert shapes["one"] == {"image": ["1", "1", "240", "320"], **batch, "num_keypoints": ["1"]}
    assert shapes["heads"]["image"] == ["-1", "-1", "-1"] and shapes["heads"]["descriptors"] == ["-1", "256"]
    assert configs["plan"]["max_batch_size"] == 8 and "dynamic_batching" in configs["plan"]
    assert "dynamic_batching" not in configs["one"] and configs["heads_plan"]["backend"] == "python"
    assert [config["name"] for config in configs.values()] == list(repository)


@pytest.mark.exhaustive
def test_a_server_answers_as_the_direct_call(exported, tmp_path, capsys):
    """Images of several sizes, gray and in color, and one that is refused."""
    model = exported("packaged", OutputType.HEADS, 240, 320, dynamic=True)
    arguments = ["--model", str(model), "--output", str(tmp_path / "models"), "--max-keypoints", "200"]
    assert run(cli, ["triton", *arguments]) == 0
    assert "python" in capsys.readouterr().out
    gray = photograph()
    images = [gray[..., None], np.repeat(gray[:160, :, None], 3, axis=2), gray[:4, :4, None]]
    paths = [tmp_path / f"{index}.npy" for index in range(len(images))]
    for path, image in zip(paths, images):
        np.save(path, image)
    in_triton("serve", tmp_path / "models", "superpoint", tmp_path / "answers.npz", *paths)
    with SuperPoint(model, max_keypoints=200, device="cpu") as superpoint, np.load(tmp_path / "answers.npz") as answers:
        for index, image in enumerate(images[:2]):
            expected = superpoint.extract(image)
            assert len(expected) == 200
            assert answers[f"image_size{index}"].tolist() == list(expected.image_size)
            np.testing.assert_allclose(answers[f"keypoints{index}"], expected.xy, atol=1e-3)
            np.testing.assert_allclose(answers[f"scores{index}"], expected.scores, atol=1e-5)
            np.testing.assert_allclose(answers[f"descriptors{index}"], expected.descriptors, atol=1e-4)
        assert "8" in str(answers["error2"]), "the smallest image is 8x8 px"


@pytest.mark.parametrize(
    ("options", "words"), [({"name": "a/b"}, "name is 'a/b'"), ({"instances": 0}, "instances is 0")], ids=str
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(SuperPointError, match=words):
        TritonOptions(**options)


def test_models_that_are_not_served(exported, tmp_path):
    keypoints = exported("packaged", OutputType.KEYPOINTS, 240, 320, max_keypoints=100)
    with pytest.raises(SuperPointError, match="decodes in its graph, so threshold cannot be set"):
        make_repository(keypoints, tmp_path, TritonOptions(settings={"threshold": 0.1}))
    plan = engine(tmp_path, OutputType.HEADS)
    sidecar(plan).unlink()
    with pytest.raises(SuperPointError, match=r"no heads\.engine\.json beside it"):
        make_repository(plan, tmp_path)
    with pytest.raises(SuperPointError, match=r"x\.pth cannot be served"):
        make_repository(tmp_path / "x.pth", tmp_path)
