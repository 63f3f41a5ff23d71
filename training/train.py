"""The stages, and the loop that all of them share."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.compact import CompactNet
from superpoint_trt.checkpoint.layouts import Checkpoint, NormPlacement
from superpoint_trt.checkpoint.reference import SuperPointNet, network
from superpoint_trt.checkpoint.topology import LOGITS
from superpoint_trt.core.types import SuperPointError
from training import leaves, losses, photos, places, shapes
from training.adapt import VIEW_HW, adapt
from training.bank import Bank, join
from training.fold import fold, unfold
from training.geometry import inverse, warp
from training.rounding import forward
from training.steady import shared_logits, unsteady
from training.validate import validate
from training.views import Views, blur_strongly, darken, disturb, pair


@dataclass(frozen=True)
class Stage:
    """One training of the network, from where the stage before left it."""

    name: str
    steps: int
    learning_rate: float
    adapted_views: int = 0
    """Views of each image for homographic adaptation by the network so far; 0: synthetic shapes, corners known."""


@dataclass(frozen=True)
class Plan:
    """Everything a run depends on, besides the photographs."""

    stages: tuple[Stage, ...] = (
        Stage("shapes", 2500, 1e-3),
        Stage("first", 2500, 1e-3, 64),
        Stage("second", 3000, 1e-3, 96),
        Stage("third", 3000, 1e-3, 96),
        Stage("fourth", 7500, 1e-3, 128),
        Stage("fifth", 16000, 1e-3, 40),
    )
    pairs: int = 32
    """Of views, a step."""
    group: int = 32
    """Pairs that share their negatives."""
    points: int = 256
    """Correspondences of each pair."""
    same_place_px: float = losses.SAME_PLACE_PX
    """Of losses.descriptor_loss."""
    view_hw: tuple[int, int] = (240, 320)
    channels: tuple[int, ...] = (64, 64, 128, 128, 256)
    descriptor_dim: int = 256
    shapes: int = 12000
    collages: int = 200
    collage_share: float = 0.3
    adapt_batch: int = 16
    adapt_hw: tuple[int, int] = VIEW_HW
    descriptor_weight: float = 1.0
    placing: float = 1.0
    """Of losses.detector_loss."""
    rounded_share: float = 0.5
    """Of views, those that the network sees through int8's rounding, and of steps, those with rounded weights."""
    far_share: float = 0.2
    """Of pairs, those that differ by any rotation and a zoom down to 0.25 (views.FAR)."""
    tilted_share: float = 0.2
    """Of pairs, those where one view looks from far beside the other (views.TILTED)."""
    shadow_share: float = 0.3
    """Of views, those that a shadow falls on."""
    blurred_share: float = 0.125
    """Of pairs, those with strong blur in one view (views.blur_strongly)."""
    night_share: float = 0.125
    """Of pairs, those with night in one view (views.darken)."""
    coarsest_step_octaves: float = -3.0
    """Of compression in views.disturb: -4.5 is about JPEG quality 65, -3 about 20."""
    found: int = 256
    """Points of each view that the losses of `places` look at."""
    place_weight: float = 0.5
    """Of how far apart two views place the same point (places.place_losses)."""
    spread_weight: float = 0.1
    """Of how widely the scores spread around a place."""
    choice_weight: float = 1.0
    """Of scores given to points that would not match (places.choice_loss)."""
    match_weight: float = 0.5
    """Of how unlikely right matches are among the points found (the second of places.choice_loss)."""
    stray_weight: float = 0.5
    """Of points without a partner that do not choose their neighbours (the third of places.choice_loss)."""
    wrong_weight: float = 3.0
    """Of the share of matches that are wrong (places.wrong_share)."""
    repeat_weight: float = 0.0
    """Of the share of the scores that goes to points which the other view does not find (places.lone_share)."""
    steady_weight: float = 0.0
    """Of how far the detector is from its teachers' steady answers (steady.unsteady)."""
    seed: int = 1
    validation_pairs: int = 16
    canvas_px: int = photos.CANVAS_PX
    validate_every: int = 2500
    save_every_s: float = 120.0

    @property
    def looks_at_found(self) -> bool:
        """Whether any loss needs the detector's own points."""
        weights = self.place_weight, self.spread_weight, self.choice_weight, self.match_weight, self.stray_weight
        return max(*weights, self.wrong_weight, self.repeat_weight) > 0


