"""`python -m training.distill --photos FOLDER --teacher CHECKPOINT --output RUN`: the full network teaches small ones.

A small network needs no labels: in every cell of a disturbed view it learns what the full network says of the same view
undisturbed, its distribution over the cell's pixels and its descriptor. Descriptors are taught as their leading
principal directions, so one fixed matrix leads from a small network's descriptors to the full one's. In the last part
of a run the losses of `train.found_losses` on the points that the small network finds itself, and int8's rounding, join
in.

Several networks learn side by side from the same views and the same teacher's answers. On a GPU a whole step is one
CUDA graph.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.compact import CompactNet
from superpoint_trt.checkpoint.reference import SuperPointNet
from superpoint_trt.core.types import SuperPointError
from training import development, leaves, photos
from training.bank import Bank, join
from training.capture import captured
from training.fold import fold
from training.networks import SHAPES
from training.rounding import forward
from training.steady import LOST_OCTAVES, divergence
from training.train import (
    FOUND_FIGURES,
    LOG_EVERY,
    MOST_GRADIENT,
    SMOKE,
    WEIGHT_DECAY,
    Plan,
    change,
    device_of,
    found_losses,
    in_one_line,
    paced,
    ready_detector,
    schedule,
    spoil,
)
from training.views import disturb, pair

LESSONS = ("scores", "aligned", "alike")
"""What is learnt from the teacher, as `lesson` returns it."""
PAIRS = 16
"""A step. Half as many as the full network's: twice the steps taught more than twice the views."""
SURVEYED_BATCHES = 16
"""Views that the principal directions of the teacher's descriptors come from."""


@dataclass(frozen=True)
class Course:
    """How small networks learn, beside what `train.Plan` says of views and of the points found."""

    learning_rate: float = 2e-3
    scores: float = 1.0
    """Weights of `LESSONS`."""
    aligned: float = 1.0
    alike: float = 1.0
    temperature: float = 0.07
    """Of `alike`: what similarities are divided by."""
    cells: int = 4096
    """Of all views of a batch, drawn anew each step, that `alike` compares."""
    found: float = 0.2
    """Weight of `train.found_losses` in the last part of a run."""
    last_share: float = 0.25
    """Of the run, its last part: the points that the network finds, and int8's rounding, count too."""


class Seen(NamedTuple):
    """B pairs of views: the first views of all, then the second ones."""

    image: Tensor
    """(2 B, 1, H, W) in [0, 1], disturbed."""
    clean: Tensor
    """(2 B, 1, H, W): `image` before blur, night and noise."""
    lost: Tensor
    """(2 B,) octaves of detail that `image` has lost to strong blur."""
    inside: Tensor
    """(2 B, 1, H, W): where the views show their image."""
    homography: Tensor
    """(B, 3, 3) from the first views to the second."""


@torch.no_grad()
def look(plan: Plan, colour: Tensor, sizes: Tensor) -> Seen:
    """Fresh pairs of views of some images of a bank."""
    first, second, homography = pair(colour, sizes, plan.view_hw, plan.far_share, plan.tilted_share)
    clean = torch.cat([first.image, second.image])
    image, lost = spoil(clean, plan.blurred_share, plan.night_share)
    image = disturb(image, plan.coarsest_step_octaves, plan.shadow_share)
    return Seen(image, clean, lost, torch.cat([first.inside, second.inside]), homography)


def principal_directions(descriptors: Tensor) -> Tensor:
    """(N, T) descriptors -> (T, T) orthonormal columns, those along which the descriptors are longest first."""
    moments = descriptors.double().T @ descriptors.double()
    return torch.linalg.eigh(moments.cpu())[1].flip(1).float().to(descriptors.device)


