"""Reads checkpoint files of every known layout into one verified set of float32 arrays.

Layers get the names of the paper's own code, whatever the file calls them: `conv1a`, `conv1b`, ..., `conv4b`
(backbone, a 2x2 max-pool after every stage but the last), `convPa`, `convPb` (detector), `convDa`, `convDb`
(descriptor). A network that is no VGG has the names of its topology (`topology.py`). No code in a file is ever
executed: `.pth` goes through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import enum
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.checkpoint import descriptor_map
from superpoint_trt.checkpoint.descriptor_map import DescriptorMap
from superpoint_trt.checkpoint.topology import (
    DESCRIPTORS,
    LOGITS,
    Topology,
    check_weights,
    from_json,
    multiplications,
    to_json,
)
from superpoint_trt.core.files import PathLike, one_line, read_bytes, sha256, write_atomically
from superpoint_trt.core.install import install_hint
from superpoint_trt.core.networks import weights_path
from superpoint_trt.core.types import CELL_PX, Family, Float32, Sampling, SuperPointError

FEWEST_STAGES, MOST_STAGES = 3, 6
"""3 to 6 stages make cells of 4 to 32 px. The published networks have 4 stages, so cells of 8 px."""

_MOST_VALUES = 1 << 26
"""Values of one tensor that are accepted; the published networks' largest has 589,824."""

BATCHNORM_EPS = 1e-3
"""Epsilon of the MIT model's BatchNorm; torch's own default is 1e-5."""


_Choice = TypeVar("_Choice", bound=enum.Enum)


