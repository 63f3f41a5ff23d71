"""Photographs for these tests, made of the packaged one, and checkpoints made of random numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

VIEW_WH = (768, 576)
SMALL_CHANNELS = (16, 16, 32, 32, 64)
SMALL_DIM = 64


def write_views(folder: Path, count: int) -> list[Path]:
    """Different views of the packaged photograph: turned, mirrored and cut out, as PNG."""
    import cv2

    from superpoint_trt import packaged

    whole = cv2.imread(str(packaged.PHOTO))
    paths = []
    for index in range(count):
        view = np.rot90(whole, index % 4)
        view = view[:, ::-1] if index >= 4 else view
        top = (index * 29) % 128  # 512 - 384 px
        view = cv2.resize(np.ascontiguousarray(view[top : top + 384]), VIEW_WH, interpolation=cv2.INTER_CUBIC)
        paths.append(folder / f"view{index}.png")
        cv2.imwrite(str(paths[-1]), view)
    return paths


def write_batchnorm_checkpoint(path: Path, seed: int = 0) -> Path:
    """A small random checkpoint of the v6 layout, whose BatchNorm stays in the graph, as safetensors."""
    from superpoint_trt.checkpoint.layouts import from_arrays, save

    rng = np.random.default_rng(seed)
    *stages, hidden = SMALL_CHANNELS
    arrays: dict[str, np.ndarray] = {}

    def layer(name: str, inputs: int, outputs: int, kernel: int) -> None:
        spread = np.sqrt(2.0 / (inputs * kernel * kernel))
        arrays[f"{name}.conv.weight"] = rng.normal(0, spread, (outputs, inputs, kernel, kernel)).astype(np.float32)
        arrays[f"{name}.conv.bias"] = rng.normal(0, 0.1, outputs).astype(np.float32)
        signs = np.where(rng.random(outputs) < 0.1, -1, 1)
        arrays[f"{name}.bn.weight"] = (rng.uniform(0.4, 1.6, outputs) * signs).astype(np.float32)
        arrays[f"{name}.bn.bias"] = rng.normal(0, 0.5, outputs).astype(np.float32)
        arrays[f"{name}.bn.running_mean"] = rng.normal(0.3, 0.3, outputs).astype(np.float32)
        arrays[f"{name}.bn.running_var"] = rng.uniform(0.2, 2.0, outputs).astype(np.float32)

    previous = 1
    for index, width in enumerate(stages):
        layer(f"backbone.{index}.0", previous, width, 3)
        layer(f"backbone.{index}.1", width, width, 3)
        previous = width
    for head, outputs in (("detector", 65), ("descriptor", SMALL_DIM)):
        layer(f"{head}.0", previous, hidden, 3)
        layer(f"{head}.1", hidden, outputs, 1)
    return save(from_arrays(arrays), path)


COMPACT = (
    # Layer, inputs, output channels, kernel, stride, ReLU, added to: the form of the packaged small networks.
    ("stem0", ["image"], 16, 4, 2, True, ""),
    ("stem1", ["stem0"], 32, 2, 2, True, ""),
    ("quarter0", ["stem1"], 32, 3, 1, True, ""),
    ("quarter1", ["quarter0"], 32, 3, 1, True, ""),
    ("eighth0", ["quarter1"], 64, 2, 2, True, ""),
    ("eighth1", ["eighth0"], 64, 3, 1, True, ""),
    ("eighth2", ["eighth1"], 64, 3, 1, True, ""),
    ("eighth3", ["eighth2"], 64, 3, 1, True, ""),
    ("wide0", ["eighth3"], 128, 3, 2, True, ""),
    ("wide1", ["wide0"], 128, 3, 1, True, ""),
    ("features", ["wide1"], 64, 1, 1, False, "eighth3"),
    ("patches", ["image"], 32, 8, 8, True, ""),
    ("detector_hidden", ["features", "patches"], 64, 3, 1, True, ""),
    ("detector", ["detector_hidden"], 65, 1, 1, False, ""),
    ("descriptor_hidden", ["features"], 64, 3, 1, True, ""),
    ("descriptor", ["descriptor_hidden"], 64, 1, 1, False, ""),
)


def write_compact_checkpoint(path: Path, seed: int = 0) -> Path:
    """A random checkpoint with a topology, BatchNorm folded, descriptors of 64 numbers."""
    from superpoint_trt.checkpoint.layouts import from_arrays, save
    from superpoint_trt.checkpoint.topology import Convolution, to_json

    rng = np.random.default_rng(seed)
    channels, topology, arrays = {"image": 1}, [], {}
    for name, inputs, outputs, kernel, stride, relu, added_to in COMPACT:
        topology.append(Convolution(name, tuple(inputs), stride, relu, added_to))
        shape = (outputs, sum(channels[other] for other in inputs), kernel, kernel)
        # The head is steep, so that scores differ by more than a low precision rounds.
        spread = np.sqrt(2.0 / np.prod(shape[1:])) * (6 if name == "detector" else 1)
        arrays[f"{name}.weight"] = rng.normal(0, spread, shape).astype(np.float32)
        arrays[f"{name}.bias"] = rng.normal(0, 0.1, outputs).astype(np.float32)
        channels[name] = outputs
    metadata = {"format": "superpoint-trt", "norm": "none", "sampling": "half-pixel", "topology": to_json(topology)}
    return save(from_arrays(arrays, metadata=metadata), path)
