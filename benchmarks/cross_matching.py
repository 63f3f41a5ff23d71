"""A small network's descriptors against the full one's: the table of docs/checkpoints.md.

    python benchmarks/cross_matching.py [--small small] [--full full] [--dataset ../shared/data/homography]

Weights are packaged networks or checkpoint files; the small one's file holds the map to the full one's descriptors
(`python -m training.lift`). The best 1000 points of each image, mutual nearest neighbors; means over the pairs: the
share of matches that are right within 1 and 3 px, and the number that are right within 3 px.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from superpoint_trt import Keypoints, SuperPoint, lift_descriptors, load_descriptor_map
from superpoint_trt.cli.progress import progress_bar
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.files import file_sha256
from superpoint_trt.core.networks import weights_path
from superpoint_trt.core.types import SuperPointError
from superpoint_trt.prove.datasets import Dataset, load_pairs
from superpoint_trt.prove.metrics import accuracy_of, match_errors_px

SMALL, FULL, LIFTED = "small", "full", "small lifted"
ROWS = ((SMALL, SMALL), (FULL, FULL), (LIFTED, FULL), (FULL, LIFTED))
"""Which descriptors the first image has, and which the second."""

Views = dict[Path, Keypoints]


def views(weights: str, paths: list[Path], max_keypoints: int, device: str, threads: int | None) -> Views:
    """Each image's keypoints."""
    found = {}
    with tempfile.TemporaryDirectory() as folder, progress_bar(f"images, {weights}") as progress:
        model = export(weights, Path(folder) / "network.onnx", ExportOptions(dynamic=True))
        with SuperPoint(model, device=device, threads=threads, max_keypoints=max_keypoints) as superpoint:
            for number, path in enumerate(paths, start=1):
                found[path] = superpoint.extract(path)
                progress(number, len(paths))
    return found


def means(pairs: Dataset, first: Views, second: Views) -> np.ndarray:
    """MMA@1, MMA@3 and right matches, (3,)."""
    rows = []
    for pair in pairs.pairs:
        errors_px = match_errors_px(first[pair.first], second[pair.second], pair.homography)
        rows.append((*accuracy_of(errors_px, (1, 3)), (errors_px <= 3).sum()))
    return np.mean(rows, axis=0)


@click.command()
@click.option("--small", default=SMALL, show_default=True, help="Weights with a map to the descriptors of --full.")
@click.option("--full", default=FULL, show_default=True)
@click.option("--dataset", default="../shared/data/homography", show_default=True)
@click.option("--max-keypoints", default=1000, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int)
def main(small: str, full: str, dataset: str, max_keypoints: int, device: str, threads: int | None) -> None:
    """Print one row for each way to match."""
    try:
        to_full = load_descriptor_map(small)
        if to_full.target_sha256 != file_sha256(weights_path(full)):
            raise SuperPointError(f"{small} has a map to other descriptors than those of {full}.")
        pairs = load_pairs(dataset)
        paths = sorted({path for pair in pairs.pairs for path in (pair.first, pair.second)})
        own = {kind: views(one, paths, max_keypoints, device, threads) for kind, one in ((SMALL, small), (FULL, full))}
    except SuperPointError as error:
        raise click.UsageError(str(error)) from None
    lifted = {
        path: replace(one, descriptors=lift_descriptors(one.descriptors, to_full)) for path, one in own[SMALL].items()
    }
    found = {**own, LIFTED: lifted}
    print("| first image | second image | MMA@1 | MMA@3 | right matches |\n|---|---|---|---|---|")
    for first, second in ROWS:
        near, far, right = means(pairs, found[first], found[second])
        print(f"| {first} | {second} | {near:.3f} | {far:.3f} | {right:.0f} |")


if __name__ == "__main__":
    main()