class NormPlacement(str, enum.Enum):
    """Where a checkpoint's BatchNorm sits relative to the ReLU of its block."""

    NONE = "none"
    AFTER_RELU = "after-relu"
    BEFORE_RELU = "before-relu"


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """Frozen BatchNorm statistics: y = (x - mean) / sqrt(var + eps) * weight + bias, each (C,) float32."""

    weight: Float32
    bias: Float32
    running_mean: Float32
    running_var: Float32

    def scale_and_shift(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Scale and shift, (C,) float64 each, of the same map written as y = x * scale + shift."""
        scale = self.weight.astype(np.float64) / np.sqrt(self.running_var.astype(np.float64) + BATCHNORM_EPS)
        return scale, self.bias - self.running_mean * scale


@dataclass(frozen=True, eq=False)
class Layer:
    """One convolution, and its BatchNorm if it has one."""

    weight: Float32
    """(O, I, K, K)."""
    bias: Float32
    """(O,)."""
    norm: BatchNorm | None = None


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The weights of a SuperPoint: every layer is present, has the right shape, and is finite."""

    layers: Mapping[str, Layer]
    """Layer name ("conv1a") -> layer, in the network's order."""
    family: Family
    norm: NormPlacement
    sampling: Sampling
    sha256: str | None = None
    """Of the file that was read; None: the arrays came from memory."""
    subpixel: bool = False
    """Whether its keypoints are sub-pixel by default: yes for this project's own weights; no for others, whose users
    expect their reference's whole pixels."""
    topology: Topology = ()
    """The network's convolutions, in the order of `layers`; empty: the VGG of the paper."""
    descriptor_map: DescriptorMap | None = None
    """To another network's descriptors, (T, D); most checkpoints have none."""
    descriptors_of: str | None = None
    """SHA-256 of the checkpoint whose descriptors `lifted` gave it; None: it has its own."""

    @property
    def stages(self) -> int:
        """Number of the VGG's backbone stages. Each has two convolutions. Of a network with a topology: 0."""
        return 0 if self.topology else sum(1 for name in self.layers if re.fullmatch(r"conv\d+a", name))

    @property
    def stride_px(self) -> int:
        """Pixels along one side of a detector cell."""
        return CELL_PX if self.topology else int(2 ** (self.stages - 1))

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels: of each stage, then of the heads' hidden layers (published: 64, 64, 128, 128, 256).

        Of a network with a topology: of every layer but the heads.
        """
        if self.topology:
            return tuple(
                len(self.layers[layer.name].weight)
                for layer in self.topology
                if layer.name not in (LOGITS, DESCRIPTORS)
            )
        stages = [self.layers[f"conv{stage}b"].weight.shape[0] for stage in range(1, self.stages + 1)]
        return (*stages, self.layers["convPa"].weight.shape[0])

    @property
    def descriptor_dim(self) -> int:
        """D: length of a descriptor, 256 in the published networks."""
        return len(self.layers[self.descriptor_layer].weight)

    @property
    def descriptor_layer(self) -> str:
        """Name of the convolution whose output is the coarse descriptors."""
        return DESCRIPTORS if self.topology else "convDb"

    @property
    def parameters(self) -> int:
        """Number of weights and biases of all convolutions."""
        return sum(layer.weight.size + layer.bias.size for layer in self.layers.values())

    def gflop(self, height_px: int = 480, width_px: int = 640) -> float:
        """Billions of additions and multiplications in the convolutions, for one image of that size."""
        weights = {name: layer.weight for name, layer in self.layers.items()}
        if self.topology:
            return 2e-9 * multiplications(self.topology, weights, height_px, width_px)
        products = 0
        for name, weight in weights.items():
            stage = re.fullmatch(r"conv(\d+)[ab]", name)
            halvings = int(stage[1]) - 1 if stage else self.stages - 1
            products += weight.size * (height_px >> halvings) * (width_px >> halvings)
        return 2e-9 * products


def load(path: PathLike, sampling: Sampling | None = None) -> Checkpoint:
    """Reads a checkpoint file of any known layout, recognised by its keys.

    Args:
        path: `.pth` (needs torch) or `.safetensors` (does not); told apart by content, not by name. Or the name of a
            packaged network.
        sampling: overrides the descriptor sampling that the family implies.

    Raises:
        SuperPointError: the file is missing, damaged, no checkpoint or no SuperPoint, or asks to execute code.
    """
    path = Path(weights_path(path))
    data = read_bytes(path, "checkpoint")
    if is_safetensors(data):
        arrays, metadata = read_safetensors(data, path)
    else:
        arrays, metadata = read_torch(data, path), {}
    checkpoint = from_arrays(arrays, sampling=sampling, metadata=metadata, source=str(path))
    return replace(checkpoint, sha256=sha256(data))


def load_descriptor_map(weights: PathLike) -> DescriptorMap:
    """Reads the map from a checkpoint's descriptors to another network's, for `run.decode.lift_descriptors`.

    Args:
        weights: checkpoint file, or the name of a packaged network.

    Raises:
        SuperPointError: the file cannot be read as a checkpoint, or has no map.
    """
    return _map_of(load(weights), str(weights))


def from_arrays(
    arrays: Mapping[str, NDArray[Any]],
    sampling: Sampling | None = None,
    metadata: Mapping[str, str] | None = None,
    source: str = "state dict",
) -> Checkpoint:
    """Recognises the layout of named arrays by their keys and verifies every layer.

    Args:
        arrays: parameter name -> array, as in the checkpoint.
        sampling: overrides the descriptor sampling that the family implies.
        metadata: a safetensors file's own, if any.
        source: names the arrays in an error.

    Raises:
        SuperPointError: a key is unknown, a layer is missing, a shape is wrong, or a value is not finite.
    """
    metadata = metadata or {}
    mapped = DescriptorMap.from_arrays(arrays, metadata, source)
    arrays = {name: array for name, array in arrays.items() if name != descriptor_map.ARRAY}
    topology = from_json(metadata["topology"], source) if "topology" in metadata else ()
    if topology:
        family, named = Family.SUPERPOINT_TRT, _sort_by_layer(arrays, topology, metadata, source)
    else:
        family, named = _recognize(arrays, metadata, source)
    shapes = {name: _shapes(name, parameters, source) for name, parameters in named.items()}
    if topology:
        _check_compact_shapes(topology, shapes, source)
    else:
        _check_shapes(shapes, source)
    layers = {name: _layer(name, parameters, source) for name, parameters in named.items()}
    norm = _norm_placement(family, layers, metadata, source)
    sampling = sampling or _sampling(family, layers, metadata, source)
    subpixel = _subpixel(metadata, source)
    found = Checkpoint(layers, family, norm, sampling, subpixel=subpixel, topology=topology, descriptor_map=mapped)
    if mapped:
        _expect(source, descriptor_map.ARRAY, mapped.matrix.shape, (len(mapped.matrix), found.descriptor_dim))
    return found


def save(checkpoint: Checkpoint, path: PathLike, half: bool = False) -> Path:
    """Writes this project's own `.safetensors`: canonical names, BatchNorm placement and sampling as metadata.

    Args:
        checkpoint: what to write.
        path: the file to write.
        half: stores float16, half the size. BatchNorm statistics stay float32; a map of descriptors is float16 always.

    Returns:
        The path written.
    """
    from safetensors.numpy import save as to_bytes

    arrays: dict[str, NDArray[Any]] = {}
    for name, layer in checkpoint.layers.items():
        convolution = {"weight": layer.weight, "bias": layer.bias}
        arrays.update({f"{name}.{key}": a.astype(np.float16) if half else a for key, a in convolution.items()})
        if layer.norm:
            arrays.update({f"{name}.bn.{key}": value for key, value in vars(layer.norm).items()})
    metadata = {
        "format": Family.SUPERPOINT_TRT.value,
        "norm": checkpoint.norm.value,
        "sampling": checkpoint.sampling.value,
        "source_family": checkpoint.family.value,
        "source_sha256": checkpoint.sha256 or "",
        "subpixel": "yes" if checkpoint.subpixel else "no",
    }
    if checkpoint.topology:
        metadata["topology"] = to_json(checkpoint.topology)
    if checkpoint.descriptor_map:
        arrays[descriptor_map.ARRAY] = checkpoint.descriptor_map.matrix.astype(np.float16)
        metadata[descriptor_map.TARGET] = checkpoint.descriptor_map.target_sha256
    return write_atomically(path, to_bytes(arrays, metadata=metadata))


def without_batchnorm(checkpoint: Checkpoint) -> Checkpoint:
    """Folds every BatchNorm into its convolution, in float64: the same network up to rounding.

    Raises:
        SuperPointError: BatchNorm comes after the ReLU, where it cannot be folded away.
    """
    if checkpoint.norm is NormPlacement.AFTER_RELU:
        raise SuperPointError("BatchNorm after ReLU cannot be folded away; expected BatchNorm before ReLU, or none.")
    layers = {}
    for name, layer in checkpoint.layers.items():
        weight, bias = layer.weight.astype(np.float64), layer.bias.astype(np.float64)
        if layer.norm:
            scale, shift = layer.norm.scale_and_shift()
            weight, bias = weight * scale[:, None, None, None], bias * scale + shift
        layers[name] = Layer(weight.astype(np.float32), bias.astype(np.float32))
    return replace(checkpoint, layers=layers, norm=NormPlacement.NONE)


def with_mapped_descriptors(checkpoint: Checkpoint, matrix: NDArray[Any]) -> Checkpoint:
    """The network whose coarse descriptors are `matrix` times the checkpoint's, in float64; it carries no map.

    Args:
        checkpoint: BatchNorm is folded away where it has some.
        matrix: (T, D).

    Raises:
        SuperPointError: BatchNorm comes after the ReLU.
    """
    if checkpoint.norm is not NormPlacement.NONE:
        checkpoint = without_batchnorm(checkpoint)
    name = checkpoint.descriptor_layer
    layer = checkpoint.layers[name]
    weight = np.tensordot(matrix.astype(np.float64), layer.weight, axes=1).astype(np.float32)
    bias = (matrix.astype(np.float64) @ layer.bias).astype(np.float32)
    return replace(checkpoint, layers={**checkpoint.layers, name: Layer(weight, bias)}, descriptor_map=None)


def lifted(checkpoint: Checkpoint, target_sha256: str, source: str = "the checkpoint") -> Checkpoint:
    """The network whose own descriptors are the lifted ones: its map multiplied into the last convolution.

    Args:
        checkpoint: with a map.
        target_sha256: of the checkpoint file that the map must lead to.
        source: names the checkpoint in an error.

    Raises:
        SuperPointError: it has no map, or one to another network.
    """
    found = _map_of(checkpoint, source)
    if found.target_sha256 != target_sha256:
        raise SuperPointError(
            f"{source} has a map to the descriptors of checkpoint {found.target_sha256[:12]}, not to those of "
            f"{target_sha256[:12]}; name the checkpoint that it was fitted to."
        )
    return replace(with_mapped_descriptors(checkpoint, found.matrix), descriptors_of=target_sha256)


def _map_of(checkpoint: Checkpoint, source: str) -> DescriptorMap:
    if checkpoint.descriptor_map is None:
        raise SuperPointError(
            f"{source} has no map to another network's descriptors; python -m training.lift fits one "
            "(training/README.md)."
        )
    return checkpoint.descriptor_map


# ---------------------------------------------------------------------------------------------- layouts by their keys

_PARAMETER = r"(weight|bias)"
_BN_PARAMETER = r"bn\.(weight|bias|running_mean|running_var)"
SAFE_TORCH = (2, 6)
_LAYOUTS: Mapping[Family, tuple[str, ...]] = {
    # Each pattern yields (stage or head, a/b or 0/1, parameter). No key fits two layouts, so their order is free.
    Family.V6: (
        rf"backbone\.(\d+)\.([01])\.(?:conv\.{_PARAMETER}|{_BN_PARAMETER})",
        rf"(detector|descriptor)\.([01])\.(?:conv\.{_PARAMETER}|{_BN_PARAMETER})",
    ),
    Family.HUGGINGFACE: (
        rf"encoder\.conv_blocks\.(\d+)\.conv_([ab])\.{_PARAMETER}",
        rf"(keypoint_decoder)\.conv_score_([ab])\.{_PARAMETER}",
        rf"(descriptor_decoder)\.conv_descriptor_([ab])\.{_PARAMETER}",
    ),
    Family.MAGICLEAP: (rf"conv(\d+|[PD])([ab])\.(?:{_PARAMETER}|{_BN_PARAMETER})",),
}
_HEADS = {"detector": "P", "keypoint_decoder": "P", "descriptor": "D", "descriptor_decoder": "D", "P": "P", "D": "D"}
_FIRST_STAGE = {Family.V6: 0, Family.HUGGINGFACE: 0, Family.MAGICLEAP: 1}

_SAMPLING_BY_CONTENT: Mapping[str, Sampling] = {
    # `_fingerprint` -> sampling. This one is AMD's Vitis-AI tf_superpoint after an int8 round trip: it has Magic Leap's
    # key names, but was trained with the TensorFlow code of rpautrat/SuperPoint, which samples the half-pixel way.
    "daa72151d47bff8ba79de12d65762d0b9ebb33d5390aa00c700b192d5d2d2d9a": Sampling.HALF_PIXEL,
}


def _fingerprint(layers: Mapping[str, Layer]) -> str:
    """SHA-256 of the convolution weights, whatever file they come from."""
    return sha256(b"".join(layers[name].weight.tobytes() for name in sorted(layers)))


def _recognize(
    arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str], source: str
) -> tuple[Family, dict[str, dict[str, NDArray[Any]]]]:
    """Finds the layout that fits the most keys, and sorts the arrays: layer -> parameter -> array."""
    keys = [key[len("module.") :] if key.startswith("module.") else key for key in arrays]
    keys = [key for key in keys if not key.endswith("num_batches_tracked")]
    renamed = {family: dict(_rename(family, keys)) for family in _LAYOUTS}
    family = max(renamed, key=lambda candidate: len(renamed[candidate]))
    strange = [key for key in keys if key not in renamed[family]]
    if not renamed[family] or strange:
        found = ", ".join((strange or keys)[:3]) or "no arrays"
        raise SuperPointError(
            f"{source} is not a SuperPoint checkpoint: found {len(arrays)} arrays, among them {found}; expected "
            "'backbone.0.0.conv.weight' (MIT v6), 'conv1a.weight' (Magic Leap) or "
            "'encoder.conv_blocks.0.conv_a.weight' (Hugging Face)."
        )
    layers: dict[str, dict[str, NDArray[Any]]] = {}
    for key, (layer, parameter) in renamed[family].items():
        array = arrays[key] if key in arrays else arrays["module." + key]
        layers.setdefault(layer, {})[parameter] = np.asarray(array)
    if metadata.get("format") == Family.SUPERPOINT_TRT.value:
        family = Family.SUPERPOINT_TRT
    return family, {name: layers[name] for name in sorted(layers, key=_network_order)}


def _sort_by_layer(
    arrays: Mapping[str, NDArray[Any]], topology: Topology, metadata: Mapping[str, str], source: str
) -> dict[str, dict[str, NDArray[Any]]]:
    """The arrays of a network with a topology: layer -> parameter -> array, in the topology's order.

    Raises:
        SuperPointError: the metadata's format is another, a layer has no arrays, or an array belongs to no layer.
    """
    if metadata.get("format") != Family.SUPERPOINT_TRT.value:
        raise SuperPointError(
            f"{source} has a topology, but its metadata's format is {metadata.get('format')!r}; expected "
            f"{Family.SUPERPOINT_TRT.value!r}."
        )
    layers: dict[str, dict[str, NDArray[Any]]] = {layer.name: {} for layer in topology}
    for key, array in arrays.items():
        match = re.fullmatch(rf"(\w+)\.({_PARAMETER}|{_BN_PARAMETER})", key)
        if not match or match[1] not in layers:
            raise SuperPointError(
                f"{source} does not fit its topology: found {_key_text(key)}; expected the weight, bias and bn.* of "
                f"{', '.join(layers)}."
            )
        layers[match[1]][match[2]] = np.asarray(array)
    missing = [name for name, parameters in layers.items() if not parameters]
    if missing:
        raise SuperPointError(f"{source} is incomplete: no layer {', '.join(missing)}.")
    return layers


def _rename(family: Family, keys: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    for key in keys:
        for pattern in _LAYOUTS[family]:
            match = re.fullmatch(pattern, key)
            if match:
                group, half, *parameters = match.groups()
                stage = _HEADS[group] if group in _HEADS else int(group) + 1 - _FIRST_STAGE[family]
                letter = {"0": "a", "1": "b"}.get(half, half)
                bn = "bn." if ".bn." in key else ""
                yield key, (f"conv{stage}{letter}", bn + next(name for name in parameters if name))


def _network_order(name: str) -> tuple[int, str]:
    stage = re.fullmatch(r"conv(\d+)([ab])", name)
    return (int(stage[1]), stage[2]) if stage else (10_000, {"P": "1", "D": "2"}[name[4]] + name[5])


def _shapes(name: str, parameters: Mapping[str, NDArray[Any]], source: str) -> dict[str, tuple[int, ...]]:
    """The shapes of one layer's parameters, as the file has them: parameter -> shape.

    Raises:
        SuperPointError: the layer lacks a parameter.
    """
    needed = ["weight", "bias"]
    if any(parameter.startswith("bn.") for parameter in parameters):
        needed += [f"bn.{field}" for field in BatchNorm.__dataclass_fields__]
    for parameter in needed:
        if parameter not in parameters:
            raise SuperPointError(f"{source} is incomplete: layer {name} has no {parameter}.")
    return {parameter: parameters[parameter].shape for parameter in needed}


def _layer(name: str, parameters: Mapping[str, NDArray[Any]], source: str) -> Layer:
    """Copies one layer whose shapes were checked, as float32.

    Raises:
        SuperPointError: a value is not finite, no number, or a variance is negative.
    """

    def take(parameter: str) -> Float32:
        try:
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(parameters[parameter], dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise SuperPointError(
                f"{source}: {name}.{parameter} holds no float32 values: {one_line(error)}."
            ) from error
        if not np.isfinite(array).all():
            raise SuperPointError(f"{source} is damaged: {name}.{parameter} holds values that are not finite.")
        return array

    norm = None
    if any(parameter.startswith("bn.") for parameter in parameters):
        norm = BatchNorm(*(take(f"bn.{field}") for field in BatchNorm.__dataclass_fields__))
        if (norm.running_var < 0).any():
            raise SuperPointError(f"{source} is damaged: {name}.bn.running_var is negative in places.")
    return Layer(take("weight"), take("bias"), norm)


def _check_shapes(layers: Mapping[str, Mapping[str, tuple[int, ...]]], source: str) -> None:
    """Checks that every layer is there, and that kernels and channels fit (DeTone et al. 2018, section 3).

    Args:
        layers: layer -> parameter -> shape.
        source: names the checkpoint in the error.

    Raises:
        SuperPointError: naming the first layer that does not fit.
    """
    stages = [int(match[1]) for name in layers for match in [re.fullmatch(r"conv(\d+)a", name)] if match]
    if max([*stages, 0]) > MOST_STAGES:
        last = f"conv{max(stages)}a"
        raise SuperPointError(f"{source} is not a SuperPoint: layer {last}; at most {MOST_STAGES} stages are known.")
    expected = [f"conv{stage}{half}" for stage in range(1, max([*stages, FEWEST_STAGES]) + 1) for half in "ab"]
    expected += ["convPa", "convPb", "convDa", "convDb"]
    strange = [name for name in layers if name not in expected]
    if strange:
        raise SuperPointError(f"{source} is not a SuperPoint: layer {strange[0]}; stages count from conv1a.")
    missing = [name for name in expected if name not in layers]
    if missing:
        raise SuperPointError(f"{source} is incomplete: no layer {', '.join(missing)}.")
    inputs = 1
    for name in expected:
        shapes = layers[name]
        if name in ("convPa", "convDa"):
            inputs = layers[f"conv{max(stages)}b"]["weight"][0]
        kernel = 1 if name in ("convPb", "convDb") else 3
        outputs = max(1, next(iter(shapes["weight"]), 0))
        for parameter, shape in shapes.items():
            fitting = (outputs, inputs, kernel, kernel) if parameter == "weight" else (outputs,)
            _expect(source, f"{name}.{parameter}", shape, fitting)
        inputs = outputs
    stride = 2 ** (max(stages) - 1)
    cells = layers["convPb"]["weight"][0]
    if cells != stride**2 + 1:
        raise SuperPointError(
            f"{source} is not a SuperPoint: its detector has {cells} channels; {max(stages)} stages make cells of "
            f"{stride}x{stride} px, so {stride**2 + 1} are expected (with the dustbin)."
        )


def _check_compact_shapes(topology: Topology, layers: Mapping[str, Mapping[str, tuple[int, ...]]], source: str) -> None:
    """Checks the shapes of a network with a topology; arguments and errors as `_check_shapes`."""
    check_weights(topology, {name: shapes["weight"] for name, shapes in layers.items()}, source)
    for name, shapes in layers.items():
        outputs = shapes["weight"][0]
        for parameter, shape in shapes.items():
            if parameter != "weight":
                _expect(source, f"{name}.{parameter}", shape, (outputs,))


def _expect(source: str, what: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise SuperPointError(f"{source} does not fit a SuperPoint: {what} is {shape}, expected {expected}.")


def _norm_placement(
    family: Family, layers: Mapping[str, Layer], metadata: Mapping[str, str], source: str
) -> NormPlacement:
    with_norm = [name for name, layer in layers.items() if layer.norm]
    if not with_norm:
        return NormPlacement.NONE
    if len(with_norm) != len(layers):
        without = ", ".join(name for name in layers if name not in with_norm)
        raise SuperPointError(f"{source} is incomplete: BatchNorm is missing for {without}.")
    if family is Family.SUPERPOINT_TRT:
        norm = _choice(NormPlacement, metadata.get("norm", ""), source)
        if norm is NormPlacement.AFTER_RELU and "topology" in metadata:
            raise SuperPointError(f"{source} has a topology and BatchNorm after the ReLU; expected it before the ReLU.")
        return norm
    if family is Family.V6:
        return NormPlacement.AFTER_RELU
    raise SuperPointError(
        f"{source} has BatchNorm under Magic Leap's key names, which say nothing of its place; this project's own "
        "files say it in their metadata, which this one has lost: convert the original again."
    )


def _sampling(family: Family, layers: Mapping[str, Layer], metadata: Mapping[str, str], source: str) -> Sampling:
    if family is Family.SUPERPOINT_TRT:
        return _choice(Sampling, metadata.get("sampling", ""), source)
    if family is Family.V6:
        if not any(layer.norm for layer in layers.values()):
            raise SuperPointError(
                f"{source} has the v6 layout's key names but no BatchNorm, so its descriptor sampling is not known; "
                "say it: --sampling half-pixel or legacy."
            )
        return Sampling.HALF_PIXEL
    return _SAMPLING_BY_CONTENT.get(_fingerprint(layers), Sampling.LEGACY)


def _subpixel(metadata: Mapping[str, str], source: str) -> bool:
    # Files written before there was this key: the ones trained here name no other family as their source.
    trained_here = metadata.get("source_family") == Family.SUPERPOINT_TRT.value or "topology" in metadata
    found = metadata.get("subpixel", "yes" if trained_here else "no")
    if found not in ("yes", "no"):
        raise SuperPointError(f"{source} has metadata subpixel {found!r}; expected yes or no.")
    return found == "yes"


def _choice(kind: type[_Choice], value: str, source: str) -> _Choice:
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(member.value for member in kind)
        raise SuperPointError(f"{source} has metadata {value!r}; expected one of {known}.") from None


# ------------------------------------------------------------------------------------------------------ file formats


def is_safetensors(data: bytes) -> bool:
    """Whether a file begins with its header's length and JSON: https://github.com/huggingface/safetensors#format."""
    return len(data) > 8 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 2**32


def read_safetensors(data: bytes, path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Reads a safetensors file's content: arrays by name, and its metadata.

    Raises:
        SuperPointError: it is damaged or in bfloat16; `path` names it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    try:
        arrays = from_bytes(data)  # bfloat16 comes as ml_dtypes' where that is installed
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        if '"BF16"' in str(data[8:100_000]):
            raise SuperPointError(f"checkpoint {path} is in bfloat16; save it as float32 or float16.") from error
        raise SuperPointError(f"checkpoint {path} is not a readable safetensors file: {one_line(error)}.") from error
    return arrays, header.get("__metadata__") or {}


def read_torch(data: bytes, path: Path) -> dict[str, NDArray[Any]]:
    """Reads a .pth file's content: float32 arrays by name. No code in it is executed.

    Raises:
        SuperPointError: it is damaged, no state_dict, or asks to execute code; or PyTorch is missing or older than 2.6.
    """
    if not data.startswith((b"PK\x03\x04", b"\x80")):
        raise SuperPointError(f"{path} is not a checkpoint: neither a .pth (PyTorch) nor a .safetensors file.")
    try:
        import torch
    except ImportError:
        raise SuperPointError(
            f"reading {path} needs PyTorch: {install_hint('torch')}. A .safetensors file does not."
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise SuperPointError(
            f"torch {torch.__version__} cannot be trusted to refuse code in a .pth (CVE-2025-32434): "
            "pip install 'torch>=2.6', or use a .safetensors file."
        )
    import pickle
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a TorchScript archive, which is refused below
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"(?:GLOBAL|global|class|type)\s+`?([\w.]+)`?", str(error))
        what = f" ({asked[1]})" if asked else ""
        raise SuperPointError(
            f"checkpoint {path} is refused: it holds more than plain arrays{what}, which could execute code when "
            "loaded; save only the state_dict, or use a .safetensors file."
        ) from error
    except Exception as error:  # torch raises many exceptions for damaged files
        raise SuperPointError(
            f"checkpoint {path} is damaged or truncated, or no plain state_dict: {one_line(error)}."
        ) from error
    return state_arrays(state, str(path))


def state_arrays(state: Any, source: str = "state dict") -> dict[str, NDArray[Any]]:
    """Turns a torch state_dict into float32 arrays; takes it out of the dictionary that training scripts put it in.

    Raises:
        SuperPointError: it is no mapping of names to tensors, or a tensor is too large, or of a kind that has no
            float32 values.
    """
    import torch

    state = _unwrap(state)
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        kind = type(state).__name__
        raise SuperPointError(f"{source} is not a checkpoint: expected a state_dict of arrays, got {kind}.")
    for key, value in state.items():
        _check_tensor(key, value, source)
    arrays = {}
    for key, value in state.items():
        try:
            arrays[str(key)] = value.detach().cpu().to_dense().float().numpy()
        except (RuntimeError, NotImplementedError, TypeError, MemoryError) as error:
            raise SuperPointError(
                f"{source}: {_key_text(key)} cannot be read as float32 values ({one_line(error)}); save the state_dict "
                "as float32."
            ) from error
    return arrays


def _check_tensor(key: object, tensor: Any, source: str) -> None:
    """Checks one tensor of a state_dict before its values are copied: an expanded or sparse one can be of any size.

    Raises:
        SuperPointError: the tensor is too large, or of a kind that has no float32 values.
    """
    dtype = str(tensor.dtype).rpartition(".")[2]
    strange = {
        "a meta tensor, which has no values": tensor.is_meta,
        "a quantized tensor": tensor.is_quantized,
        "a nested tensor": tensor.is_nested,
        f"a tensor of {dtype}": tensor.is_complex() or dtype.startswith("bits"),
    }
    for kind, is_of_kind in strange.items():
        if is_of_kind:
            raise SuperPointError(f"{source}: {_key_text(key)} is {kind}; save the state_dict as float32.")
    if tensor.numel() > _MOST_VALUES:
        raise SuperPointError(
            f"{source} is not a SuperPoint: {_key_text(key)} is {tuple(tensor.shape)}, {tensor.numel()} values; "
            f"expected {_MOST_VALUES} at most."
        )


def _key_text(key: object) -> str:
    """A parameter's name for an error: on one line, cut to 80 characters."""
    return " ".join(str(key).split())[:80]


def _unwrap(state: Any) -> Any:
    """Takes a state_dict out of the dictionary that a training script saved it in."""
    for key in ("state_dict", "model_state_dict", "model", "net"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            return state[key]
    return state
