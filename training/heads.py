"""`python -m training.heads --photos FOLDER --start CHECKPOINT --output RUN`: a last stage, minutes on a CPU.

Only the last convolutions of the two heads learn, from `train.found_losses`; all other layers stay as they are. So the
network runs once over some hundred pairs of views, and what enters its last convolutions is kept: a step costs no more
than two 1x1 convolutions and the losses. The detector learns exact places and stays near its first answers; descriptors
learn which matches are wrong. Neither learns from the other's losses, so both learn in the same steps.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.reference import Network, network
from superpoint_trt.checkpoint.topology import DESCRIPTORS, LOGITS
from superpoint_trt.cli.progress import phase_bar
from superpoint_trt.core.files import make_folder
from superpoint_trt.core.progress import PhaseProgress, Progress
from superpoint_trt.core.types import SuperPointError
from training import late, places
from training.fold import learnable
from training.geometry import inverse, warp
from training.losses import sample, shown
from training.places import Found
from training.train import FOUND_FIGURES, Plan, change, device_of, found_losses


@dataclass(frozen=True)
class HeadsPlan(Plan):
    """What this stage depends on: `train.Plan`'s views and losses with values of its own, and how the heads learn.

    What `train.Plan` says of rounds, collages, rounding and teachers has no effect.
    """

    pairs: int = 8
    """A step."""
    kept_pairs: int = 400
    """That the steps draw from."""
    steps: int = 300
    learning_rate: float = 5e-4
    detector_pace: float = 2.0
    """The detector's learning rate, as a multiple."""
    most_gradient: float = 1.0
    """Length of each head's gradient at most."""
    keep_weight: float = 1.0
    """Of how far the detector's answers are from its first ones."""
    found: int = 180
    far_share: float = 0.1
    tilted_share: float = 0.3
    place_weight: float = 0.5
    spread_weight: float = 0.1
    choice_weight: float = 0.0
    match_weight: float = 0.0
    stray_weight: float = 0.0
    wrong_weight: float = 5.0
    repeat_weight: float = 0.0
    judged_pairs: int = 64
    """Of held-out photographs."""

    def __post_init__(self) -> None:
        late.at_least_one(self, "pairs", "kept_pairs", "steps", "found", "judged_pairs")


SMOKE = HeadsPlan(pairs=2, kept_pairs=4, steps=2, judged_pairs=2, found=24, view_hw=(64, 80), canvas_px=128)
"""Seconds on a CPU, to see that it runs."""

JUDGED_AT_ONCE = 8
"""Pairs. `Plan` says how many of the judged ones are hard."""
JUDGED_POINTS = 180
FEW = 150
"""Points of each view that should be found again in the other one."""
FIGURES = ("mma1", "mma3", "right", "matches", "again3", "again1")
"""Of `judge`: shares of matches that are right within 1 and 3 px; right matches (3 px) and matches of a pair; shares of
the best points that the other view finds again within 3 and 1 px."""

VGG_LAYERS = {"convPb": "detector.1", "convDb": "descriptor.1"}
COMPACT_LAYERS = {LOGITS: LOGITS, DESCRIPTORS: DESCRIPTORS}
"""Last layers of the detector and the descriptor: the checkpoint's name, and the block of the torch network."""


class Kept(NamedTuple):
    """What is kept of a pair of views, the first one before the second; or of B pairs, all first views first."""

    detector: Tensor
    """(2 B, C, H/8, W/8): enters the detector's last convolution. Kept as float16."""
    descriptor: Tensor
    """(2 B, C, H/8, W/8): enters the descriptor's. Kept as float16."""
    inside: Tensor
    """(2 B, 1, H, W): where the views show their image. Kept as bool."""
    homography: Tensor
    """(B, 3, 3) from the first views to the second."""


def together(pairs: list[Kept]) -> Kept:
    """One batch of pairs, float32."""
    parts = (torch.stack(part, dim=1).flatten(0, 1).float() for part in list(zip(*pairs))[:-1])
    return Kept(*parts, torch.cat([pair.homography for pair in pairs]))


class Heads(nn.Module):
    """The last convolutions of a network's two heads; the network's own, not copies."""

    def __init__(self, net: Network, layers: dict[str, str]) -> None:
        super().__init__()
        self.detector, self.descriptor = (net.get_submodule(block).conv for block in layers.values())

    def forward(self, seen: Kept) -> tuple[Tensor, Tensor]:
        """Logits (2 B, 65, H/8, W/8) and coarse descriptors (2 B, D, H/8, W/8)."""
        return self.detector(seen.detector), self.descriptor(seen.descriptor)


# ------------------------------------------------------------------------------------------------------- pairs of views


@torch.no_grad()
def draw(net: Network, heads: Heads, paths: list[Path], count: int, plan: Plan, progress: Progress) -> list[Kept]:
    """Pairs of views of photographs, in an order drawn at random, as the last convolutions of the heads see them."""
    device = heads.detector.weight.device
    kept: list[Kept] = []
    for seen in late.looks(paths, count, plan, device, progress):
        rows = len(seen.homography)
        parts = (*_entering(net, heads, seen.image), seen.inside > 0.999)
        kept += [
            Kept(*(part[[row, row + rows]] for part in parts), seen.homography[row : row + 1]) for row in range(rows)
        ]
    return kept