def lesson(course: Course, heads: tuple[Tensor, Tensor], taught: tuple[Tensor, Tensor], lost: Tensor) -> Tensor:
    """How far a student is from its teacher, in every cell.

    Args:
        course: its temperature and number of cells.
        heads: (B, 65, H/8, W/8) logits and (B, D, H/8, W/8) descriptors of the student, on disturbed views.
        taught: the teacher's logits, and descriptors along at least D directions, the most telling first, on the views
            undisturbed.
        lost: (B,) octaves of detail that each disturbed view has lost.

    Returns:
        (3,), `LESSONS`: cross-entropy of the cells' distributions less the teacher's entropy; one less the cosine of
        descriptors; and, among cells of all views, cross-entropy of which of the teacher's descriptors the student's is
        like, less the entropy of which of them the teacher's own is like.
    """
    (logits, coarse), (told, known) = heads, taught
    counts = (lost < LOST_OCTAVES).float()[:, None, None].expand(-1, *logits.shape[2:])
    total = counts.sum().clamp(min=1)
    cells = divergence(told.float(), logits.float())
    mine, its = F.normalize(coarse.float(), dim=1), F.normalize(known[:, : coarse.shape[1]].float(), dim=1)
    away = 1 - (mine * its).sum(dim=1)
    rows = torch.randint(counts.numel(), (course.cells,), device=counts.device)
    chosen = counts.flatten()[rows]
    a, b = (x.permute(0, 2, 3, 1).flatten(0, 2)[rows] for x in (mine, its))
    alike = divergence(b @ b.T / course.temperature, a @ b.T / course.temperature)
    return torch.stack(
        [
            (cells * counts).sum() / total,
            (away * counts).sum() / total,
            (alike * chosen).sum() / chosen.sum().clamp(min=1),
        ]
    )


@dataclass
class Student:
    """One network that learns, and the sums of its figures since the last line of the log."""

    name: str
    net: CompactNet
    sums: Tensor = field(init=False)
    heads: Callable[[Tensor, float], tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(len(LESSONS) + len(FOUND_FIGURES), device=next(self.net.parameters()).device)
        self.heads = self._heads

    def _heads(self, image: Tensor, rounded_share: float) -> tuple[Tensor, Tensor]:
        image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=image.device.type == "cuda"):
            return forward(self.net, image, rounded_share)


def grow(net: CompactNet, weights: Mapping[str, Tensor]) -> None:
    """Begins with the weights of a smaller network: until the rest learns, both say the same.

    Args:
        net: its convolutions may have more channels than the other's, and may read more; those come last.
        weights: the other's state dict.

    Raises:
        SuperPointError: the other has layers or channels that `net` lacks, or channels are not the last ones.
    """
    state = net.state_dict()
    for layer in net.topology:
        for read in layer.inputs[:-1]:
            name = f"{read}.conv.weight"
            if name in weights and len(weights[name]) != len(state[name]):
                raise SuperPointError(f"{read} cannot grow: {layer.name} reads further channels after its own.")
    for name, value in weights.items():
        here = state.get(name)
        if here is None or here.shape[2:] != value.shape[2:] or any(a < b for a, b in zip(here.shape, value.shape)):
            raise SuperPointError(f"{name} {tuple(value.shape)} has no place in the network that is to grow from it.")
        if here.ndim > 1:
            here[: len(value)] = 0  # old channels read nothing of new ones yet
        here[tuple(slice(length) for length in value.shape)] = value


def student(name: str, device: torch.device) -> Student:
    """A student of one of `networks.SHAPES`, with weights drawn at random."""
    net = SHAPES[name].network()
    ready_detector(net)
    return Student(name, net.to(device, memory_format=torch.channels_last))


