"""A trained network -> the shipped checkpoint: BatchNorm folded away, plain Conv + ReLU."""

from __future__ import annotations

import re

from superpoint_trt.checkpoint import layouts as checkpoints
from superpoint_trt.checkpoint.layouts import Checkpoint, NormPlacement
from superpoint_trt.checkpoint.reference import SuperPointNet
from superpoint_trt.core.types import Family, Sampling

_BLOCK = re.compile(r"(?:backbone\.(\d+)|(detector|descriptor))\.([01])\.(conv|bn)\.(.+)")


def fold(net: SuperPointNet) -> Checkpoint:
    """The same network without BatchNorm.

    Args:
        net: with BatchNorm before ReLU, where it folds into the convolution in front of it exactly.
    """
    arrays = {}
    for key, value in net.state_dict().items():
        match = _BLOCK.fullmatch(key)
        if not match or key.endswith("num_batches_tracked"):
            continue
        stage, head, half, part, parameter = match.groups()
        group = str(int(stage) + 1) if stage else {"detector": "P", "descriptor": "D"}[head]
        name = f"conv{group}{'ab'[int(half)]}.{'bn.' if part == 'bn' else ''}{parameter}"
        arrays[name] = value.detach().float().cpu().numpy()
    metadata = {
        "format": Family.SUPERPOINT_TRT.value,
        "norm": NormPlacement.BEFORE_RELU.value,
        "sampling": Sampling.HALF_PIXEL.value,
    }
    return checkpoints.without_batchnorm(checkpoints.from_arrays(arrays, metadata=metadata, source="the network"))
