"""`python -m training.distill --photos FOLDER --teacher CHECKPOINT --output RUN`: the full network teaches small ones.

Several shapes learn side by side from the same views, since views cost more than a small network does. Each learns what
the full network learns (`train.objective`), and besides what the teacher says of the views before they were disturbed:
its score of every pixel, which points its descriptors hold for alike, and its descriptors themselves through a fixed
linear map, by which a small network's descriptors can be compared with the full one's.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.compact import CompactNet
from superpoint_trt.checkpoint.reference import SuperPointNet
from training import development, photos
from training.bank import Bank
from training.losses import TEMPERATURE, sample
from training.networks import SHAPES
from training.rounding import forward
from training.train import (
    FIGURES,
    LOG_EVERY,
    MOST_GRADIENT,
    SMOKE,
    Batch,
    Plan,
    Run,
    change,
    objective,
    optimizer_of,
    prepare,
    ready_detector,
    schedule,
)

LEARNING_RATE = 2e-3
LOST_OCTAVES = 0.3
"""A view that has lost more than this to blur cannot show what the teacher sees in the sharp one."""
LESSONS = ("scores", "alike", "aligned")
"""What is learnt from the teacher, as `lesson` returns it."""


@dataclass(frozen=True)
class Weights:
    """Of what the teacher says, beside `Plan`'s own weights."""

    scores: float = 1.0
    alike: float = 0.5
    aligned: float = 0.5


def lesson(logits: Tensor, coarse: Tensor, taught: tuple[Tensor, Tensor], bridge: Tensor, batch: Batch) -> Tensor:
    """How far a student is from its teacher.

    Args:
        logits: (2 B, 65, H/8, W/8) of the student, on `batch.image`.
        coarse: (2 B, D, H/8, W/8), likewise.
        taught: the same two of the teacher, with T channels of descriptors, on `batch.clean`.
        bridge: (T, D) from the student's descriptors to the teacher's.
        batch: what both looked at.

    Returns:
        (3,), `LESSONS`: cross-entropy of the cells' distributions, less what is the teacher's own; cross-entropy of
        which point of the other view each point is like; and one less the cosine of descriptors, through the bridge.
    """
    told, known = taught
    chances = told.float().softmax(dim=1)
    lost = torch.xlogy(chances, chances).sum(dim=1) - (chances * logits.float().log_softmax(dim=1)).sum(dim=1)
    counts = batch.counts * (batch.lost < LOST_OCTAVES)[:, None, None]
    scores = (lost * counts).sum() / counts.sum().clamp(min=1)
    xy = torch.cat([batch.first_xy, batch.second_xy])
    mine, its = sample(coarse, xy), sample(known, xy)
    real = batch.real.float()
    (a, b), (c, d) = mine.chunk(2), its.chunk(2)
    student, teacher = (
        (x @ y.transpose(1, 2) / TEMPERATURE).masked_fill(~batch.real[:, None] | ~batch.real[..., None], -1e4)
        for x, y in ((a, b), (c, d))
    )
    both = [
        ((teacher.softmax(dim) * (teacher.log_softmax(dim) - student.log_softmax(dim))).sum(dim) * real).sum()
        for dim in (1, 2)
    ]
    count = real.sum().clamp(min=1)
    cosine = (F.normalize(mine @ bridge.T, dim=-1) * its).sum(dim=-1)
    twice = torch.cat([real, real])
    return torch.stack([scores, sum(both) / (2 * count), ((1 - cosine) * twice).sum() / (2 * count)])


