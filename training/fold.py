"""A trained network -> the shipped checkpoint, BatchNorm folded away; and back, to go on training."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.compact import CompactNet, ConvBlock
from superpoint_trt.checkpoint.layouts import Checkpoint, NormPlacement
from superpoint_trt.checkpoint.reference import Block, Network, network
from superpoint_trt.core.types import CELL_PX, Family, Sampling, SuperPointError

_BLOCK = re.compile(r"(?:backbone\.(\d+)|(detector|descriptor))\.([01])\.(conv|bn)\.(.+)")


def fold(net: Network) -> Checkpoint:
    """The same network without BatchNorm.

    Args:
        net: with BatchNorm before ReLU, where it folds into the convolution in front of it exactly.
    """
    if isinstance(net, CompactNet):
        return layouts.without_batchnorm(net.checkpoint())
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
        "subpixel": "yes",
    }
    return layouts.without_batchnorm(layouts.from_arrays(arrays, metadata=metadata, source="the network"))


def learnable(path: Path) -> Checkpoint:
    """Reads a checkpoint as the other stages write it.

    Raises:
        SuperPointError: it cannot be read, or its heads are not what the losses expect.
    """
    checkpoint = layouts.load(path)
    if checkpoint.norm is not NormPlacement.NONE:
        raise SuperPointError(f"{path} has BatchNorm; expected it folded away, as the other stages write checkpoints.")
    if checkpoint.sampling is not Sampling.HALF_PIXEL or checkpoint.stride_px != CELL_PX:
        raise SuperPointError(
            f"{path} has {checkpoint.sampling.value} sampling and cells of {checkpoint.stride_px} px; expected "
            f"{Sampling.HALF_PIXEL.value} and {CELL_PX}, as this project trains."
        )
    return checkpoint


@torch.no_grad()
def unfold(net: Network, checkpoint: Checkpoint, images: Tensor) -> None:
    """Makes `net` compute what a shipped checkpoint does, with BatchNorm to train with.

    Each BatchNorm takes away the mean and the scale that its convolution has on `images`, and puts both back: in eval
    mode nothing changes, and in training only as far as a batch differs from them.

    Args:
        net: of the checkpoint's shape, with BatchNorm before ReLU.
        checkpoint: Conv + ReLU, as `fold` writes it.
        images: (B, 1, H, W) as the network will see them, on its device.
    """
    plain = network(checkpoint).to(images.device)
    blocks = [[block for block in each.modules() if isinstance(block, (Block, ConvBlock))] for each in (net, plain)]
    hooks = [old.conv.register_forward_hook(_measure(new)) for new, old in zip(*blocks)]
    plain(images)
    for hook in hooks:
        hook.remove()


def _measure(block: Block | ConvBlock) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    """Gives `block` the convolution that has just run, by what came out of it."""

    def measured(conv: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        variance, mean = torch.var_mean(out, dim=(0, 2, 3), correction=0)
        block.conv.weight.copy_(conv.weight)
        block.conv.bias.zero_()
        block.bn.running_mean.copy_(mean - conv.bias)
        block.bn.running_var.copy_(variance)
        block.bn.weight.copy_((variance + block.bn.eps).sqrt())
        block.bn.bias.copy_(mean)

    return measured
