"""`python -m training.matcher --photos FOLDER --features CHECKPOINT --output RUN --minutes M`: a learned matcher.

Pairs of pictures are made on the GPU: photographs under strong changes (`views.py`), photographs on planes at several
depths with parallax and occlusion (`layered.py`), and pictures that have nothing to do with each other. A trained
network finds their points; it does not change. Which points are the same is known from the geometry. The loss is that
of Lindenberger et al. 2023, section 3.4: the negative logarithm of the assignments and of being matchable, at every
layer. A run that was cut off goes on from its state when the command is given again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.matcher import MatcherShape, save_matcher
from superpoint_trt.checkpoint.matcher_network import Assignment, MatcherNet, PointSets, matches
from superpoint_trt.checkpoint.reference import network
from superpoint_trt.core.networks import weights_path
from superpoint_trt.core.types import SuperPointError
from training import layered, photos
from training.bank import Bank
from training.geometry import inverse, uniform, warp
from training.layered import Worlds
from training.losses import sample, shown
from training.places import Found, detect, score_map
from training.train import LOG_EVERY, WARM_STEPS, _random_state, _save, _set_random_state, schedule
from training.views import blur_strongly, darken, disturb, pair

SAME_PX = 3.0
"""Points of two pictures are the same if this near, in px of the picture that sees less detail."""
OTHER_PX = 5.0
"""A point without another this near has no partner. Between the two distances nothing is learnt."""
MOST_GRADIENT = 1.0


@dataclass(frozen=True)
class Plan:
    """Everything a run depends on, besides the photographs and the network that finds the points."""

    pairs: int = 64
    """A step."""
    layered_share: float = 0.4
    """Of pairs, those of scenes with parallax."""
    unrelated_share: float = 0.1
    """Of pairs, those of two photographs."""
    far_share: float = 0.25
    """Of pairs of views of one photograph: views.pair."""
    tilted_share: float = 0.35
    blurred_share: float = 0.06
    """Of pictures, those with strong blur (views.blur_strongly)."""
    night_share: float = 0.06
    """Of pictures, those at night (views.darken)."""
    shadow_share: float = 0.2
    coarsest_step_octaves: float = -3.5
    points: int = 512
    """Of each picture at most."""
    fewer_share: float = 0.3
    """Of pictures, those of which a random number of points is taken."""
    height: int = 384
    width: int = 512
    canvas_px: int = 960
    matcher_width: int = 128
    heads: int = 4
    layers: int = 6
    learning_rate: float = 6e-4
    weight_decay: float = 0.01
    unmatched_weight: float = 0.5
    """Of points without a partner in the loss; the rest is for the matches."""
    min_score: float = 0.1
    """Least probability of a match, where matches are judged."""
    seed: int = 1
    judged_batches: int = 4
    """For the curve."""
    judge_every_s: float = 180.0
    save_every_s: float = 60.0

    @property
    def view_hw(self) -> tuple[int, int]:
        """Size of the pictures."""
        return self.height, self.width

    @property
    def kinds(self) -> tuple[int, int, int]:
        """How many pairs of a step are of one photograph, layered and unrelated."""
        layers, strangers = (max(1, round(self.pairs * s)) for s in (self.layered_share, self.unrelated_share))
        return self.pairs - layers - strangers, layers, strangers


SMOKE = Plan(
    pairs=6,
    unrelated_share=0.3,
    points=48,
    height=96,
    width=128,
    canvas_px=192,
    matcher_width=16,
    heads=2,
    layers=2,
    judged_batches=1,
    save_every_s=0.0,
)
"""Seconds on a CPU, to see that it runs."""


class Batch(NamedTuple):
    """B pairs of pictures and what is true of their points."""

    first: PointSets
    second: PointSets
    partner: Tensor
    """(B, N) int64: row of the second picture's point that is the same; -1: none, or not known."""
    alone0: Tensor
    """(B, N) bool: surely without a partner."""
    alone1: Tensor


class Truth(NamedTuple):
    """Where the points of one picture lie in the other: `layered.Points`, whatever the pictures are."""

    there: Tensor
    seen: Tensor
    unsure: Tensor


# ------------------------------------------------------------------------------------------------------------- pictures


