"""The last stage, where only the last convolutions learn: what changes, what stays, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import photograph, write_photographs
from training import heads, late
from training.distill import look
from training.fold import fold
from training.geometry import translation
from training.heads import COMPACT_LAYERS, FEW, SMOKE, VGG_LAYERS, Heads, HeadsPlan, Kept
from training.networks import SHAPES
from training.places import Found
from training.train import FOUND_FIGURES

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.descriptor_map import DescriptorMap
from superpoint_trt.checkpoint.layouts import Checkpoint, NormPlacement
from superpoint_trt.checkpoint.reference import SuperPointNet, network
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import Sampling, SuperPointError

LAYERS = {"vgg": VGG_LAYERS, "compact": COMPACT_LAYERS}
NOTHING = {name: 0.0 for name in vars(SMOKE) if name.endswith("_weight")}
KINDS = pytest.mark.parametrize("kind", LAYERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each kind, float16."""
    torch.manual_seed(3)
    nets = {
        "vgg": SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU),
        "compact": SHAPES["smoke"].network(),
    }
    out = tmp_path_factory.mktemp("starts")
    return {kind: layouts.save(fold(net.eval()), out / f"{kind}.safetensors", half=True) for kind, net in nets.items()}


def command(folder: Path, start: Path, output: Path, *more: str) -> list[str]:
    return ["--photos", str(folder), "--start", str(start), "--output", str(output), "--smoke", *more]


def drawn(start: Path, folder: Path, count: int, plan: HeadsPlan = SMOKE) -> tuple[Checkpoint, Heads, list[Kept]]:
    checkpoint = layouts.load(start)
    net = network(checkpoint)
    last = Heads(net, COMPACT_LAYERS if checkpoint.topology else VGG_LAYERS)
    paths = sorted(folder.glob("*.png"))
    return checkpoint, last, heads.draw(net, last, paths, count, plan, lambda *_: None)


# -------------------------------------------------------------------------------------------------------- what is kept


@KINDS
def test_the_last_layers_say_of_what_is_kept_what_the_network_says(kind, starts, folder, monkeypatch):
    shown: list[torch.Tensor] = []

    def watched(*drawn):
        views = look(*drawn)
        shown.extend(views.image.unflatten(0, (2, -1)).unbind(dim=1))  # a pair each
        return views

    monkeypatch.setattr(late, "look", watched)
    checkpoint, last, kept = drawn(starts[kind], folder, 3)  # two pairs, then one
    assert len(shown) == len(kept) == 3
    with torch.no_grad():
        said = last(heads.together(kept))
        known = network(checkpoint)(torch.stack(shown, dim=1).flatten(0, 1))
    for mine, its in zip(said, known):
        torch.testing.assert_close(mine, its, atol=5e-3, rtol=5e-3)
    assert kept[0].detector.dtype is kept[0].descriptor.dtype is torch.float16
    assert kept[0].inside.dtype is torch.bool


def test_a_batch_has_all_first_views_before_the_second_ones():
    pairs = [
        Kept(
            *(torch.full((2, 1, 1, 1), 10.0 * pair) + torch.arange(2.0).view(2, 1, 1, 1) for _ in range(3)),
            torch.eye(3)[None] * pair,
        )
        for pair in (1, 2, 3)
    ]
    batch = heads.together(pairs)
    assert batch.detector.flatten().tolist() == [10, 20, 30, 11, 21, 31]
    assert batch.homography[:, 0, 0].tolist() == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- learning


@KINDS
def test_the_loss_falls(kind, starts, folder, tmp_path):
    easy = {"far_share": 0.0, "tilted_share": 0.0, "blurred_share": 0.0, "night_share": 0.0}
    plan = replace(SMOKE, steps=80, learning_rate=1e-2, pairs=4, match_weight=0.5, repeat_weight=1.0, **easy)
    _, last, kept = drawn(starts[kind], folder, 4, plan)
    heads.learn(last, kept, plan, tmp_path / "log.jsonl", lambda *_: None)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 81, 10))
    assert set(lines[0]) == {"step", "loss", "drift", *FOUND_FIGURES}
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    assert lines[-1]["drift"] > 0


