"""BatchNorm folded into convolutions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.checkpoint.layouts import Checkpoint, Layer, NormPlacement


@dataclass(frozen=True)
class FoldedLayer:
    """A convolution and what is left of its BatchNorm after folding: y = relu(conv(x)) * scale + shift."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    scale: NDArray[np.float64] | None = None
    shift: NDArray[np.float64] | None = None


def fold_batch_norms(checkpoint: Checkpoint) -> dict[str, FoldedLayer]:
    """Folds every BatchNorm that folds exactly, in float64.

    Exact are: BatchNorm straight after a convolution (both output layers; every layer when it precedes the ReLU),
    and BatchNorm in front of a 1x1 convolution, which sees no padding (both heads' hidden layers). BatchNorm between
    a ReLU and a 3x3 convolution stays: its shift does not reach the zeros of the padding.
    """
    folded = {}
    for name, layer in checkpoint.layers.items():
        after_relu = checkpoint.norm is NormPlacement.AFTER_RELU and name not in ("convPb", "convDb")
        folded[name] = _fold_before(layer, keep=after_relu)
    for head in ("convP", "convD"):
        hidden, out = folded[f"{head}a"], folded[f"{head}b"]
        if hidden.scale is not None and hidden.shift is not None:
            folded[f"{head}a"] = FoldedLayer(hidden.weight, hidden.bias)
            bias = out.bias + np.einsum("oikl,i->o", out.weight, hidden.shift)
            folded[f"{head}b"] = FoldedLayer(out.weight * hidden.scale[None, :, None, None], bias)
    return folded


def backbone_layers(checkpoint: Checkpoint) -> list[str]:
    return [f"conv{stage}{half}" for stage in range(1, checkpoint.stages + 1) for half in "ab"]


def move_batch_norm_on(layers: dict[str, FoldedLayer], name: str, checkpoint: Checkpoint, exact: bool) -> None:
    """Moves a layer's BatchNorm into the 3x3 convolutions that follow.

    The scale goes into their weights. The shift would meet zeros at the border, where a bias does not. Exact: it enters
    by one more channel, 1 wherever there is an image (no weights, bias 1) and 0 in the padding, as the shift itself.
    If not: it becomes a bias, as if the padding were the shift. In front of a max-pool only a rising map commutes:
    there a layer with a scale up to 0 keeps its BatchNorm.
    """
    layer, order = layers[name], backbone_layers(checkpoint)
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
    """How far from the border of the input, in px, what the padding holds can be felt in scores and descriptors.

    A descriptor is sampled from cells up to half a cell further out than its point. Suppression may hand a difference
    in the scores on, by five radii at most.
    """
    reach = -1  # the first convolution pads the image, with the same zeros in any case
    for stage in range(1, checkpoint.stages + 1):
        reach += 2
        if stage < checkpoint.stages:
            reach = -(-reach // 2)
    return (reach + 1) * checkpoint.stride_px + checkpoint.stride_px // 2


def _fold_before(layer: Layer, keep: bool) -> FoldedLayer:
    """Folds the layer's own BatchNorm into its convolution, or keeps it beside as scale and shift."""
    weight, bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
    if layer.norm is None:
        return FoldedLayer(weight, bias)
    scale, shift = layer.norm.scale_and_shift()
    if keep:
        return FoldedLayer(weight, bias, scale, shift)
    return FoldedLayer(weight * scale[:, None, None, None], bias * scale + shift)
