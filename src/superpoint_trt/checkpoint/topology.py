"""A network as a list of plain convolutions, for checkpoints that are no VGG.

A checkpoint of this kind keeps the list in its safetensors metadata (`topology`, JSON), its weights under the layers'
names. The list says what reads what; channels and kernel sizes are the weights' own. The torch reference
(`compact.CompactNet`) and the export follow it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from superpoint_trt.core.typed_json import JsonError, flag, mapping, member, parse, shown, text, texts
from superpoint_trt.core.types import CELL_PX, LARGEST_DESCRIPTOR_DIM, SuperPointError

IMAGE = "image"
LOGITS, DESCRIPTORS = "detector", "descriptor"
"""The two layers whose outputs are the raw heads."""

STRIDES = (1, 2, 4, 8)

MOST_LAYERS = 128

MOST_CHANNELS = 4096
"""Of a layer's output."""

MOST_KERNEL = 16
"""Pixels along a kernel's side."""

MOST_STRIDE_PX = 64
"""The coarsest grid of a layer, in pixels of the image."""

_MOST_CHARS = 1 << 16
"""Length of the JSON."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")


@dataclass(frozen=True)
class Convolution:
    """One convolution of a network, with what happens to its output."""

    name: str
    inputs: tuple[str, ...]
    """`image` or earlier layers, all of one size; more than one are concatenated along channels."""
    stride: int = 1
    relu: bool = True
    added_to: str = ""
    """Name of an earlier layer. The output is repeated 2x2 (nearest), cut to that layer's size, and added to it; who
    reads this layer reads the sum."""

    @staticmethod
    def padding(kernel: int, stride: int) -> int:
        """Zeros on every side: an output lies in the middle of the `stride` x `stride` inputs it stands for."""
        return (kernel - stride + 1) // 2


Topology = tuple[Convolution, ...]


# ------------------------------------------------------------------------------------------------------------- as text


def to_json(topology: Sequence[Convolution]) -> str:
    """The list as compact JSON, fields that have their default left out."""
    plain = Convolution("", ())
    layers = [{key: value for key, value in vars(layer).items() if value != getattr(plain, key)} for layer in topology]
    return json.dumps(layers, separators=(",", ":"))


def from_json(written: str, source: str) -> Topology:
    """Reads what `to_json` wrote.

    Args:
        written: the JSON.
        source: names the checkpoint in the error.

    Raises:
        SuperPointError: it is no list of convolutions; two have one name; one reads what does not come before it; or a
            head is missing.
    """
    try:
        found = parse(written, _MOST_CHARS)
        if not isinstance(found, list) or not 2 <= len(found) <= MOST_LAYERS:
            raise JsonError(f"it is {shown(found)}; expected a list of 2 to {MOST_LAYERS} layers")
        topology = tuple(_convolution(mapping(entry, f"layer {index}")) for index, entry in enumerate(found))
        _check_names(topology)
    except JsonError as error:
        raise SuperPointError(f"{source} has a topology that cannot be read: {error}.") from error
    return topology


def _convolution(entry: Mapping[str, object]) -> Convolution:
    name = text(member(entry, "name"), "a layer's name")
    if not _NAME.fullmatch(name):
        raise JsonError(f"a layer's name is {shown(name)}; expected up to 40 of a-z, 0-9 and _, a letter first")
    strange = [key for key in entry if key not in Convolution.__dataclass_fields__]
    if strange:
        known = ", ".join(Convolution.__dataclass_fields__)
        raise JsonError(f"layer {name} has {shown(strange[0])}; expected some of {known}")
    inputs = texts(member(entry, "inputs"), f"inputs of {name}")
    if not inputs:
        raise JsonError(f"inputs of {name} is empty")
    stride = entry.get("stride", 1)
    if isinstance(stride, bool) or stride not in STRIDES:
        raise JsonError(f"stride of {name} is {shown(stride)}; expected one of {', '.join(map(str, STRIDES))}")
    assert isinstance(stride, int)
    relu = flag(entry.get("relu", True), f"relu of {name}")
    return Convolution(name, inputs, stride, relu, text(entry.get("added_to", ""), f"added_to of {name}"))


def _check_names(topology: Topology) -> None:
    """Checks that names are unique, that layers read earlier ones, and that both heads are there.

    Raises:
        JsonError: naming the first layer that does not fit.
    """
    known = {IMAGE}
    for layer in topology:
        if layer.name in known:
            raise JsonError(f"two layers are called {layer.name}" if layer.name != IMAGE else "a layer is called image")
        for name in (*layer.inputs, *filter(None, [layer.added_to])):
            if name not in known:
                raise JsonError(f"layer {layer.name} reads {shown(name)}, which is no earlier layer")
        if layer.added_to == IMAGE:
            raise JsonError(f"layer {layer.name} is added to the image; expected an earlier layer")
        known.add(layer.name)
    for layer in topology:
        if layer.name in (LOGITS, DESCRIPTORS) and (layer.relu or layer.added_to):
            raise JsonError(f"layer {layer.name} is a head; expected relu false and no added_to")
    missing = [head for head in (LOGITS, DESCRIPTORS) if head not in known]
    if missing:
        raise JsonError(f"there is no layer {missing[0]}; expected the heads {LOGITS} and {DESCRIPTORS}")


# --------------------------------------------------------------------------------------------------------------- sizes

Shape = tuple[int, ...]


def check_weights(topology: Topology, weights: Mapping[str, Shape], source: str) -> None:
    """Checks that weights and layers fit each other, and that the heads have cells of 8 px at every image size.

    Args:
        topology: of `from_json`.
        weights: layer -> shape of its weights, (O, I, K, K).
        source: names the checkpoint in the error.

    Raises:
        SuperPointError: naming the first layer that does not fit.
    """
    channels = {IMAGE: 1}
    for layer in topology:
        shape = weights[layer.name]
        inputs = sum(channels[name] for name in layer.inputs)
        outputs, kernel = (shape[0], shape[2]) if len(shape) == 4 else (0, 0)
        if not 1 <= outputs <= MOST_CHANNELS or not layer.stride <= kernel <= MOST_KERNEL:
            raise SuperPointError(
                f"{source} does not fit its topology: {layer.name}.weight is {shape}; expected (O, {inputs}, K, K) "
                f"with O up to {MOST_CHANNELS} and K from {layer.stride}, the stride, to {MOST_KERNEL}."
            )
        if shape != (outputs, inputs, kernel, kernel):
            raise SuperPointError(
                f"{source} does not fit its topology: {layer.name}.weight is {shape}, expected "
                f"{(outputs, inputs, kernel, kernel)}."
            )
        if layer.added_to and channels[layer.added_to] != outputs:
            raise SuperPointError(
                f"{source} does not fit its topology: {layer.name} has {outputs} channels and is added to "
                f"{layer.added_to}, which has {channels[layer.added_to]}."
            )
        channels[layer.name] = outputs
    _check_heads(channels, source)
    _check_grids(topology, {name: shape[2] for name, shape in weights.items()}, source)


def _check_heads(channels: Mapping[str, int], source: str) -> None:
    if channels[LOGITS] != CELL_PX**2 + 1:
        raise SuperPointError(
            f"{source} is not a SuperPoint: its detector has {channels[LOGITS]} channels; expected {CELL_PX**2 + 1}, "
            f"the pixels of a cell of {CELL_PX}x{CELL_PX} px and the dustbin."
        )
    if channels[DESCRIPTORS] > LARGEST_DESCRIPTOR_DIM:
        raise SuperPointError(
            f"{source} has descriptors of {channels[DESCRIPTORS]} numbers; expected {LARGEST_DESCRIPTOR_DIM} at most."
        )


def _check_grids(topology: Topology, kernels: Mapping[str, int], source: str) -> None:
    """Checks that grids that are joined have one size, and that both heads have a value a cell.

    Sizes repeat with a period of `MOST_STRIDE_PX`, so two periods show all there is.

    Raises:
        SuperPointError: naming the layer.
    """
    strides = {IMAGE: 1}
    for layer in topology:
        strides[layer.name] = max(strides[name] for name in layer.inputs) * layer.stride
        if strides[layer.name] > MOST_STRIDE_PX:
            raise SuperPointError(
                f"{source} does not fit its topology: {layer.name} has one value for {strides[layer.name]} px; "
                f"expected {MOST_STRIDE_PX} at most."
            )
        if layer.added_to:
            strides[layer.name] = strides[layer.added_to]
    for cells in range(1, 2 * MOST_STRIDE_PX // CELL_PX + 1):
        sizes = grid_sizes(topology, kernels, cells * CELL_PX)
        for layer in topology:
            if len({sizes[name] for name in layer.inputs}) != 1:
                raise SuperPointError(
                    f"{source} does not fit its topology: {layer.name} reads {', '.join(layer.inputs)}, which have "
                    f"{', '.join(str(sizes[name]) for name in layer.inputs)} values along {cells * CELL_PX} px."
                )
            own = convolved_size(sizes[layer.inputs[0]], kernels[layer.name], layer.stride)
            if layer.added_to and -(-sizes[layer.added_to] // 2) != own:
                raise SuperPointError(
                    f"{source} does not fit its topology: {layer.name} has {own} values along {cells * CELL_PX} px, "
                    f"{layer.added_to}, which it is added to, {sizes[layer.added_to]}; expected half as many, rounded "
                    "up."
                )
        for head in (LOGITS, DESCRIPTORS):
            if sizes[head] != cells:
                raise SuperPointError(
                    f"{source} is not a SuperPoint: its {head} has {sizes[head]} values along {cells * CELL_PX} px; "
                    f"expected {cells}, one a cell of {CELL_PX} px."
                )


def grid_sizes(topology: Sequence[Convolution], kernels: Mapping[str, int], side_px: int) -> dict[str, int]:
    """Values along one side of every layer's output.

    Args:
        topology: of a network that `check_weights` took.
        kernels: layer -> pixels along its kernel's side.
        side_px: of the image.
    """
    sizes = {IMAGE: side_px}
    for layer in topology:
        own = convolved_size(sizes[layer.inputs[0]], kernels[layer.name], layer.stride)
        sizes[layer.name] = sizes[layer.added_to] if layer.added_to else own
    return sizes


def convolved_size(side: int, kernel: int, stride: int) -> int:
    """Values along one side of a convolution's output, of `side` along its input."""
    return (side + 2 * Convolution.padding(kernel, stride) - kernel) // stride + 1


def multiplications(topology: Sequence[Convolution], weights: Mapping[str, Any], height_px: int, width_px: int) -> int:
    """Products that all convolutions compute for one image.

    Args:
        topology: of a network that `check_weights` took.
        weights: layer -> array (O, I, K, K).
        height_px: of the image.
        width_px: of the image.
    """
    kernels = {name: weight.shape[2] for name, weight in weights.items()}
    rows, columns = (grid_sizes(topology, kernels, side) for side in (height_px, width_px))
    total = 0
    for layer in topology:
        first, kernel = layer.inputs[0], kernels[layer.name]
        places = [convolved_size(grid[first], kernel, layer.stride) for grid in (rows, columns)]
        total += int(weights[layer.name].size) * places[0] * places[1]
    return total