def test_each_head_learns_from_its_own_losses_alone(starts, folder):
    _, last, kept = drawn(starts["vgg"], folder, 2)
    first = torch.nn.Conv2d(24, 65, 1)
    learning = {
        "wrong_weight": (False, True),
        "match_weight": (False, True),
        "repeat_weight": (True, False),
        "place_weight": (True, False),
        "spread_weight": (True, False),
        "keep_weight": (True, False),
    }
    for name, expected in learning.items():
        last.zero_grad(set_to_none=True)
        loss, _ = heads.objective(last, first, heads.together(kept), replace(SMOKE, **{**NOTHING, name: 1.0}))
        loss.backward()
        lengths = [conv.weight.grad.abs().sum() for conv in (last.detector, last.descriptor)]
        assert tuple(bool(length > 0) for length in lengths) == expected, name


def test_the_detector_is_kept_near_its_first_answers(starts, folder):
    _, last, kept = drawn(starts["vgg"], folder, 2)
    batch = heads.together(kept)
    plan = replace(SMOKE, **{**NOTHING, "keep_weight": 2.0})
    same, figures = heads.objective(last, last.detector, batch, plan)
    assert abs(same.item()) < 1e-5 and abs(figures[-1].item()) < 1e-5
    other = torch.nn.Conv2d(24, 65, 1)
    loss, figures = heads.objective(last, other, batch, plan)
    told, said = other(batch.detector).softmax(1), last.detector(batch.detector).softmax(1)
    torch.testing.assert_close(figures[-1], (told * (told / said).log()).sum(1).mean().detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss.detach(), 2 * figures[-1])


# -------------------------------------------------------------------------------------------------------------- judging


def points(xy: list[tuple[float, float]], real: list[bool] | None = None) -> Found:
    place = torch.tensor(xy)[None]
    marks = torch.tensor([real or [True] * len(xy)])
    return Found(place, torch.linspace(1, 0.5, len(xy))[None], torch.zeros(1, len(xy)), marks)


def test_matches_of_a_known_case():
    """Three of four points choose each other: 0.5, 2 and 20 px off; the fourth is padding in the second view."""
    first = points([(10, 10), (20, 20), (30, 30), (40, 40)])
    second = points([(15.5, 10), (25, 22), (35, 50), (45, 40)], [True, True, True, False])
    unit = torch.eye(4)[None]
    got = heads.matching(first, second, (unit, unit), translation(torch.tensor([[5.0, 0.0]])))
    torch.testing.assert_close(got, torch.tensor([[1 / 3, 2 / 3, 2, 3]]))


def test_points_found_again_of_a_known_case():
    """Of three points that the other view shows, one is found within 1 px, one within 3; the fourth is not shown."""
    first = points([(10, 10), (20, 20), (30, 30), (76, 30)])
    second = points([(15.5, 10), (25, 22), (35, 50), (35, 30)], [True, True, True, False])
    inside = torch.ones(1, 1, 64, 80)
    got = heads.found_again(first, second, translation(torch.tensor([[5.0, 0.0]])), inside)
    torch.testing.assert_close(got, torch.tensor([[2 / 3, 1 / 3]]))