class Pictures(NamedTuple):
    """B pairs of pictures and their geometry, in the order of `Plan.kinds`."""

    image: Tensor
    """(2 B, 1, H, W) in [0, 1], disturbed: the first pictures of all, then the second."""
    inside: Tensor
    """(2 B, 1, H, W): where they show anything."""
    homography: Tensor
    """(B1, 3, 3) of the pairs of one photograph, first picture to second."""
    scene: layered.Scene
    """Of the layered pairs."""


@torch.no_grad()
def draw(plan: Plan, colour: Tensor, sizes: Tensor, layers: Tensor, layer_sizes: Tensor) -> Pictures:
    """Pictures at random.

    Args:
        plan: sizes and shares.
        colour: (B1 + B3, 3, S, S) uint8 canvases: of the pairs of one photograph, then of the unrelated ones.
        sizes: (B1 + B3, 2).
        layers: (B2, K, 3, S, S) of the layered pairs.
        layer_sizes: (B2, K, 2).
    """
    same, _, strangers = plan.kinds
    first, second, homography = pair(colour, sizes, plan.view_hw, plan.far_share, plan.tilted_share)
    image0, image1, inside0, inside1 = first.image, second.image, first.inside, second.inside
    if strangers:  # the second picture of the next pair
        row = torch.arange(same + strangers, device=colour.device)
        order = torch.cat([row[:same], row[same:].roll(1)])
        image1, inside1 = image1[order], inside1[order]
    scene = layered.scene(layer_sizes, plan.view_hw, Worlds(planes=layers.shape[1]))
    image, inside = layered.pictures(layers, scene, plan.view_hw)
    images = torch.cat([image0[:same], image[: len(layers)], image0[same:]])
    images = torch.cat([images, image1[:same], image[len(layers) :], image1[same:]])
    insides = torch.cat([inside0[:same], inside[: len(layers)], inside0[same:]])
    insides = torch.cat([insides, inside1[:same], inside[len(layers) :], inside1[same:]])
    disturbed = disturb(_spoil(plan, images), plan.coarsest_step_octaves, plan.shadow_share)
    return Pictures(disturbed, insides, homography[:same], scene)


