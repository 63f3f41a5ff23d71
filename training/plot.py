"""`python -m training.plot log.jsonl curve.png`: losses and held-out figures over the steps of all stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

PANELS = {
    "detector": "detector loss",
    "descriptor": "descriptor loss",
    "repeatability": "repeatability, held out",
    "localisation_px": "localisation, px, held out",
    "mma3": "MMA@3, held out",
    "homography3": "homography@3, held out",
}


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
"""Okabe and Ito, "Color Universal Design", 2008."""


@click.command()
@click.argument("log")
@click.argument("picture")
def main(log: str, picture: str) -> None:
    """Draws the log of a run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    entries = _with_running_step([json.loads(line) for line in Path(log).read_text().splitlines()])
    # Letters that are read at a width of 400 px, colors that color-blind people tell apart.
    plt.rcParams.update({"font.size": 13, "axes.prop_cycle": plt.cycler(color=COLORS)})
    figure, axes = plt.subplots(3, 2, figsize=(7, 8.5), layout="constrained")
    for axis, (key, title) in zip(axes.flat, PANELS.items()):
        for stage in dict.fromkeys(entry["stage"] for entry in entries):
            rows = [entry for entry in entries if entry["stage"] == stage and entry.get(key)]
            style = ".-" if len(rows) < 20 else "-"
            axis.plot([e["at"] / 1000 for e in rows], [e[key] for e in rows], style, label=stage)
        axis.set_title(title, fontsize=13)
    for axis in axes[-1]:
        axis.set_xlabel("thousand steps")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, frameon=False)
    figure.savefig(picture, dpi=130, bbox_inches="tight")


def _with_running_step(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries that belong to a step, each with `at`: its number counted over all stages."""
    found: list[dict[str, Any]] = []
    before, stage, last = 0, None, 0
    for entry in entries:
        if "step" not in entry or "resumed" in entry:
            continue
        if entry["stage"] == stage and entry["step"] < last:  # cut off and done again: what went before does not count
            found = [e for e in found if e["stage"] != stage or e["step"] < entry["step"]]
        if entry["stage"] != stage:
            stage, before = entry["stage"], before + last
        last = entry["step"]
        found.append({**entry, "at": before + last})
    return found


if __name__ == "__main__":
    main()
