"""What a stage of minutes on a CPU needs, where only late layers of a finished network learn (`heads`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from superpoint_trt.checkpoint.layouts import Checkpoint, Layer
from superpoint_trt.checkpoint.reference import Network
from superpoint_trt.core.progress import Progress
from superpoint_trt.core.types import SuperPointError
from training import photos
from training.distill import Seen, look
from training.train import Plan, schedule

JUDGED_SEED = 1000
"""Held-out views are the same for every run, whatever its seed."""
VIEWS_AT_ONCE = 4
"""That the whole network sees: its first layers take 79 MB a view of 240x320."""
LOG_EVERY = 10
HALF_MAX = float(np.finfo(np.float16).max)

Figures = dict[str, dict[str, float]]
"""`before` and `after` learning: name -> value."""


# ----------------------------------------------------------------------------------------------------- what is read


def at_least_one(plan: Any, *names: str) -> None:
    """Checks numbers of a plan.

    Raises:
        SuperPointError: one of them is less than 1.
    """
    for name in names:
        if getattr(plan, name) < 1:
            raise SuperPointError(f"{name} is {getattr(plan, name)}; expected 1 or more.")


def photographs(folders: list[Path]) -> tuple[list[Path], list[Path]]:
    """Photographs to learn from, and those to judge by.

    Raises:
        SuperPointError: there are none of the one or of the other.
    """
    train, held_out = photos.find(folders)
    if not held_out:
        raise SuperPointError(
            f"no held-out photograph in {', '.join(map(str, folders))}: add a folder with one of "
            f"{', '.join(photos.HELD_OUT)} (--photos)."
        )
    return train, held_out


def looks(paths: list[Path], count: int, plan: Plan, device: torch.device, progress: Progress) -> Iterator[Seen]:
    """Pairs of views of photographs, in an order drawn at random.

    Args:
        paths: the photographs; they come again if there are fewer than `count`.
        count: pairs in all.
        plan: what views look like; `plan.pairs` come at a time.
        device: where the views are made.
        progress: called with (pairs done, count).
    """
    order = torch.randperm(len(paths)).tolist()
    for begin in range(0, count, plan.pairs):
        progress(begin, count)
        rows = range(begin, min(begin + plan.pairs, count))
        bank = photos.load([paths[order[row % len(order)]] for row in rows], device, plan.canvas_px)
        yield look(plan, bank.images, bank.sizes)
    progress(count, count)


# --------------------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Descent:
    """How some layers learn."""

    steps: int
    learning_rate: float
    most_gradient: float
    """Length of each group's gradient at most."""
    rate_option: str = "--learning-rate"
    """What sets the rate, for the message."""


def descend(
    descent: Descent,
    groups: list[dict[str, Any]],
    objective: Callable[[], tuple[Tensor, Tensor]],
    write: Callable[[int, list[float]], None],
    progress: Progress,
) -> None:
    """All steps of AdamW without decay; the rate warms up, then falls to nothing (`train.schedule`).

    Args:
        descent: steps, rate and clipping.
        groups: parameters, each group with its `pace`: its rate as a multiple.
        objective: a new batch's loss, and (N,) figures.
        write: gets the step and the figures' means since it was called before, every `LOG_EVERY` steps and at the end.
        progress: called after each step.

    Raises:
        SuperPointError: a loss is not finite.
    """
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    window: list[Tensor] = []
    for step in range(1, descent.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = descent.learning_rate * group["pace"] * schedule((step - 0.5) / descent.steps)
        loss, figures = objective()
        if not torch.isfinite(loss):
            raise SuperPointError(
                f"the loss is not finite at step {step} of {descent.steps}: lower {descent.rate_option}."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], descent.most_gradient)
        optimizer.step()
        window.append(figures.detach())
        if step % LOG_EVERY == 0 or step == descent.steps:
            write(step, torch.stack(window).mean(dim=0).tolist())
            window.clear()
        progress(step, descent.steps)


def rounded(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    """Figures as logs and tables have them."""
    return {name: round(value, 4) + 0.0 for name, value in zip(names, values)}  # 0.0, not -0.0


def append(log: Path, entry: dict[str, Any]) -> None:
    """Adds a JSON line to a file."""
    with log.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")


# -------------------------------------------------------------------------------------------------- what is written


def learnt(checkpoint: Checkpoint, net: Network) -> Checkpoint:
    """The checkpoint with the weights that its network has now. Its map of descriptors, fitted to those before, goes.

    Raises:
        SuperPointError: a value is not finite in float16.
    """
    # Both have the layers in the network's order.
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    layers = {}
    for name, conv in zip(checkpoint.layers, convolutions):
        assert conv.bias is not None
        weight, bias = (part.detach().cpu().numpy().copy() for part in (conv.weight, conv.bias))
        assert weight.shape == checkpoint.layers[name].weight.shape, name
        if not all(np.abs(part).max() <= HALF_MAX for part in (weight, bias)):  # no NaN is
            raise SuperPointError(f"layer {name} has learnt values that float16 cannot hold: lower --learning-rate.")
        layers[name] = Layer(weight, bias)
    return replace(checkpoint, layers=layers, descriptor_map=None)


def table(figures: Figures) -> str:
    """One line each, beneath the names."""
    names = list(next(iter(figures.values())))
    lines = [f"{'':8}" + "".join(f"{name:>11}" for name in names)]
    lines += [f"{name:8}" + "".join(f"{row[key]:11.4f}" for key in names) for name, row in figures.items()]
    return "\n".join(lines)


def write_figures(figures: Figures, output: Path) -> None:
    """`figures.json` in the folder of a run."""
    (output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
