"""Files of the learned matcher's weights: safetensors, names and shapes checked. The network is `matcher_network.py`.

Names: `project.D.weight` for descriptors of D numbers, `positions.weight`, then for each layer n `layers.n.self.*`,
`layers.n.cross.*` and `layers.n.head.*`. Linear weights are (out, in). `layers.n.head.support` holds two factors: of
what a match's support by its neighborhood adds to its similarity, and to the logits of both points being matchable.
The metadata hold the shape.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.core.files import PathLike, one_line, read_bytes, sha256, write_atomically
from superpoint_trt.core.types import LARGEST_DESCRIPTOR_DIM, Float32, SuperPointError

FORMAT = "superpoint-trt-matcher"
"""Metadata `format` of a matcher's file."""

MOST_LAYERS = 32
MOST_WIDTH = 1024

NORM_EPS = 1e-5
"""Epsilon of the layer norms, torch's default."""

NEIGHBORHOOD = 1.75
"""Standard deviation of a point's neighborhood, in sides of the square that one point has to itself in its image."""


class Activation(str, enum.Enum):
    """The nonlinearity of the updates."""

    RELU = "relu"
    GELU = "gelu"
    """By the error function, not its approximation."""


@dataclass(frozen=True)
class MatcherShape:
    """Sizes of a matcher."""

    descriptor_dims: tuple[int, ...] = (256,)
    """Lengths of the descriptors that it takes, each with an input projection of its own."""
    width: int = 128
    """Numbers of a point's state."""
    heads: int = 4
    """Attention heads; each has width / heads numbers, an even number."""
    layers: int = 6
    """Layers, each of one self- and one cross-attention, and a head of its own."""
    activation: Activation = Activation.RELU

    def __post_init__(self) -> None:
        dims = self.descriptor_dims
        if not dims or len(set(dims)) < len(dims) or not all(1 <= dim <= LARGEST_DESCRIPTOR_DIM for dim in dims):
            raise SuperPointError(f"descriptors have {dims} numbers; expected different ones, (256,) or (256, 64) say.")
        if not 1 <= self.layers <= MOST_LAYERS:
            raise SuperPointError(f"the matcher has {self.layers} layers; expected 1 to {MOST_LAYERS}.")
        if not 1 <= self.heads <= self.width <= MOST_WIDTH or self.width % (2 * self.heads):
            raise SuperPointError(
                f"the matcher is {self.width} wide with {self.heads} heads; expected a width of at most {MOST_WIDTH} "
                "that two times the heads divide."
            )

    @property
    def head_width(self) -> int:
        """Numbers of one attention head."""
        return self.width // self.heads

    def arrays(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every array."""
        width = self.width
        found: dict[str, tuple[int, ...]] = {}

        def linear(name: str, inputs: int, outputs: int) -> None:
            found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

        for dim in self.descriptor_dims:
            linear(f"project.{dim}", dim + 1, width)
        found["positions.weight"] = (self.head_width // 2, 2)
        for layer in range(self.layers):
            for kind, inputs in (("self", 3 * width), ("cross", 2 * width)):
                block = f"layers.{layer}.{kind}"
                linear(f"{block}.read", width, inputs)
                linear(f"{block}.hidden", 2 * width, 2 * width)
                found.update({f"{block}.norm.weight": (2 * width,), f"{block}.norm.bias": (2 * width,)})
                linear(f"{block}.write", 2 * width, width)
            linear(f"layers.{layer}.head.project", width, width)
            linear(f"layers.{layer}.head.matchable", width, 1)
            found[f"layers.{layer}.head.support"] = (2,)
        return found


@dataclass(frozen=True, eq=False)
class MatcherWeights:
    """The weights of a matcher: every array is there, has the right shape, and is finite."""

    shape: MatcherShape
    arrays: Mapping[str, Float32]
    """Name -> array, as `MatcherShape.arrays` lists them."""
    features: Mapping[int, str]
    """Length of descriptors -> SHA-256 of the extractor's checkpoint that the matcher learned from; may lack some."""
    sha256: str | None = None
    """Of the file that was read; None: the arrays came from memory."""

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return sum(array.size for array in self.arrays.values())

    def with_layers(self, count: int) -> MatcherWeights:
        """The first layers alone: each layer has a head of its own, trained with it.

        Raises:
            SuperPointError: there are not so many.
        """
        if not 1 <= count <= self.shape.layers:
            raise SuperPointError(f"{count} layers were asked for; this matcher has {self.shape.layers}.")
        shape = replace(self.shape, layers=count)
        return replace(self, shape=shape, arrays={name: self.arrays[name] for name in shape.arrays()})


def load_matcher(path: PathLike) -> MatcherWeights:
    """Reads a matcher's weights.

    Args:
        path: a `.safetensors` file that `save_matcher` wrote.

    Raises:
        SuperPointError: the file is missing, damaged, or no matcher of this package.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load as from_bytes

    data = read_bytes(path, "matcher")
    try:
        arrays = from_bytes(data)
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise SuperPointError(
            f"matcher {path} is not a readable safetensors file: {one_line(error)}. "
            "LightGlue's .pth: superpoint matcher convert."
        ) from error
    return replace(matcher_from_arrays(arrays, metadata, str(path)), sha256=sha256(data))


def is_matcher(path: PathLike) -> bool:
    """Whether a file says that it holds a matcher's weights; False if it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, ValueError, TypeError):
        return False


def matcher_from_arrays(
    arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str], source: str = "the matcher"
) -> MatcherWeights:
    """Checks named arrays against the shape that the metadata name.

    Raises:
        SuperPointError: the metadata are not a matcher's, or an array is missing, strange, of another shape, or not
            finite.
    """
    if metadata.get("format") != FORMAT:
        raise SuperPointError(
            f"{source} is not a matcher: its metadata's format is {metadata.get('format')!r}, expected {FORMAT!r}. "
            "Matchers come from python -m training.matcher, or superpoint matcher convert."
        )
    try:
        dims = tuple(int(dim) for dim in metadata["descriptor_dims"].split())
        sizes = {key: int(metadata[key]) for key in ("width", "heads", "layers")}
        activation = Activation(metadata.get("activation", Activation.RELU.value))
    except (KeyError, ValueError) as error:
        raise SuperPointError(f"{source} is damaged: its metadata lack a size ({one_line(error)}).") from error
    shape = MatcherShape(dims, **sizes, activation=activation)
    expected = shape.arrays()
    for name in sorted(expected.keys() ^ arrays.keys()):
        what = "lacks" if name in expected else "has a strange array"
        raise SuperPointError(f"{source} is no matcher of {shape.layers} layers: it {what} {name}.")
    for name, size in expected.items():
        if arrays[name].shape != size:
            raise SuperPointError(f"{source} does not fit its metadata: {name} is {arrays[name].shape}, not {size}.")
        if not np.isfinite(arrays[name]).all():
            raise SuperPointError(f"{source} is damaged: {name} holds values that are not finite.")
    features = {dim: metadata[f"features_{dim}"] for dim in dims if metadata.get(f"features_{dim}")}
    return MatcherWeights(shape, {name: arrays[name].astype(np.float32) for name in expected}, features)


def save_matcher(weights: MatcherWeights, path: PathLike, half: bool = True) -> Path:
    """Writes a matcher's weights as safetensors, by default in float16."""
    from safetensors.numpy import save as to_bytes

    kind = np.float16 if half else np.float32
    sizes = asdict(weights.shape)
    dims = " ".join(map(str, sizes.pop("descriptor_dims")))
    sizes["activation"] = weights.shape.activation.value
    metadata = {"format": FORMAT, "descriptor_dims": dims, **{key: str(value) for key, value in sizes.items()}}
    metadata.update({f"features_{dim}": digest for dim, digest in weights.features.items()})
    return write_atomically(path, to_bytes({k: a.astype(kind) for k, a in weights.arrays.items()}, metadata=metadata))