def _spoil(plan: Plan, image: Tensor) -> Tensor:
    """Strong blur in some pictures and night in others, spread evenly over the batch."""
    count = len(image)
    blurred, dark = round(plan.blurred_share * count), round(plan.night_share * count)
    step = max(1, count // max(1, blurred + dark))
    rows = [index * step + index % 2 for index in range(blurred + dark) if index * step + index % 2 < count]
    image = image.clone()
    if rows[:blurred]:
        image[rows[:blurred]] = blur_strongly(image[rows[:blurred]])[0]
    if rows[blurred:]:
        image[rows[blurred:]] = darken(image[rows[blurred:]])
    return image


# ---------------------------------------------------------------------------------------------------- points and labels


@torch.no_grad()
def find(plan: Plan, net: nn.Module, drawn: Pictures) -> Batch:
    """The points that a network finds in pictures, and which of them are the same."""
    image = drawn.image.contiguous(memory_format=torch.channels_last)
    with torch.autocast(image.device.type, dtype=torch.float16, enabled=image.device.type == "cuda"):
        logits, coarse = net(image)
    points = detect(score_map(logits), drawn.inside, plan.points)
    real = _fewer(plan, points)
    descriptors = sample(coarse, points.xy)
    count = real.sum(dim=1).int()
    size = points.xy.new_tensor([plan.width, plan.height]).expand(len(image), 2)
    sets = [
        PointSets(*parts) for parts in zip(*(t.chunk(2) for t in (points.xy, points.score, descriptors, count, size)))
    ]
    there = truths(plan, drawn, sets[0].xy, sets[1].xy)
    return Batch(sets[0], sets[1], *label(sets[0].xy, sets[1].xy, real.chunk(2), there))


def _fewer(plan: Plan, points: Found) -> Tensor:
    """(2 B, N) bool: the rows that count, the first ones; of some pictures only a part."""
    batch, most = points.score.shape
    device = points.score.device
    some = uniform((batch, 1), 0, 1, device) < plan.fewer_share
    limit = torch.where(some, uniform((batch, 1), 0.1, 1, device) * most, float(most))
    return points.real & (torch.arange(most, device=device) < limit)


def truths(plan: Plan, drawn: Pictures, xy0: Tensor, xy1: Tensor) -> tuple[Truth, Truth]:
    """Where each point of either picture (B, N, 2) lies in the other, of all kinds of pairs."""
    same, layers, _ = plan.kinds
    both = []
    for camera, xy in enumerate((xy0, xy1)):
        matrix = drawn.homography if camera == 0 else inverse(drawn.homography)
        other = drawn.inside.chunk(2)[1 - camera]
        there = warp(xy[:same], matrix)
        flat = Truth(there, shown(there, other[:same]) > 0, torch.zeros_like(there[..., 0], dtype=torch.bool))
        deep = layered.follow(drawn.scene, camera, xy[same : same + layers], plan.view_hw)
        nowhere = torch.full_like(xy[same + layers :], -1e4)
        none = torch.zeros_like(nowhere[..., 0], dtype=torch.bool)
        parts = (flat, deep, Truth(nowhere, none, none))
        both.append(Truth(*(torch.cat(columns) for columns in zip(*parts))))
    return both[0], both[1]


def label(
    xy0: Tensor, xy1: Tensor, real: tuple[Tensor, Tensor], there: tuple[Truth, Truth]
) -> tuple[Tensor, Tensor, Tensor]:
    """Which points are the same: each other's nearest within `SAME_PX`; which have no partner within `OTHER_PX`.

    Distances are those in the picture that sees less detail, in which the same distance is fewer px.

    Returns:
        partner (B, N) int64, -1 for none; and which points of the first and the second picture surely have none.
    """
    possible = (real[0] & there[0].seen)[..., None] & (real[1] & there[1].seen)[:, None]
    apart = torch.minimum(_distance(there[0].there, xy1), _distance(xy0, there[1].there))
    apart = torch.where(possible, apart, 1e6)
    best, nearest = apart.min(dim=2)
    other, back = apart.min(dim=1)
    row = torch.arange(xy0.shape[1], device=xy0.device)
    same = (back.gather(1, nearest) == row) & (best < SAME_PX)
    alone0 = real[0] & (best > OTHER_PX) & ~there[0].unsure
    alone1 = real[1] & (other > OTHER_PX) & ~there[1].unsure
    return torch.where(same, nearest, -1), alone0, alone1


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, N) px."""
    return (a[:, :, None] - b[:, None]).square().sum(dim=-1).sqrt()


# ----------------------------------------------------------------------------------------------------------------- loss

FIGURES = ("loss", "matched", "alone", "right", "found")
"""What each step reports: the loss; of the last layer its two parts; the share of the last layer's matches that are
right; the share of true matches that it finds."""


def objective(plan: Plan, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss to descend, the mean over the layers, and `FIGURES`."""
    device = batch.partner.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        said = net(batch.first, batch.second)
    parts = [loss_of(each, batch) for each in said]
    weight = plan.unmatched_weight
    losses = torch.stack([(1 - weight) * matched + weight * alone for matched, alone in parts])
    with torch.no_grad():
        found, _ = matches(said[-1], plan.min_score)
        true = batch.partner >= 0
        hit = ((found == batch.partner) & true).sum()
        known = ((found >= 0) & (true | batch.alone0)).sum()
        right, recall = hit / known.clamp(min=1), hit / true.sum().clamp(min=1)
    loss = losses.mean()
    return loss, torch.stack([loss.detach(), parts[-1][0].detach(), parts[-1][1].detach(), right, recall])


def loss_of(said: Assignment, batch: Batch) -> tuple[Tensor, Tensor]:
    """One layer's negative log-likelihood: of the true matches, and of points that have none (section 3.4)."""
    true = batch.partner >= 0
    chosen = said.log_probability().gather(2, batch.partner.clamp(min=0)[..., None])[..., 0]
    matched = -torch.where(true, chosen, 0).sum(dim=1) / true.sum(dim=1).clamp(min=1)
    any_match = true.any(dim=1)
    alone = [
        -torch.where(which, nn.functional.logsigmoid(-logit), 0).sum(dim=1) / which.sum(dim=1).clamp(min=1)
        for which, logit in ((batch.alone0, said.matchable0), (batch.alone1, said.matchable1))
    ]
    return matched.sum() / any_match.sum().clamp(min=1), (alone[0] + alone[1]).mean() / 2


