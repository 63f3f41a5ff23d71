"""`python -m training.lift --photos FOLDER --small CHECKPOINT --full CHECKPOINT --output FILE`: minutes on a CPU.

Fits the map that leads from a small network's descriptors to the full one's, and keeps it in the small one's file. Both
networks see the same training photographs; at the points that the small one finds, a (T, D) matrix W is the least
squares solution of W s = f. W = Q A, with Q's columns orthonormal and A symmetric: folded into the small network's last
convolution, A makes the small network's own similarities those of its lifted descriptors, and Q is the map that is
kept. Its own matches gain from that metric too (docs/notes/training-small.md).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.descriptor_map import DescriptorMap
from superpoint_trt.checkpoint.layouts import Checkpoint
from superpoint_trt.checkpoint.reference import Network, decode, dense, network, sample_descriptors
from superpoint_trt.cli.progress import phase_bar
from superpoint_trt.core.files import check_distinct, check_writable
from superpoint_trt.core.image import load_image, to_gray
from superpoint_trt.core.progress import PhaseProgress, Progress
from superpoint_trt.core.types import CELL_PX, DecodeOptions, Sampling, SuperPointError
from training import photos
from training.fold import learnable
from training.train import device_of

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class LiftPlan:
    """What the map is fitted to."""

    photographs: int = 60
    """At most, drawn at random from the training ones."""
    judged: int = 10
    """Held-out photographs at most."""
    points: int = 600
    """Of a photograph, at most."""
    side_px: int = 768
    """Longer photographs are shrunk."""
    fold: bool = True
    """Whether the small network takes over the map's metric."""
    seed: int = 0


class Moments:
    """Sums over pairs of descriptors, from which the map and its closeness follow."""

    def __init__(self, dim: int, target_dim: int) -> None:
        self.count = 0
        self.own = np.zeros((dim, dim))
        self.cross = np.zeros((dim, target_dim))

    def add(self, small: NDArray[np.float32], full: NDArray[np.float32]) -> None:
        """Adds pairs.

        Args:
            small: (N, D) unit length.
            full: (N, T) unit length.
        """
        rows = small.astype(np.float64)
        self.count += len(rows)
        self.own += rows.T @ rows
        self.cross += rows.T @ full.astype(np.float64)

    def fit(self) -> Matrix:
        """The least squares map, (T, D).

        Raises:
            SuperPointError: there are fewer pairs than numbers in a descriptor.
        """
        dim = len(self.own)
        if self.count < dim:
            raise SuperPointError(
                f"the small network finds {self.count} points in the photographs; a map of {dim} numbers needs more: "
                "add photographs (--photos, --photographs)."
            )
        solution: Matrix = np.linalg.lstsq(self.own, self.cross, rcond=None)[0]
        return solution.T