@dataclass
class Student:
    """One network that learns."""

    name: str
    net: CompactNet
    bridge: nn.Linear
    plan: Plan
    weights: Weights
    optimizer: torch.optim.Optimizer = field(init=False)
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device = self.bridge.weight.device
        self.optimizer = optimizer_of(self.net, device)
        self.optimizer.add_param_group({"params": list(self.bridge.parameters()), "pace": 1.0})
        self.sums = torch.zeros(len(FIGURES) + len(LESSONS), device=device)

    def objective(self, batch: Batch, taught: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss to descend, and `FIGURES` and `LESSONS`."""
        image = batch.image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=image.device.type == "cuda"):
            logits, coarse = forward(self.net, image, self.plan.rounded_share)
        loss, figures = objective(self.plan, logits, coarse, batch, descriptors=True)
        learnt = lesson(logits, coarse, taught, self.bridge.weight, batch)
        weights = self.weights
        loss = loss + weights.scores * learnt[0] + weights.alike * learnt[1] + weights.aligned * learnt[2]
        return loss, torch.cat([figures, learnt])

    def learn(self, batch: Batch, taught: tuple[Tensor, Tensor], rate: float) -> None:
        """One update."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["pace"]
        loss, figures = self.objective(batch, taught)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), MOST_GRADIENT)
        self.optimizer.step()
        self.sums += figures.detach()

    def state(self) -> dict[str, Any]:
        """What `load` takes back."""
        return {"net": self.net.state_dict(), "bridge": self.bridge.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from another run's weights."""
        self.net.load_state_dict(state["net"])
        self.bridge.load_state_dict(state["bridge"])


def student(name: str, teacher: SuperPointNet, plan: Plan, weights: Weights, device: torch.device) -> Student:
    """A student of one of `networks.SHAPES`, with weights drawn at random."""
    net = SHAPES[name].network()
    ready_detector(net)
    dim = SHAPES[name].descriptor_dim
    taught_dim = teacher.descriptor[1].conv.out_channels
    bridge = nn.Linear(dim, taught_dim, bias=False).to(device)
    nn.init.orthogonal_(bridge.weight)
    return Student(name, net.to(device, memory_format=torch.channels_last), bridge, plan, weights)


@dataclass
class School:
    """Students, their teacher, and what they look at."""

    teacher: SuperPointNet
    students: list[Student]
    bank: Bank
    plan: Plan
    folder: Path
    device: torch.device
    compiled: bool = False

    def __post_init__(self) -> None:
        self.teacher.eval()
        self._prepare, self._teach = prepare, self._taught
        if self.compiled:
            self._prepare = torch.compile(prepare, dynamic=False)
            self._teach = torch.compile(self._taught, dynamic=False)
            for each in self.students:
                each.objective = torch.compile(each.objective, dynamic=False)  # type: ignore[method-assign]

    @torch.no_grad()
    def _taught(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits, coarse = self.teacher(clean.contiguous(memory_format=torch.channels_last))
        return logits, coarse

    def step(self, rate: float) -> None:
        """One batch for all."""
        index = self.bank.sample(self.plan.pairs)
        batch = self._prepare(self.plan, self.bank.images[index], self.bank.sizes[index], *self.bank.points(index))
        taught = self._teach(batch.clean)
        for each in self.students:
            each.learn(batch, taught, rate)

    def run(self, steps: int, limit_s: float) -> None:
        """Until `steps` are done or the time is over; the learning rate has fallen to nothing by then."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for each in self.students:
            each.net.train()
        started = since = time.perf_counter()
        with (self.folder / "log.jsonl").open("a") as log:
            for step in range(steps):
                spent = max(step / steps, (time.perf_counter() - started) / limit_s)
                if spent >= 1:
                    break
                self.step(LEARNING_RATE * schedule(spent))
                if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                    now = time.perf_counter()
                    rate = ((step % LOG_EVERY) + 1) * 2 * self.plan.pairs / (now - since)
                    for line in self._lines(step, round(now - started, 1), round(rate)):
                        log.write(line + "\n")
                        print(line, flush=True)
                    since = time.perf_counter()
        for each in self.students:
            each.net.eval()
            torch.save(each.state(), self.folder / f"{each.name}.pt")

    def _lines(self, step: int, seconds: float, images_per_s: int) -> list[str]:
        lines = []
        for each in self.students:
            means = (each.sums / ((step % LOG_EVERY) + 1)).tolist()
            each.sums.zero_()
            figures = {name: round(value, 4) for name, value in zip((*FIGURES, *LESSONS), means)}
            entry = {"s": seconds, "net": each.name, "step": step + 1, **figures, "images_per_s": images_per_s}
            lines.append(json.dumps(entry))
        return lines


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option("--teacher", required=True, help="Checkpoint of the full network.")
@click.option("--output", required=True, help="Folder of the run.")
@click.option("--network", "names", multiple=True, type=click.Choice(list(SHAPES)), default=("small",))
@click.option("--go-on", help="Folder of another run, to go on from its weights.")
@click.option("--minutes", default=math.inf, help="It ends after so long.")
@click.option("--steps", default=40000, show_default=True)
@click.option("--seed", default=Plan.seed, show_default=True)
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Another value of one of train.Plan's.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--smoke", is_flag=True, help="Tiny views, two steps.")
def main(
    folders: tuple[str, ...],
    teacher: str,
    output: str,
    names: tuple[str, ...],
    go_on: str | None,
    minutes: float,
    steps: int,
    seed: int,
    changes: tuple[str, ...],
    device: str,
    smoke: bool,
) -> None:
    """Trains small networks, and judges them on photographs kept out."""
    where, out = torch.device(device), Path(output)
    plan = replace(SMOKE if smoke else Plan(), seed=seed)
    plan = replace(plan, **dict(change(plan, text) for text in changes), stages=plan.stages[-1:])
    found, held_out = photos.find([Path(folder) for folder in folders])
    loaded = layouts.load(teacher)
    bank = photos.load(found[:2] if smoke else found, where, plan.canvas_px)
    labeller = Run(plan, out, bank, bank, where, where.type == "cuda", start=None if smoke else loaded)
    out.mkdir(parents=True, exist_ok=True)
    labelled = labeller.labelled(0, plan.stages[0])
    del labeller
    expert = SuperPointNet.from_checkpoint(loaded).to(where, memory_format=torch.channels_last)
    torch.manual_seed(seed)
    students = [student(name, expert, plan, Weights(), where) for name in names]
    for each in students:
        if go_on:
            each.load(torch.load(Path(go_on) / f"{each.name}.pt", weights_only=True, map_location=where))
    school = School(expert, students, labelled, plan, out, where, where.type == "cuda")
    school.run(2 if smoke else steps, minutes * 60)
    made = list(development.pairs(held_out[:1] if smoke else held_out))
    figures = {each.name: development.evaluate(development.Network(each.net, where), made) for each in students}
    (out / "development.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name, got in figures.items():
        print(name)
        print(development.table(got))


if __name__ == "__main__":
    main()
