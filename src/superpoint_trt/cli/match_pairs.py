"""The command match-pairs: features and pairs -> matches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from superpoint_trt.cli.extract import SHARD
from superpoint_trt.cli.match import NeighborArgs
from superpoint_trt.cli.matcher import MatcherArgs
from superpoint_trt.cli.options import DEVICE, given_flags
from superpoint_trt.cli.progress import rate_bar
from superpoint_trt.cli.terminal import check_outputs, print_row

if TYPE_CHECKING:
    from superpoint_trt.pipeline.match_pairs import PairMatchOptions, PairMatchSummary


@click.command("match-pairs")
@click.option("--features", required=True, help="Feature file: .h5, or a folder of .npz.")
@click.option("--pairs", "pairs_path", required=True, help="Pairs file: lines of two names.")
@click.option("--output", required=True, help="Match file to write: .h5 in hloc's layout.")
@NeighborArgs.declare("neighbors")
@MatcherArgs.declare("matcher_args")
@DEVICE
@click.option("--cache-mib", type=click.IntRange(0), default=4096, show_default=True, help="Memory for descriptors.")
@SHARD
@click.option("--overwrite", is_flag=True, help="Replace an output or an unfinished run that is there.")
def match_pairs(
    features: str,
    pairs_path: str,
    output: str,
    neighbors: NeighborArgs,
    matcher_args: MatcherArgs,
    device: str,
    cache_mib: int,
    shard: tuple[int, int],
    overwrite: bool,
) -> None:
    """Match many pairs of images; started again, it goes on where it was."""
    from superpoint_trt.pipeline.match_pairs import match_pairs as run_match_pairs

    check_outputs([output], [features, pairs_path])
    part, parts = shard
    settings = {"device": device, "cache_mib": cache_mib, "part": part, "parts": parts, "overwrite": overwrite}
    options = pair_options(neighbors, matcher_args, **settings)
    with rate_bar("pairs") as progress:
        found = run_match_pairs(features, pairs_path, output, options, progress)
    print_pair_matches(found)


def pair_options(neighbors: NeighborArgs, matcher: MatcherArgs, **settings: Any) -> PairMatchOptions:
    """The options of `pipeline.match_pairs.match_pairs`.

    Raises:
        click.UsageError: options of nearest neighbors and of a learned matcher were given together.
    """
    from superpoint_trt.pipeline.match_pairs import PairMatchOptions

    file = matcher.file()
    if file and given_flags(("ratio", "max_distance")):
        raise click.UsageError("--ratio and --max-distance are for --matcher nearest; use --min-score.")
    return PairMatchOptions(neighbors.neighbors(), matcher=file, min_score=matcher.min_score, **settings)


def print_pair_matches(found: PairMatchSummary) -> None:
    """Prints what a run matched."""
    print_row("pairs", f"{found.pairs}, {found.done_before} done before")
    if found.matched:
        print_row("ran on", found.runs_on)
        print_row("matched", f"{found.matched} pairs, {found.matched / max(found.seconds, 1e-9):.3g} a second")
        print_row("matches", f"{found.matches}, {found.matches / found.matched:.0f} a pair")
    left = found.unfinished_shards
    print_row("output", f"not complete: shards left to other processes: {left}" if left else found.output)
