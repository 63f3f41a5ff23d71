"""Late layers learn steadier answers: what changes, what stays, what is kept, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import photograph
from training import late, settle
from training.distill import look
from training.fold import fold
from training.networks import SHAPES
from training.settle import SMOKE, SettlePlan, parts_of
from training.steady import dealt, steady_logits

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.checkpoint.reference import Network, SuperPointNet, network
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import SuperPointError

CPU = torch.device("cpu")
EARLY = {"conv1a", "conv1b", "conv2a", "conv2b"}
KINDS = pytest.mark.parametrize("kind", ["full", "small"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, shown in (("camera", "camera"), ("coffee", "coffee"), ("kodim07", "astronaut")):
        cv2.imwrite(str(folder / f"{name}.png"), photograph(120, 160, shown))
    return folder


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints, float16: a full and a small network to start from, and another full one."""
    torch.manual_seed(3)
    nets = {
        "full": SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU),
        "small": SHAPES["smoke"].network(),
        "other": SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU),
    }
    out = tmp_path_factory.mktemp("checkpoints")
    return {name: layouts.save(fold(net.eval()), out / f"{name}.safetensors", half=True) for name, net in nets.items()}


def nets_of(paths: dict[str, Path], *names: str) -> list[Network]:
    return [network(layouts.load(paths[name])) for name in names]


def kept_views(
    net: Network, teachers: list[Network], folder: Path, count: int, plan: SettlePlan = SMOKE
) -> settle.Kept:
    photos = sorted(folder.glob("*.png"))
    return settle.keep(parts_of(net), teachers, photos, count, plan.look, CPU, lambda *_: None)


def command(folder: Path, paths: dict[str, Path], output: Path, *more: str, start: str = "full") -> list[str]:
    teachers = ["--teacher", str(paths["full"]), "--teacher", str(paths["other"])]
    return ["--photos", str(folder), "--start", str(paths[start]), *teachers, "--output", str(output), "--smoke", *more]


# -------------------------------------------------------------------------------------------------------- what is kept


