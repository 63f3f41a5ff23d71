"""The PyTorch reference that every other backend is measured against.

`network` makes the pure network of a checkpoint, image -> raw heads: `SuperPointNet`, the VGG of the paper, or
`compact.CompactNet`, which a topology describes. `dense` and `decode` are written with torch's own operators and
share no code with the numpy decode, so that each checks the other. `SuperPoint` joins them behind the interface of the
MIT reference (rpautrat/SuperPoint): a dictionary in, lists of tensors out.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.compact import CompactNet
from superpoint_trt.checkpoint.layouts import BATCHNORM_EPS, Checkpoint, NormPlacement
from superpoint_trt.core.files import PathLike
from superpoint_trt.core.types import DecodeOptions, Sampling, SuperPointError

RGB_TO_GRAY = (0.299, 0.587, 0.114)


class Block(nn.Sequential):
    """Convolution and, in the checkpoint's own order, ReLU and BatchNorm. Parameter names are the v6 layout's."""

    def __init__(self, c_in: int, c_out: int, kernel: int, norm: NormPlacement, relu: bool = True) -> None:
        conv = ("conv", nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2))
        activation = [("relu", nn.ReLU())] if relu else []
        bn = [("bn", nn.BatchNorm2d(c_out, eps=BATCHNORM_EPS))] if norm is not NormPlacement.NONE else []
        tail = bn + activation if norm is NormPlacement.BEFORE_RELU else activation + bn
        super().__init__(OrderedDict([conv, *tail]))


class SuperPointNet(nn.Module):
    """The network alone (DeTone et al. 2018, section 3): shared VGG-style backbone, detector and descriptor heads.

    Args:
        channels: output channels of each stage, then of the heads' hidden layers.
        descriptor_dim: D.
        norm: where BatchNorm sits.
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 64, 128, 128, 256),
        descriptor_dim: int = 256,
        norm: NormPlacement = NormPlacement.AFTER_RELU,
    ) -> None:
        super().__init__()
        *stages, hidden = channels
        self.stride = 2 ** (len(stages) - 1)
        backbone = []
        for index, (c_in, c_out) in enumerate(zip([1, *stages[:-1]], stages)):
            blocks: list[nn.Module] = [Block(c_in, c_out, 3, norm), Block(c_out, c_out, 3, norm)]
            if index < len(stages) - 1:
                blocks.append(nn.MaxPool2d(2))
            backbone.append(nn.Sequential(*blocks))
        self.backbone = nn.Sequential(*backbone)
        self.detector = self._head(stages[-1], hidden, self.stride**2 + 1, norm)
        self.descriptor = self._head(stages[-1], hidden, descriptor_dim, norm)

    @staticmethod
    def _head(c_in: int, hidden: int, c_out: int, norm: NormPlacement) -> nn.Sequential:
        return nn.Sequential(Block(c_in, hidden, 3, norm), Block(hidden, c_out, 1, norm, relu=False))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> SuperPointNet:
        """The network of a checkpoint, with its weights, in eval mode."""
        net = cls(checkpoint.channels, checkpoint.descriptor_dim, checkpoint.norm)
        net.load_state_dict(_module_state(checkpoint))
        return net.eval()

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Raw heads.

        Args:
            image: (B, 1, H, W) float in [0, 1]; H and W multiples of 8 (a remainder is cut off, as torch pools).

        Returns:
            logits (B, 65, H/8, W/8) and coarse descriptors (B, D, H/8, W/8), as the convolutions give them.
        """
        features = self.backbone(image)
        return self.detector(features), self.descriptor(features)


Network = Union[SuperPointNet, CompactNet]
"""Image (B, 1, H, W) -> logits (B, 65, H/8, W/8) and coarse descriptors (B, D, H/8, W/8)."""


def network(checkpoint: Checkpoint) -> Network:
    """The network of any checkpoint, with its weights, in eval mode."""
    if checkpoint.topology:
        return CompactNet.from_checkpoint(checkpoint)
    return SuperPointNet.from_checkpoint(checkpoint)


def dense(logits: Tensor, coarse_descriptors: Tensor) -> tuple[Tensor, Tensor]:
    """Raw heads -> score map (B, H, W) and descriptors (B, D, H/8, W/8) of unit length along D.

    Softmax over the cell's pixels and the dustbin, which is then dropped (DeTone et al. 2018, section 3.2).
    """
    stride = round((logits.shape[1] - 1) ** 0.5)
    probabilities = logits.softmax(dim=1)[:, :-1]
    return F.pixel_shuffle(probabilities, stride).squeeze(1), F.normalize(coarse_descriptors, dim=1)


def suppress(scores: Tensor, radius_px: int) -> Tensor:
    """Non-maximum suppression of the MIT reference: two rounds; equal neighbours all survive.

    A pixel stays if it is the maximum of its (2 r + 1)^2 window, or becomes the maximum once the pixels within reach of
    a survivor are taken away.

    Args:
        scores: (B, H, W).
        radius_px: r.

    Returns:
        (B, H, W): the scores, 0 where a pixel is suppressed.
    """

    def window_max(x: Tensor) -> Tensor:
        return F.max_pool2d(x[:, None], 2 * radius_px + 1, stride=1, padding=radius_px)[:, 0]

    kept = scores == window_max(scores)
    for _ in range(2):
        near_kept = window_max(kept.to(scores.dtype)) > 0
        rest = scores.masked_fill(near_kept, 0.0)
        kept |= (rest == window_max(rest)) & ~near_kept
    return scores.masked_fill(~kept, 0.0)


def sample_descriptors(xy: Tensor, descriptors: Tensor, stride: int, sampling: Sampling) -> Tensor:
    """Samples descriptors bilinearly at keypoints, and normalizes them again.

    Args:
        xy: (N, 2) pixels of the network's input.
        descriptors: (D, H/8, W/8) of unit length.
        stride: 8.
        sampling: the checkpoint's convention.

    Returns:
        (N, D), unit length.
    """
    cells = xy.new_tensor([descriptors.shape[2], descriptors.shape[1]])
    if sampling is Sampling.HALF_PIXEL:
        unit = (xy + 0.5) / (cells * stride)
    else:
        unit = (xy - stride / 2 + 0.5) / (cells * stride - stride / 2 - 0.5)
    sampled = F.grid_sample(
        descriptors[None], (unit * 2 - 1)[None, None], mode="bilinear", align_corners=sampling is Sampling.LEGACY
    )
    return F.normalize(sampled[0, :, 0], dim=0).T


def refine(xy: Tensor, scores: Tensor) -> Tensor:
    """Moves points by the mean offset of the 5x5 pixels around them, weighted by their scores.

    Args:
        xy: (N, 2) whole pixels.
        scores: (H, W) before suppression. Pixels outside count 0.

    Returns:
        (N, 2) pixels.
    """
    offset = torch.arange(-2, 3, device=scores.device)
    padded = F.pad(scores, (2, 2, 2, 2))
    x, y = xy.unbind(1)
    around = padded[(y[:, None] + 2 + offset)[:, :, None], (x[:, None] + 2 + offset)[:, None]]  # (N, 5, 5), rows first
    total = around.sum(dim=(1, 2)).clamp(min=torch.finfo(scores.dtype).tiny)
    across, down = ((around.sum(dim=axis) * offset).sum(dim=1) / total for axis in (1, 2))
    return xy + torch.stack([across, down], dim=1)


def decode(
    scores: Tensor, descriptors: Tensor, options: DecodeOptions, sampling: Sampling
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Finds keypoints in dense outputs.

    Args:
        scores: (B, H, W).
        descriptors: (B, D, H/8, W/8) of unit length along D.
        options: NMS radius, border, threshold, number, sub-pixel or not.
        sampling: the checkpoint's convention.

    Returns:
        For each image, by falling score: keypoints (N, 2) x, y in px; scores (N,); descriptors (N, D).
    """
    stride = scores.shape[-1] // descriptors.shape[-1]
    kept = suppress(scores, options.nms_radius_px)
    border = options.remove_borders_px
    inside = torch.zeros_like(kept, dtype=torch.bool)
    inside[:, border : kept.shape[1] - border, border : kept.shape[2] - border] = True
    found = []
    for before, image_scores, image_descriptors in zip(scores, kept.masked_fill(~inside, 0.0), descriptors):
        yx = torch.nonzero(image_scores > options.threshold)
        values, order = torch.sort(image_scores[yx[:, 0], yx[:, 1]], descending=True, stable=True)
        best = order[: options.max_keypoints]
        xy = yx[best].flip(1)
        xy = refine(xy, before) if options.subpixel else xy.to(scores.dtype)
        found.append((xy, values[: len(best)], sample_descriptors(xy, image_descriptors, stride, sampling)))
    return found


