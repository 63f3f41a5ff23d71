"""Pairs of pictures whose points are known to be the same, or not: what the matcher learns from.

Photographs under strong changes (`views.py`), photographs on planes at several depths with parallax and occlusion
(`layered.py`), and pictures that have nothing to do with each other. A trained network finds their points; which of
them are the same is known from the geometry. Finding points costs more than a step of the matcher, so a `Pool` keeps
the pairs, and each serves several steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from superpoint_trt.checkpoint.matcher_network import PointSets
from superpoint_trt.core.types import CELL_PX, SuperPointError
from training import layered
from training.bank import Bank
from training.geometry import inverse, uniform, warp
from training.layered import Worlds
from training.losses import sample, shown
from training.places import detect, score_map
from training.views import blur_strongly, darken, disturb, pair

SAME_PX = 3.0
"""Points of two pictures are the same if this near, in px of the picture that sees less detail. A point without another
this near has no partner: matches that are a little off pull a homography with them, so they must be learnt as wrong."""
SMALLEST_SIDE_PX = 64
EXACT_PX = 1.0
"""Partners this near are wholly right."""


@dataclass(frozen=True)
class Plan:
    """Everything a run depends on, besides the photographs and the network that finds the points.

    Raises:
        SuperPointError: a number cannot be used.
    """

    pairs: int = 32
    """A step."""
    layered_share: float = 0.4
    """Of pairs, those of scenes with parallax."""
    unrelated_share: float = 0.1
    """Of pairs, those of two photographs."""
    far_share: float = 0.25
    """Of pairs of views of one photograph: views.pair."""
    tilted_share: float = 0.35
    spoiled_every: int = 17
    """One picture in so many has strong blur, another is at night; 0: none. No divisor of `pairs`: then both pictures
    of a pair would have it."""
    shadow_share: float = 0.2
    coarsest_step_octaves: float = -3.5
    points: int = 512
    """Of each picture at most."""
    fewer_share: float = 0.3
    """Of pictures, those of which a random number of points is taken."""
    height: int = 384
    width: int = 512
    canvas_px: int = 960
    uses: int = 4
    """Steps for each batch of new pairs."""
    kept_batches: int = 32
    """The pool's size: a step's pairs come from so many batches."""
    matcher_width: int = 128
    heads: int = 4
    layers: int = 6
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    unmatched_weight: float = 0.5
    """Of points without a partner in the loss; the rest is for the matches."""
    least_worth: float = 0.5
    """How right a partner at `SAME_PX` is; the rest of it counts as being alone. 1: all partners are alike."""
    min_score: float = 0.1
    """Least probability of a match, where matches are judged."""
    seed: int = 1
    judged_batches: int = 8
    """For the curve."""
    judge_every_s: float = 120.0
    save_every_s: float = 60.0

    def __post_init__(self) -> None:
        counts = ("points", "uses", "kept_batches", "judged_batches")
        small = [name for name in counts if getattr(self, name) < 1]
        if small or self.learning_rate <= 0:
            raise SuperPointError(f"{small[0] if small else 'learning_rate'} is too small; expected more than 0.")
        if self.kinds[0] < 1:
            raise SuperPointError(
                f"pairs are {self.pairs} a step, {self.kinds[1]} layered and {self.kinds[2]} unrelated; expected more, "
                "so that some are of one photograph."
            )
        if min(self.view_hw) < SMALLEST_SIDE_PX or self.height % CELL_PX or self.width % CELL_PX:
            raise SuperPointError(
                f"pictures are {self.height} x {self.width} px; expected multiples of {CELL_PX}, at least "
                f"{SMALLEST_SIDE_PX}."
            )

    @property
    def view_hw(self) -> tuple[int, int]:
        """Size of the pictures."""
        return self.height, self.width

    @property
    def kinds(self) -> tuple[int, int, int]:
        """How many pairs of a batch are of one photograph, layered and unrelated; they come in this order.

        Unrelated ones are two at least: they exchange their second pictures.
        """
        layers = max(1, round(self.pairs * self.layered_share))
        strangers = max(2, round(self.pairs * self.unrelated_share))
        return self.pairs - layers - strangers, layers, strangers


class Batch(NamedTuple):
    """B pairs of pictures, and what is true of their points. Dimension 1 is the picture: the first or the second."""

    xy: Tensor
    """(B, 2, N, 2) px; this and the next four are those of `PointSets`."""
    scores: Tensor
    """(B, 2, N)"""
    descriptors: Tensor
    """(B, 2, N, D); the pool keeps float16."""
    rows: Tensor
    """(B, 2)"""
    size: Tensor
    """(B, 2, 2)"""
    partner: Tensor
    """(B, 2, N) int64: row of the other picture's point that is the same; -1: none, or not known."""
    alone: Tensor
    """(B, 2, N) bool: surely without a partner."""
    apart: Tensor
    """(B, 2, N) float32: px from the partner, measured as for `SAME_PX`; of other points without a meaning."""

    def worth(self, least: float) -> Tensor:
        """(B, 2, N) how right the partners are: 1 up to `EXACT_PX`, `least` at `SAME_PX`; 0 without a partner."""
        far = ((self.apart - EXACT_PX) / (SAME_PX - EXACT_PX)).clamp(0, 1)
        return torch.where(self.partner >= 0, 1 - (1 - least) * far, 0.0)

    def sides(self) -> tuple[PointSets, PointSets]:
        """The points of the first pictures and of the second, as the matcher takes them."""
        first, second = (PointSets(*(part[:, side] for part in self[:5])) for side in (0, 1))
        return first, second


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