def _entering(net: Network, heads: Heads, image: Tensor) -> tuple[Tensor, Tensor]:
    """What enters the heads' last convolutions, float16."""
    seen: dict[nn.Module, list[Tensor]] = {heads.detector: [], heads.descriptor: []}
    hooks = [conv.register_forward_pre_hook(lambda conv, read: seen[conv].append(read[0].half())) for conv in seen]
    for part in image.split(late.VIEWS_AT_ONCE):
        net(part)
    for hook in hooks:
        hook.remove()
    return torch.cat(seen[heads.detector]), torch.cat(seen[heads.descriptor])


# ------------------------------------------------------------------------------------------------------------- learning


def learn(heads: Heads, kept: list[Kept], plan: HeadsPlan, log: Path, progress: Progress) -> None:
    """All steps.

    Args:
        heads: learn in place.
        kept: pairs to draw from.
        plan: its steps, rates and weights.
        log: file that gets a JSON line every `late.LOG_EVERY` steps: means since the line before.
        progress: called after each step.

    Raises:
        SuperPointError: a loss is not finite.
    """
    first = copy.deepcopy(heads.detector)
    paces = ((heads.descriptor, 1.0), (heads.detector, plan.detector_pace))
    groups = [{"params": list(head.parameters()), "pace": pace} for head, pace in paces]
    names = ("loss", *FOUND_FIGURES, "drift")

    def of_a_batch() -> tuple[Tensor, Tensor]:
        batch = together([kept[row] for row in torch.randperm(len(kept))[: plan.pairs].tolist()])
        loss, figures = objective(heads, first, batch, plan)
        return loss, torch.cat([loss.detach()[None], figures])

    def write(step: int, means: list[float]) -> None:
        late.append(log, {"step": step, **late.rounded(names, means)})

    late.descend(late.Descent(plan.steps, plan.learning_rate, plan.most_gradient), groups, of_a_batch, write, progress)


def objective(heads: Heads, first: nn.Conv2d, batch: Kept, plan: HeadsPlan) -> tuple[Tensor, Tensor]:
    """The loss to descend, and what it is made of.

    Args:
        heads: that learn.
        first: the detector's last convolution before it learnt.
        batch: of `together`.
        plan: its weights.

    Returns:
        the loss, and `train.FOUND_FIGURES` followed by the mean divergence of the detector's answers from its first
        ones: cross-entropy less the entropy of the first.
    """
    logits, coarse = heads(batch)
    loss, figures = found_losses(plan, logits, coarse, batch.inside, batch.homography)
    with torch.no_grad():
        told = first(batch.detector).log_softmax(dim=1)
    drift = F.kl_div(logits.log_softmax(dim=1), told, log_target=True, reduction="none").sum(dim=1).mean()
    return loss + plan.keep_weight * drift, torch.cat([figures, drift.detach()[None]])


# -------------------------------------------------------------------------------------------------------------- judging


@torch.no_grad()
def judge(heads: Heads, kept: list[Kept]) -> dict[str, float]:
    """`FIGURES`, means over pairs of views."""
    rows = []
    for begin in range(0, len(kept), JUDGED_AT_ONCE):
        batch = together(kept[begin : begin + JUDGED_AT_ONCE])
        logits, coarse = heads(batch)
        inside = batch.inside.chunk(2)
        scores = places.score_map(logits).chunk(2)
        first, second = (places.detect(part, seen, JUDGED_POINTS) for part, seen in zip(scores, inside))
        unit = [sample(part, points.xy) for part, points in zip(coarse.chunk(2), (first, second))]
        matched = matching(first, second, (unit[0], unit[1]), batch.homography)
        there = found_again(first, second, batch.homography, inside[1])
        back = found_again(second, first, inverse(batch.homography), inside[0])
        rows.append(torch.cat([matched, (there + back) / 2], dim=1))
    return late.rounded(FIGURES, torch.cat(rows).nanmean(dim=0).tolist())


def matching(first: Found, second: Found, descriptors: tuple[Tensor, Tensor], homography: Tensor) -> Tensor:
    """Mutual nearest neighbors of each pair.

    Args:
        first: points of the first views.
        second: of the second views.
        descriptors: (B, N, D) and (B, M, D), unit length.
        homography: (B, 3, 3) from the first views to the second.

    Returns:
        (B, 4), the first four of `FIGURES`; shares are NaN without a match.
    """
    both = first.real[..., None] & second.real[:, None]
    similarity = (descriptors[0] @ descriptors[1].transpose(1, 2)).masked_fill(~both, -2)
    nearest = similarity.argmax(dim=2)
    itself = torch.arange(nearest.shape[1], device=nearest.device)
    real = first.real & second.real.gather(1, nearest)
    mutual = (similarity.argmax(dim=1).gather(1, nearest) == itself) & real
    partner = second.xy.gather(1, nearest[..., None].expand(-1, -1, 2))
    error_px = (warp(first.xy, homography) - partner).norm(dim=2)
    count = mutual.sum(dim=1)
    right1, right3 = (((error_px < limit) & mutual).sum(dim=1) for limit in (1.0, 3.0))
    return torch.stack([right1 / count, right3 / count, right3.float(), count.float()], dim=1)


