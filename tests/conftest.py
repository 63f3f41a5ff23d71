"""Shared fixtures: real photographs, real and random checkpoints of every layout, and models exported from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# One thread in each process: the tests run in as many processes as there are cores (pytest -n auto), and the networks
# here are small. Set before numpy and torch are imported, which read it once.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import pytest
import torch

from superpoint_trt import packaged
from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.layouts import Checkpoint
from superpoint_trt.convert.export import ExportOptions, export

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = SHARED / "data" / "weights"
REAL = {"v6": WEIGHTS / "superpoint_v6_int8deq.pth", "amd": WEIGHTS / "superpoint_amd_int8deq.pth"}

# Small networks keep the suite short; the layout rules do not depend on the widths.
SMALL = (8, 8, 16, 16, 24)
SMALL_DIM = 32
LAYOUTS = ("v6", "magicleap", "huggingface", "own")


def photograph(height: int = 240, width: int = 320, name: str = "astronaut") -> np.ndarray:
    """A scikit-image photograph, gray uint8, cut and scaled to size."""
    import cv2
    from skimage import data

    image = getattr(data, name)()
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image
    return cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA)


def random_state(layout: str, seed: int = 0, channels=SMALL, dim: int = SMALL_DIM) -> dict[str, torch.Tensor]:
    """A random state_dict of a layout. The BatchNorm statistics are far from the identity, some scales negative."""
    rng = np.random.default_rng(seed)
    state: dict[str, torch.Tensor] = {}
    *stages, hidden = channels
    shapes = []
    previous = 1
    for index, width in enumerate(stages):
        shapes += [((index, 0), width, previous, 3), ((index, 1), width, width, 3)]
        previous = width
    cells = 4 ** (len(stages) - 1) + 1
    for head, out in (("P", cells), ("D", dim)):
        shapes += [((head, 0), hidden, previous, 3), ((head, 1), out, hidden, 1)]
    for place, c_out, c_in, kernel in shapes:
        fan_in = c_in * kernel * kernel
        name = NAMERS[layout](*place)
        weight = rng.normal(0, np.sqrt(2.0 / fan_in), (c_out, c_in, kernel, kernel))
        state[f"{name.conv}.weight"] = torch.tensor(weight, dtype=torch.float32)
        state[f"{name.conv}.bias"] = torch.tensor(rng.normal(0, 0.1, c_out), dtype=torch.float32)
        if layout == "v6":
            statistics = {
                "weight": rng.uniform(0.4, 1.6, c_out) * np.where(rng.random(c_out) < 0.1, -1, 1),
                "bias": rng.normal(0, 0.5, c_out),
                "running_mean": rng.normal(0.3, 0.3, c_out),
                "running_var": rng.uniform(0.2, 2.0, c_out),
            }
            for key, value in statistics.items():
                state[f"{name.bn}.{key}"] = torch.tensor(value, dtype=torch.float32)
            state[f"{name.bn}.num_batches_tracked"] = torch.tensor(7)
    return state


class _Name:
    def __init__(self, conv: str, bn: str = "") -> None:
        self.conv, self.bn = conv, bn


def _v6(group, half):
    block = f"{ {'P': 'detector', 'D': 'descriptor'}.get(group) or f'backbone.{group}' }.{half}"
    return _Name(f"{block}.conv", f"{block}.bn")


def _magicleap(group, half):
    return _Name(f"conv{group + 1 if isinstance(group, int) else group}{'ab'[half]}")


def _huggingface(group, half):
    heads = {"P": "keypoint_decoder.conv_score_", "D": "descriptor_decoder.conv_descriptor_"}
    return _Name((heads.get(group) or f"encoder.conv_blocks.{group}.conv_") + "ab"[half])


NAMERS = {"v6": _v6, "magicleap": _magicleap, "huggingface": _huggingface}


def write_checkpoint(layout: str, folder: Path, seed: int = 0, **shape) -> Path:
    """A random checkpoint file of a layout."""
    from safetensors.torch import save_file

    if layout == "own":
        source = layouts.from_arrays({k: v.numpy() for k, v in random_state("v6", seed, **shape).items()})
        return layouts.save(source, folder / f"own{seed}.safetensors")
    state = random_state(layout, seed, **shape)
    if layout == "huggingface":
        path = folder / f"huggingface{seed}.safetensors"
        save_file(state, path)
    else:
        path = folder / f"{layout}{seed}.pth"
        torch.save(state, path)
    return path


class _OneThread(onnxruntime.SessionOptions):
    """Session options whose default is one thread; onnxruntime has no environment variable for it."""

    def __init__(self) -> None:
        super().__init__()
        self.intra_op_num_threads = 1


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Keeps the processes that run tests side by side from taking each other's cores."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime, "SessionOptions", _OneThread)
        yield


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory) -> Iterator[None]:
    """A cache of this session's own: no test reads the user's, and the packaged model is exported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERPOINT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    return photograph()


@pytest.fixture(scope="session")
def checkpoint_file(tmp_path_factory) -> Callable[[str], Path]:
    """Layout name -> a random checkpoint of it, the "packaged" one, or one of shared/ ("real-v6", "real-amd")."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout == "packaged":
            return packaged.WEIGHTS
        if layout.startswith("real-"):
            path = REAL[layout[len("real-") :]]
            if not path.exists():
                pytest.skip(f"{path} is not here: the real checkpoints are not part of this repository")
            return path
        if layout not in made:
            made[layout] = write_checkpoint(layout, folder)
        return made[layout]

    return get


@pytest.fixture(scope="session")
def checkpoint(checkpoint_file) -> Callable[[str], Checkpoint]:
    return lambda layout: layouts.load(checkpoint_file(layout))


@pytest.fixture(scope="session")
def exported(checkpoint_file, tmp_path_factory) -> Callable[..., Path]:
    """Checkpoint name and fields of `ExportOptions` -> the .onnx, exported once a session. Do not write to it."""
    folder = tmp_path_factory.mktemp("exported")
    made: dict[tuple[str, ExportOptions], Path] = {}

    def get(layout: str, *arguments, **options) -> Path:
        key = layout, ExportOptions(*arguments, **options)
        if key not in made:
            made[key] = export(checkpoint_file(layout), folder / f"{layout}{len(made)}.onnx", key[1])
        return made[key]

    return get
