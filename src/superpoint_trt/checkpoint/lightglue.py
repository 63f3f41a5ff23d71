"""Published LightGlue checkpoints as this package's matchers.

LightGlue's layers (Lindenberger et al. 2023, arXiv 2306.13643) fit `matcher_network` exactly: the attention's output
map and the update's first one are linear and become one; its rotary positions turn neighboring numbers of a head, those
here a number of either half, so rows change places. What its early stopping needs (`token_confidence`) is left out: all
layers run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from superpoint_trt.checkpoint.layouts import is_safetensors, read_safetensors, read_torch
from superpoint_trt.checkpoint.matcher import Activation, MatcherShape, MatcherWeights, save_matcher
from superpoint_trt.core.files import PathLike, check_distinct, check_writable, read_bytes
from superpoint_trt.core.types import Float32, SuperPointError

HEADS = 4
"""Of every published checkpoint; the arrays do not tell it."""

_NOT_USED = re.compile(r"token_confidence\.|confidence_thresholds$")
_BLOCKS = {"self": ("Wqkv", "out_proj"), "cross": ("to_qk", "to_v", "to_out")}

Arrays = Mapping[str, NDArray[Any]]


def convert_lightglue(path: PathLike, output: PathLike, half: bool = False) -> Path:
    """Reads a LightGlue checkpoint and writes it as a matcher of this package.

    Args:
        path: `.pth` (needs torch; nothing but arrays is unpickled) or `.safetensors`.
        output: the `.safetensors` to write.
        half: stores float16.

    Returns:
        The path written.

    Raises:
        SuperPointError: not such a checkpoint: a key is missing or unknown, or a shape is wrong.
    """
    output = check_writable(output)
    if output.suffix.lower() != ".safetensors":
        raise SuperPointError(f"output {output}: a matcher's weights end in .safetensors.")
    check_distinct(output, path)
    data = read_bytes(path, "checkpoint")
    arrays = read_safetensors(data, Path(path))[0] if is_safetensors(data) else read_torch(data, Path(path))
    return save_matcher(lightglue_weights(arrays, str(path)), output, half)


def lightglue_weights(arrays: Arrays, source: str = "the checkpoint") -> MatcherWeights:
    """A LightGlue state_dict as a matcher's weights.

    Raises:
        SuperPointError: a key is missing or unknown, a shape is wrong, or a value is not finite.
    """
    own = {_key(key): np.asarray(array, np.float64) for key, array in arrays.items()}
    own = {key: array for key, array in own.items() if not _NOT_USED.search(key)}
    layers = 1 + max((int(key.split(".")[1]) for key in own if re.match(r"self_attn\.\d+\.", key)), default=-1)
    if not layers or "posenc.Wr.weight" not in own:
        raise SuperPointError(
            f"{source} is not a LightGlue checkpoint: expected arrays named posenc.Wr.weight and self_attn.0.*, found "
            f"{', '.join(sorted(arrays)[:3]) or 'none'}."
        )
    half_head = own["posenc.Wr.weight"].shape[0] if own["posenc.Wr.weight"].ndim == 2 else 0
    width = 2 * half_head * HEADS
    projected = own.get("input_proj.weight")
    dim = projected.shape[-1] if projected is not None and projected.ndim == 2 else width
    _check(own, _expected(width, half_head, layers, dim if projected is not None else None), source)
    shape = MatcherShape((dim,), width, HEADS, layers, Activation.GELU)
    made: dict[str, NDArray[np.float64]] = {"positions.weight": own["posenc.Wr.weight"]}
    weight = projected if projected is not None else np.eye(width)
    made[f"project.{dim}.weight"] = np.concatenate([weight, np.zeros((width, 1))], axis=1)
    made[f"project.{dim}.bias"] = own.get("input_proj.bias", np.zeros(width))
    for layer in range(layers):
        made[f"layers.{layer}.head.support"] = np.zeros(2)
        made.update(_self_attention(own, layer, half_head))
        made.update(_cross_attention(own, layer))
        for part in ("weight", "bias"):
            made[f"layers.{layer}.head.project.{part}"] = own[f"log_assignment.{layer}.final_proj.{part}"]
            made[f"layers.{layer}.head.matchable.{part}"] = own[f"log_assignment.{layer}.matchability.{part}"]
    converted: dict[str, Float32] = {name: array.astype(np.float32) for name, array in made.items()}
    return MatcherWeights(shape, converted, {})


def _key(key: str) -> str:
    """The published name of a key, without the prefixes of later versions and of training code."""
    key = re.sub(r"^(module\.|matcher\.)+", "", key)
    return re.sub(r"^transformers\.(\d+)\.(self_attn|cross_attn)\.", r"\2.\1.", key)


def _expected(width: int, half_head: int, layers: int, dim: int | None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array."""
    found: dict[str, tuple[int, ...]] = {"posenc.Wr.weight": (half_head, 2)}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    if dim is not None:
        linear("input_proj", dim, width)
    for layer in range(layers):
        for kind, names in _BLOCKS.items():
            block = f"{kind}_attn.{layer}"
            for name in names:
                linear(f"{block}.{name}", width, 3 * width if name == "Wqkv" else width)
            linear(f"{block}.ffn.0", 2 * width, 2 * width)
            found.update({f"{block}.ffn.1.weight": (2 * width,), f"{block}.ffn.1.bias": (2 * width,)})
            linear(f"{block}.ffn.3", 2 * width, width)
        linear(f"log_assignment.{layer}.final_proj", width, width)
        linear(f"log_assignment.{layer}.matchability", width, 1)
    return found