class SuperPoint(SuperPointNet):
    """Image to keypoints, behind the MIT reference's interface.

        model = SuperPoint()
        model.load_state_dict(torch.load("superpoint_v6_from_tf.pth", weights_only=True))
        out = model.eval()({"image": image})

    Its own `state_dict` has the v6 layout. `load_state_dict` takes every layout that `layouts.py` knows, and rebuilds
    the network if it differs.

    Args:
        conf: nms_radius, max_num_keypoints, detection_threshold, remove_borders, descriptor_dim, channels, subpixel
            (None: the checkpoint's own default).
    """

    default_conf: Mapping[str, Any] = {
        "nms_radius": 4,
        "max_num_keypoints": None,
        "detection_threshold": 0.005,
        "remove_borders": 4,
        "descriptor_dim": 256,
        "channels": (64, 64, 128, 128, 256),
        "subpixel": None,
    }

    def __init__(self, **conf: Any) -> None:
        unknown = sorted(set(conf) - set(self.default_conf))
        if unknown:
            raise SuperPointError(
                f"SuperPoint has no option {unknown[0]!r}; options are {', '.join(self.default_conf)}."
            )
        settings = SimpleNamespace(**{**self.default_conf, **conf})
        super().__init__(settings.channels, settings.descriptor_dim)
        self.conf = settings
        self.sampling, self.subpixel = Sampling.HALF_PIXEL, False

    @classmethod
    def from_file(cls, path: PathLike, sampling: Sampling | None = None, **conf: Any) -> SuperPoint:
        """The reference of a checkpoint file of any known layout, in eval mode."""
        model = cls(**conf)
        model._adopt(layouts.load(path, sampling))
        return model.eval()

    @property
    def options(self) -> DecodeOptions:
        """`conf` as the options of `decode`."""
        conf = self.conf
        subpixel = self.subpixel if conf.subpixel is None else conf.subpixel
        numbers = (conf.nms_radius, conf.remove_borders, conf.detection_threshold, conf.max_num_keypoints)
        return DecodeOptions(*numbers, subpixel)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads this module's own state, or the state_dict of a checkpoint of any known layout.

        Raises:
            SuperPointError: the keys or shapes are not those of a SuperPoint.
        """
        own = {name: tensor.shape for name, tensor in self.state_dict().items()}
        if own == {name: getattr(value, "shape", None) for name, value in state_dict.items()}:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._adopt(layouts.from_arrays(layouts.state_arrays(state_dict)))
        return nn.modules.module._IncompatibleKeys([], [])

    def _adopt(self, checkpoint: Checkpoint) -> None:
        """Takes over a checkpoint's network, whatever its shape and BatchNorm; device and dtype stay."""
        like = next(self.parameters())
        net = network(checkpoint).to(like).train(self.training)
        for part in list(self._modules):
            delattr(self, part)
        if isinstance(net, CompactNet):
            self.compact = net
        else:
            self.backbone, self.detector, self.descriptor = net.backbone, net.detector, net.descriptor
        self.stride, self.sampling, self.subpixel = checkpoint.stride_px, checkpoint.sampling, checkpoint.subpixel

    def forward(self, data: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:  # type: ignore[override]
        """Keypoints of a batch of images.

        Args:
            data: {"image": (B, 1 or 3, H, W) float in [0, 1], RGB if 3}.

        Returns:
            Lists of B tensors: keypoints (N, 2) x, y; keypoint_scores (N,); descriptors (N, D); by falling score.
        """
        image = data["image"]
        if image.shape[1] == 3:
            image = (image * image.new_tensor(RGB_TO_GRAY)[:, None, None]).sum(1, keepdim=True)
        heads = self.compact(image) if "compact" in self._modules else super().forward(image)
        found = decode(*dense(*heads), self.options, self.sampling)
        keypoints, scores, descriptors = ([part[index] for part in found] for index in range(3))
        return {"keypoints": keypoints, "keypoint_scores": scores, "descriptors": descriptors}


def _module_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's arrays under the parameter names of `SuperPointNet`."""
    state: dict[str, Tensor] = {}
    for name, layer in checkpoint.layers.items():
        block = _block_path(name)
        state[f"{block}.conv.weight"] = torch.from_numpy(layer.weight)
        state[f"{block}.conv.bias"] = torch.from_numpy(layer.bias)
        if layer.norm:
            state.update({f"{block}.bn.{key}": torch.from_numpy(value) for key, value in vars(layer.norm).items()})
            state[f"{block}.bn.num_batches_tracked"] = torch.tensor(0)
    return state


def _block_path(layer: str) -> str:
    match = re.fullmatch(r"conv(\d+|P|D)([ab])", layer)
    assert match, layer
    group = {"P": "detector", "D": "descriptor"}.get(match[1]) or f"backbone.{int(match[1]) - 1}"
    return f"{group}.{'ab'.index(match[2])}"