def split(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """The polar decomposition: matrix = map times metric, up to a factor, which unit length takes away.

    Args:
        matrix: (T, D), T at least D.

    Returns:
        map (T, D) with orthonormal columns; metric (D, D), symmetric, its singular values' mean square 1.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt(np.square(values).mean())
    return left @ right, (right.T * values) @ right


@torch.no_grad()
def pairs(
    nets: tuple[Network, Network], paths: list[Path], plan: LiftPlan, device: torch.device, progress: Progress
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Both networks' descriptors (N, D) and (N, T) at the points that the first one finds in each photograph."""
    options = DecodeOptions(max_keypoints=plan.points, subpixel=True)
    for number, path in enumerate(paths):
        progress(number, len(paths))
        gray = photos.fit(to_gray(load_image(path)), plan.side_px)
        height, width = (side // CELL_PX * CELL_PX for side in gray.shape)
        image = torch.from_numpy(np.ascontiguousarray(gray[:height, :width]))[None, None].to(device)
        (scores, small), (_, full) = (dense(*net(image)) for net in nets)
        xy = decode(scores, small, options, Sampling.HALF_PIXEL)[0][0]
        sampled = (
            sample_descriptors(xy, each[0], CELL_PX, Sampling.HALF_PIXEL).cpu().numpy() for each in (small, full)
        )
        yield next(sampled), next(sampled)
    progress(len(paths), len(paths))


def cosine(matrix: Matrix, found: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> float:
    """Mean cosine of lifted descriptors to the full network's; NaN of no pairs.

    Args:
        matrix: (T, D).
        found: descriptors (N, D) and (N, T) of each photograph.
    """
    cosines = []
    for small, full in found:
        lifted = small @ matrix.T
        cosines.append((lifted * full).sum(axis=1) / np.linalg.norm(lifted, axis=1))
    return float(np.concatenate(cosines).mean()) if cosines else float("nan")


def lift(
    small: Path, full: Path, folders: list[Path], plan: LiftPlan, device: torch.device, progress: PhaseProgress
) -> tuple[Checkpoint, int, float]:
    """The small checkpoint with a map to the full one's descriptors.

    Args:
        small: checkpoint without BatchNorm, as the other stages write it.
        full: checkpoint whose descriptors the map leads to.
        folders: of photographs.
        plan: all settings.
        device: what the networks run on.
        progress: called with (phase, done, total).

    Returns:
        the checkpoint, the points it was fitted to, and the mean cosine of lifted descriptors to the full network's on
        held-out photographs (NaN without any).

    Raises:
        SuperPointError: a checkpoint is of another kind, the photographs cannot be used, or show too few points.
    """
    checkpoint, target = learnable(small), learnable(full)
    if target.descriptor_dim < checkpoint.descriptor_dim:
        raise SuperPointError(
            f"{full} has descriptors of {target.descriptor_dim} numbers, {small} of {checkpoint.descriptor_dim}; "
            "expected at least as many."
        )
    train, held_out = photos.find(folders)
    for paths in (train, held_out):
        random.Random(plan.seed).shuffle(paths)
    nets = network(checkpoint).to(device), network(target).to(device)
    moments = Moments(checkpoint.descriptor_dim, target.descriptor_dim)
    for found in pairs(nets, train[: plan.photographs], plan, device, partial(progress, "photographs")):
        moments.add(*found)
    matrix = moments.fit()
    held = pairs(nets, held_out[: plan.judged], plan, device, partial(progress, "held-out photographs"))
    closeness = cosine(matrix, held)
    if plan.fold:
        matrix, metric = split(matrix)
        checkpoint = layouts.with_mapped_descriptors(checkpoint, metric)
    assert target.sha256
    mapped = DescriptorMap(matrix.astype(np.float32), target.sha256)
    return replace(checkpoint, descriptor_map=mapped), moments.count, closeness


@click.command()
@click.option("--photos", "folders", multiple=True, required=True, help="Folder of photographs; may be given again.")
@click.option("--small", required=True, help="Checkpoint that gets the map.")
@click.option("--full", required=True, help="Checkpoint whose descriptors the map leads to.")
@click.option("--output", required=True, help="The .safetensors to write, float16.")
@click.option(
    "--fold/--no-fold", default=LiftPlan.fold, show_default=True, help="Fold the map's metric into the network."
)
@click.option("--photographs", default=LiftPlan.photographs, show_default=True, type=click.IntRange(1))
@click.option("--points", default=LiftPlan.points, show_default=True, type=click.IntRange(1), help="Of a photograph.")
@click.option("--seed", default=LiftPlan.seed, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(
    folders: tuple[str, ...],
    small: str,
    full: str,
    output: str,
    fold: bool,
    photographs: int,
    points: int,
    seed: int,
    device: str,
) -> None:
    """Fits the map from a small network's descriptors to the full one's."""
    plan = LiftPlan(photographs, points=points, fold=fold, seed=seed)
    try:
        check_distinct(check_writable(output), small)
        with phase_bar() as progress:
            paths = [Path(folder) for folder in folders]
            found, count, closeness = lift(Path(small), Path(full), paths, plan, device_of(device), progress)
        written = layouts.save(found, output, half=True)
    except SuperPointError as error:
        raise click.UsageError(str(error)) from None
    print(f"fitted to {count} points")
    judged = "no held-out photograph" if math.isnan(closeness) else f"{closeness:.4f} on held-out photographs"
    print(f"mean cosine of lifted descriptors to the full network's: {judged}")
    print(f"written: {written}")


if __name__ == "__main__":
    main()