def test_no_more_than_the_best_points_are_to_be_found_again():
    many = points([(8.0 + k % 20, 8.0 + k // 20) for k in range(FEW + 20)])
    late = Found(many.xy.flip(1) + 0.1, *many[1:])
    got = heads.found_again(many, late, torch.eye(3)[None], torch.ones(1, 1, 64, 80))
    assert 0 < got[0, 1] < 1
    assert heads.found_again(many, many, torch.eye(3)[None], torch.ones(1, 1, 64, 80))[0].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------------------- the command


@KINDS
def test_the_command_changes_the_last_layers_alone(kind, starts, folder, tmp_path):
    done = CliRunner().invoke(heads.main, command(folder, starts[kind], tmp_path / "run", "--set", "keep_weight=0.1"))
    assert done.exit_code == 0, done.output
    assert "mma3" in done.output and "before" in done.output and "after" in done.output
    assert set(json.loads((tmp_path / "run/figures.json").read_text())) == {"before", "after"}
    before, after = layouts.load(starts[kind]), layouts.load(tmp_path / "run/heads.safetensors")
    assert list(before.layers) == list(after.layers)
    changed = {
        name
        for name, layer in before.layers.items()
        if not (
            np.array_equal(layer.weight, after.layers[name].weight)
            and np.array_equal(layer.bias, after.layers[name].bias)
        )
    }
    assert changed == set(LAYERS[kind])
    for field in ("family", "norm", "sampling", "subpixel", "topology"):
        assert getattr(before, field) == getattr(after, field)
    assert (tmp_path / "run/heads.safetensors").stat().st_size < starts[kind].stat().st_size * 1.1
    assert export(tmp_path / "run/heads.safetensors", tmp_path / "net.onnx", ExportOptions())


def test_a_seed_repeats_a_run(starts, folder, tmp_path):
    for name in "ab":
        done = CliRunner().invoke(heads.main, command(folder, starts["vgg"], tmp_path / name, "--pairs", "3"))
        assert done.exit_code == 0, done.output
    a, b = (layouts.load(tmp_path / f"{name}/heads.safetensors").layers for name in "ab")
    assert all(np.array_equal(a[name].weight, b[name].weight) for name in a)
    assert (tmp_path / "a/log.jsonl").read_text() == (tmp_path / "b/log.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--set", "nothing=1"), "--set nothing=1: expected one of pairs"),
        (("--learning-rate", "1e30"), "lower --learning-rate"),
        (("--steps", "0"), "--steps"),
        (("--set", "pairs=0"), "pairs is 0; expected 1 or more"),
        (("--device", "tpus"), "expected cuda, cuda:1 or cpu"),
    ],
)
def test_bad_values_are_refused_in_one_line_and_leave_no_checkpoint(more, words, starts, folder, tmp_path):
    done = CliRunner().invoke(heads.main, command(folder, starts["vgg"], tmp_path / "run", *more))
    assert done.exit_code == 2
    assert words in done.output and "Traceback" not in done.output
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_weights_that_float16_cannot_hold_are_refused(value, starts):
    checkpoint = layouts.load(starts["vgg"])
    net = network(checkpoint)
    with torch.no_grad():
        net.descriptor[1].conv.weight[0, 0] = value
    with pytest.raises(SuperPointError, match="layer convDb has learnt values that float16 cannot hold"):
        late.learnt(checkpoint, net)


def test_a_map_does_not_outlive_the_descriptors_that_it_was_fitted_to(starts):
    checkpoint = layouts.load(starts["compact"])
    mapped = replace(checkpoint, descriptor_map=DescriptorMap(np.eye(checkpoint.descriptor_dim, dtype=np.float32), "f"))
    assert late.learnt(mapped, network(mapped)).descriptor_map is None


def test_checkpoints_of_another_kind_are_refused(starts, folder, tmp_path):
    norm = SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.BEFORE_RELU).state_dict()
    checkpoint = layouts.load(starts["vgg"])
    cases = {
        "legacy": (replace(checkpoint, sampling=Sampling.LEGACY), "has legacy sampling and cells of 8 px"),
        "norm": (
            replace(layouts.from_arrays({k: v.numpy() for k, v in norm.items() if "num_b" not in k})),
            "BatchNorm",
        ),
    }
    for name, (wrong, words) in cases.items():
        path = layouts.save(wrong, tmp_path / f"{name}.safetensors")
        done = CliRunner().invoke(heads.main, command(folder, path, tmp_path / "run"))
        assert done.exit_code == 2 and words in done.output, done.output


def test_photographs_to_judge_by_are_needed(starts, tmp_path):
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/camera.png"), photograph(96, 128, "camera"))
    done = CliRunner().invoke(heads.main, command(tmp_path / "photos", starts["vgg"], tmp_path / "run"))
    assert done.exit_code == 2
    assert "no held-out photograph in" in done.output and "kodim07" in done.output
