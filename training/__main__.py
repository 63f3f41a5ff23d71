"""`python -m training --photos FOLDER --output RUN`: from nothing to a checkpoint, or on from where RUN was cut off."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import click
import torch

from superpoint_trt.core.files import make_folder
from superpoint_trt.core.types import SuperPointError
from training import photos
from training.fold import learnable
from training.steady import MOST_TEACHERS
from training.train import SMOKE, Plan, Run, change, device_of


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option("--output", required=True, help="Folder of the run: log, states to go on from, checkpoints.")
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1, cpu.")
@click.option("--seed", default=Plan.seed, show_default=True)
@click.option("--smoke", is_flag=True, help="A tiny network, a few steps: does every stage run?")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True, help="torch.compile on a GPU.")
@click.option("--set", "changes", multiple=True, metavar="NAME=NUMBER", help="Another value of one of train.Plan's.")
@click.option("--start", help="Checkpoint to go on from: only the last stage runs, with labels by it.")
@click.option(
    "--teacher",
    "teachers",
    multiple=True,
    help="Checkpoint whose answers, steadied over mirrored copies, the detector learns (steady_weight).  [--start's]",
)
@click.option("--minutes", default=math.inf, help="A stage ends after so long, whatever its steps.")
@click.option("--steps-scale", default=1.0, show_default=True, help="All stages' steps times this.")
def main(
    folders: tuple[str, ...],
    output: str,
    device: str,
    seed: int,
    smoke: bool,
    compiled: bool,
    changes: tuple[str, ...],
    start: str | None,
    teachers: tuple[str, ...],
    minutes: float,
    steps_scale: float,
) -> None:
    """Trains a SuperPoint from nothing, or on from one of ours."""
    where = device_of(device)
    if where.type == "cuda":
        where = torch.device("cuda", where.index or 0)
        torch.cuda.set_device(where)
    if len(teachers) > MOST_TEACHERS:
        raise click.UsageError(f"{len(teachers)} --teacher were given; expected at most {MOST_TEACHERS}.")
    plan = replace(SMOKE if smoke else Plan(), seed=seed)
    stages = plan.stages[-1:] if start else plan.stages
    stages = tuple(replace(stage, steps=max(1, round(stage.steps * steps_scale))) for stage in stages)
    plan = replace(plan, stages=stages)
    plan = replace(plan, **dict(change(plan, text) for text in changes))
    if teachers and not plan.steady_weight:
        raise click.UsageError("--teacher has no effect while steady_weight is 0: add --set steady_weight=1.")
    if plan.steady_weight and not (start or teachers):
        raise click.UsageError("steady_weight needs --start or --teacher: the detector learns their steady answers.")
    try:
        begin = learnable(Path(start)) if start else None
        steady = tuple(learnable(Path(path)) for path in teachers)
        if begin and (begin.topology or (begin.channels, begin.descriptor_dim) != (plan.channels, plan.descriptor_dim)):
            shape = f"channels {plan.channels} and {plan.descriptor_dim}-dimensional descriptors"
            raise SuperPointError(f"--start {start} has another shape; expected the full network: {shape}.")
        train, held_out = photos.find([Path(folder) for folder in folders])
        banks = tuple(photos.load(paths, where, plan.canvas_px) for paths in (train, held_out or train[:1]))
        make_folder(output)
    except SuperPointError as error:
        raise click.UsageError(str(error)) from None
    compiled = compiled and where.type == "cuda"
    run = Run(plan, Path(output), *banks, where, compiled, start=begin, teachers=steady, stage_limit_s=minutes * 60)
    print(f"trained: {run.run()}")


if __name__ == "__main__":
    main()
