"""The PyTorch reference's dense outputs, in a process of its own: the Python that has TensorRT may have no torch.

python reference.py WEIGHTS OUT.npz HEIGHTxWIDTH IMAGE [IMAGE ...] -> inputs_i, scores_i, descriptors_i
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))


def main(weights: str, out: str, size: str, *photos: str) -> None:
    import cv2

    from superpoint_trt.core.image import load_image, parse_size, to_gray
    from superpoint_trt.run.backends.torch import TorchBackend

    height, width = parse_size(size)
    found = {}
    with TorchBackend(weights, device="cpu") as reference:
        for index, photo in enumerate(photos):
            gray = cv2.resize(to_gray(load_image(photo)), (width, height), interpolation=cv2.INTER_AREA)
            inputs = np.ascontiguousarray(gray)[None, None]
            found[f"inputs_{index}"] = inputs
            found.update({f"{name}_{index}": value for name, value in reference.infer(inputs).items()})
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
