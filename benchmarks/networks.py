"""Processor time of a 640x480 image in this project's networks and in others: column `ms` of docs/images/networks.csv.

    python benchmarks/networks.py --edgepoint2 FOLDER --xfeat FOLDER --lightglue FOLDER --aliked FOLDER

From the picture in memory to its best 1000 keypoints and their descriptors. Everything runs on one thread, and the
processor's time counts, so other work on the machine disturbs little. This project's networks run as users run them,
in onnxruntime, and also in PyTorch. The others run by their authors' code, in PyTorch; the networks of EdgePoint2 and
XFeat also in onnxruntime, without decoding. A network whose folder is not given is left out.

The folders are clones of github.com/HITCSC/EdgePoint2, verlab/accelerated_features, cvg/LightGlue (which has ALIKED for
CPUs; it needs torchvision and kornia) and Shiaoming/ALIKED (its weights).
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import onnxruntime as ort
import torch
from common import machine, photograph

from superpoint_trt import SuperPoint
from superpoint_trt.checkpoint.reference import SuperPoint as Reference
from superpoint_trt.core.networks import packaged_network
from superpoint_trt.prove.opencv_features import opencv_extractor

HEIGHT, WIDTH = 480, 640
COUNT = 1000
OURS = ("full", "small")

Run = Callable[[], object]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The authors' code finds its modules and weights from its own folder."""
    before = Path.cwd()
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))


def ours(gray: np.ndarray) -> Iterator[tuple[str, Run]]:
    """The packaged networks in onnxruntime, as `extract` runs them, and in PyTorch."""
    for name in OURS:
        superpoint = SuperPoint(name, device="cpu", max_keypoints=COUNT, threads=1)
        yield f"{name}, onnxruntime", lambda superpoint=superpoint: superpoint.extract(gray)
    for name in OURS:
        reference = Reference.from_file(packaged_network(name).weights, max_num_keypoints=COUNT)
        yield f"{name}, PyTorch", lambda reference=reference: reference({"image": tensor_of(gray)})


def opencv(gray: np.ndarray) -> Iterator[tuple[str, Run]]:
    """OpenCV's features."""
    for name, kind in (("RootSIFT", "rootsift"), ("ORB", "orb")):
        extract = opencv_extractor(kind, COUNT)
        yield name, lambda extract=extract: extract(gray.astype(np.float32) / 255)


def edgepoint2(folder: Path, gray: np.ndarray) -> Iterator[tuple[str, Run]]:
    """EdgePoint2 by its authors' wrapper."""
    with inside(folder):
        from edgepoint2 import EdgePoint2Wrapper

        for name in ("E64", "S64"):
            model = EdgePoint2Wrapper(name, top_k=COUNT).eval()
            yield f"EdgePoint2-{name}", lambda model=model: model(tensor_of(gray))
            yield f"EdgePoint2-{name}, network in onnxruntime", exported(model.model, gray)


def xfeat(folder: Path, gray: np.ndarray) -> Iterator[tuple[str, Run]]:
    """XFeat, sparse, by its authors' class."""
    with inside(folder):
        from modules.xfeat import XFeat

        weights = folder / "weights" / "xfeat.pt"
        # Random weights take as long; with them every local maximum counts, or none would.
        model = XFeat(top_k=COUNT) if weights.is_file() else XFeat(None, COUNT, detection_threshold=0.0)
        yield "XFeat", lambda: model.detectAndCompute(tensor_of(gray))
        yield "XFeat, network in onnxruntime", exported(model.net, gray)


def aliked(folder: Path, weights: Path, gray: np.ndarray) -> Iterator[tuple[str, Run]]:
    """ALIKED in LightGlue's form: its authors' needs an NVIDIA GPU."""
    with inside(folder):
        from lightglue import ALIKED

        for name in ("aliked-n16", "aliked-n16rot"):
            ALIKED.checkpoint_url = f"{weights.as_uri()}/models/{{}}.pth"
            model = ALIKED(model_name=name, max_num_keypoints=COUNT, detection_threshold=-1).eval()
            yield f"ALIKED-{name[7:]}", lambda model=model: model({"image": tensor_of(gray).expand(-1, 3, -1, -1)})


def exported(network: torch.nn.Module, gray: np.ndarray) -> Run:
    """A network in onnxruntime, as PyTorch exports it."""
    file = io.BytesIO()
    torch.onnx.export(network.eval(), (tensor_of(gray),), file, dynamo=False, opset_version=17)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {session.get_inputs()[0].name: tensor_of(gray).numpy()})


def tensor_of(gray: np.ndarray) -> torch.Tensor:
    """(1, 1, H, W) float32 in [0, 1]."""
    return torch.from_numpy(gray[None, None].astype(np.float32) / 255)


def processor_ms(runs: dict[str, Run], iterations: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Milliseconds that the processor works for each run. The runs take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for iteration in range(warm_up + iterations):
        for name, run in runs.items():
            with torch.inference_mode():
                started = time.process_time()
                run()
                spent = time.process_time() - started
            if iteration >= warm_up:
                times[name].append(spent * 1e3)
    return {name: np.array(values) for name, values in times.items()}


@click.command()
@click.option("--edgepoint2", "edgepoint2_folder", type=click.Path(exists=True, path_type=Path, resolve_path=True))
@click.option("--xfeat", "xfeat_folder", type=click.Path(exists=True, path_type=Path, resolve_path=True))
@click.option("--lightglue", "lightglue_folder", type=click.Path(exists=True, path_type=Path, resolve_path=True))
@click.option("--aliked", "aliked_folder", type=click.Path(exists=True, path_type=Path, resolve_path=True))
@click.option("--iterations", default=20, show_default=True)
def main(iterations: int, **folders: Path | None) -> None:
    """Time all networks in turn on one thread."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    gray = photograph(HEIGHT, WIDTH)
    runs: dict[str, Any] = dict([*ours(gray), *opencv(gray)])
    if folders["edgepoint2_folder"]:
        runs.update(edgepoint2(folders["edgepoint2_folder"], gray))
    if folders["xfeat_folder"]:
        runs.update(xfeat(folders["xfeat_folder"], gray))
    if folders["lightglue_folder"] and folders["aliked_folder"]:
        runs.update(aliked(folders["lightglue_folder"], folders["aliked_folder"], gray))
    print(f"{machine()}; onnxruntime {ort.__version__}, torch {torch.__version__}")
    print(f"{WIDTH}x{HEIGHT}, one thread, processor time, {iterations} runs in turn")
    for name, values in processor_ms(runs, iterations).items():
        median, p95 = np.percentile(values, (50, 95))
        print(f"{name:<40}median {median:8.1f} ms, least {values.min():8.1f}, p95 {p95:8.1f}")


if __name__ == "__main__":
    main()