SMOKE = Plan(
    stages=(Stage("shapes", 2, 1e-3), Stage("first", 2, 1e-3, 2), Stage("last", 2, 1e-3, 2)),
    pairs=2,
    group=2,
    points=16,
    view_hw=(64, 80),
    channels=(8, 8, 16, 16, 24),
    descriptor_dim=32,
    shapes=4,
    collages=1,
    adapt_batch=2,
    adapt_hw=(64, 96),
    validation_pairs=1,
    validate_every=2,
    save_every_s=0.0,
    canvas_px=128,
)
"""Seconds on a CPU: every stage once, to see that it runs."""

LOG_EVERY = 50
WARM_STEPS = 10
"""Before a stage's time counts."""
WARM_UP = 0.03
WEIGHT_DECAY = 0.01
MOST_GRADIENT = 10.0
DETECTOR_SCALE = 2.0
EMPTY_CELL = 8.0
"""Logit of the dustbin to begin with: about one cell in a hundred holds a point."""
DETECTOR_PACE = 10.0


class Batch(NamedTuple):
    """B pairs of views: the first views of all, then the second ones."""

    image: Tensor
    """(2 B, 1, H, W) in [0, 1], disturbed."""
    target: Tensor
    """(2 B, 65, H/8, W/8): losses.detector_targets."""
    counts: Tensor
    """(2 B, H/8, W/8)."""
    first_xy: Tensor
    """(B, N, 2): losses.correspondences, with the next two."""
    second_xy: Tensor
    real: Tensor
    inside: Tensor
    """(2 B, 1, H, W): where the views show their image."""
    homography: Tensor
    """(B, 3, 3) from the first views to the second."""
    clean: Tensor
    """(2 B, 1, H, W): `image` before blur, night and noise."""
    lost: Tensor
    """(2 B,) octaves of detail that `image` has lost to strong blur."""


FOUND_FIGURES = ("apart_px", "spread_px", "choice", "missed", "strayed", "wrong", "lone", "chance")
FIGURES = ("detector", "descriptor", "known", *FOUND_FIGURES, "unsteady")
"""What each step reports: losses, and the shares of points whose partner is nearest and would be matched."""


