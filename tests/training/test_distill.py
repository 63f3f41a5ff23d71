"""Small networks learn from the full one: what they are taught, a run cut in two, and what a CUDA graph needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import photograph
from torch.utils._python_dispatch import TorchDispatchMode
from training import distill, losses
from training.bank import Bank
from training.capture import captured
from training.distill import Course, School, lesson, look, principal_directions, student
from training.fold import fold
from training.networks import SHAPES
from training.train import SMOKE

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.layouts import NormPlacement
from superpoint_trt.checkpoint.reference import SuperPointNet, network
from superpoint_trt.core.types import SuperPointError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(7)


@pytest.fixture
def bank() -> Bank:
    names = "camera", "coffee", "brick"
    images = torch.stack([torch.from_numpy(photograph(96, 96, name)).expand(3, -1, -1) for name in names])
    return Bank(images, torch.full((3, 2), 96.0), torch.ones(3))


def school(bank: Bank, folder: Path, names: tuple[str, ...] = ("smoke",), **course: float) -> School:
    teacher = SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.NONE)
    course = {"cells": 64, **course}
    return School(teacher, [student(name, CPU) for name in names], bank, SMOKE, Course(**course), folder, CPU)


def test_principal_directions_are_orthonormal_and_the_longest_comes_first():
    lengths = torch.tensor([1.0, 5.0, 3.0])
    directions = principal_directions(torch.randn(2000, 3) * lengths)
    torch.testing.assert_close(directions.T @ directions, torch.eye(3), atol=1e-5, rtol=0)
    assert directions.abs().argmax(dim=0).tolist() == [1, 2, 0]


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn():
    logits, known = torch.randn(4, 65, 5, 6), torch.randn(4, 8, 5, 6)
    course, sharp = Course(cells=100), torch.zeros(4)
    torch.testing.assert_close(
        lesson(course, (logits, known * 3), (logits, known), sharp), torch.zeros(3), atol=1e-5, rtol=0
    )
    other = lesson(course, (torch.randn(logits.shape), torch.randn(known.shape)), (logits, known), sharp)
    assert (other > 0.5).all()
    # Descriptors with fewer channels answer to the first of the teacher's directions.
    fewer = lesson(course, (logits, known[:, :4]), (logits, known), sharp)
    torch.testing.assert_close(fewer, torch.zeros(3), atol=1e-5, rtol=0)


def test_a_view_that_lost_its_detail_teaches_nothing():
    logits, known = torch.randn(2, 65, 5, 6), torch.randn(2, 8, 5, 6)
    wrong = logits.clone(), known.clone()
    for part in wrong:
        part[1] = torch.randn(part[1].shape)
    course = Course(cells=200)
    assert (lesson(course, wrong, (logits, known), torch.tensor([0.0, 1.0])) < 1e-5).all()
    assert (lesson(course, wrong, (logits, known), torch.tensor([1.0, 0.0])) > 0.5).all()


def test_the_teacher_sees_the_views_before_they_are_disturbed(bank):
    seen = look(SMOKE, bank.images, bank.sizes)
    assert seen.image.shape == seen.clean.shape == seen.inside.shape == (6, 1, 64, 80)
    assert seen.homography.shape == (3, 3, 3)
    assert (seen.image != seen.clean).any()
    assert seen.clean.min() >= 0 and seen.clean.max() <= 1


def test_suppression_by_rows_and_columns_is_that_of_the_window():
    scores = torch.rand(2, 1, 20, 31)
    assert torch.equal(losses.largest_near(scores, 4), F.max_pool2d(scores, 9, stride=1, padding=4))


class Forbidden(TorchDispatchMode):
    """Raises where a step would wait for the GPU, or copy numbers from the host: no CUDA graph can hold that."""

    NAMES = "_local_scalar_dense", "nonzero", "lift_fresh"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        mask = name == "index" and any(rows is not None and rows.dtype is torch.bool for rows in args[1])
        assert name not in self.NAMES and not mask, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "harmful",
    [lambda: torch.rand(3).sum().item(), lambda: torch.rand(3)[torch.rand(3) > 0.5], lambda: torch.rand(3)[[0, 2]]],
)
def test_the_next_test_can_fail(harmful):
    with pytest.raises(AssertionError), Forbidden():
        harmful()


@pytest.mark.parametrize("finishing", [False, True])
def test_a_step_neither_waits_for_the_gpu_nor_copies_from_the_host(bank, tmp_path, monkeypatch, finishing):
    both = school(bank, tmp_path)
    monkeypatch.setattr(both.optimizer, "step", lambda: None)  # on a CPU it reads its own counter
    with Forbidden():
        both.step(finishing)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_captured_step_reads_its_inputs_and_draws_new_numbers_at_each_replay():
    given, noise = torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
    seen = torch.zeros(4, device="cuda")

    def step() -> None:
        seen.copy_(given)
        noise.copy_(torch.rand(4, device="cuda"))

    one = captured(step)
    given.fill_(3)
    one()
    before = noise.clone()
    one()
    assert (seen == 3).all()
    assert (noise != before).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_captured_run_learns(bank, tmp_path):
    cuda = torch.device("cuda")
    on_gpu = Bank(bank.images.to(cuda), bank.sizes.to(cuda), bank.draw.to(cuda))
    teacher = SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.NONE).to(cuda)
    one = School(teacher, [student("smoke", cuda)], on_gpu, SMOKE, Course(cells=64), tmp_path, cuda, True, True)
    one.run(200, 1e6)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()[1:]]
    assert lines[-1]["scores"] < lines[0]["scores"]


def test_a_run_goes_on_where_it_stopped(bank, tmp_path):
    first = school(bank, tmp_path / "first", last_share=0.5)
    first.run(3, 1e6, until=0.5)
    assert first.done == 0.5
    assert first.directions.shape == (32, 16)
    lines = (tmp_path / "first/log.jsonl").read_text().splitlines()
    assert '"choice": 0.0' in lines[-1]

    second = school(bank, tmp_path / "second", last_share=0.5)
    second.load(tmp_path / "first/state.pt")
    assert second.done == 0.5
    assert torch.equal(second.directions, first.directions)
    for a, b in zip(first.students[0].net.parameters(), second.students[0].net.parameters()):
        assert torch.equal(a, b)
    assert len(second.optimizer.state_dict()["state"]) == len(list(second.students[0].net.parameters()))
    second.run(3, 1e6)
    assert second.done == 1.0
    lines = (tmp_path / "second/log.jsonl").read_text().splitlines()
    assert '"choice": 0.0' not in lines[-1]
    assert second.optimizer.param_groups[0]["lr"] < 0.3 * second.course.learning_rate

    third = school(bank, tmp_path / "third")
    third.load(tmp_path / "second/state.pt")
    assert third.done == 0.0


def test_a_state_of_other_networks_is_refused(bank, tmp_path):
    first = school(bank, tmp_path)
    first.run(1, 1e6)
    with pytest.raises(SuperPointError, match=r"state.pt is of smoke, not of tiny \(--network\)"):
        school(bank, tmp_path, ("tiny",)).load(tmp_path / "state.pt")


def test_a_network_grows_from_a_smaller_one(bank, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "grown", replace(SHAPES["smoke"], skip=4, detector=12))
    first = school(bank, tmp_path)
    first.run(2, 1e6)
    second = school(bank, tmp_path / "grown", ("grown",))
    second.load(tmp_path / "state.pt", "smoke")
    small, grown = first.students[0].net.eval(), second.students[0].net.eval()
    image = torch.rand(1, 1, 32, 40)
    with torch.no_grad():
        for mine, its in zip(small(image), grown(image)):
            torch.testing.assert_close(mine, its)
    assert second.done == 0.0
    assert torch.equal(second.directions, first.directions)
    second.run(2, 1e6)
    read = grown.get_submodule("detector_hidden").conv.weight
    assert read.shape[1] == small.get_submodule("detector_hidden").conv.weight.shape[1] + 4
    assert read[:, -4:].abs().max() > 0
    assert grown.get_submodule("detector").conv.weight[:, 8:].abs().max() > 0


@pytest.mark.parametrize(
    ("names", "smaller"), [(("tiny",), "smoke"), (("smoke",), "tiny"), (("smoke", "tiny"), "smoke")]
)
def test_a_network_does_not_grow_from_what_does_not_fit(bank, tmp_path, names, smaller):
    school(bank, tmp_path).run(1, 1e6)
    with pytest.raises(SuperPointError, match="grow"):
        school(bank, tmp_path, names).load(tmp_path / "state.pt", smaller)


@pytest.mark.parametrize("content", [None, b"", b"not a state", b"PK\x03\x04 cut"])
def test_a_state_that_cannot_be_read_is_refused(bank, tmp_path, content):
    if content is not None:
        (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(SuperPointError, match=r"state\.pt is no state of a run"):
        school(bank, tmp_path).load(tmp_path / "state.pt")


def test_the_checkpoint_is_the_network(bank, tmp_path):
    one = school(bank, tmp_path)
    one.run(2, 1e6)
    image = torch.rand(1, 1, 32, 40)
    loaded = network(layouts.load(tmp_path / "smoke.safetensors"))
    with torch.no_grad():
        for mine, its in zip(one.students[0].net(image), loaded(image)):
            torch.testing.assert_close(mine, its, atol=2e-2, rtol=2e-2)


def test_the_command_trains_and_judges(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("camera", "kodim07"):
        cv2.imwrite(str(tmp_path / f"photos/{name}.png"), photograph(96, 128, "camera"))
    teacher = SuperPointNet((8, 8, 16, 16, 24), 32, NormPlacement.NONE)
    layouts.save(fold(teacher), tmp_path / "teacher.safetensors")
    options = f"--photos {tmp_path}/photos --teacher {tmp_path}/teacher.safetensors --output {tmp_path}/run --smoke"
    done = CliRunner().invoke(
        distill.main, [*options.split(), "--network", "smoke", "--device", "cpu", "--set", "cells=32"]
    )
    assert done.exit_code == 0, done.output
    assert "side 0.15" in done.output
    assert (tmp_path / "run/development.json").exists()
    refused = CliRunner().invoke(distill.main, [*options.split(), "--set", "sells=32"])
    assert refused.exit_code == 2
    assert "--set sells=32: expected one of" in refused.output
