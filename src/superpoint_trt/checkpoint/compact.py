"""The torch reference of a network given by its topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint.layouts import BATCHNORM_EPS, Checkpoint, NormPlacement, from_arrays
from superpoint_trt.checkpoint.topology import DESCRIPTORS, IMAGE, LOGITS, Convolution, to_json
from superpoint_trt.core.types import Family, Sampling, SuperPointError


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
            try:
                self.add_module(layer.name, block)
            except KeyError:
                raise SuperPointError(f"a layer cannot be called {layer.name}, which PyTorch has for itself.") from None
            channels[layer.name] = c_out

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> CompactNet:
        """The network of a checkpoint that has a topology, with its weights, in eval mode."""
        sizes = {name: (layer.weight.shape[0], layer.weight.shape[2]) for name, layer in checkpoint.layers.items()}
        net = cls(checkpoint.topology, sizes, checkpoint.norm)
        state: dict[str, Tensor] = {}
        for name, layer in checkpoint.layers.items():
            state[f"{name}.conv.weight"] = torch.from_numpy(layer.weight)
            state[f"{name}.conv.bias"] = torch.from_numpy(layer.bias)
            if layer.norm:
                state.update({f"{name}.bn.{key}": torch.from_numpy(value) for key, value in vars(layer.norm).items()})
                state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
        net.load_state_dict(state)
        return net.eval()

    def checkpoint(self) -> Checkpoint:
        """The network's weights as they are, verified: descriptors sampled half-pixel, keypoints sub-pixel.

        Raises:
            SuperPointError: the topology is none that a checkpoint may have, or a value is not finite.
        """
        arrays = {
            key.replace(".conv.", "."): value.detach().float().cpu().numpy()
            for key, value in self.state_dict().items()
            if not key.endswith("num_batches_tracked")
        }
        has_norm = any(".bn." in key for key in arrays)
        metadata = {
            "format": Family.SUPERPOINT_TRT.value,
            "norm": (NormPlacement.BEFORE_RELU if has_norm else NormPlacement.NONE).value,
            "sampling": Sampling.HALF_PIXEL.value,
            "subpixel": "yes",
            "topology": to_json(self.topology),
        }
        return from_arrays(arrays, metadata=metadata, source="the network")

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
