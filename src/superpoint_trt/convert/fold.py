"""BatchNorm folded into convolutions, before the graph is written."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.checkpoint.layouts import Checkpoint, Layer, NormPlacement
from superpoint_trt.convert.export_options import ExportOptions
from superpoint_trt.core.types import SuperPointError


@dataclass(frozen=True)
class FoldedLayer:
    """A convolution and the BatchNorm that stays behind its ReLU: y = relu(conv(x)) * scale + shift."""

    weight: NDArray[np.float64]
    """(O, I, K, K)."""
    bias: NDArray[np.float64]
    """(O,)."""
    scale: NDArray[np.float64] | None = None
    """(O,); None: no BatchNorm stays."""
    shift: NDArray[np.float64] | None = None
    """(O,); None: no BatchNorm stays."""


def folded_layers(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, FoldedLayer]:
    """The layers as the graph has them: BatchNorm folded where that is exact, and where the options ask for it.

    Raises:
        SuperPointError: `shift_channels` names an unknown layer, or there is no BatchNorm after a ReLU to fold.
    """
    layers, backbone = _fold_exactly(checkpoint), _backbone_layers(checkpoint)
    for name in options.shift_channels:
        if checkpoint.topology:
            raise SuperPointError(f"shift_channels names {name!r}, but this network has no BatchNorm after a ReLU.")
        if name not in backbone:
            raise SuperPointError(f"shift_channels names {name!r}; expected some of {', '.join(backbone)}.")
    if options.fold_batchnorm and checkpoint.norm is not NormPlacement.AFTER_RELU:
        has = "none" if checkpoint.norm is NormPlacement.NONE else "it before the ReLU, where it folds exactly"
        raise SuperPointError(
            f"folding BatchNorm is for checkpoints that have it after the ReLU (v6); this one has {has}: leave "
            "--fold-batchnorm out."
        )
    for name in backbone:  # from front to back: a layer's weights have the channels that the one before it makes
        if options.fold_batchnorm or name in options.shift_channels:
            _fold_into_next(layers, name, checkpoint, exact=not options.fold_batchnorm)
    return layers


def _fold_exactly(checkpoint: Checkpoint) -> dict[str, FoldedLayer]:
    """Folds every BatchNorm that folds exactly, in float64.

    A BatchNorm straight after a convolution folds exactly: both output layers, and every layer whose BatchNorm comes
    before the ReLU. So does one in front of a 1x1 convolution, which reads no padding: both heads' hidden layers. A
    BatchNorm between a ReLU and a 3x3 convolution stays, because its shift does not reach the zeros of the padding.
    """
    folded = {}
    for name, layer in checkpoint.layers.items():
        after_relu = checkpoint.norm is NormPlacement.AFTER_RELU and name not in ("convPb", "convDb")
        folded[name] = _fold_into_own(layer, keep=after_relu)
    if checkpoint.norm is not NormPlacement.AFTER_RELU:
        return folded
    for head in ("convP", "convD"):
        hidden, out = folded[f"{head}a"], folded[f"{head}b"]
        if hidden.scale is not None and hidden.shift is not None:
            folded[f"{head}a"] = FoldedLayer(hidden.weight, hidden.bias)
            bias = out.bias + np.einsum("oikl,i->o", out.weight, hidden.shift)
            folded[f"{head}b"] = FoldedLayer(out.weight * hidden.scale[None, :, None, None], bias)
    return folded


def _backbone_layers(checkpoint: Checkpoint) -> list[str]:
    """conv1a, conv1b, conv2a, ..., in order; none of a network with a topology."""
    return [f"conv{stage}{half}" for stage in range(1, checkpoint.stages + 1) for half in "ab"]


def _fold_into_next(layers: dict[str, FoldedLayer], name: str, checkpoint: Checkpoint, exact: bool) -> None:
    """Moves a layer's BatchNorm into the 3x3 convolutions that read it.

    The scale goes into their weights. The shift is 0 in the padding, so a bias would be wrong at the border.
    With `exact`, one more channel carries it: the channel is 1 inside the image (no weights, bias 1) and 0 in the
    padding. Without, the shift becomes a bias, as if the padding held the shift. A layer in front of a max-pool keeps
    its BatchNorm if a scale is not positive, because only a rising map commutes with the maximum.

    Args:
        layers: changed in place.
        name: the layer whose BatchNorm moves.
        checkpoint: gives the order of the layers.
        exact: by a channel rather than by a bias.
    """
    layer, order = layers[name], _backbone_layers(checkpoint)
    pooled = name.endswith("b") and name != order[-1]
    if layer.scale is None or layer.shift is None or (pooled and not (layer.scale > 0).all()):
        return
    layers[name] = FoldedLayer(layer.weight, layer.bias)
    if exact:
        silent = np.zeros_like(layer.weight[:1])
        layers[name] = FoldedLayer(np.concatenate([layer.weight, silent]), np.append(layer.bias, 1.0))
    following = ["convPa", "convDa"] if name == order[-1] else [order[order.index(name) + 1]]
    for other in following:
        its = layers[other]
        constant = np.einsum("oikl,i->okl", its.weight, layer.shift)[:, None]
        weight = its.weight * layer.scale[None, :, None, None]
        if exact:
            layers[other] = replace(its, weight=np.concatenate([weight, constant], axis=1))
        else:
            layers[other] = replace(its, weight=weight, bias=its.bias + constant.sum(axis=(1, 2, 3)))


def reach_of_padding_px(checkpoint: Checkpoint) -> int:
    """How far from the input's border, in px, the padding's values change scores and descriptors.

    A descriptor is sampled from cells up to half a cell further out than its point. Suppression may carry a difference
    of scores further, by five radii at most; that is not counted here.
    """
    reach = -1  # the first convolution pads the image itself, with zeros in any case
    for stage in range(1, checkpoint.stages + 1):
        reach += 2
        if stage < checkpoint.stages:
            reach = -(-reach // 2)
    return (reach + 1) * checkpoint.stride_px + checkpoint.stride_px // 2


def _fold_into_own(layer: Layer, keep: bool) -> FoldedLayer:
    """Folds a layer's BatchNorm into its own convolution, or keeps it as scale and shift."""
    weight, bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
    if layer.norm is None:
        return FoldedLayer(weight, bias)
    scale, shift = layer.norm.scale_and_shift()
    if keep:
        return FoldedLayer(weight, bias, scale, shift)
    return FoldedLayer(weight * scale[:, None, None, None], bias * scale + shift)
