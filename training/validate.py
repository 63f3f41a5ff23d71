"""The curve over training: the literature's metrics on pairs made of photographs that are never trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from superpoint_trt.checkpoint.reference import SuperPointNet, decode, dense
from superpoint_trt.core.types import DecodeOptions, Keypoints, Sampling
from superpoint_trt.prove import metrics
from training.bank import Bank
from training.views import disturb, pair

SIZE_HW = (480, 640)
THRESHOLD = 0.001
SEED = 20180415


@torch.no_grad()
def validate(net: SuperPointNet, bank: Bank, pairs: int) -> dict[str, float]:
    """Repeatability and localisation of 300 points, matching accuracy and homography correctness at 3 px of 1000.

    The pairs are the same at every call. net must be in eval mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        rows = np.array([_pair(net, bank, index % len(bank)) for index in range(pairs)])
    names = ("repeatability", "localisation_px", "mma3", "homography3")
    return {name: round(value, 4) for name, value in zip(names, map(_mean, rows.T))}


def _mean(values: np.ndarray) -> float:
    """Of the pairs for which a figure is defined; 0 of none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else 0.0


def _pair(net: SuperPointNet, bank: Bank, index: int) -> tuple[float, float, float, float]:
    """The figures of one fresh pair."""
    first, second, homography = pair(bank.images[index : index + 1], bank.sizes[index : index + 1], SIZE_HW)
    matrix = homography[0].double().cpu().numpy()
    views = [(disturb(view.image), view.inside) for view in (first, second)]
    few, many = ([_keypoints(net, image, inside, radius) for image, inside in views] for radius in (4, 8))
    again = metrics.repeatability(*few, matrix, 300)
    return (
        again.share or 0.0,
        np.nan if again.localization_error_px is None else again.localization_error_px,
        metrics.matching_accuracy(*many, matrix, (3,))[0],
        float(metrics.homography_error_px(*many, matrix) <= 3),
    )


def _keypoints(net: SuperPointNet, image: Tensor, inside: Tensor, radius_px: int) -> Keypoints:
    """Of the part of a view that shows its image."""
    with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=image.device.type == "cuda"):
        logits, coarse = net(image.contiguous(memory_format=torch.channels_last))
    scores, descriptors = dense(logits.float(), coarse.float())
    scores = scores * (inside[:, 0] > 0.999)
    options = DecodeOptions(radius_px, threshold=THRESHOLD, max_keypoints=3000)
    xy, found, sampled = (part.cpu().numpy() for part in decode(scores, descriptors, options, Sampling.HALF_PIXEL)[0])
    return Keypoints(xy, found, sampled, (image.shape[3], image.shape[2]))
