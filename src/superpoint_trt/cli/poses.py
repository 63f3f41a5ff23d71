"""`superpoint evaluate --poses`: its options, and what it prints."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from superpoint_trt.cli.matcher import MatcherArgs
from superpoint_trt.cli.options import OptionGroup, RuntimeArgs, option
from superpoint_trt.cli.progress import progress_bar
from superpoint_trt.cli.terminal import (
    check_outputs,
    console,
    print_aside,
    print_row,
    write_json,
)
from superpoint_trt.prove.poses import LIMITS_DEG, PoseEvaluation, PoseOptions, evaluate_poses

_POSES = PoseOptions()


@dataclass(frozen=True)
class PoseArgs(OptionGroup):
    """With --poses: which pairs and points."""

    min_gap: int = option(
        "--min-gap", type=int, default=_POSES.min_gap, help="--poses: images of a pair are so many apart."
    )
    pose_keypoints: int = option(
        "--pose-keypoints", type=int, default=_POSES.max_keypoints, help="--poses: best points of each image."
    )
    pose_side: int | None = option("--pose-side", type=int, help="--poses: shrink larger images to this many px.")
    pose_px: float = option(
        "--pose-px", type=float, default=_POSES.threshold_px, help="--poses: how far an inlier of MAGSAC may lie."
    )
    pose_orders: int = option(
        "--pose-orders",
        type=int,
        default=_POSES.orders,
        help="--poses: average over so many orders of the matches.",
    )

    def options(self, subpixel: bool | None) -> PoseOptions:
        """The options of `evaluate_poses`."""
        return PoseOptions(self.pose_keypoints, self.pose_side, self.min_gap, self.pose_px, subpixel, self.pose_orders)


def run_poses(
    scene: str,
    model: str,
    arguments: PoseArgs,
    matcher: MatcherArgs,
    subpixel: bool | None,
    json_path: str | None,
    runtime: RuntimeArgs,
) -> None:
    """Evaluates the poses of a scene and prints one line for each matcher."""
    check_outputs((json_path,), (model, scene))
    options = arguments.options(subpixel)
    learned = matcher.file()
    with progress_bar("evaluating poses") as progress:
        found = evaluate_poses(
            model, scene, options, learned, matcher.min_score, runtime.device, runtime.threads, progress
        )
    print_poses(found)
    if json_path:
        write_json(json_path, found.to_json())


def print_poses(found: PoseEvaluation) -> None:
    """Prints the areas under the pose errors, by matcher."""
    for problem in found.problems:
        print_aside("left out", problem)
    print_row("model", found.model)
    print_row("ran on", found.runtime)
    table = Table("matcher", "pairs", *(f"AUC@{limit}" for limit in LIMITS_DEG), "matches", "inliers")
    for one in found.matchers:
        total = one.to_json()["total"]
        areas = [f"{area:.3f}" for area in one.pose_auc.values()]
        table.add_row(one.matcher, str(len(one.pairs)), *areas, f"{total['matches']:.0f}", f"{total['inliers']:.0f}")
    console().print(table)