def choose(plan: Plan, bank: Bank) -> tuple[Tensor, ...]:
    """Photographs at random: what `draw` takes. No photograph twice among the unrelated, nor on two planes."""
    same, layers, strangers = plan.kinds
    flat = torch.cat([bank.sample(same), _different(bank, 1, strangers)[0]])
    deep = _different(bank, layers, Worlds().planes)
    return bank.images[flat], bank.sizes[flat], bank.images[deep], bank.sizes[deep]


def _different(bank: Bank, rows: int, count: int) -> Tensor:
    """(rows, count) photographs, in each row different ones, where the bank has so many; drawn by `Bank.draw`.

    The largest of u^(1 / w) for uniform u (Efraimidis and Spirakis 2006): torch.multinomial waits for the GPU.
    """
    if count > len(bank):
        return bank.sample(rows * count).view(rows, count)
    chance = torch.rand(rows, len(bank), device=bank.draw.device).log() / bank.draw
    return chance.topk(count, dim=1).indices


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
    same = plan.kinds[0]
    *views, homography = pair(colour, sizes, plan.view_hw, plan.far_share, plan.tilted_share)
    first, second = (torch.stack([view.image, view.inside]) for view in views)
    # The second picture of an unrelated pair is that of the next pair.
    second = torch.cat([second[:, :same], second[:, same:].roll(1, dims=1)], dim=1)
    scene = layered.scene(layer_sizes, plan.view_hw, Worlds(planes=layers.shape[1]))
    deep = torch.stack(layered.pictures(layers, scene, plan.view_hw)).chunk(2, dim=1)
    parts = [(flat[:, :same], other, flat[:, same:]) for flat, other in zip((first, second), deep)]
    image, inside = torch.cat([part for camera in parts for part in camera], dim=1)
    disturbed = disturb(_spoil(image, plan.spoiled_every), plan.coarsest_step_octaves, plan.shadow_share)
    return Pictures(disturbed, inside, homography[:same], scene)