@dataclass
class Run:
    """One training, in a folder that a later call goes on from.

    Folder: `log.jsonl`, `state.pt` (to go on from), `labels-STAGE.pt`, `STAGE.safetensors` after each stage.
    """

    plan: Plan
    folder: Path
    train: Bank
    held_out: Bank
    device: torch.device
    compiled: bool = False
    start: Checkpoint | None = None
    """Weights to go on from: Conv + ReLU, of the plan's shape."""
    teachers: tuple[Checkpoint, ...] = ()
    """Networks whose steady answers the detector learns (Plan.steady_weight); none: those of `start`."""
    stage_limit_s: float = math.inf
    """A stage ends by then whatever its steps, its learning rate having fallen to nothing: machines are lent."""
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        torch.manual_seed(self.plan.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self.net = SuperPointNet(self.plan.channels, self.plan.descriptor_dim, NormPlacement.BEFORE_RELU)
        ready_detector(self.net)
        self.net.to(self.device, memory_format=torch.channels_last)
        if self.start:
            unfold(self.net, self.start, self._looks_at_photographs())
        steady = self.teachers or ((self.start,) if self.start else ())
        self._teachers = [self._answers_of(each) for each in steady] if self.plan.steady_weight else []
        if self.compiled:
            self._prepare = torch.compile(self._prepare, dynamic=False)  # type: ignore[method-assign]
            self._objective = torch.compile(self._objective, dynamic=False)  # type: ignore[method-assign]

    def run(self) -> Path:
        """Every stage not yet done; the last one's checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self._restore()
        for number, stage in enumerate(self.plan.stages):
            if number < state.get("stage", 0):
                continue
            bank = self.labelled(number, stage)
            resumed = state if number == state.get("stage") and "optimizer" in state else {}
            self._stage(number, stage, bank, resumed)
            state = {}
        return self.folder / f"{self.plan.stages[-1].name}.safetensors"

    def _answers_of(self, checkpoint: Checkpoint) -> Callable[[Tensor], Tensor]:
        """The logits of a frozen network."""
        net = network(checkpoint).to(self.device, memory_format=torch.channels_last).eval().requires_grad_(False)
        return lambda image: net(image.contiguous(memory_format=torch.channels_last))[0]

    def _looks_at_photographs(self) -> Tensor:
        """A batch of views such as the network will see."""
        index = self.train.sample(self.plan.pairs)
        first, second, _ = pair(self.train.images[index], self.train.sizes[index], self.plan.view_hw)
        return disturb(torch.cat([first.image, second.image]))

    def labelled(self, number: int, stage: Stage) -> Bank:
        """What a stage learns from, by a seed of its own: a resumed run draws what its labels on disk belong to."""
        plan = self.plan
        torch.manual_seed(plan.seed * 1000 + number)
        if not stage.adapted_views:
            return self._timed("shapes", lambda: shapes.draw(plan.shapes, self.device))
        # New ones each time: on images it has learnt by heart, a detector repeats what it was told.
        collages = self._timed("collages", lambda: leaves.draw(plan.collages, self.train, self.device))
        bank = join([self.train, collages], [1 - plan.collage_share, plan.collage_share])
        labels = self.folder / f"labels-{stage.name}.pt"
        if labels.exists():
            saved = torch.load(labels, weights_only=True, map_location=self.device)
            return bank.with_points(saved["xy"], saved["worth"])
        self.net.eval()
        views = stage.adapted_views, plan.adapt_batch, plan.adapt_hw
        adapted = self._timed("adaptation", lambda: adapt(self.net, bank, *views, compiled=self.compiled))
        _save(labels, {"xy": adapted.xy, "worth": adapted.worth})
        return adapted

    def _timed(self, what: str, make: Any) -> Any:
        started = time.perf_counter()
        made = make()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._log(what=what, took_s=round(time.perf_counter() - started, 1))
        return made

    def _stage(self, number: int, stage: Stage, bank: Bank, resumed: dict[str, Any]) -> None:
        optimizer = optimizer_of(self.net, self.device)
        first = done = 0
        if resumed:
            first = done = resumed["step"]
            optimizer.load_state_dict(resumed["optimizer"])
            _set_random_state(resumed["random"].cpu(), self.device)
        sums = torch.zeros(len(FIGURES), device=self.device)
        begun = saved = since = time.perf_counter()
        for step in range(first, stage.steps):
            if step == first + WARM_STEPS:
                begun = time.perf_counter()  # compiled by now
            spent = max(step / stage.steps, (time.perf_counter() - begun) / self.stage_limit_s)
            if spent >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate * group["pace"] * schedule(spent)
            self.net.train()
            sums += self._step(bank, optimizer, bool(stage.adapted_views))
            done = step + 1
            if done % LOG_EVERY == 0 or done == stage.steps:
                window = (done - first - 1) % LOG_EVERY + 1
                rounded = {name: round(value, 4) for name, value in zip(FIGURES, (sums / window).tolist())}
                rate = window * 2 * self.plan.pairs / (time.perf_counter() - since)
                self._log(stage=stage.name, step=done, **rounded, images_per_s=round(rate))
                sums.zero_()
                since = time.perf_counter()
            if done % self.plan.validate_every == 0 and done < stage.steps:
                self._validate(stage, done)
                since = time.perf_counter()
            if done < stage.steps and time.perf_counter() - saved > self.plan.save_every_s:
                self._save_state(number, done, optimizer)
                saved = time.perf_counter()
        self._validate(stage, done)
        layouts.save(fold(self.net), self.folder / f"{stage.name}.safetensors", half=True)
        self._save_state(number + 1, 0, None)

    def _validate(self, stage: Stage, step: int) -> None:
        self.net.eval()
        self._log(stage=stage.name, step=step, **validate(self.net, self.held_out, self.plan.validation_pairs))

    def _step(self, bank: Bank, optimizer: torch.optim.Optimizer, descriptors: bool) -> Tensor:
        """One update; `FIGURES`, on the device."""
        index = bank.sample(self.plan.pairs)
        batch = self._prepare(bank.images[index], bank.sizes[index], *bank.points(index))
        loss, figures = self._objective(batch, descriptors)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), MOST_GRADIENT)
        optimizer.step()
        return figures.detach()

    def _prepare(self, *drawn: Tensor) -> Batch:
        return prepare(self.plan, *drawn)

    def _objective(self, batch: Batch, descriptors: bool) -> tuple[Tensor, Tensor]:
        """The loss to descend, and `FIGURES`."""
        image = batch.image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            logits, coarse = forward(self.net, image, self.plan.rounded_share if descriptors else 0.0)
            told = shared_logits(self._teachers, batch.clean) if self._teachers and descriptors else None
        loss, figures = objective(self.plan, logits, coarse, batch, descriptors)
        away = torch.zeros_like(loss) if told is None else unsteady(told, logits, batch.lost)
        return loss + self.plan.steady_weight * away, torch.cat([figures, away.detach()[None]])

    def _restore(self) -> dict[str, Any]:
        path = self.folder / "state.pt"
        if not path.exists():
            return {}
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.device)
        self.net.load_state_dict(state["net"])
        self._log(resumed=True, stage=state["stage"], step=state["step"])
        return state

    def _save_state(self, stage: int, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        state = {"stage": stage, "step": step, "net": self.net.state_dict(), "random": _random_state(self.device)}
        if optimizer:
            state["optimizer"] = optimizer.state_dict()
        _save(self.folder / "state.pt", state)

    def _log(self, **entry: Any) -> None:
        entry = {"s": round(time.perf_counter() - self.started, 1), **entry}
        line = json.dumps(entry)
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")


@torch.no_grad()
def prepare(plan: Plan, colour: Tensor, sizes: Tensor, xy: Tensor, worth: Tensor) -> Batch:
    """Fresh pairs of views of some images of a bank, and what is true of them."""
    first, second, homography = pair(colour, sizes, plan.view_hw, plan.far_share, plan.tilted_share)
    clean = torch.cat([first.image, second.image])
    image, lost = spoil(clean, plan.blurred_share, plan.night_share)
    seen, worths = zip(*(_seen(view, xy, worth, octaves) for view, octaves in zip((first, second), lost.chunk(2))))
    inside = torch.cat([first.inside, second.inside])
    target, counts = losses.detector_targets(torch.cat(seen), torch.cat(worths), inside)
    both = (first.inside, second.inside)
    points = losses.correspondences(seen[0], worths[0], homography, both, plan.points)
    disturbed = disturb(image, plan.coarsest_step_octaves, plan.shadow_share)
    return Batch(disturbed, target, counts, *points, inside, homography, clean, lost)


def objective(plan: Plan, logits: Tensor, coarse: Tensor, batch: Batch, descriptors: bool) -> tuple[Tensor, Tensor]:
    """The loss to descend of what a network says of a batch, and `FIGURES` but the last."""
    detector = losses.detector_loss(logits, batch.target, batch.counts, plan.placing)
    nothing = torch.zeros_like(detector)
    if not descriptors:
        return detector, torch.stack([detector, *[nothing] * (2 + len(FOUND_FIGURES))])
    points = (batch.first_xy, batch.second_xy, batch.real)
    descriptor, known = losses.descriptor_loss(*coarse.chunk(2), points, plan.group, plan.same_place_px)
    loss = detector + plan.descriptor_weight * descriptor
    if plan.looks_at_found:
        found, figures = found_losses(plan, logits, coarse, batch.inside, batch.homography)
        return loss + found, torch.cat([torch.stack([detector, descriptor, known]), figures])
    return loss, torch.stack([detector, descriptor, known, *[nothing] * len(FOUND_FIGURES)])


def found_losses(
    plan: Plan, logits: Tensor, coarse: Tensor, inside: Tensor, homography: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of what both views say of the points that the detector finds, and `FOUND_FIGURES`.

    Args:
        plan: its weights of the losses of `places`.
        logits: (2 B, 65, H/8, W/8), the first views of all pairs, then the second ones.
        coarse: (2 B, D, H/8, W/8).
        inside: (2 B, 1, H, W): where the views show their image.
        homography: (B, 3, 3) from the first views to the second.
    """
    scores = places.score_map(logits)
    seen = inside.chunk(2)
    views = [places.detect(part, shown, plan.found) for part, shown in zip(scores.chunk(2), seen)]
    there = places.partners(views[0], views[1], homography, (seen[0], seen[1]))
    back = places.partners(views[1], views[0], inverse(homography), (seen[1], seen[0]))
    displaced, apart, spread = places.place_losses(views[0], views[1], there, homography)
    choice, missed, strayed, chance = places.choice_loss(views[0], views[1], coarse.chunk(2), there, back)
    wrong = places.wrong_share(views[0], views[1], coarse.chunk(2), homography)
    loss = plan.place_weight * displaced + plan.spread_weight * spread + plan.choice_weight * choice
    lone = places.lone_share(views[0], views[1], there, back)
    loss = loss + plan.match_weight * missed + plan.stray_weight * strayed
    loss = loss + plan.wrong_weight * wrong + plan.repeat_weight * lone
    return loss, torch.stack([apart, spread, choice, missed, strayed, wrong, lone, chance]).detach()


def spoil(image: Tensor, blurred_share: float, night_share: float) -> tuple[Tensor, Tensor]:
    """Strong blur and night, each in one view of some pairs.

    The first pairs of a batch, since batches are drawn at random; of those half in the first view, half in the second.

    Args:
        image: (2 B, 1, H, W), the first views, then the second.
        blurred_share: of pairs.
        night_share: of pairs, the ones after those.

    Returns:
        the views, and (2 B,) how many octaves of detail each has lost.
    """
    pairs = len(image) // 2
    blurred, dark = round(blurred_share * pairs), round(night_share * pairs)
    rows = (
        _in_one_view(0, blurred, pairs, image.device),
        _in_one_view(blurred, blurred + dark, pairs, image.device),
    )
    lost = image.new_zeros(len(image))
    if blurred:
        image, lost = image.clone(), lost.clone()
        image[rows[0]], lost[rows[0]] = blur_strongly(image[rows[0]])
    if dark:
        image = image.clone()
        image[rows[1]] = darken(image[rows[1]])
    return image, lost


def _in_one_view(start: int, stop: int, pairs: int, device: torch.device) -> Tensor:
    """Rows of the pairs from `start` to before `stop`: of every other pair the first view, of the rest the second."""
    row = torch.arange(start, stop, device=device)
    return row + pairs * (row % 2)


def _seen(view: Views, xy: Tensor, worth: Tensor, lost: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Of the bank's points those of the level that suits each view: (B, K, 2) px of the view, and (B, K).

    lost: (B,) octaves of detail that the view has lost, as if it looked from that much farther away.
    """
    level = (view.octaves() + lost).round().clamp(0, xy.shape[1] - 1).long()
    rows = torch.arange(len(xy), device=xy.device)
    return warp(xy[rows, level], inverse(view.to_canvas)), worth[rows, level]


def ready_detector(net: SuperPointNet | CompactNet) -> None:
    """Logits that begin with room to be sure, and nearly every cell empty.

    BatchNorm makes logits of unit variance, and Adam moves its scale by no more than the learning rate a step: left so,
    thousands of steps pass before any score can come near 1 (measured: 0.14 at best after 2500).
    """
    norm = _last(net)
    torch.nn.init.constant_(norm.weight, DETECTOR_SCALE)
    with torch.no_grad():
        norm.bias[-1] = EMPTY_CELL


def _last(net: SuperPointNet | CompactNet) -> nn.BatchNorm2d:
    """The detector's last layer."""
    block = net.get_submodule(LOGITS) if isinstance(net, CompactNet) else net.detector[1]
    assert isinstance(block.bn, nn.BatchNorm2d)
    return block.bn


def optimizer_of(net: SuperPointNet | CompactNet, device: torch.device) -> torch.optim.Optimizer:
    """AdamW on `paced`."""
    return torch.optim.AdamW(paced(net), weight_decay=WEIGHT_DECAY, fused=device.type == "cuda")


def paced(net: SuperPointNet | CompactNet) -> list[dict[str, Any]]:
    """Parameters for an optimizer; the detector's last scale and shift at a pace of their own."""
    quick = list(_last(net).parameters())
    known = {id(parameter) for parameter in quick}
    others = [parameter for parameter in net.parameters() if id(parameter) not in known]
    return [{"params": others, "pace": 1.0}, {"params": quick, "pace": DETECTOR_PACE, "weight_decay": 0.0}]


def schedule(done: float) -> float:
    """Warm-up, then half a cosine down to nothing."""
    return min(done / WARM_UP, 1.0) * 0.5 * (1 + math.cos(math.pi * done)) + 1e-4


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _save(path: Path, state: dict[str, Any]) -> None:
    """Written beside, then renamed: a run that is cut off leaves the last whole state."""
    beside = path.with_suffix(".part")
    torch.save(state, beside)
    beside.replace(path)


def change(plan: Any, text: str) -> tuple[str, float]:
    """`NAME=NUMBER` as a field of a plan and its value."""
    name, _, value = text.partition("=")
    now = vars(plan).get(name)
    if not isinstance(now, (int, float)):
        numbers = [key for key, other in vars(plan).items() if isinstance(other, (int, float))]
        raise click.UsageError(f"--set {text}: expected one of {', '.join(numbers)}, then = and a number.")
    try:
        return name, type(now)(value)
    except ValueError:
        raise click.UsageError(f"--set {text}: {value!r} is no {type(now).__name__}.") from None


@contextmanager
def in_one_line() -> Iterator[None]:
    """What a user gave wrong ends a command in one line."""
    try:
        yield
    except SuperPointError as error:
        raise click.UsageError(str(error)) from None


def device_of(name: str) -> torch.device:
    """The device that `--device` names."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise click.UsageError(f"--device {name}: expected cuda, cuda:1 or cpu.") from None
    if device.type not in ("cuda", "cpu"):
        raise click.UsageError(f"--device {name}: expected cuda, cuda:1 or cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.UsageError(f"--device {name}: PyTorch sees no such GPU here; take --device cpu (--smoke: seconds).")
    return device
