"""`python -m training.matcher --photos FOLDER --features CHECKPOINT --output RUN --minutes M`: a learned matcher.

`pairs.py` makes what it learns from, `matching.py` says how wrong it is. What is judged and saved is an average of the
weights over the last steps. A run that was cut off goes on from its state when the command is given again.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.matcher import MatcherShape, load_matcher, save_matcher
from superpoint_trt.checkpoint.matcher_network import MatcherNet, matches
from superpoint_trt.checkpoint.reference import network
from superpoint_trt.core.files import make_folder
from superpoint_trt.core.networks import weights_path
from superpoint_trt.core.types import SuperPointError
from training import photos
from training.bank import Bank
from training.matching import objective, summary
from training.pairs import Batch, Plan, Pool, choose, draw, find, vary
from training.train import (
    LOG_EVERY,
    WARM_STEPS,
    _random_state,
    _save,
    _set_random_state,
    device_of,
    in_one_line,
    schedule,
)

POSITIVE = click.FloatRange(min=0, min_open=True)
"""Minutes."""
MOST_GRADIENT = 1.0
AVERAGED = 0.999
"""Of the averaged weights, what stays of them after a step."""

SMOKE = Plan(
    pairs=6,
    unrelated_share=0.3,
    points=48,
    height=96,
    width=128,
    canvas_px=192,
    kept_batches=2,
    matcher_width=16,
    heads=2,
    layers=2,
    judged_batches=1,
    save_every_s=0.0,
)
"""Seconds on a CPU, to see that it runs."""


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
    """Training time of all calls: the learning rate falls to zero by then. Infinite with a finite `pause_s`: what
    compiling leaves of this call."""
    pause_s: float = math.inf
    """This call ends so long after `started`, with a state to go on from."""
    steps: int = 10**9
    compiled: bool = False
    start: Path | None = None
    """A matcher's weights to begin with."""
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        torch.manual_seed(self.plan.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.enable_cudnn_sdp(False)  # the newest attention with a mask: others have run for years
        plan = self.plan
        self._draw, self._find, self._vary, self._objective = draw, find, vary, objective
        if self.compiled:
            self._draw, self._find, self._vary, self._objective = map(_compile, (draw, find, vary, objective))
        shape = MatcherShape(tuple(self.features), plan.matcher_width, plan.heads, plan.layers)
        self.net = MatcherNet.from_weights(load_matcher(self.start)) if self.start else MatcherNet(shape)
        self.net.train().to(self.device)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        groups = [
            {"params": [p for p in self.net.parameters() if p.ndim > 1], "weight_decay": plan.weight_decay},
            {"params": [p for p in self.net.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, fused=self.device.type == "cuda")

    def run(self) -> bool:
        """Trains until the time or the steps are over, or this call's pause; whether the training is over."""
        saved = judged = since = time.perf_counter()
        make_folder(self.folder)
        step, before = self._restore()
        pools = [Pool(self._batches(self.train, net), self.plan.kept_batches) for net in self.extractors]
        if not step and not self.start:
            for pool in pools:
                begin_with(self.net, pool.pairs.descriptors[: self.plan.pairs])
            self.average.load_state_dict(self.net.state_dict())
        sums: Any = 0.0
        first, logged, trained, begun, limit_s = step, step, before, since, self.limit_s
        while True:
            now = time.perf_counter()
            if step == first + WARM_STEPS:
                begun = now  # compiled by now
                if math.isinf(limit_s):
                    limit_s = max(before + self.started + self.pause_s - now, 1.0)
            if step >= first + WARM_STEPS:
                trained = before + now - begun
            spent = max(step / self.steps, trained / limit_s)
            if spent >= 1 or now - self.started > self.pause_s:
                break
            for group in self.optimizer.param_groups:
                group["lr"] = self.plan.learning_rate * schedule(spent)
            sums = sums + self._step(pools[step % len(pools)], step)
            step += 1
            if step == logged + LOG_EVERY:
                losses = _losses(sums / LOG_EVERY)
                rate = LOG_EVERY * self.plan.pairs / (time.perf_counter() - since)
                self._log(step=step, trained_s=round(trained), **losses, pairs_per_s=round(rate))
                sums, logged, since = 0.0, step, time.perf_counter()
            if now - saved > self.plan.save_every_s:
                self._save_state(step, trained)
                saved = now
            if now - judged > self.plan.judge_every_s:
                self._log(step=step, **self.judge()["learned"])
                judged = now
        self._save_state(step, trained)
        return spent >= 1

    def _step(self, pool: Pool, number: int) -> Tensor:
        """One update; on the device, each layer's losses and the gradient's length."""
        if (number // len(self.extractors) + 1) % self.plan.uses == 0:
            pool.renew()
        batch = self._vary(self.plan, pool.sample(self.plan.pairs))
        loss, losses = self._objective(self.plan, self.net, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(self.net.parameters(), MOST_GRADIENT)
        self.optimizer.step()
        average(self.average, self.net, min(AVERAGED, (1 + number) / (10 + number)))
        return torch.cat([losses.flatten(), length[None]])

    def _batches(self, bank: Bank, extractor: nn.Module) -> Iterator[Batch]:
        """Fresh pairs, without end."""
        while True:
            yield self._find(self.plan, extractor, self._draw(self.plan, *choose(self.plan, bank)))

    def judge(self) -> dict[str, dict[str, float]]:
        """`matching.summary` of the averaged weights on held-out photographs, the same pairs each time."""
        with _random(self.plan.seed, self.device):
            sources = itertools.cycle([self._batches(self.held_out, net) for net in self.extractors])
            batches = [next(next(sources)) for _ in range(self.plan.judged_batches)]
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"),
        ):  # not around the batches: torch.compile would compile them again
            found = [matches(self.average(*batch.sides())[-1], 0.0) for batch in batches]
        return summary(self.plan, batches, found)

    def _restore(self) -> tuple[int, float]:
        """Steps and seconds trained so far; 0 if this run has not begun."""
        if not (self.folder / "state.pt").exists():
            return 0, 0.0
        state = torch.load(self.folder / "state.pt", weights_only=True, map_location=self.device)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        _set_random_state(state["random"].cpu(), self.device)
        self._log(resumed=True, step=state["step"], trained_s=round(state["trained_s"]))
        return int(state["step"]), float(state["trained_s"])

    def _save_state(self, step: int, trained_s: float) -> None:
        """Keeps what the folder holds if training went wrong.

        Raises:
            SuperPointError: a weight is not finite.
        """
        if not all(bool(part.isfinite().all()) for part in self.average.parameters()):
            raise SuperPointError(
                f"a weight is not finite after {step} steps: lower learning_rate (--set). {self.folder} holds the "
                "state and the weights of before."
            )
        save_matcher(self.average.weights(self.features), self.folder / "matcher.safetensors")
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        random = _random_state(self.device)
        _save(self.folder / "state.pt", {**parts, "step": step, "trained_s": trained_s, "random": random})

    def _parts(self) -> dict[str, Any]:
        return {"net": self.net, "average": self.average, "optimizer": self.optimizer}

    def _log(self, **entry: Any) -> None:
        line = json.dumps({"s": round(time.perf_counter() - self.started, 1), **entry})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for inputs whose shapes stay the same."""
    # It chooses how kernels are tiled, and fails in `draw` with torch 2.11: "Expected a number but got Add".
    analysis = "triton.coalesce_tiling_analysis"
    options = {analysis: False} if analysis in torch._inductor.list_options() else {}
    return torch.compile(function, dynamic=False, options=options)


def _losses(means: Tensor) -> dict[str, Any]:
    """What `Run._step` gives, to log."""
    *losses, length = means.tolist()
    rounded = [round(value, 3) for value in losses]
    return {"matched": rounded[::2], "alone": rounded[1::2], "gradient": round(length, 2)}


@torch.no_grad()
def begin_with(net: MatcherNet, descriptors: Tensor) -> None:
    """The first map keeps the descriptors' principal directions, so that matches begin as those of the descriptors.

    Args:
        net: new.
        descriptors: (..., D). Nothing happens if the matcher is as wide as they are.
    """
    dim, width = descriptors.shape[-1], net.shape.width
    if dim > width:
        flat = descriptors.flatten(0, -2).double()
        _, directions = torch.linalg.eigh(flat.T @ flat)
        net.get_submodule(f"project.{dim}").weight[:, :dim] = directions[:, -width:].T * math.sqrt(width)


@torch.no_grad()
def average(averaged: nn.Module, net: nn.Module, kept: float) -> None:
    """Moves averaged weights towards the present ones."""
    get_ema_multi_avg_fn(kept)(list(averaged.parameters()), list(net.parameters()), 0)


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


def _check_dims(dims: list[int], start: str | None) -> None:
    """Each network needs an input of its own in the matcher.

    Raises:
        SuperPointError: two networks have equally long descriptors, or the weights to begin with lack an input.
    """
    if len(set(dims)) < len(dims):
        raise SuperPointError(
            f"--features: two networks have descriptors of {max(dims, key=dims.count)} numbers; a matcher learns one "
            "network for each length."
        )
    there = load_matcher(start).shape.descriptor_dims if start else tuple(dims)
    if not set(dims) <= set(there):
        raise SuperPointError(
            f"--go-on {start} takes descriptors of {', '.join(map(str, there))} numbers; --features gives "
            f"{', '.join(map(str, dims))}."
        )


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
@click.option("--minutes", type=POSITIVE, default=math.inf, help="Of training, over all calls.")
@click.option("--pause", "pause_minutes", type=POSITIVE, default=math.inf, help="This call ends after so many minutes.")
@click.option(
    "--within", "within_minutes", type=POSITIVE, help="All of it in one call of so many minutes, compiling too."
)
@click.option("--steps", type=click.IntRange(min=1), help="It ends after so many.")
@click.option("--go-on", help="Weights of another run (matcher.safetensors) to begin with.")
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Another value of one of Plan's.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="torch.compile on a GPU.")
@click.option("--smoke", is_flag=True, help="Tiny pictures, two steps.")
@in_one_line()
def main(
    folders: tuple[str, ...],
    features: tuple[str, ...],
    output: str,
    minutes: float,
    pause_minutes: float,
    within_minutes: float | None,
    steps: int | None,
    go_on: str | None,
    changes: tuple[str, ...],
    device: str,
    compiled: bool,
    smoke: bool,
) -> None:
    """Trains a matcher, and judges it on photographs kept out."""
    started = time.perf_counter()
    where, plan = device_of(device), SMOKE if smoke else Plan()
    for text in changes:
        plan = change(plan, text)
    if smoke and steps is None:
        steps = 2
    if within_minutes is not None and not math.isinf(min(minutes, pause_minutes)):
        raise click.UsageError("--within is for a training of one call; --minutes and --pause are for several.")
    if math.isinf(minutes) and steps is None and within_minutes is None:
        raise click.UsageError("--minutes, --within or --steps says when the training is over.")
    extractors = [extractor(path, where) for path in features]
    _check_dims([dim for _, dim, _ in extractors], go_on)
    found, held_out = photos.find([Path(folder) for folder in folders])
    banks = [photos.load(paths, where, plan.canvas_px) for paths in (found, held_out or found)]
    run = Run(
        plan,
        Path(output),
        *banks,
        [net for net, _, _ in extractors],
        {dim: digest for _, dim, digest in extractors},
        where,
        minutes * 60,
        (within_minutes or pause_minutes) * 60,
        steps or 10**9,
        compiled and where.type == "cuda",
        Path(go_on) if go_on else None,
        started,
    )
    over = run.run()
    judged = run.judge()
    (run.folder / "development.json").write_text(json.dumps(judged, indent=1) + "\n")
    print(json.dumps(judged, indent=1))
    print(f"{'trained' if over else 'paused; the same command goes on'}: {run.folder / 'matcher.safetensors'}")


if __name__ == "__main__":
    main()
