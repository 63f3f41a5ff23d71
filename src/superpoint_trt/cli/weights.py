"""The command group weights: list, fetch and convert checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from superpoint_trt.cli.options import SAMPLING, chosen_sampling
from superpoint_trt.cli.progress import download_bar
from superpoint_trt.cli.terminal import print_info
from superpoint_trt.core.types import SuperPointError

FOLDER = Path("weights")
"""Where fetched checkpoints go, unless asked otherwise."""


@click.group(no_args_is_help=False)
def weights() -> None:
    """The public checkpoints: list, fetch, convert."""


@weights.command("list")
def list_weights() -> None:
    """The packaged networks and the public checkpoints: what they are, their licenses, and where they are."""
    from superpoint_trt import packaged
    from superpoint_trt.checkpoint.layouts import load
    from superpoint_trt.checkpoint.public import PUBLIC
    from superpoint_trt.core.files import git_blob_id, read_bytes

    for network in packaged.NETWORKS:
        default = ", the default" if network.name == packaged.DEFAULT else ""
        click.echo(f"{network.name} (packaged{default}): {network.about}")
        found = load(network.weights)
        data = read_bytes(network.weights, "packaged checkpoint")
        _print_rows(
            {
                "licence": "MIT",
                "network": f"{found.parameters:,} parameters, {found.gflop():.1f} GFLOP for 640x480 px",
                "numbers": f"{found.descriptor_dim} a descriptor",
                "layout": f"{found.family.value} ({found.sampling.value} sampling)",
                "git blob": git_blob_id(data),
                "file": f"{network.weights} ({len(data) / 1e6:.2f} MB)",
                "card": network.card,
                "log": network.log,
            }
        )
    _print_matcher()
    for entry in PUBLIC:
        click.echo(f"{entry.name}: {entry.about}")
        _print_rows(
            {"licence": entry.license, "layout": entry.family.value, "git blob": entry.git_blob, "url": entry.url}
        )


def _print_matcher() -> None:
    """The packaged matcher, if this version has one."""
    from superpoint_trt import packaged
    from superpoint_trt.checkpoint.matcher import load_matcher
    from superpoint_trt.core.files import file_sha256

    if not packaged.MATCHER.is_file():
        return
    found = load_matcher(packaged.MATCHER)
    names = {file_sha256(network.weights): network.name for network in packaged.NETWORKS}
    learned = ", ".join(names.get(digest, digest[:12]) for digest in found.features.values())
    click.echo(f"learned (packaged matcher, --matcher learned): for the descriptors of {learned}")
    _print_rows(
        {
            "licence": "MIT",
            "network": f"{found.parameters:,} parameters, {found.shape.layers} layers",
            "numbers": f"{' or '.join(map(str, found.shape.descriptor_dims))} a descriptor",
            "file": f"{packaged.MATCHER} ({packaged.MATCHER.stat().st_size / 1e6:.2f} MB)",
            "card": packaged.MATCHER_CARD,
            "log": packaged.MATCHER_LOG,
        }
    )


def _print_rows(rows: dict[str, object]) -> None:
    for label, value in rows.items():
        click.echo(f"  {label:<10}{value}")


@weights.command("fetch")
@click.argument("name")
@click.option("--output", help="File to write.  [default: weights/ and the name it has at its source]")
def fetch_weights(name: str, output: str | None) -> None:
    """Download a public checkpoint and verify its content."""
    from superpoint_trt.checkpoint.public import fetch, find

    entry = find(name)
    click.echo(f"{entry.name}: {entry.about}. Licence: {entry.license}.")
    if not entry.commercial_use:
        click.echo("NON-COMMERCIAL: by using these weights you accept that licence; v6 is free for any use.")
    path = Path(output) if output else _default_folder() / entry.filename
    with download_bar(entry.filename) as progress:
        fetch(entry, path, progress)
    click.echo(f"{path}: verified, git blob {entry.git_blob}")


def _default_folder() -> Path:
    """Makes the folder of fetched checkpoints if it is missing."""
    if not FOLDER.is_dir():
        if FOLDER.exists():
            raise SuperPointError(f"{FOLDER} is a file, not a folder; choose another place: --output FILE.")
        FOLDER.mkdir()
    return FOLDER


@weights.command("convert")
@click.argument("checkpoint")
@click.argument("output")
@click.option("--half", is_flag=True, help="Store float16: half the size.")
@SAMPLING
def convert_weights(checkpoint: str, output: str, half: bool, sampling: str | None) -> None:
    """Rewrite any checkpoint as this project's .safetensors, which needs no torch to read."""
    from superpoint_trt.checkpoint.layouts import load, save
    from superpoint_trt.core.files import check_distinct

    if not output.endswith(".safetensors"):
        raise SuperPointError(f"{output}: expected a name that ends in .safetensors.")
    check_distinct(output, checkpoint)
    print_info(save(load(checkpoint, chosen_sampling(sampling)), output, half))
