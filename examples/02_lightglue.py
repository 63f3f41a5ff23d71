"""Hands keypoints over to LightGlue (https://github.com/cvg/LightGlue, installed separately).

    python examples/02_lightglue.py [CHECKPOINT]

LightGlue's published `superpoint` matcher is trained for Magic Leap's weights. Their licence allows non-commercial
research only:

    superpoint weights fetch magicleap

gives the CHECKPOINT. The default network, full, which this script takes without an argument, show the tensors; no
LightGlue is trained for them. `small` has 64 numbers a descriptor, where `superpoint` matchers take 256.
"""

from __future__ import annotations

import sys

import torch

from superpoint_trt import Keypoints, SuperPoint, packaged


def lightglue_features(found: Keypoints) -> dict[str, torch.Tensor]:
    """One image's features under LightGlue's names, with its batch axis.

    Returns:
        keypoints (1, N, 2) and keypoint_scores (1, N) float32, descriptors (1, N, D) float32,
        image_size (1, 2) float32, width then height.
    """
    return {
        "keypoints": torch.from_numpy(found.xy)[None],
        "keypoint_scores": torch.from_numpy(found.scores)[None],  # this package says `scores`
        "descriptors": torch.from_numpy(found.descriptors)[None],
        "image_size": torch.tensor([found.image_size], dtype=torch.float32),
    }


def main(model: str | None) -> None:
    """Prints the two dicts, and the matches if LightGlue is installed."""
    with SuperPoint(model, max_keypoints=2048) if model else SuperPoint(max_keypoints=2048) as superpoint:
        found = superpoint.extract(packaged.PHOTO)
    data = {"image0": lightglue_features(found), "image1": lightglue_features(found.top(1000))}
    for image, features in data.items():
        for name, tensor in features.items():
            print(f"{image}  {name:<16}{tuple(tensor.shape)!s:<16}{tensor.dtype}")
    try:
        from lightglue import LightGlue
    except ImportError:
        print("LightGlue is not installed: this is what LightGlue(features='superpoint')(data) takes")
        return
    with torch.inference_mode():
        matches = LightGlue(features="superpoint").eval()(data)["matches"][0]
    print(f"{len(matches)} matches, rows of image0 and image1")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