def _check(own: Arrays, expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    for key in sorted(own.keys() ^ expected.keys()):
        what = "lacks" if key in expected else "has an array of another network,"
        raise SuperPointError(f"{source} is no LightGlue that can be converted: it {what} {key}.")
    for key, shape in expected.items():
        if own[key].shape != shape:
            raise SuperPointError(f"{source} does not fit LightGlue: {key} is {own[key].shape}, expected {shape}.")
        if not np.isfinite(own[key]).all():
            raise SuperPointError(f"{source} is damaged: {key} holds values that are not finite.")


def _self_attention(own: Arrays, layer: int, half_head: int) -> dict[str, NDArray[np.float64]]:
    """Its rows count through heads, numbers of a head, then query, key, value."""
    block = f"self_attn.{layer}"
    made = {}
    for part in ("weight", "bias"):
        rows = own[f"{block}.Wqkv.{part}"].reshape(HEADS, 2 * half_head, 3, -1).transpose(2, 0, 1, 3)
        # Queries and keys: the even numbers of a head become its first half, the odd ones its second.
        halves = np.concatenate([rows[:2, :, 0::2], rows[:2, :, 1::2]], axis=2)
        read = np.concatenate([halves, rows[2:]])
        flat = read.reshape(3 * HEADS * 2 * half_head, -1)
        made[f"layers.{layer}.self.read.{part}"] = flat if part == "weight" else flat[:, 0]
    return {**made, **_update(own, block, f"layers.{layer}.self", "out_proj")}


def _cross_attention(own: Arrays, layer: int) -> dict[str, NDArray[np.float64]]:
    block = f"cross_attn.{layer}"
    made = {
        f"layers.{layer}.cross.read.{part}": np.concatenate(
            [own[f"{block}.{name}.{part}"] for name in ("to_qk", "to_v")]
        )
        for part in ("weight", "bias")
    }
    return {**made, **_update(own, block, f"layers.{layer}.cross", "to_out")}


def _update(own: Arrays, block: str, name: str, out: str) -> dict[str, NDArray[np.float64]]:
    """The attention's output map goes into the half of the first map that reads the message."""
    state, message = np.split(own[f"{block}.ffn.0.weight"], 2, axis=1)
    return {
        f"{name}.hidden.weight": np.concatenate([state, message @ own[f"{block}.{out}.weight"]], axis=1),
        f"{name}.hidden.bias": own[f"{block}.ffn.0.bias"] + message @ own[f"{block}.{out}.bias"],
        f"{name}.norm.weight": own[f"{block}.ffn.1.weight"],
        f"{name}.norm.bias": own[f"{block}.ffn.1.bias"],
        f"{name}.write.weight": own[f"{block}.ffn.3.weight"],
        f"{name}.write.bias": own[f"{block}.ffn.3.bias"],
    }