# ------------------------------------------------------------------------------------------------------------ judgement


def nearest(batch: Batch) -> tuple[Tensor, Tensor]:
    """Mutual nearest neighbors of the same points, as `matcher_network.matches` gives matches."""
    first, second = batch.first, batch.second
    row = torch.arange(first.xy.shape[1], device=first.xy.device)
    both = (row < first.rows[:, None])[..., None] & (row < second.rows[:, None])[:, None]
    alike = (first.descriptors @ second.descriptors.transpose(1, 2)).masked_fill(~both, -2)
    best, there = alike.max(dim=2)
    good = (alike.argmax(dim=1).gather(1, there) == row) & (best > -2)
    return torch.where(good, there, -1), torch.where(good, best, 0)


def figures(found: tuple[Tensor, Tensor], batch: Batch, part: slice) -> dict[str, Tensor]:
    """Of some pairs of a batch: true matches, those found, matches of known truth, all matches, and their scores."""
    there, score, partner = found[0][part], found[1][part], batch.partner[part]
    true = partner >= 0
    hit = (there == partner) & true
    known = (there >= 0) & (true | batch.alone0[part])
    sums = {"true": true.sum(), "hit": hit.sum(), "known": known.sum(), "all": (there >= 0).sum()}
    return {**sums, "hits": hit[known], "scores": score[known]}


def _judged(name: str, made: list[dict[str, Tensor]], pairs: int) -> dict[str, float]:
    """The figures of one kind of pairs."""
    true, hit, known, every = (sum(int(one[key]) for one in made) for key in ("true", "hit", "known", "all"))
    if name == "unrelated":
        return {"unrelated_matches": round(every / (len(made) * pairs), 2)}
    hits, scores = (torch.cat([one[key] for one in made]) for key in ("hits", "scores"))
    shares = {"precision": hit / max(known, 1), "recall": hit / max(true, 1), "area": area(hits, scores, true)}
    return {f"{name}_{key}": round(share, 4) for key, share in shares.items()}


def _as_many(name: str, learned: list[dict[str, Tensor]], plain: list[dict[str, Tensor]]) -> dict[str, float]:
    """Precision and least score of the surest matches among which as many are right as nearest neighbors find.

    0 and 0 if they are fewer.
    """
    wanted = sum(int(one["hit"]) for one in plain)
    hits, scores = (torch.cat([one[key] for one in learned]) for key in ("hits", "scores"))
    order = scores.argsort(descending=True)
    right = hits[order].long().cumsum(0)
    precision = score = 0.0
    if len(right) and int(right[-1]) >= wanted > 0:
        count = int((right < wanted).sum()) + 1
        precision, score = wanted / count, float(scores[order[count - 1]])
    return {f"{name}_precision_of_as_many": round(precision, 4), f"{name}_score_of_as_many": round(score, 4)}


def area(hits: Tensor, scores: Tensor, true: int) -> float:
    """Average precision: the mean over all true matches of the precision where each is found, by falling score."""
    ordered = hits[scores.argsort(descending=True)].double()
    precision = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    return float((precision * ordered).sum() / max(true, 1))


# ------------------------------------------------------------------------------------------------------------------ run