@KINDS
def test_kept_views_say_what_networks_say_of_the_same_views(kind, paths, folder, monkeypatch):
    shown = []

    def watched(*drawn):
        shown.append(look(*drawn))
        return shown[-1]

    monkeypatch.setattr(late, "look", watched)
    net, first, second = nets_of(paths, kind, "full", "other")
    kept = kept_views(net, [first, second], folder, 7)  # two pairs at a time: the last view is left out
    assert [len(part) for part in kept] == [7] * 5
    image = torch.cat([seen.image for seen in shown])[:7]
    inside = torch.cat([seen.inside for seen in shown])[:7]
    with torch.no_grad():
        logits, coarse = net(image)
        said = parts_of(net).heads(parts_of(net).trunk(kept.entering.float()))
        again = parts_of(net).heads(kept.features.float())
    for mine in (said, again):
        torch.testing.assert_close(mine[0], logits, atol=5e-3, rtol=5e-3)
        torch.testing.assert_close(mine[1], coarse, atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(kept.known.float(), F.normalize(coarse, dim=1), atol=2e-3, rtol=0)
    halves = [
        steady_logits(lambda x, own=each: own(x)[0], image, hand).exp() for each, hand in zip((first, second), dealt(2))
    ]
    torch.testing.assert_close(kept.target.float().exp(), sum(halves) / 2, atol=2e-3, rtol=5e-3)
    cells = F.pixel_unshuffle(inside, 8).amin(dim=1) > 0.999
    assert torch.equal(kept.inside, cells) and kept.inside.dtype is torch.bool
    assert {part.dtype for part in kept[:-1]} == {torch.float16}


def test_what_is_kept_of_a_view_of_the_full_network_takes_1_7_mb():
    """The figure of training/README.md, and which cells count: those that look past the edge in no pixel."""
    net = SuperPointNet(norm=NormPlacement.NONE).eval()
    inside = torch.ones(1, 1, 240, 320)
    inside[:, :, :, 312:] = 0.5
    some = settle._of_views(parts_of(net), [net], torch.rand(1, 1, 240, 320), inside)
    assert some.bytes() / 1e6 == pytest.approx(1.69, abs=0.01)
    assert some.inside.sum() == 30 * 39


def test_more_views_than_memory_allows_are_refused_with_the_number_that_fits(paths, folder):
    (net,) = nets_of(paths, "full")
    photos = sorted(folder.glob("*.png"))
    size = kept_views(net, [net], folder, 1).bytes()
    with pytest.raises(SuperPointError, match=r"100 views take .* GB .* take 10 views or fewer \(--views"):
        settle.keep(parts_of(net), [net], photos, 100, SMOKE.look, CPU, lambda *_: None, size * 10)


# ------------------------------------------------------------------------------------------------------------ learning


@KINDS
def test_the_divergence_falls_and_the_early_layers_stay(kind, paths, folder, tmp_path):
    net, first, second = nets_of(paths, kind, "full", "other")
    plan = replace(SMOKE, head_steps=30, head_learning_rate=1e-2, steps=30, learning_rate=3e-3, head_batch=4, batch=4)
    parts, kept = parts_of(net), kept_views(net, [first, second], folder, 8)
    early = [parameter.clone() for parameter in parts.early.parameters()]
    before = settle.judge(parts, kept)
    assert before["away"] < 1e-3 < before["divergence"]
    settle.learn(parts, kept, plan, tmp_path / "log.jsonl", lambda *_: None)
    after = settle.judge(parts, kept)
    assert after["divergence"] < 0.8 * before["divergence"]
    assert all(torch.equal(old, new) for old, new in zip(early, parts.early.parameters()))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(set(line) == {"phase", "step", "divergence", "away"} for line in lines)
    expected = [(phase, step) for phase in ("detector", "all") for step in (10, 20, 30)]
    assert [(line["phase"], line["step"]) for line in lines] == (expected if kind == "full" else expected[3:])
    assert lines[-1]["divergence"] < lines[0]["divergence"]


def test_the_detector_head_learns_alone_first(paths, folder, tmp_path):
    net, other = nets_of(paths, "full", "other")
    kept = kept_views(net, [other], folder, 4)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plan = replace(SMOKE, steps=1, learning_rate=0.0, head_steps=2)
    settle.learn(parts_of(net), kept, plan, tmp_path / "log.jsonl", lambda *_: None)
    changed = {name.split(".")[0] for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"detector"}


def test_descriptors_stay_by_their_weight(paths, folder, tmp_path):
    away = {}
    for weight in (0.0, 20.0):
        net, other = nets_of(paths, "full", "other")
        kept = kept_views(net, [other], folder, 8)
        torch.manual_seed(1)
        plan = replace(SMOKE, head_steps=0, steps=30, learning_rate=3e-3, batch=4, keep_weight=weight)
        settle.learn(parts_of(net), kept, plan, tmp_path / f"{weight}.jsonl", lambda *_: None)
        away[weight] = settle.judge(parts_of(net), kept)["away"]
    assert away[20.0] < 0.5 * away[0.0]


def test_cells_that_look_past_the_edge_do_not_count(paths, folder):
    net, other = nets_of(paths, "full", "other")
    kept = kept_views(net, [other], folder, 4)
    kept.inside[:] = False
    kept.inside[:, 2:5, 3:6] = True
    known = settle.judge(parts_of(net), kept)
    kept.target[~kept.inside[:, None].expand_as(kept.target)] = 0
    assert settle.judge(parts_of(net), kept) == known
    kept.inside[:] = False
    assert settle.judge(parts_of(net), kept) == {"divergence": 0, "away": 0}


# --------------------------------------------------------------------------------------------------------- the command


@KINDS
def test_the_command_writes_a_checkpoint_that_loads_and_exports(kind, paths, folder, tmp_path):
    done = CliRunner().invoke(settle.main, command(folder, paths, tmp_path / "run", start=kind))
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("divergence", "away", "before", "after"))
    figures = json.loads((tmp_path / "run/figures.json").read_text())
    assert set(figures) == {"before", "after"}
    before, after = layouts.load(paths[kind]), layouts.load(tmp_path / "run/settled.safetensors")
    assert list(before.layers) == list(after.layers)
    same = {
        name
        for name, layer in before.layers.items()
        if np.array_equal(layer.weight, after.layers[name].weight)
        and np.array_equal(layer.bias, after.layers[name].bias)
    }
    assert same == (EARLY if kind == "full" else set())
    for name in ("family", "norm", "sampling", "subpixel", "topology"):
        assert getattr(before, name) == getattr(after, name)
    assert (tmp_path / "run/settled.safetensors").stat().st_size < paths[kind].stat().st_size * 1.1
    assert export(tmp_path / "run/settled.safetensors", tmp_path / "net.onnx", ExportOptions())


