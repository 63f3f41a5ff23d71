"""The torch reference of a network given by its topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint.layouts import BATCHNORM_EPS, NormPlacement
from superpoint_trt.checkpoint.topology import DESCRIPTORS, IMAGE, LOGITS, Convolution


class ConvBlock(nn.Sequential):
    """Convolution, BatchNorm if any, ReLU if any."""

    def __init__(self, c_in: int, c_out: int, kernel: int, layer: Convolution, norm: NormPlacement) -> None:
        super().__init__()
        padding = Convolution.padding(kernel, layer.stride)
        self.add_module("conv", nn.Conv2d(c_in, c_out, kernel, layer.stride, padding))
        if norm is NormPlacement.BEFORE_RELU:
            self.add_module("bn", nn.BatchNorm2d(c_out, eps=BATCHNORM_EPS))
        if layer.relu:
            self.add_module("relu", nn.ReLU())


def _plainly(block: ConvBlock, x: Tensor) -> Tensor:
    out: Tensor = block(x)
    return out


class CompactNet(nn.Module):
    """Convolutions in the order of their list.

    Args:
        topology: every layer reads the image or earlier ones; `detector` and `descriptor` are the heads.
        sizes: layer -> (output channels, kernel).
        norm: NONE or BEFORE_RELU.
    """

    def __init__(
        self,
        topology: Sequence[Convolution],
        sizes: Mapping[str, tuple[int, int]],
        norm: NormPlacement = NormPlacement.NONE,
    ) -> None:
        super().__init__()
        self.topology = tuple(topology)
        channels = {IMAGE: 1}
        for layer in self.topology:
            c_out, kernel = sizes[layer.name]
            block = ConvBlock(sum(channels[name] for name in layer.inputs), c_out, kernel, layer, norm)
            self.add_module(layer.name, block)
            channels[layer.name] = c_out

    def forward(self, image: Tensor, run: Callable[[ConvBlock, Tensor], Tensor] = _plainly) -> tuple[Tensor, Tensor]:
        """Raw heads.

        Args:
            image: (B, 1, H, W) float in [0, 1]; H and W multiples of 8.
            run: computes one block; training rounds here.

        Returns:
            logits (B, 65, H/8, W/8) and coarse descriptors (B, D, H/8, W/8), as the convolutions give them.
        """
        made = {IMAGE: image}
        for layer in self.topology:
            read = [made[name] for name in layer.inputs]
            block = self.get_submodule(layer.name)
            assert isinstance(block, ConvBlock)
            out = run(block, read[0] if len(read) == 1 else torch.cat(read, dim=1))
            if layer.added_to:
                base = made[layer.added_to]
                repeated = F.interpolate(out, scale_factor=2.0, mode="nearest")
                out = base + repeated[..., : base.shape[2], : base.shape[3]]
            made[layer.name] = out
        return made[LOGITS], made[DESCRIPTORS]