@dataclass
class Run:
    """One training, in a folder that a later call goes on from.

    Folder: `log.jsonl`, `state.pt` (to go on from), `matcher.safetensors`, `development.json`.
    """

    plan: Plan
    folder: Path
    train: Bank
    held_out: Bank
    extractors: list[nn.Module]
    """Networks that find points; steps take turns. Their descriptors have different lengths."""
    features: dict[int, str]
    """Length of descriptors -> SHA-256 of the checkpoint."""
    device: torch.device
    limit_s: float
    """Of all calls together: the learning rate falls to nothing by then."""
    pause_s: float = math.inf
    """This call ends after so long, with a state to go on from."""
    steps: int = 10**9
    compiled: bool = False
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        torch.manual_seed(self.plan.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        plan = self.plan
        shape = MatcherShape(tuple(self.features), plan.matcher_width, plan.heads, plan.layers)
        self.net = MatcherNet(shape).to(self.device)
        self._draw, self._find, self._objective = draw, find, objective
        if self.compiled:
            self._draw, self._find, self._objective = (
                torch.compile(function, dynamic=False) for function in (draw, find, objective)
            )
        groups = [
            {"params": [p for p in self.net.parameters() if p.ndim > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in self.net.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, fused=self.device.type == "cuda")

    def start_from(self, folder: Path) -> None:
        """Takes another run's weights, not its schedule."""
        self.net.load_state_dict(self._state_of(folder)["net"])

    def run(self) -> bool:
        """Trains until the time or the steps are over, or this call's pause; whether the training is over."""
        self.folder.mkdir(parents=True, exist_ok=True)
        step, before = self._restore()
        sums = torch.zeros(len(FIGURES), device=self.device)
        entered = begun = saved = judged = since = time.perf_counter()
        spent, window, first, trained = 0.0, 0, step, before
        while True:
            now = time.perf_counter()
            if step == first + WARM_STEPS:
                begun = now  # compiled by now
            if step >= first + WARM_STEPS:
                trained = before + now - begun
            spent = max(step / self.steps, trained / self.limit_s)
            if spent >= 1 or now - entered > self.pause_s:
                break
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.learning_rate * schedule(spent)
            sums += self._step(step)
            step, window = step + 1, window + 1
            if window == LOG_EVERY:
                rounded = {name: round(value, 4) for name, value in zip(FIGURES, (sums / window).tolist())}
                rate = window * self.plan.pairs / (time.perf_counter() - since)
                self._log(step=step, trained_s=round(trained), **rounded, pairs_per_s=round(rate))
                sums.zero_()
                window, since = 0, time.perf_counter()
            if time.perf_counter() - saved > self.plan.save_every_s:
                self._save_state(step, trained)
                saved = time.perf_counter()
            if time.perf_counter() - judged > self.plan.judge_every_s:
                self._log(step=step, **self.judge()["learned"])
                judged = since = time.perf_counter()
        self._save_state(step, trained)
        return spent >= 1

    def _step(self, number: int) -> Tensor:
        """One update; `FIGURES`, on the device."""
        batch = self.batch(self.train, number)
        loss, said = self._objective(self.plan, self.net, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), MOST_GRADIENT)
        self.optimizer.step()
        return said.detach()

    def batch(self, bank: Bank, number: int) -> Batch:
        """Fresh pairs, with points by the network whose turn it is."""
        plan = self.plan
        same, layers, strangers = plan.kinds
        planes = Worlds().planes
        # No photograph twice among the unrelated, nor on two planes of a scene.
        index = torch.cat([bank.sample(same), _different(bank, 1, strangers)[0]])
        deep = _different(bank, layers, planes)
        drawn = self._draw(plan, bank.images[index], bank.sizes[index], bank.images[deep], bank.sizes[deep])
        made: Batch = self._find(plan, self.extractors[number % len(self.extractors)], drawn)
        return made

    def judge(self) -> dict[str, dict[str, float]]:
        """Precision, recall and area on held-out photographs, of the matcher and of mutual nearest neighbors.

        The same pairs each time; unrelated pairs are counted apart.
        """
        rows: dict[str, dict[str, float]] = {"learned": {}, "nearest": {}}
        with _random(self.plan.seed, self.device):
            batches = [self.batch(self.held_out, number) for number in range(self.plan.judged_batches)]
        plain, learned = [nearest(batch) for batch in batches], [self._matches(batch) for batch in batches]
        start = 0
        for name, count in zip(("changed", "layered", "unrelated"), self.plan.kinds):
            part = slice(start, start + count)
            made = [[figures(*each, part) for each in zip(found, batches)] for found in (learned, plain)]
            for row, of_one in zip(rows.values(), made):
                row.update(_judged(name, of_one, count))
            if name != "unrelated":
                rows["learned"].update(_as_many(name, *made))
            start += count
        return rows

    @torch.no_grad()
    def _matches(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
            said = self.net(batch.first, batch.second)
        return matches(said[-1], self.plan.min_score)

    def _restore(self) -> tuple[int, float]:
        """Steps and seconds trained so far; 0 if this run has not begun."""
        if not (self.folder / "state.pt").exists():
            return 0, 0.0
        state = self._state_of(self.folder)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        _set_random_state(state["random"].cpu(), self.device)
        self._log(resumed=True, step=state["step"], trained_s=round(state["trained_s"]))
        return int(state["step"]), float(state["trained_s"])

    def _state_of(self, folder: Path) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True, map_location=self.device)
        return state

    def _save_state(self, step: int, trained_s: float) -> None:
        save_matcher(self.net.weights(self.features), self.folder / "matcher.safetensors")
        state = {"step": step, "trained_s": trained_s, "random": _random_state(self.device)}
        _save(
            self.folder / "state.pt", {**state, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        )

    def _log(self, **entry: Any) -> None:
        line = json.dumps({"s": round(time.perf_counter() - self.started, 1), **entry})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")


def _different(bank: Bank, rows: int, count: int) -> Tensor:
    """(rows, count) photographs, in each row different ones, where the bank has so many."""
    if not rows or not count:
        return torch.zeros(rows, count, dtype=torch.long, device=bank.draw.device)
    again = count > len(bank)
    return torch.multinomial(bank.draw.expand(rows, -1), count, replacement=again)


@contextmanager
def _random(seed: int, device: torch.device) -> Iterator[None]:
    """The random numbers of a seed inside, the usual ones afterwards."""
    before = _random_state(device)
    torch.manual_seed(seed)
    yield
    _set_random_state(before, device)


def extractor(path: str, device: torch.device) -> tuple[nn.Module, int, str]:
    """A frozen network that finds points, the length of its descriptors, and its checkpoint's SHA-256."""
    loaded = layouts.load(weights_path(path))
    net = network(loaded).to(device, memory_format=torch.channels_last).eval()
    return net.requires_grad_(False), loaded.descriptor_dim, loaded.sha256 or ""


def change(plan: Plan, text: str) -> Plan:
    """The plan with `NAME=NUMBER`."""
    name, _, value = text.partition("=")
    known = [entry.name for entry in fields(plan)]
    try:
        return replace(plan, **{name: type(getattr(plan, name))(value)})
    except (AttributeError, ValueError):
        raise click.UsageError(f"--set {text}: expected one of {', '.join(known)}, then = and a number.") from None


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option(
    "--features",
    multiple=True,
    required=True,
    help="Checkpoint, or packaged network, that finds the points; may be given again.",
)
@click.option("--output", required=True, help="Folder of the run. One that holds a state goes on from it.")
@click.option("--minutes", default=math.inf, help="Of training, over all calls.")
@click.option("--pause", "pause_minutes", default=math.inf, help="This call ends after so many minutes.")
@click.option("--steps", type=int, help="It ends after so many.")
@click.option("--go-on", help="Folder of another run, to begin with its weights.")
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Another value of one of Plan's.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="torch.compile on a GPU.")
@click.option("--smoke", is_flag=True, help="Tiny pictures, two steps.")
def main(
    folders: tuple[str, ...],
    features: tuple[str, ...],
    output: str,
    minutes: float,
    pause_minutes: float,
    steps: int | None,
    go_on: str | None,
    changes: tuple[str, ...],
    device: str,
    compiled: bool,
    smoke: bool,
) -> None:
    """Trains a matcher, and judges it on photographs kept out."""
    where, plan = torch.device(device), SMOKE if smoke else Plan()
    for text in changes:
        plan = change(plan, text)
    if smoke and steps is None:
        steps = 2
    if math.isinf(minutes) and steps is None:
        raise click.UsageError("--minutes or --steps says when the training is over.")
    try:
        extractors = [extractor(path, where) for path in features]
        found, held_out = photos.find([Path(folder) for folder in folders])
        banks = [photos.load(paths, where, plan.canvas_px) for paths in (found, held_out or found)]
    except SuperPointError as error:
        raise click.UsageError(str(error)) from None
    run = Run(
        plan,
        Path(output),
        *banks,
        [net for net, _, _ in extractors],
        {dim: digest for _, dim, digest in extractors},
        where,
        minutes * 60,
        pause_minutes * 60,
        steps or 10**9,
        compiled and where.type == "cuda",
    )
    if go_on:
        run.start_from(Path(go_on))
    over = run.run()
    judged = run.judge()
    (run.folder / "development.json").write_text(json.dumps(judged, indent=1) + "\n")
    print(json.dumps(judged, indent=1))
    print(f"{'trained' if over else 'paused; the same command goes on'}: {run.folder / 'matcher.safetensors'}")


if __name__ == "__main__":
    main()
