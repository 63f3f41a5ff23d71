"""LightGlue checkpoints: the converted matcher computes what the paper's formulas give with the published arrays."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from matchers import points, shuffled

from superpoint_trt.checkpoint.lightglue import HEADS, convert_lightglue, lightglue_weights
from superpoint_trt.checkpoint.matcher import Activation, load_matcher
from superpoint_trt.checkpoint.matcher_network import MatcherNet, PointSets
from superpoint_trt.cli.main import cli
from superpoint_trt.convert.export_matcher import MatcherExportOptions, matcher_to_onnx
from superpoint_trt.core.matcher import INPUTS
from superpoint_trt.core.types import SuperPointError

WIDTH, LAYERS, ROWS = 32, 2, 24


def published(dim: int = WIDTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random arrays under the names of the published files."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, inputs: int, outputs: int, scale: float = 1.0) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=random) * scale / inputs**0.5
        state[f"{name}.bias"] = torch.randn(outputs, generator=random) * 0.1

    state["posenc.Wr.weight"] = torch.randn(WIDTH // HEADS // 2, 2, generator=random) * 2
    if dim != WIDTH:
        linear("input_proj", dim, WIDTH)
    for layer in range(LAYERS):
        for block, maps in (
            ("self_attn", {"Wqkv": 3, "out_proj": 1}),
            ("cross_attn", {"to_qk": 1, "to_v": 1, "to_out": 1}),
        ):
            for name, times in maps.items():
                linear(f"{block}.{layer}.{name}", WIDTH, times * WIDTH, 3)
            linear(f"{block}.{layer}.ffn.0", 2 * WIDTH, 2 * WIDTH)
            state[f"{block}.{layer}.ffn.1.weight"] = 1 + 0.2 * torch.randn(2 * WIDTH, generator=random)
            state[f"{block}.{layer}.ffn.1.bias"] = 0.2 * torch.randn(2 * WIDTH, generator=random)
            linear(f"{block}.{layer}.ffn.3", 2 * WIDTH, WIDTH, 0.5)
        linear(f"log_assignment.{layer}.final_proj", WIDTH, WIDTH, 4)
        linear(f"log_assignment.{layer}.matchability", WIDTH, 1)
    linear("token_confidence.0.token.0", WIDTH, 1)
    return state


def apply(state, name: str, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def updated(state, block: str, x, message):
    hidden = apply(state, f"{block}.ffn.0", torch.cat([x, message], dim=1))
    normed = F.layer_norm(hidden, (2 * WIDTH,), state[f"{block}.ffn.1.weight"], state[f"{block}.ffn.1.bias"])
    return x + apply(state, f"{block}.ffn.3", F.gelu(normed))


def formulas(state, pair) -> torch.Tensor:
    """Section 3 of the paper for one pair, point by point and head by head: logarithms of the assignment."""
    head = WIDTH // HEADS
    states, angles = [], []
    for found in pair:
        descriptors = torch.from_numpy(found.descriptors)
        states.append(apply(state, "input_proj", descriptors) if "input_proj.weight" in state else descriptors)
        size = torch.tensor(found.image_size).float()
        angles.append((torch.from_numpy(found.xy) - size / 2) / (size.max() / 2) @ state["posenc.Wr.weight"].T)
    for layer in range(LAYERS):
        for index in (0, 1):
            block, x = f"self_attn.{layer}", states[index]
            read = apply(state, f"{block}.Wqkv", x).reshape(len(x), HEADS, head, 3)
            messages = []
            for h in range(HEADS):
                asked, offered, value = read[:, h].unbind(dim=-1)
                turned = []
                for vector in (asked, offered):  # neighboring numbers are one complex number, which is turned
                    complex_ = torch.complex(vector[:, 0::2], vector[:, 1::2]) * torch.exp(1j * angles[index])
                    turned.append(torch.view_as_real(complex_).flatten(1))
                shares = (turned[0] @ turned[1].T / head**0.5).softmax(dim=1)
                messages.append(shares @ value)
            states[index] = updated(state, block, x, apply(state, f"{block}.out_proj", torch.cat(messages, dim=1)))
        block = f"cross_attn.{layer}"
        alike = [apply(state, f"{block}.to_qk", x).reshape(len(x), HEADS, head) for x in states]
        values = [apply(state, f"{block}.to_v", x).reshape(len(x), HEADS, head) for x in states]
        similar = torch.einsum("ihd,jhd->hij", *alike) / head**0.5
        there = torch.einsum("hij,jhd->ihd", similar.softmax(dim=2), values[1]).flatten(1)
        back = torch.einsum("hij,ihd->jhd", similar.softmax(dim=1), values[0]).flatten(1)
        states = [updated(state, block, x, apply(state, f"{block}.to_out", m)) for x, m in zip(states, (there, back))]
    block = f"log_assignment.{LAYERS - 1}"
    first, second = (apply(state, f"{block}.final_proj", x) / WIDTH**0.25 for x in states)
    z0, z1 = (F.logsigmoid(apply(state, f"{block}.matchability", x)) for x in states)
    similarity = first @ second.T
    return similarity.log_softmax(dim=1) + similarity.log_softmax(dim=0) + z0 + z1.T


def sets_of(pair) -> list[PointSets]:
    return [
        PointSets(
            *(torch.from_numpy(array)[None] for array in (one.xy, one.scores, one.descriptors)),
            torch.tensor([len(one)], dtype=torch.int32),
            torch.tensor([one.image_size]).float(),
        )
        for one in pair
    ]


@pytest.mark.parametrize("dim", [WIDTH, 20])
def test_the_converted_matcher_computes_the_papers_formulas(dim):
    state = published(dim)
    first = points(ROWS, dim=dim)
    pair = first, shuffled(first, noise=0.1)[0]
    weights = lightglue_weights({key: value.numpy() for key, value in state.items()})
    assert weights.shape.descriptor_dims == (dim,) and weights.shape.activation is Activation.GELU
    said = MatcherNet.from_weights(weights)(*sets_of(pair))[-1].log_probability()[0]
    torch.testing.assert_close(said, formulas(state, pair), atol=2e-3, rtol=1e-3)


def test_its_onnx_agrees(tmp_path):
    """The published file through the command, to an .onnx."""
    torch.save(published(), tmp_path / "l.pth")
    words = ["matcher", "convert", "--lightglue", str(tmp_path / "l.pth"), "--output", str(tmp_path / "w.safetensors")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    weights = load_matcher(tmp_path / "w.safetensors")
    first = points(ROWS)
    sets = sets_of((first, shuffled(first, noise=0.1)[0]))
    model = matcher_to_onnx(weights, MatcherExportOptions(min_score=0.001))
    feed = {f"{n}{i}": part.numpy() for i, one in enumerate(sets) for n, part in zip(INPUTS, one)}
    found, scores = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)
    expected = formulas(published(), (first, shuffled(first, noise=0.1)[0])).exp()
    rows = np.flatnonzero(found[0] >= 0)
    assert len(rows) > 5
    np.testing.assert_allclose(scores[0, rows], expected[rows, found[0, rows]], atol=2e-3)
    np.testing.assert_array_equal(expected[rows].argmax(dim=1), found[0, rows])


def test_names_of_later_versions_are_known():
    state = {key: value.numpy() for key, value in published().items()}
    later = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] in ("self_attn", "cross_attn"):
            key = ".".join(["transformers", parts[1], parts[0], *parts[2:]])
        later["matcher." + key] = value
    for name, array in lightglue_weights(later).arrays.items():
        np.testing.assert_array_equal(array, lightglue_weights(state).arrays[name])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.clear(), "is not a LightGlue checkpoint"),
        (lambda state: state.pop("posenc.Wr.weight"), "is not a LightGlue checkpoint"),
        (lambda state: state.pop("self_attn.1.ffn.3.bias"), "lacks self_attn.1.ffn.3.bias"),
        (lambda state: state.update(more=torch.zeros(1)), "has an array of another network, more"),
        (lambda state: state.update({"cross_attn.0.to_v.bias": torch.zeros(3)}), r"cross_attn.0.to_v.bias is \(3,\)"),
        (lambda state: state["posenc.Wr.weight"].fill_(float("nan")), "not finite"),
        (lambda state: state.update({"posenc.Wr.weight": torch.zeros(4, 4)}), r"posenc.Wr.weight is \(4, 4\)"),
    ],
)
def test_other_files_are_refused(change, said, tmp_path):
    state = published()
    change(state)
    with pytest.raises(SuperPointError, match=said):
        lightglue_weights({key: value.numpy() for key, value in state.items()})


def test_code_in_a_file_is_refused(tmp_path):
    import os

    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"posenc.Wr.weight": Evil()}, tmp_path / "l.pth")
    with pytest.raises(SuperPointError, match="more than plain arrays"):
        convert_lightglue(tmp_path / "l.pth", tmp_path / "w.safetensors")
