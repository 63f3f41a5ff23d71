"""What several test modules make: score maps, graphs of this project and of other tools, image sequences."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from conftest import photograph
from onnx import helper, numpy_helper

from superpoint_trt.convert.export import ExportOptions, to_onnx
from superpoint_trt.core.types import OutputType
from superpoint_trt.run.backends import open_backend

KINDS = ("random", "smooth", "plateaus", "few levels", "below threshold")
MOVE = np.array([[1.0, 0, 24], [0, 1, 8], [0, 0, 1]])
SAME = np.eye(3)


def rarely(*values):
    """Parameters that only `make test-all` runs."""
    return [pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=pytest.mark.exhaustive) for one in values]


def cases(*axes, fast):
    """Every combination of the axes' values, for `parametrize`; those that are not `fast` are marked exhaustive."""
    return [
        pytest.param(*values, marks=() if fast(*values) else pytest.mark.exhaustive)
        for values in itertools.product(*axes)
    ]


def score_map(kind: str, seed: int = 0, height: int = 64, width: int = 96) -> np.ndarray:
    """Score maps that break careless decoders."""
    rng = np.random.default_rng(seed)
    if kind == "smooth":
        coarse = rng.random((height // 4, width // 4))
        return np.kron(coarse, np.ones((4, 4))).astype(np.float32) * 0.1  # 4x4 plateaus everywhere
    scores = rng.random((height, width)).astype(np.float32) ** 8
    if kind == "plateaus":
        scores[10:13, 20:31] = 0.9
        scores[40:60, 50:70] = 0.5
        scores[:, :2] = 0.7
    if kind == "few levels":  # ties all over, as int8 and fp16 make them
        scores = np.round(scores * 8) / np.float32(8)
    if kind == "below threshold":
        scores *= 0.004
    return scores


def graph_of(checkpoint, kind="dense", layout="v6", opset=17, dynamic=False, **size):
    return to_onnx(checkpoint(layout), ExportOptions(OutputType(kind), opset=opset, dynamic=dynamic, **size))


def foreign(model: onnx.ModelProto) -> onnx.ModelProto:
    """As another tool writes it: no metadata, no node names, weights in Constant nodes, a scaled image."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.metadata_props[:]
    graph = made.graph
    constants = [
        helper.make_node("Constant", [], [weight.name], value=weight)
        for weight in graph.initializer
        if weight.name.endswith((".weight", ".bias"))
    ]
    rest = [weight for weight in graph.initializer if not weight.name.endswith((".weight", ".bias"))]
    nodes = [*constants, helper.make_node("Mul", ["image", "gain"], ["scaled"])]
    for node in graph.node:
        node.name = ""
        node.input[:] = ["scaled" if name == "image" else name for name in node.input]
        nodes.append(node)
    rest.append(numpy_helper.from_array(np.array(1.0, np.float32), "gain"))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    weights = [onnx.TensorProto.FromString(weight.SerializeToString()) for weight in rest]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(copies)
    graph.initializer.extend(weights)
    return made


def run_in_onnxruntime(model: onnx.ModelProto, image: np.ndarray, folder: Path) -> list[np.ndarray]:
    """(H, W) in [0, 1] -> outputs, by this package's own backend."""
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    with open_backend(folder / "m.onnx", "cpu") as backend:
        outputs = backend.infer(image[None, None])
    return [outputs[value.name][0] for value in model.graph.output]


def write_sequence(folder, oxford=False, homographies=(MOVE, SAME), suffix="ppm"):
    """Image 1 and its exact translations, cut from one photograph so that nothing is interpolated."""
    folder.mkdir(parents=True)
    whole = photograph(600, 800, "coffee")
    for index, homography in enumerate((np.eye(3), *homographies), start=1):
        dx, dy = int(homography[0, 2]), int(homography[1, 2])
        view = whole[60 - dy : 540 - dy, 80 - dx : 720 - dx]
        path = folder / (f"img{index}.{suffix}" if oxford else f"{index}.{suffix}")
        assert cv2.imwrite(str(path), np.repeat(view[..., None], 3, axis=2))  # .ppm is colour
        if index > 1:
            np.savetxt(folder / (f"H1to{index}p" if oxford else f"H_1_{index}"), homography)
    return folder
