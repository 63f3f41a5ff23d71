"""The command reconstruct: photographs or a video -> a map."""

from __future__ import annotations

import click


@click.command()
def reconstruct() -> None:
    """Make a map."""