@dataclass
class School:
    """Students, their teacher, and what they look at."""

    teacher: SuperPointNet
    students: list[Student]
    bank: Bank
    plan: Plan
    course: Course
    folder: Path
    device: torch.device
    compiled: bool = False
    """By torch.compile, with a fused optimizer; needs a GPU."""
    graphed: bool = False
    """A whole step is one CUDA graph (capture.captured)."""

    def __post_init__(self) -> None:
        self.teacher.eval()
        self.directions = self._survey()
        groups = [group for each in self.students for group in paced(each.net)]
        # Rates that stay where they are on the device: a CUDA graph reads them anew at each replay.
        groups = [{**group, "lr": torch.zeros((), device=self.device)} for group in groups]
        self.optimizer = torch.optim.AdamW(
            groups, weight_decay=WEIGHT_DECAY, foreach=False, fused=self.compiled, capturable=self.graphed
        )
        self.index = self.bank.sample(self.plan.pairs)
        self.done = 0.0
        self._look, self._teach, self._lesson, self._found = look, self._taught, lesson, found_losses
        if self.compiled:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
            self._look, self._teach, self._lesson, self._found = (
                torch.compile(each, dynamic=False) for each in (look, self._taught, lesson, found_losses)
            )
            for each in self.students:
                each.heads = torch.compile(each._heads, dynamic=False)

    @torch.no_grad()
    def _survey(self) -> Tensor:
        """(T, D): from the teacher's descriptors to the longest of the students' ones."""
        widest = max(SHAPES[each.name].descriptor_dim for each in self.students)
        batches = []
        for _ in range(SURVEYED_BATCHES):
            index = self.bank.sample(self.plan.pairs)
            known = self._answers(look(self.plan, self.bank.images[index], self.bank.sizes[index]).clean)[1]
            batches.append(F.normalize(known.float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2))
        return principal_directions(torch.cat(batches))[:, :widest].contiguous()

    def _answers(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits, coarse = self.teacher(clean.contiguous(memory_format=torch.channels_last))
        return logits, coarse

    @torch.no_grad()
    def _taught(self, clean: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and unit descriptors along the principal directions."""
        logits, coarse = self._answers(clean)
        return logits, torch.einsum("bthw,td->bdhw", F.normalize(coarse.float(), dim=1), directions)

    def step(self, finishing: bool) -> None:
        """One batch for all. It never waits for the GPU, so that a CUDA graph can hold it."""
        seen = self._look(self.plan, self.bank.images[self.index], self.bank.sizes[self.index])
        taught = self._teach(seen.clean, self.directions)
        self.optimizer.zero_grad(set_to_none=True)
        for each in self.students:
            heads = each.heads(seen.image, self.plan.rounded_share if finishing else 0.0)
            learnt = self._lesson(self.course, heads, taught, seen.lost)
            loss = self.course.scores * learnt[0] + self.course.aligned * learnt[1] + self.course.alike * learnt[2]
            figures = learnt.new_zeros(len(FOUND_FIGURES))
            if finishing and self.course.found:
                found, figures = self._found(self.plan, *heads, seen.inside, seen.homography)
                loss = loss + self.course.found * found
            loss.backward()
            torch.nn.utils.clip_grad_norm_(each.net.parameters(), MOST_GRADIENT)
            each.sums += torch.cat([learnt.detach(), figures])
        self.optimizer.step()

    def run(self, steps: int, limit_s: float, until: float = 1.0) -> None:
        """Goes on to a share of the whole run, `steps` later or when the time is over, and saves the state.

        Args:
            steps: at most, in this call.
            limit_s: at most, compiling included; the steps share what compiling leaves.
            until: where this call ends; the learning rate falls to nothing at 1, the end of the whole run.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for each in self.students:
            each.net.train()
        started = time.perf_counter()
        begin, switch = self.done, 1 - self.course.last_share
        stages = [(min(until, switch), False)] * (begin < switch) + [(until, True)] * (until > switch)
        ready = [(end, self._ready(finishing)) for end, finishing in stages]
        trained = since = time.perf_counter()
        limit_s -= trained - started
        self._log([json.dumps({"what": "compiled", "took_s": round(trained - started, 1)})])
        step = 0
        for end, one in ready:
            while self.done < end:
                self._set_rate(self.course.learning_rate * schedule(self.done))
                self.index.copy_(self.bank.sample(self.plan.pairs))
                one()
                step += 1
                if step % LOG_EVERY == 0 or step == steps:
                    now = time.perf_counter()
                    window = (step - 1) % LOG_EVERY + 1
                    self._log(self._lines(step, window, now - started, (now - since) / window))
                    since = now
                spent = max(step / steps, (time.perf_counter() - trained) / limit_s)
                self.done = min(begin + (until - begin) * spent, until)
        self._save()

    def _ready(self, finishing: bool) -> Callable[[], None]:
        """One step, compiled; what that takes changes no weight, since the learning rate is 0."""
        if not self.compiled:
            return lambda: self.step(finishing)
        self._set_rate(0.0)
        one = captured(lambda: self.step(finishing)) if self.graphed else lambda: self.step(finishing)
        one()
        for each in self.students:
            each.sums.zero_()
        return one

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate * group["pace"])

    def _lines(self, step: int, window: int, seconds: float, step_s: float) -> list[str]:
        lines = []
        for each in self.students:
            means = (each.sums / window).tolist()
            each.sums.zero_()
            if not math.isfinite(sum(means)):
                raise SuperPointError(
                    f"{each.name}: a loss is not finite after {step} steps: lower learning_rate (--set)."
                )
            figures = {name: round(value, 4) for name, value in zip((*LESSONS, *FOUND_FIGURES), means)}
            entry = {"s": round(seconds, 1), "net": each.name, "done": round(self.done, 4), "step": step, **figures}
            lines.append(json.dumps({**entry, "ms_a_step": round(step_s * 1e3, 2)}))
        return lines

    def _log(self, lines: list[str]) -> None:
        with (self.folder / "log.jsonl").open("a") as log:
            for line in lines:
                log.write(line + "\n")
                print(line, flush=True)

    def _save(self) -> None:
        """`state.pt` to go on from, and a checkpoint of each network."""
        state = {
            "done": self.done,
            "nets": {each.name: each.net.state_dict() for each in self.students},
            "optimizer": self.optimizer.state_dict(),
            "directions": self.directions,
        }
        torch.save(state, self.folder / "state.pt")
        for each in self.students:
            each.net.eval()
            layouts.save(fold(each.net), self.folder / f"{each.name}.safetensors", half=True)

    def load(self, path: Path, smaller: str | None = None) -> None:
        """Goes on from a saved state: where its run stopped; or, if that run came to its end, with a new one.

        Args:
            path: the state.
            smaller: the network of the state that the only student grows from, in a new run.

        Raises:
            SuperPointError: there is no such state, or it is of other networks.
        """
        try:
            state = torch.load(path, weights_only=True, map_location=self.device)
        except (OSError, RuntimeError, EOFError, UnpicklingError):
            raise SuperPointError(f"{path} is no state of a run of training.distill (--go-on FOLDER).") from None
        names = [each.name for each in self.students]
        if smaller:
            if smaller not in state["nets"] or len(names) > 1:
                raise SuperPointError(f"{path} is of {', '.join(state['nets'])}: one network grows from one of these.")
            grow(self.students[0].net, state["nets"][smaller])
            self.directions = state["directions"]
            return
        if list(state["nets"]) != names:
            raise SuperPointError(f"{path} is of {', '.join(state['nets'])}, not of {', '.join(names)} (--network).")
        for each in self.students:
            each.net.load_state_dict(state["nets"][each.name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.directions = state["directions"]
        self.done = state["done"] if state["done"] < 1 else 0.0


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option("--teacher", required=True, help="Checkpoint of the full network.")
@click.option("--output", required=True, help="Folder of the run.")
@click.option("--network", "names", multiple=True, type=click.Choice(list(SHAPES)), default=("small",))
@click.option("--go-on", help="Folder of another call, to go on from where it stopped.")
@click.option("--grow-from", metavar="NAME", help="The network of --go-on's run that this one begins as.")
@click.option("--until", default=1.0, show_default=True, help="Share of the whole run at which this call stops.")
@click.option("--minutes", default=math.inf, help="The call trains no longer, compiling included.")
@click.option("--steps", default=100000, show_default=True, help="The call trains no more.")
@click.option("--seed", default=Plan.seed, show_default=True)
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="A value of Course's or train.Plan's.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--graph/--no-graph", default=True, show_default=True, help="On a GPU a step is one CUDA graph.")
@click.option("--smoke", is_flag=True, help="Tiny views, two steps.")
@in_one_line()
def main(
    folders: tuple[str, ...],
    teacher: str,
    output: str,
    names: tuple[str, ...],
    go_on: str | None,
    grow_from: str | None,
    until: float,
    minutes: float,
    steps: int,
    seed: int,
    changes: tuple[str, ...],
    device: str,
    graph: bool,
    smoke: bool,
) -> None:
    """Trains small networks, and judges them on photographs kept out."""
    plan, course = replace(SMOKE if smoke else Plan(pairs=PAIRS), seed=seed), Course()
    for text in changes:
        if hasattr(course, text.partition("=")[0]):
            course = replace(course, **dict([change(course, text)]))
        else:
            plan = replace(plan, **dict([change(plan, text)]))
    where, out = device_of(device), Path(output)
    found, held_out = photos.find([Path(folder) for folder in folders])
    torch.manual_seed(seed)
    bank = photos.load(found[:2] if smoke else found, where, plan.canvas_px)
    collages = leaves.draw(plan.collages, bank, where)
    bank = join([bank, collages], [1 - plan.collage_share, plan.collage_share])
    expert = SuperPointNet.from_checkpoint(layouts.load(teacher)).to(where, memory_format=torch.channels_last)
    students = [student(name, where) for name in names]
    fast = where.type == "cuda", where.type == "cuda" and graph
    school = School(expert, students, bank, plan, course, out, where, *fast)
    if grow_from and not go_on:
        raise click.UsageError("--grow-from has no effect without --go-on, the run that has that network.")
    if go_on:
        school.load(Path(go_on) / "state.pt", grow_from)
    school.run(2 if smoke else steps, minutes * 60, until)
    made = list(development.pairs(held_out[:1] if smoke else held_out))
    figures = {each.name: development.evaluate(development.Network(each.net, where), made) for each in students}
    (out / "development.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name, got in figures.items():
        print(name)
        print(development.table(got))


if __name__ == "__main__":
    main()
