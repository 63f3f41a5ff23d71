"""Exact dense outputs of a checkpoint, in a process of its own: the Python that has TensorRT may have no torch.

python reference.py WEIGHTS OUT.npz HEIGHTxWIDTH IMAGE [IMAGE ...] -> inputs_i, scores_i, descriptors_i

PyTorch computes them where it is installed, else onnxruntime on the CPU from the fp32 .onnx.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))


def open_reference(weights: str, folder: str):
    """A backend that computes in fp32 on the CPU."""
    try:
        from superpoint_trt.run.backends.torch import TorchBackend
    except ImportError:
        from superpoint_trt.convert.export import ExportOptions, export
        from superpoint_trt.run.backends.onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(export(weights, Path(folder) / "dense.onnx", ExportOptions(dynamic=True)), "cpu")
    return TorchBackend(weights, device="cpu")


def main(weights: str, out: str, size: str, *photos: str) -> None:
    import cv2

    from superpoint_trt.core.image import load_image, parse_size, to_gray

    height, width = parse_size(size)
    found = {}
    with tempfile.TemporaryDirectory() as folder, open_reference(weights, folder) as reference:
        print(f"reference: {reference.runtime}")
        for index, photo in enumerate(photos):
            gray = cv2.resize(to_gray(load_image(photo)), (width, height), interpolation=cv2.INTER_AREA)
            inputs = np.ascontiguousarray(gray)[None, None]
            found[f"inputs_{index}"] = inputs
            found.update({f"{name}_{index}": value for name, value in reference.infer(inputs).items()})
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
