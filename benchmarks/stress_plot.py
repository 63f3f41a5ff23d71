"""Draws the curves of one or several `superpoint evaluate --stress ... --json` files in one picture.

    python benchmarks/stress_plot.py figures.json [more.json ...] --output docs/images/stress.png
        [--title "NAME=full, version 1" ...] [--only NAME ...]

Models from several files must have seen the same photographs with the same options. NAME is a model's name in the
legend when no --title is given. A model that stands in several files is drawn once.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from superpoint_trt.prove.stress_plot import model_title, plot_stress

NAMES = {"rootsift": "RootSIFT", "sift": "SIFT", "orb": "ORB"}


def models_of(files: tuple[Path, ...]) -> dict[str, dict]:
    """The models of all files by name.

    Raises:
        click.UsageError: the files are not of the same pictures, or different models have one name.
    """
    reports = [json.loads(file.read_text()) for file in files]
    for file, report in zip(files, reports):
        kept = {key: value for key, value in report["options"].items() if key != "subpixel"}
        first = {key: reports[0]["options"][key] for key in kept}
        if kept != first or report["photographs"] != reports[0]["photographs"]:
            raise click.UsageError(f"{file} has other photographs or options than {files[0]}.")
    models: dict[str, dict] = {}
    for file, report in zip(files, reports):
        for model in report["models"]:
            known = models.setdefault(model_title(model), model)
            if known != model and model["model"] not in NAMES:
                raise click.UsageError(f"{file} has another model named {model_title(model)}, too; rename its file.")
    return models


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--output", required=True, help="Picture to write.")
@click.option("--title", "titles", multiple=True, metavar="NAME=TITLE", help="What the legend says instead of NAME.")
@click.option("--only", multiple=True, metavar="NAME", help="Draw these, in this order.  [default: all]")
def main(files: tuple[Path, ...], output: str, titles: tuple[str, ...], only: tuple[str, ...]) -> None:
    """Draws a picture for the docs."""
    models = models_of(files)
    named = {**NAMES, **dict(title.split("=", 1) for title in titles)}
    unknown = {*only, *named} - {*models, *NAMES}
    if unknown:
        raise click.UsageError(f"no model {', '.join(sorted(unknown))}; the files have {', '.join(models)}.")
    print(plot_stress([models[name] for name in only or models], output, named))


if __name__ == "__main__":
    main()
