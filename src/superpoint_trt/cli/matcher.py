"""The commands `superpoint matcher`: export, build and verify a learned matcher; and the option --matcher."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from superpoint_trt import packaged
from superpoint_trt.cli.options import JSON, OptionGroup, RuntimeArgs, option
from superpoint_trt.cli.terminal import check_outputs, print_aside, print_info, print_row, write_json
from superpoint_trt.core.matcher import MIN_SCORE
from superpoint_trt.core.types import Precision
from superpoint_trt.gpu.tensorrt_api import Flavor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from superpoint_trt.match.learned import LearnedMatcher

NEAREST, LEARNED = "nearest", "learned"
"""Names that --matcher takes besides files."""

FAILED = 1
"""Exit code."""


@dataclass(frozen=True)
class MatcherArgs(OptionGroup):
    """Which matcher."""

    matcher: str = option(
        "--matcher", default=NEAREST, metavar="nearest|learned|FILE", help="Mutual nearest neighbors, or a network."
    )
    min_score: float | None = option(
        "--min-score", type=float, help=f"A network's matches must be surer.  [default: the file's own, {MIN_SCORE:g}]"
    )

    def file(self) -> str | None:
        """The network's file; None for nearest neighbors.

        Raises:
            click.UsageError: --min-score was given with nearest neighbors.
        """
        if self.matcher != NEAREST:
            return matcher_file(self.matcher)
        if self.min_score is not None:
            raise click.UsageError("--min-score has no effect with --matcher nearest.")
        return None

    def opened(self, runtime: RuntimeArgs) -> AbstractContextManager[LearnedMatcher | None]:
        """The network, open inside a `with`, and what it runs on printed; None for nearest neighbors."""
        return _opened(self, runtime)


@contextmanager
def _opened(arguments: MatcherArgs, runtime: RuntimeArgs) -> Iterator[LearnedMatcher | None]:
    path = arguments.file()
    if path is None:
        yield None
        return
    from superpoint_trt.match.learned import LearnedMatcher

    with LearnedMatcher(path, runtime.device, runtime.threads, arguments.min_score) as matcher:
        print_row("matcher", f"{arguments.matcher} ({matcher.description.layers} layers, {matcher.runs_on})")
        yield matcher


def matcher_file(name: str) -> str:
    """The file of a matcher that the user named; `learned` is the packaged one."""
    if name != LEARNED:
        return name
    from superpoint_trt.convert.default_matcher import default_matcher

    return str(default_matcher())


def note_another_network(matcher: LearnedMatcher | None, checkpoint_sha256: str | None, model: str) -> None:
    """Says if the matcher learned the descriptors of another network: they may be as long."""
    if matcher and matcher.is_of_another(checkpoint_sha256):
        print_aside("note", f"the matcher learned the descriptors of another network than {model}: it may match badly")


@click.group()
def matcher() -> None:
    """Export, build, verify and convert a learned matcher."""


@matcher.command()
@click.option(
    "--weights", required=True, help=".safetensors of python -m training.matcher, or of superpoint matcher convert."
)
@click.option("--output", required=True, help="The .onnx to write.")
@click.option("--keypoints", type=int, default=0, show_default="any number", help="N, fixed; engines need it.")
@click.option("--layers", type=int, help="Only the first so many: faster.  [default: all]")
@click.option("--descriptor-dim", type=int, help="D, of a matcher that takes several.  [default: its first]")
@click.option("--batch", type=int, default=1, show_default=True, help="Pairs of images in a call.")
@click.option("--min-score", type=float, default=MIN_SCORE, show_default=True, help="Least probability of a match.")
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp32", show_default=True)
@click.option("--half-softmax", is_flag=True, help="fp16: the attention's softmax in fp16 too.")
def export(
    weights: str,
    output: str,
    keypoints: int,
    layers: int | None,
    descriptor_dim: int | None,
    batch: int,
    min_score: float,
    precision: str,
    half_softmax: bool,
) -> None:
    """Convert a matcher's weights to one .onnx file."""
    from superpoint_trt.convert.export_matcher import MatcherExportOptions, export_matcher

    options = MatcherExportOptions(
        keypoints, layers, descriptor_dim, batch, min_score, Precision(precision), half_softmax
    )
    print_info(export_matcher(weights, output, options))


@matcher.command()
@click.option("--lightglue", required=True, help="A checkpoint of LightGlue: .pth (needs torch) or .safetensors.")
@click.option("--output", required=True, help="The .safetensors to write.")
@click.option("--half", is_flag=True, help="Store float16, half the size.")
def convert(lightglue: str, output: str, half: bool) -> None:
    """Convert a published LightGlue checkpoint to weights that export, build and match take."""
    from superpoint_trt.checkpoint.lightglue import convert_lightglue

    print_row("written", convert_lightglue(lightglue, output, half))


@matcher.command()
@click.option("--onnx", required=True, help=".onnx of superpoint matcher export --keypoints N.")
@click.option("--engine", required=True, help="The engine to write.")
@click.option("--runtime", type=click.Choice(["auto", *(flavor.value for flavor in Flavor)]), default="auto")
@click.option("--target", help="TensorRT-RTX: GPUs to build for, sm89 say.  [default: the GPU here]")
@click.option("--optimization-level", type=int, help="0 to 5.  [default: TensorRT's]")
def build(onnx: str, engine: str, runtime: str, target: str | None, optimization_level: int | None) -> None:
    """Build a TensorRT engine of a matcher, in the precision of its .onnx."""
    from superpoint_trt.cli.build import parse_targets
    from superpoint_trt.convert.matcher_engine import build_matcher

    flavor = None if runtime == "auto" else Flavor(runtime)
    built = build_matcher(onnx, engine, flavor, parse_targets(target), optimization_level)
    print_row("written", engine)
    print_row("matcher", f"{built.layers} layers, {built.rows} keypoints, {built.precision.value}")


@matcher.command()
@click.option("--model", required=True, help="The .onnx or engine to prove.")
@click.option("--weights", required=True, help="The weights that it was made of.")
@click.option("--images", required=True, help="Folder of real images.")
@click.option("--limit", type=click.IntRange(min=1), default=16, show_default=True, help="Use only so many images.")
@click.option("--features", default=packaged.DEFAULT, show_default=True, help="Network that finds the points.")
@JSON
@RuntimeArgs.declare("runtime")
def verify(
    model: str, weights: str, images: str, limit: int, features: str, json_path: str | None, runtime: RuntimeArgs
) -> None:
    """Prove that a converted matcher gives the matches of its fp32 reference; exit code 1 if it does not."""
    from superpoint_trt.cli.progress import progress_bar
    from superpoint_trt.prove.verify_matcher import verify_matcher

    check_outputs((json_path,), (model, weights))
    with progress_bar("verifying") as progress:
        found = verify_matcher(model, weights, images, limit, features, runtime.device, runtime.threads, progress)
    print_row("ran on", found.runs_on)
    print_row("matches", f"{found.reference_matches} in the reference, {found.same_share:.2%} of all the same")
    print_row("scores", f"differ by {found.score_error:.2g} at most (limit {found.score_limit:g})")
    if json_path:
        write_json(json_path, found.to_json())
    click.echo("PASSED" if found.passed else "FAILED")
    if not found.passed:
        raise click.exceptions.Exit(FAILED)
