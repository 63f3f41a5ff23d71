"""`python -m training.ablation --photos FOLDER --start CHECKPOINT --output FOLDER`: what each ingredient is worth.

Every variant goes on from the same checkpoint, with the same labels, for equally many steps; all run side by side on
one GPU. Then development figures of each, and a table. Nothing here looks at the pairs of docs/evaluation.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import torch

from superpoint_trt.checkpoint import layouts
from training import development, photos
from training.train import SMOKE, Plan, Run, device_of, in_one_line

Settings = dict[str, float]

PLAIN: Settings = {
    "group": 4,
    "far_share": 0,
    "tilted_share": 0,
    "shadow_share": 0,
    "blurred_share": 0,
    "night_share": 0,
    "coarsest_step_octaves": -4.5,
    "place_weight": 0,
    "spread_weight": 0,
    "choice_weight": 0,
    "match_weight": 0,
    "stray_weight": 0,
    "wrong_weight": 0,
}
"""Every ingredient switched off that is on in `Plan`."""


def _only(*names: str) -> Settings:
    """All off but these, which keep the plan's own values."""
    return {name: value for name, value in PLAIN.items() if name not in names}


VARIANTS: dict[str, Settings] = {
    "plain": PLAIN,
    "views": _only("far_share", "blurred_share", "night_share", "coarsest_step_octaves"),
    "tilted": _only("tilted_share"),
    "shadows": _only("shadow_share"),
    "places": _only("place_weight", "spread_weight"),
    "choice": _only("choice_weight"),
    "match": _only("match_weight"),
    "stray": _only("stray_weight"),
    "match-stray": _only("match_weight", "stray_weight"),
    "wrong": _only("wrong_weight"),
    "match-wrong": _only("match_weight", "wrong_weight"),
    "repeat": {**PLAIN, "repeat_weight": 1},
    "steady": {**PLAIN, "steady_weight": 1},
    "group": _only("group"),
    "close": {**PLAIN, "same_place_px": 4},
    "all": {},
    "all-close": {"same_place_px": 4},
}
COLUMNS = (("all", "mma1"), ("all", "mma3"), ("all", "rep1"), ("all", "rep3"), ("view", "mma1"), ("view", "mma3"))
COLUMNS += (("turn", "mma3"), ("zoom", "mma3"), ("blur", "mma3"), ("light", "mma3"), ("turn 90 zoom 0.5", "right"))


def table(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """One line a variant."""
    lines = [f"{'':14}" + "".join(f"{change[:7] + ' ' + key:>14}" for change, key in COLUMNS)]
    for name, got in figures.items():
        lines.append(f"{name:14}" + "".join(f"{got.get(change, {}).get(key, 0):14.3f}" for change, key in COLUMNS))
    return "\n".join(lines)


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option("--start", required=True, help="Checkpoint that all variants go on from, and whose labels they learn.")
@click.option("--output", required=True, help="Folder: one run a variant, and figures.json.")
@click.option("--steps", default=900, show_default=True, help="Of each variant.")
@click.option("--variant", "names", multiple=True, type=click.Choice(list(VARIANTS)), help="Only these.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--smoke", is_flag=True, help="A tiny network, a few steps.")
@in_one_line()
def main(
    folders: tuple[str, ...], start: str, output: str, steps: int, names: tuple[str, ...], device: str, smoke: bool
) -> None:
    """Trains and judges all variants."""
    where, out = device_of(device), Path(output)
    plan = SMOKE if smoke else Plan()
    plan = replace(plan, stages=plan.stages[-1:])
    found, held_out = photos.find([Path(folder) for folder in folders])
    labels = _labels(plan, start, found, where, out / "labels")
    common = ["--start", start, "--device", device, "--steps-scale", str(steps / plan.stages[0].steps)]
    common += ["--smoke"] if smoke else []
    common += [word for folder in folders for word in ("--photos", folder)]
    chosen = {name: settings for name, settings in VARIANTS.items() if not names or name in names}
    if smoke:  # two pairs a step
        chosen = {name: {**settings, "group": plan.group} for name, settings in chosen.items()}
    running = {name: _train(out / name, settings, common, labels) for name, settings in chosen.items()}
    pairs = list(development.pairs(held_out))
    figures = {"start": development.evaluate(development.network(start, where), pairs)}
    for name, process in running.items():
        if process.wait():
            print(f"{name} failed: see {out / name / 'output.txt'}")
            continue
        weights = str(out / name / f"{plan.stages[0].name}.safetensors")
        figures[name] = development.evaluate(development.network(weights, where), pairs)
        (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))


def _labels(plan: Plan, start: str, found: list[Path], where: torch.device, folder: Path) -> Path:
    """Interest points of all photographs and collages by the network of `start`, in a file; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"labels-{plan.stages[0].name}.pt"
    if not path.exists():
        bank = photos.load(found, where, plan.canvas_px)
        run = Run(plan, folder, bank, bank, where, where.type == "cuda", start=layouts.load(start))
        run.labelled(0, plan.stages[0])
    return path


def _train(folder: Path, settings: Settings, common: list[str], labels: Path) -> subprocess.Popen[bytes]:
    """Starts one variant in a folder of its own."""
    folder.mkdir(exist_ok=True)
    shutil.copy(labels, folder)
    words = [sys.executable, "-m", "training", "--output", str(folder), *common]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    with (folder / "output.txt").open("w") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)


if __name__ == "__main__":
    main()