def _spoil(image: Tensor, every: int) -> Tensor:
    """Strong blur in one picture of so many, and night in another."""
    if every:
        image = image.clone()
        image[::every] = blur_strongly(image[::every])[0]
        image[every // 2 :: every] = darken(image[every // 2 :: every])
    return image


# ---------------------------------------------------------------------------------------------------- points and labels


@torch.no_grad()
def find(plan: Plan, net: nn.Module, drawn: Pictures) -> Batch:
    """The points that a network finds in pictures, and which of them are the same."""
    image = drawn.image.contiguous(memory_format=torch.channels_last)
    with torch.autocast(image.device.type, dtype=torch.float16, enabled=image.device.type == "cuda"):
        logits, coarse = net(image)
    points = detect(score_map(logits), drawn.inside, plan.points)
    size = points.xy.new_tensor([plan.width, plan.height]).expand(len(image), 2)
    parts = (points.xy, points.score, sample(coarse, points.xy), points.real.sum(dim=1).int(), size)
    both = [torch.stack(part.chunk(2), dim=1) for part in parts]
    xy, real = both[0], torch.stack(points.real.chunk(2), dim=1)
    return Batch(*both, *label(xy, real, truths(plan, drawn, xy)))


def truths(plan: Plan, drawn: Pictures, xy: Tensor) -> tuple[Truth, Truth]:
    """Where each point (B, 2, N, 2) of either picture lies in the other, of all kinds of pairs."""
    same, layers, _ = plan.kinds
    both = []
    for camera, own in enumerate(xy.unbind(dim=1)):
        matrix = drawn.homography if camera == 0 else inverse(drawn.homography)
        other = drawn.inside.chunk(2)[1 - camera]
        there = warp(own[:same], matrix)
        flat = Truth(there, shown(there, other[:same]) > 0, torch.zeros_like(there[..., 0], dtype=torch.bool))
        deep = layered.follow(drawn.scene, camera, own[same : same + layers], plan.view_hw)
        nowhere = torch.full_like(own[same + layers :], -1e4)
        none = torch.zeros_like(nowhere[..., 0], dtype=torch.bool)
        parts = (flat, deep, Truth(nowhere, none, none))
        both.append(Truth(*(torch.cat(columns) for columns in zip(*parts))))
    return both[0], both[1]


def label(xy: Tensor, real: Tensor, truth: tuple[Truth, Truth]) -> tuple[Tensor, Tensor, Tensor]:
    """Which points are the same: each other's nearest within `SAME_PX`; which have none within that.

    Distances are those in the picture that sees less detail, in which the same distance is fewer px.

    Args:
        xy: (B, 2, N, 2).
        real: (B, 2, N) bool.
        truth: of the first pictures' points and of the second's.

    Returns:
        (B, 2, N) partner, alone and apart, as `Batch` has them.
    """
    seen0, seen1 = (real[:, side] & truth[side].seen for side in (0, 1))
    apart = torch.minimum(_distance(truth[0].there, xy[:, 1]), _distance(xy[:, 0], truth[1].there))
    apart = torch.where(seen0[..., None] & seen1[:, None], apart, 1e6)
    nearest = [apart.min(dim=2), apart.min(dim=1)]
    row = torch.arange(xy.shape[2], device=xy.device)
    partner, alone = [], []
    for side, ((best, there), (_, back)) in enumerate((nearest, nearest[::-1])):
        same = (back.gather(1, there) == row) & (best < SAME_PX)
        partner.append(torch.where(same, there, -1))
        alone.append(real[:, side] & (best > SAME_PX) & ~truth[side].unsure)
    return torch.stack(partner, dim=1), torch.stack(alone, dim=1), torch.stack([best for best, _ in nearest], dim=1)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, N) px."""
    return (a[:, :, None] - b[:, None]).square().sum(dim=-1).sqrt()


# ----------------------------------------------------------------------------------------------------------------- pool


class Pool:
    """The last batches, on the device. Each new one takes the oldest one's place."""

    def __init__(self, batches: Iterator[Batch], kept: int) -> None:
        made = [_half(next(batches)) for _ in range(kept)]
        self._batches = batches
        self._size = len(made[0].rows)
        self._oldest = 0
        self.pairs = Batch(*(torch.cat(parts) for parts in zip(*made)))

    def renew(self) -> None:
        """One new batch."""
        rows = slice(self._oldest * self._size, (self._oldest + 1) * self._size)
        for kept, new in zip(self.pairs, _half(next(self._batches))):
            kept[rows] = new
        self._oldest = (self._oldest + 1) % (len(self.pairs.rows) // self._size)

    def sample(self, count: int) -> Batch:
        """Pairs at random."""
        index = torch.randint(len(self.pairs.rows), (count,), device=self.pairs.rows.device)
        return Batch(*(part[index] for part in self.pairs))


def _half(batch: Batch) -> Batch:
    return batch._replace(descriptors=batch.descriptors.half())


@torch.no_grad()
def vary(plan: Plan, batch: Batch) -> Batch:
    """The same pairs, never twice alike: half of them mirrored, and of some pictures the best points alone."""
    count, device = len(batch.rows), batch.rows.device
    mirrored = uniform((count, 1, 1), 0, 1, device) < 0.5
    x, y = batch.xy.unbind(dim=-1)
    x = torch.where(mirrored, batch.size[..., :1] - 1 - x, x)
    some = uniform((count, 2), 0, 1, device) < plan.fewer_share
    limit = torch.where(some, uniform((count, 2), 0.1, 1, device) * plan.points, plan.points)
    rows = torch.minimum(batch.rows, limit.int())
    real = torch.arange(x.shape[-1], device=device) < rows[..., None]
    left = batch.partner >= rows.flip(1)[..., None]
    # Not `batch._replace`: compiled by torch 2.11, it returns a named tuple without elements, and says nothing.
    return Batch(
        xy=torch.stack([x, y], dim=-1),
        scores=batch.scores,
        descriptors=batch.descriptors.float(),
        rows=rows,
        size=batch.size,
        partner=torch.where(real & ~left, batch.partner, -1),
        alone=real & (batch.alone | left),
        apart=batch.apart,
    )