def found_again(first: Found, second: Found, homography: Tensor, inside: Tensor) -> Tensor:
    """Of the best `FEW` points of a view, those that are among the best of the other one.

    Args:
        first: points of the one views.
        second: of the others.
        homography: (B, 3, 3) from the one to the other.
        inside: (B, 1, H, W): where the others show their image.

    Returns:
        (B, 2): shares within 3 and 1 px of the points that the others show; NaN if they show none.
    """
    first, second = (Found(*(part[:, :FEW] for part in points)) for points in (first, second))
    there = warp(first.xy, homography)
    shared = first.real & (shown(there, inside) > 0)
    nearest_px = torch.cdist(there, second.xy).masked_fill(~second.real[:, None], math.inf).amin(dim=2)
    again = [((nearest_px < limit) & shared).sum(dim=1) / shared.sum(dim=1) for limit in (3.0, 1.0)]
    return torch.stack(again, dim=1)


# ------------------------------------------------------------------------------------------------------ the whole stage


def run(
    start: Path, folders: list[Path], output: Path, plan: HeadsPlan, device: torch.device, progress: PhaseProgress
) -> tuple[Path, late.Figures]:
    """Draws pairs, learns, judges, and writes the checkpoint.

    Args:
        start: checkpoint without BatchNorm, as the other stages write it.
        folders: of photographs.
        output: folder for `log.jsonl`, `figures.json` and `heads.safetensors`.
        plan: all settings.
        device: what it runs on.
        progress: called with (phase, done, total).

    Returns:
        the checkpoint's path, and `judge`'s figures `before` and `after`.

    Raises:
        SuperPointError: the checkpoint is of another kind, the photographs cannot be used, or learning fails.
    """
    checkpoint = learnable(start)
    layers = COMPACT_LAYERS if checkpoint.topology else VGG_LAYERS
    train, held_out = late.photographs(folders)
    make_folder(output)
    log = output / "log.jsonl"
    log.write_text("")
    net = network(checkpoint).to(device)
    heads = Heads(net, layers)
    torch.manual_seed(late.JUDGED_SEED)
    usual = Plan(pairs=JUDGED_AT_ONCE, view_hw=plan.view_hw, canvas_px=plan.canvas_px)
    judged = draw(net, heads, held_out, plan.judged_pairs, usual, partial(progress, "held-out pairs"))
    figures = {"before": judge(heads, judged)}
    torch.manual_seed(plan.seed)
    kept = draw(net, heads, train, plan.kept_pairs, plan, partial(progress, "pairs to learn from"))
    learn(heads, kept, plan, log, partial(progress, "steps"))
    path = layouts.save(late.learnt(checkpoint, net), output / "heads.safetensors", half=True)
    figures["after"] = judge(Heads(network(layouts.load(path)).to(device), layers), judged)
    late.write_figures(figures, output)
    return path, figures


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option("--start", required=True, help="Checkpoint whose heads learn on.")
@click.option("--output", required=True, help="Folder of the run: log.jsonl, figures.json, heads.safetensors.")
@click.option("--pairs", type=click.IntRange(1), help=f"Of views that the steps draw from.  [{HeadsPlan.kept_pairs}]")
@click.option("--steps", type=click.IntRange(1), help=f"[{HeadsPlan.steps}]")
@click.option("--learning-rate", type=click.FloatRange(0), help=f"[{HeadsPlan.learning_rate}]")
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Another value of one of HeadsPlan's.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=HeadsPlan.seed, show_default=True)
@click.option("--smoke", is_flag=True, help="Tiny views, two steps.")
def main(
    folders: tuple[str, ...],
    start: str,
    output: str,
    pairs: int | None,
    steps: int | None,
    learning_rate: float | None,
    changes: tuple[str, ...],
    device: str,
    seed: int,
    smoke: bool,
) -> None:
    """The last convolutions of both heads learn on, from points that the network itself finds."""
    given = {"kept_pairs": pairs, "steps": steps, "learning_rate": learning_rate, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    base = SMOKE if smoke else HeadsPlan()
    changed = dict(change(base, text) for text in changes)
    where = [Path(folder) for folder in folders]
    try:
        plan = replace(base, **{**given, **changed})
        with phase_bar() as progress:
            path, figures = run(Path(start), where, Path(output), plan, device_of(device), progress)
    except SuperPointError as error:
        raise click.UsageError(str(error)) from None
    print(late.table(figures))
    print(f"learnt: {path}")


if __name__ == "__main__":
    main()
