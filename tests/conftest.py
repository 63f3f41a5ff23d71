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
from superpoint_trt.checkpoint.layouts import Checkpoint, NormPlacement
from superpoint_trt.checkpoint.topology import Convolution, to_json
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.networks import packaged_network

SHARED = Path(__file__).resolve().parents[2] / "shared"
WEIGHTS = SHARED / "data" / "weights"
REAL = {"v6": WEIGHTS / "superpoint_v6_int8deq.pth", "amd": WEIGHTS / "superpoint_amd_int8deq.pth"}

# Small networks keep the suite short; the layout rules do not depend on the widths.
SMALL = (8, 8, 16, 16, 24)
SMALL_DIM = 32
LAYOUTS = ("v6", "magicleap", "huggingface", "own")

COMPACT = (
    # Layer, inputs, output channels, kernel, stride, ReLU, added to: every kind of layer that a topology has.
    ("stem0", ["image"], 8, 4, 2, True, ""),
    ("stem1", ["stem0"], 16, 2, 2, True, ""),
    ("quarter0", ["stem1"], 16, 3, 1, True, ""),
    ("eighth0", ["quarter0"], 24, 2, 2, True, ""),
    ("eighth1", ["eighth0"], 24, 3, 1, True, ""),
    ("wide0", ["eighth1"], 32, 3, 2, True, ""),
    ("features", ["wide0"], 24, 1, 1, False, "eighth1"),
    ("patches", ["image"], 12, 8, 8, True, ""),
    ("detector_hidden", ["features", "patches"], 24, 3, 1, True, ""),
    ("detector", ["detector_hidden"], 65, 1, 1, False, ""),
    ("descriptor_hidden", ["features"], 24, 3, 1, True, ""),
    ("descriptor", ["descriptor_hidden"], 64, 1, 1, False, ""),
)
"""A small network of the kind that has a topology; the packaged small ones have its form, and more channels."""


def photograph(height: int = 240, width: int = 320, name: str = "astronaut") -> np.ndarray:
    """A scikit-image photograph, gray uint8, cut and scaled to size."""
    import cv2
    from skimage import data

    image = getattr(data, name)()
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image
    return cv2.resize(gray, (width, height), interpolation=cv2.INTER_AREA)


def write_photographs(folder: Path) -> Path:
    """Writes two photographs to learn from and a held-out one; returns the folder."""
    import cv2

    for name, shown in (("camera", "camera"), ("coffee", "coffee"), ("kodim07", "astronaut")):
        cv2.imwrite(str(folder / f"{name}.png"), photograph(120, 160, shown))
    return folder


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


def compact_arrays(seed: int = 0, table=COMPACT) -> tuple[tuple[Convolution, ...], dict[str, np.ndarray]]:
    """A topology and random arrays of it, BatchNorm in front of every ReLU."""
    rng = np.random.default_rng(seed)
    channels, topology, arrays = {"image": 1}, [], {}
    for name, inputs, c_out, kernel, stride, relu, added_to in table:
        topology.append(Convolution(name, tuple(inputs), stride, relu, added_to))
        c_in = sum(channels[other] for other in inputs)
        spread = np.sqrt(2.0 / (c_in * kernel * kernel))
        drawn = {
            "weight": rng.normal(0, spread, (c_out, c_in, kernel, kernel)),
            "bias": rng.normal(0, 0.1, c_out),
            "bn.weight": rng.uniform(0.6, 1.4, c_out),
            "bn.bias": rng.normal(0, 0.2, c_out),
            "bn.running_mean": rng.normal(0, 0.2, c_out),
            "bn.running_var": rng.uniform(0.5, 2.0, c_out),
        }
        arrays.update({f"{name}.{key}": value.astype(np.float32) for key, value in drawn.items()})
        channels[name] = c_out
    return tuple(topology), arrays


def random_compact(seed: int = 0, table=COMPACT, norm: NormPlacement = NormPlacement.NONE) -> Checkpoint:
    """A random checkpoint with a topology, BatchNorm folded away unless it is asked for."""
    topology, arrays = compact_arrays(seed, table)
    metadata = {"format": "superpoint-trt", "norm": "before-relu", "sampling": "half-pixel"}
    found = layouts.from_arrays(arrays, metadata={**metadata, "topology": to_json(topology)})
    return found if norm is NormPlacement.BEFORE_RELU else layouts.without_batchnorm(found)


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

    if layout == "compact":
        return layouts.save(random_compact(seed, **shape), folder / f"compact{seed}.safetensors", half=True)
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
    """Name -> random weights of that layout or "compact"; "packaged", "small"; of shared/ "real-v6", "real-amd"."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Path] = {}

    def get(layout: str) -> Path:
        if layout == "packaged":
            return packaged.WEIGHTS
        if layout == "small":
            return packaged_network("small").weights
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
