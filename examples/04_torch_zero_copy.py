"""Keypoints and descriptors stay on the GPU and become torch tensors without a copy.

    superpoint export --type heads --output heads.onnx
    superpoint build --onnx heads.onnx --engine heads.engine --precision fp16
    python examples/04_torch_zero_copy.py heads.engine

Needs an NVIDIA GPU, TensorRT, and torch with CUDA.
"""

from __future__ import annotations

import sys

import torch

from superpoint_trt import SuperPoint, packaged


def main(engine: str) -> None:
    """Extracts twice, matches on the GPU, and prints where the tensors live."""
    with SuperPoint(engine, max_keypoints=1024, half_descriptors=True) as superpoint:
        print(superpoint)
        found = superpoint.extract_device(packaged.PHOTO)
        # The arrays belong to the extractor and are valid until its next call: clone what has to live longer.
        first = torch.from_dlpack(found.descriptors).clone()  # (N, D) float16, unit length

        found = superpoint.extract_device(packaged.PHOTO)
        keypoints = torch.from_dlpack(found.keypoints)  # (N, 2) float32, x then y, pixels of the network's input
        second = torch.from_dlpack(found.descriptors)

        similarity = first @ second.T  # cosine, since descriptors have unit length
        forward, backward = similarity.argmax(dim=1), similarity.argmax(dim=0)
        mutual = backward[forward] == torch.arange(len(first), device=first.device)
        print(f"{len(keypoints)} keypoints on {keypoints.device}, {int(mutual.sum())} mutual nearest neighbours")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