def test_without_steps_the_detector_head_alone_learns(paths, folder, tmp_path):
    done = CliRunner().invoke(settle.main, command(folder, paths, tmp_path / "run", "--steps", "0"))
    assert done.exit_code == 0, done.output
    before, after = layouts.load(paths["full"]), layouts.load(tmp_path / "run/settled.safetensors")
    changed = {
        name for name, layer in before.layers.items() if not np.array_equal(layer.weight, after.layers[name].weight)
    }
    assert changed == {"convPa", "convPb"}


def test_a_seed_repeats_a_run(paths, folder, tmp_path):
    for name in "ab":
        done = CliRunner().invoke(settle.main, command(folder, paths, tmp_path / name, "--views", "5"))
        assert done.exit_code == 0, done.output
    a, b = (layouts.load(tmp_path / f"{name}/settled.safetensors").layers for name in "ab")
    assert all(np.array_equal(a[name].weight, b[name].weight) for name in a)
    assert (tmp_path / "a/log.jsonl").read_text() == (tmp_path / "b/log.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--set", "nothing=1"), "--set nothing=1: expected one of views, head_steps"),
        (("--set", "batch=0"), "batch is 0; expected 1 or more"),
        (("--set", "head_steps=-1"), "head_steps is -1; expected 0 or more"),
        (("--learning-rate", "1e30"), "lower --learning-rate"),
        (("--set", "head_learning_rate=1e30"), "lower head_learning_rate (--set)"),
        (("--views", "100000000"), "views or fewer (--views"),
        (("--teacher", "a", "--teacher", "b", "--teacher", "c"), "5 teachers are given; expected 1 to 4"),
        (("--device", "tpus"), "expected cuda, cuda:1 or cpu"),
    ],
)
def test_bad_values_are_refused_in_one_line_and_leave_no_checkpoint(more, words, paths, folder, tmp_path):
    done = CliRunner().invoke(settle.main, command(folder, paths, tmp_path / "run", *more))
    assert done.exit_code == 2
    assert words in done.output and "Traceback" not in done.output
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["full", "small"])
def test_weights_that_float16_cannot_hold_are_refused(kind, paths, folder, tmp_path, monkeypatch):
    """A run whose last step leaves NaN in a layer writes nothing."""

    def spoilt(parts, *_):
        with torch.no_grad():
            parts.learning[0][0] = float("nan")

    monkeypatch.setattr(settle, "learn", spoilt)
    done = CliRunner().invoke(settle.main, command(folder, paths, tmp_path / "run", start=kind))
    assert done.exit_code == 2
    layer = {"full": "conv3a", "small": "stem0"}[kind]
    assert f"layer {layer} has learnt values that float16 cannot hold" in done.output
    assert not list(tmp_path.rglob("*.safetensors"))


def test_teachers_of_another_kind_are_refused(paths, folder, tmp_path):
    arrays = SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU).state_dict()
    wrong = layouts.from_arrays({name: value.numpy() for name, value in arrays.items() if "num_b" not in name})
    path = layouts.save(wrong, tmp_path / "norm.safetensors")
    done = CliRunner().invoke(settle.main, command(folder, paths, tmp_path / "run", "--teacher", str(path)))
    assert done.exit_code == 2 and "norm.safetensors has BatchNorm" in done.output
