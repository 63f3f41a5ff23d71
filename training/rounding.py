"""The network as int8 computes it, so that it learns to bear it (quantisation-aware training, Jacob et al. 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint.compact import CompactNet
from superpoint_trt.checkpoint.reference import Block, SuperPointNet

LARGEST = 127


def forward(net: SuperPointNet | CompactNet, image: Tensor, rounded_share: float) -> tuple[Tensor, Tensor]:
    """`net(image)`, where some views' activations, and in as many steps all weights, are rounded to int8.

    Some and not all: what is shipped must serve in full precision too, and find the same points in both.

    Args:
        net: BatchNorm, if any, before ReLU.
        image: (B, 1, H, W) float in [0, 1].
        rounded_share: 0 to 1; at 0 nothing is done.

    Returns:
        logits and coarse descriptors, as of SuperPointNet.
    """
    if not rounded_share:
        return net(image)
    views = torch.rand((len(image), 1, 1, 1), device=image.device) < rounded_share
    weights = torch.rand((), device=image.device) < rounded_share
    if isinstance(net, CompactNet):
        return net(image, lambda block, x: _rounded(block, x, views, weights))
    features = _through(net.backbone, image, views, weights)
    detector = _through(net.detector, features, views, weights)
    return detector, _through(net.descriptor, features, views, weights)


def _through(layers: nn.Sequential, x: Tensor, views: Tensor, weights: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, Block):
            x = _rounded(layer, x, views, weights)
        elif isinstance(layer, nn.Sequential):
            x = _through(layer, x, views, weights)
        else:
            x = layer(x)
    return x


def _rounded(block: nn.Sequential, x: Tensor, views: Tensor, weights: Tensor) -> Tensor:
    """One convolution as int8 computes it, and what follows it in its block."""
    conv, *rest = block
    assert isinstance(conv, nn.Conv2d)
    # Each channel has a scale of its own, so this times BatchNorm's factor is the folded weight, rounded.
    weight = torch.where(weights, _round(conv.weight, (1, 2, 3)), conv.weight)
    # An image has 8 bits already, and `superpoint quantize` keeps them all.
    read = x if x.shape[1] == 1 else torch.where(views, _round(x, (0, 1, 2, 3)), x)
    x = F.conv2d(read, weight, conv.bias, conv.stride, conv.padding)
    for layer in rest:
        x = layer(x)
    return x


def _round(x: Tensor, one_scale: tuple[int, ...]) -> Tensor:
    """To the nearest of 255 steps, over the dimensions that share a scale; gradients pass as if nothing were done."""
    scale = x.detach().abs().amax(dim=one_scale, keepdim=True).clamp(min=1e-12) / LARGEST
    return x + ((x / scale).round() * scale - x).detach()
