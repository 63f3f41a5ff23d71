"""The command pairs: which images are matched with which."""

from __future__ import annotations

import click

from superpoint_trt.cli.terminal import check_outputs, print_aside, print_row


@click.command()
@click.argument("features")
@click.option("--output", required=True, help="Pairs file to write: lines of two names.")
@click.option("--exhaustive", is_flag=True, help="Every image with every other.")
@click.option("--sequential", type=int, metavar="K", help="Every image with the K that follow it, by name.")
@click.option(
    "--loop-every", type=int, metavar="M", help="With --sequential: every M-th image with every other of these."
)
@click.option("--list", "listed", metavar="FILE", help="The pairs of a file; checks that all images have features.")
def pairs(
    features: str,
    output: str,
    exhaustive: bool,
    sequential: int | None,
    loop_every: int | None,
    listed: str | None,
) -> None:
    """List the pairs of images to match."""
    from superpoint_trt.pipeline.feature_files import FeatureFile
    from superpoint_trt.pipeline.pairs import PairOptions, make_pairs, with_spaces, write_pairs

    options = PairOptions(exhaustive, sequential, loop_every, listed)
    check_outputs([output], [features, listed])
    with FeatureFile(features) as stored:
        names = stored.names()
    found = make_pairs(names, options)
    print_row("images", len(names))
    print_row("pairs", f"{len(found)} in {write_pairs(output, found)}")
    if with_spaces(names):
        print_aside("note", "names hold spaces: this program reads such a pairs file, hloc does not")
