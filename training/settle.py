"""`python -m training.settle --photos F --start C --teacher C --output RUN`: late layers learn steadier answers.

The mean of a detector's answers over the eight symmetries of the square, and over two versions of the network, finds
more points again than each network alone, and places them better (`steady.py`). Here a network learns that mean, in
minutes on a CPU. Its first two stages stay as they are. They run once over some hundred disturbed views of training
photographs. What enters the third stage is kept, with the teachers' mean, and with the network's own descriptors, which
should not change. First the detector head learns alone, then all late layers together. A small network learns whole,
from its first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.compact import CompactNet
from superpoint_trt.checkpoint.reference import Network, network
from superpoint_trt.cli.progress import phase_bar
from superpoint_trt.core.files import make_folder
from superpoint_trt.core.progress import PhaseProgress, Progress
from superpoint_trt.core.types import CELL_PX, SuperPointError
from training import late
from training.fold import learnable
from training.steady import MOST_TEACHERS, divergence, shared_logits
from training.train import Plan, change, device_of

STAYING = 2
"""Stages of the full network that do not learn."""
MOST_BYTES = 2 * 10**9
"""Of what is kept in memory of all views."""
JUDGED_AT_ONCE = 8
"""Views."""
FIGURES = ("divergence", "away")
"""Means over cells: how far the detector's answer is from the teachers' mean (Kullback-Leibler's divergence), and one
less the cosine of the descriptor to the one that the network began with."""


@dataclass(frozen=True)
class SettlePlan:
    """What this stage depends on, besides the photographs and the teachers."""

    views: int = 640
    """That the steps draw from."""
    head_steps: int = 600
    """Of the detector head alone; 0: none."""
    head_batch: int = 12
    """Views a step."""
    head_learning_rate: float = 1e-3
    steps: int = 400
    """Of all late layers, after those."""
    batch: int = 8
    """Views a step."""
    learning_rate: float = 2e-4
    keep_weight: float = 0.5
    """Of how far the descriptors are from the first ones."""
    most_gradient: float = 1.0
    """Length of the gradient at most."""
    judged_views: int = 48
    """Of held-out photographs."""
    seed: int = 1
    look: Plan = field(default=Plan(pairs=4))
    """What views look like."""

    def __post_init__(self) -> None:
        late.at_least_one(self, "views", "head_batch", "batch", "judged_views")
        for name in ("head_steps", "steps"):
            if getattr(self, name) < 0:
                raise SuperPointError(f"{name} is {getattr(self, name)}; expected 0 or more.")


SMOKE = SettlePlan(
    views=6,
    head_steps=2,
    head_batch=2,
    steps=2,
    batch=2,
    judged_views=4,
    look=Plan(pairs=2, view_hw=(64, 80), canvas_px=128),
)
"""Seconds on a CPU, to see that it runs."""


@dataclass(frozen=True)
class Parts:
    """A network parted by what learns; its own layers, not copies. Image -> early -> trunk -> heads."""

    early: nn.Module
    """Stays as it is; of a small network nothing."""
    trunk: nn.Module
    heads: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Features -> logits (B, 65, H/8, W/8) and coarse descriptors (B, D, H/8, W/8)."""
    detector: nn.Module | None
    """The detector head: features -> logits. None: it does not learn alone."""
    learning: list[nn.Parameter]
    """Of all that learns."""


def parts_of(net: Network) -> Parts:
    """All of a small network learns, of the full one what comes after its first stages."""
    if isinstance(net, CompactNet):
        return Parts(nn.Identity(), nn.Identity(), net, None, list(net.parameters()))
    detector, descriptor, trunk = net.detector, net.descriptor, net.backbone[STAYING:]
    learning = [parameter for part in (trunk, detector, descriptor) for parameter in part.parameters()]
    return Parts(
        net.backbone[:STAYING],
        trunk,
        lambda features: (detector(features), descriptor(features)),
        detector,
        learning,
    )


# ------------------------------------------------------------------------------------------------------------ views


class Kept(NamedTuple):
    """What is kept of B views. Floats are float16."""

    entering: Tensor
    """(B, C, H', W'): what the early layers say; of a small network the image."""
    features: Tensor
    """(B, C, H/8, W/8): what the trunk said before it learnt; of a small network the image."""
    target: Tensor
    """(B, 65, H/8, W/8): logarithms of the teachers' mean."""
    known: Tensor
    """(B, D, H/8, W/8): unit descriptors of the network before it learnt."""
    inside: Tensor
    """(B, H/8, W/8) bool: cells all of whose pixels show the photograph."""

    def bytes(self) -> int:
        """In memory."""
        return sum(part.numel() * part.element_size() for part in self)


@torch.no_grad()
def keep(
    parts: Parts,
    teachers: list[Network],
    paths: list[Path],
    count: int,
    look: Plan,
    device: torch.device,
    progress: Progress,
    most_bytes: int = MOST_BYTES,
) -> Kept:
    """Disturbed views of photographs; both of each pair count.

    Args:
        parts: of the network, before it learns.
        teachers: 1 to `MOST_TEACHERS`, which share the symmetries of each view.
        paths: photographs.
        count: of views.
        look: what they look like.
        device: of the networks and of what is kept.
        progress: called with (pairs done, pairs in all).
        most_bytes: that may be kept.

    Raises:
        SuperPointError: the views would take more memory than that, or a photograph cannot be read.
    """
    kept: Kept | None = None
    done = 0
    for seen in late.looks(paths, (count + 1) // 2, look, device, progress):
        for image, inside in zip(seen.image.split(late.VIEWS_AT_ONCE), seen.inside.split(late.VIEWS_AT_ONCE)):
            some = _of_views(parts, teachers, image, inside)
            kept = kept or _room(some, count, most_bytes)
            for whole, new in zip(kept, some):
                whole[done : done + len(new)] = new[: count - done]
            done += len(image)
    assert kept
    return kept


def _of_views(parts: Parts, teachers: list[Network], image: Tensor, inside: Tensor) -> Kept:
    entering = parts.early(image)
    features = parts.trunk(entering)
    known = F.normalize(parts.heads(features)[1], dim=1)
    target = shared_logits([lambda x, own=each: own(x)[0] for each in teachers], image)
    whole_cells = -F.max_pool2d(-inside, CELL_PX)[:, 0] > 0.999
    return Kept(entering.half(), features.half(), target.half(), known.half(), whole_cells)


def _room(some: Kept, count: int, most_bytes: int) -> Kept:
    """Memory for as many views, filled later: joining pieces in the end would take twice as much."""
    a_view = some.bytes() / len(some.inside)
    if a_view * count > most_bytes:
        raise SuperPointError(
            f"{count} views take {a_view * count / 1e9:.2f} GB of memory; expected at most {most_bytes / 1e9:.2f} GB: "
            f"take {int(most_bytes / a_view)} views or fewer (--views; --set judged_views for held-out ones)."
        )
    return Kept(*(part.new_empty((count, *part.shape[1:])) for part in some))


# --------------------------------------------------------------------------------------------------------- learning


def learn(parts: Parts, kept: Kept, plan: SettlePlan, log: Path, progress: PhaseProgress) -> None:
    """The detector head alone, then all that learns.

    Args:
        parts: of the network; learn in place.
        kept: views to draw from.
        plan: its steps, rates and weights.
        log: file that gets a JSON line every `late.LOG_EVERY` steps: phase, step, and means of `FIGURES` since the line
            before. The descriptors do not change while the detector learns alone: `away` is 0 there.
        progress: called with (phase, steps done, steps in all).

    Raises:
        SuperPointError: a loss is not finite.
    """

    def drawn(batch: int) -> Kept:
        rows = torch.randperm(len(kept.inside), device=kept.inside.device)[:batch]
        return Kept(*(part[rows] for part in kept))

    def of_the_detector(detector: nn.Module) -> tuple[Tensor, Tensor]:
        batch = drawn(plan.head_batch)
        loss = _mean(divergence(batch.target.float(), detector(batch.features.float()))[batch.inside])
        return loss, torch.stack([loss, torch.zeros_like(loss)])

    def of_all() -> tuple[Tensor, Tensor]:
        figures = _mean(apart(parts, drawn(plan.batch)))
        return figures[0] + plan.keep_weight * figures[1], figures

    def phase(name: str, descent: late.Descent, learning: list[nn.Parameter], loss: Callable) -> None:
        def write(step: int, means: list[float]) -> None:
            late.append(log, {"phase": name, "step": step, **late.rounded(FIGURES, means)})

        groups = [{"params": learning, "pace": 1.0}]
        late.descend(descent, groups, loss, write, partial(progress, f"steps of {name}"))

    if parts.detector:
        descent = late.Descent(
            plan.head_steps, plan.head_learning_rate, plan.most_gradient, "head_learning_rate (--set)"
        )
        phase("detector", descent, list(parts.detector.parameters()), partial(of_the_detector, parts.detector))
    phase("all", late.Descent(plan.steps, plan.learning_rate, plan.most_gradient), parts.learning, of_all)


def apart(parts: Parts, views: Kept) -> Tensor:
    """(2, N): `FIGURES` of each of the N cells that lie inside."""
    logits, coarse = parts.heads(parts.trunk(views.entering.float()))
    away = 1 - (F.normalize(coarse, dim=1) * views.known.float()).sum(dim=1)
    return torch.stack([divergence(views.target.float(), logits)[views.inside], away[views.inside]])


def _mean(cells: Tensor) -> Tensor:
    """Along the last dimension; 0 of no cells."""
    return cells.sum(dim=-1) / max(cells.shape[-1], 1)


@torch.no_grad()
def judge(parts: Parts, kept: Kept) -> dict[str, float]:
    """`FIGURES` of a network over all cells of some views."""
    batches = zip(*(part.split(JUDGED_AT_ONCE) for part in kept))
    cells = torch.cat([apart(parts, Kept(*batch)) for batch in batches], dim=1)
    return late.rounded(FIGURES, _mean(cells).tolist())


# -------------------------------------------------------------------------------------------------- the whole stage


def run(
    start: Path,
    teachers: list[Path],
    folders: list[Path],
    output: Path,
    plan: SettlePlan,
    device: torch.device,
    progress: PhaseProgress,
) -> tuple[Path, late.Figures]:
    """Draws views, asks the teachers, learns, judges, and writes the checkpoint.

    Args:
        start: checkpoint without BatchNorm, as the other stages write it.
        teachers: 1 to `MOST_TEACHERS` such checkpoints, of any kind of network.
        folders: of photographs.
        output: folder for `log.jsonl`, `figures.json` and `settled.safetensors`.
        plan: all settings.
        device: what it runs on.
        progress: called with (phase, done, total).

    Returns:
        the checkpoint's path, and `judge`'s figures `before` and `after`.

    Raises:
        SuperPointError: a checkpoint is of another kind, the photographs cannot be used, or learning fails.
    """
    if not 1 <= len(teachers) <= MOST_TEACHERS:
        raise SuperPointError(f"{len(teachers)} teachers are given; expected 1 to {MOST_TEACHERS} (--teacher).")
    checkpoint = learnable(start)
    told_by = [network(learnable(path)).to(device) for path in teachers]
    train, held_out = late.photographs(folders)
    make_folder(output)
    log = output / "log.jsonl"
    log.write_text("")
    net = network(checkpoint).to(device)
    parts = parts_of(net)
    torch.manual_seed(late.JUDGED_SEED)
    phase = partial(progress, "held-out views")
    judged = keep(parts, told_by, held_out, plan.judged_views, plan.look, device, phase)
    figures = {"before": judge(parts, judged)}
    torch.manual_seed(plan.seed)
    phase = partial(progress, "views to learn from")
    kept = keep(parts, told_by, train, plan.views, plan.look, device, phase, MOST_BYTES - judged.bytes())
    learn(parts, kept, plan, log, progress)
    path = layouts.save(late.learnt(checkpoint, net), output / "settled.safetensors", half=True)
    figures["after"] = judge(parts_of(network(layouts.load(path)).to(device)), judged)
    late.write_figures(figures, output)
    return path, figures


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option("--start", required=True, help="Checkpoint whose late layers learn on.")
@click.option("--teacher", "teachers", multiple=True, required=True, help="Checkpoint; may be given up to four times.")
@click.option("--output", required=True, help="Folder of the run: log.jsonl, figures.json, settled.safetensors.")
@click.option("--views", type=click.IntRange(1), help=f"That the steps draw from.  [{SettlePlan.views}]")
@click.option("--steps", type=click.IntRange(0), help=f"Of all late layers.  [{SettlePlan.steps}]")
@click.option("--learning-rate", type=click.FloatRange(0), help=f"Of those steps.  [{SettlePlan.learning_rate}]")
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Another value of one of SettlePlan's.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--seed", default=SettlePlan.seed, show_default=True)
@click.option("--smoke", is_flag=True, help="Tiny views, two steps of each phase.")
def main(
    folders: tuple[str, ...],
    start: str,
    teachers: tuple[str, ...],
    output: str,
    views: int | None,
    steps: int | None,
    learning_rate: float | None,
    changes: tuple[str, ...],
    device: str,
    seed: int,
    smoke: bool,
) -> None:
    """The late layers learn the mean of the teachers' answers over the eight symmetries of the square."""
    given = {"views": views, "steps": steps, "learning_rate": learning_rate, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    base = SMOKE if smoke else SettlePlan()
    changed = dict(change(base, text) for text in changes)
    where = [Path(folder) for folder in folders]
    told_by = [Path(teacher) for teacher in teachers]
    try:
        plan = replace(base, **{**given, **changed})
        with phase_bar() as progress:
            path, figures = run(Path(start), told_by, where, Path(output), plan, device_of(device), progress)
    except SuperPointError as error:
        raise click.UsageError(str(error)) from None
    print(late.table(figures))
    print(f"settled: {path}")


if __name__ == "__main__":
    main()
