"""Pairs of images matched a second, on the GPU at hand and on the CPU.

    python benchmarks/match_pairs.py [--points 2048] [--dim 256] [--images 64] [--pairs 4000] [--device cuda]
        [--files FOLDER] [--json OUT.json]

Random unit descriptors, half of each image's from the image before.

1. kernel: GPU time of one launch of 64 pairs, by events around 20 launches in a row; TFLOP/s counts 2 N M D
2. matcher: host arrays of matches for pairs of images that are on the GPU, 64 at a time
3. with --files (needs h5py): `match_pairs` from a feature file to a match file, shards and all

Medians of five rounds.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import click
import numpy as np

from superpoint_trt.core.types import Keypoints
from superpoint_trt.match.matcher import PAIRS_A_LAUNCH, DeviceMatcher, Matcher, open_matcher
from superpoint_trt.match.nearest import MatchOptions

ROUNDS = 5
IN_A_ROW = 20


def views(images: int, points: int, dim: int) -> list[np.ndarray]:
    """Float16 unit descriptors (points, dim) of each image."""
    rng = np.random.default_rng(0)
    found: list[np.ndarray] = []
    for _ in range(images):
        rows = rng.normal(size=(points, dim))
        if found:
            kept = points // 2
            rows[:kept] = found[-1][rng.permutation(points)[:kept]].astype(np.float64) * np.sqrt(dim)
            rows[:kept] += 0.3 * rng.normal(size=(kept, dim))
        found.append((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16))
    return found


def kernel_ms(matcher: DeviceMatcher, pairs: list) -> float:
    """Milliseconds of GPU time of one launch, with its memset and its copies."""
    from superpoint_trt.gpu import cuda
    from superpoint_trt.gpu.kernels import function

    finder, held = matcher._finder, [(first.held, second.held) for first, second in pairs]
    finder.find(held)
    kernel = function("match.cu", "nearest", (f"DIM={held[0][0].dim}",))
    grid = (max(-(-first.count // 128) for first, _ in held), len(held))
    stream = finder._stream
    begin, end = (cuda.call("cudaEventCreate") for _ in range(2))
    cuda.call("cudaEventRecord", begin, stream.handle)
    for _ in range(IN_A_ROW):
        finder._queue(kernel, grid, finder._room)
    cuda.call("cudaEventRecord", end, stream.handle)
    stream.synchronize()
    return float(cuda.call("cudaEventElapsedTime", begin, end)) / IN_A_ROW


def matcher_rate(matcher: Matcher, images: list, pairs: list[tuple[int, int]]) -> float:
    """Pairs a second."""
    held = [matcher.prepare(image) for image in images]
    size = matcher.pairs_at_once
    matcher.match([(held[0], held[1])] * size)
    started = time.perf_counter()
    for start in range(0, len(pairs), size):
        matcher.match([(held[i], held[j]) for i, j in pairs[start : start + size]])
    return len(pairs) / (time.perf_counter() - started)


def file_rates(folder: Path, images: list, pairs: list[tuple[int, int]], device: str) -> dict[str, float]:
    """Pairs a second of `match_pairs`: until all shards are finished, and until the match file is."""
    from superpoint_trt.pipeline.feature_files import FeatureWriter
    from superpoint_trt.pipeline.match_pairs import PairMatchOptions, match_pairs

    folder.mkdir(parents=True, exist_ok=True)
    with FeatureWriter(folder / "features.h5") as writer:
        for index, rows in enumerate(images):
            xy, scores = np.zeros((len(rows), 2), np.float32), np.ones(len(rows), np.float32)
            writer.write(f"{index:05}.jpg", Keypoints(xy, scores, rows, (640, 480)), (640, 480))
    named = [(f"{i:05}.jpg", f"{j:05}.jpg") for i, j in pairs]
    started = time.perf_counter()
    options = PairMatchOptions(MatchOptions(), device, overwrite=True)
    found = match_pairs(folder / "features.h5", named, folder / "matches.h5", options)
    return {
        "shards": found.matched / found.seconds,
        "with the match file": len(pairs) / (time.perf_counter() - started),
    }


def tell(report: dict[str, object], name: str, value: object) -> None:
    """Prints a figure, and keeps it."""
    report[name] = value
    click.echo(f"{name}: {value}")


@click.command()
@click.option("--points", default=2048)
@click.option("--dim", default=256)
@click.option("--images", default=64)
@click.option("--pairs", "count", default=4000)
@click.option("--device", default="auto")
@click.option("--files", type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(
    points: int, dim: int, images: int, count: int, device: str, files: Path | None, json_path: Path | None
) -> None:
    """Measures, and prints each figure as soon as it is known."""
    every = list(itertools.combinations(range(images), 2))
    pairs = [every[index % len(every)] for index in range(count)]
    pairs = pairs if files is None else every[:count]
    arrays = views(images, points, dim)
    report: dict[str, object] = {"points": points, "dim": dim, "images": images, "pairs": len(pairs)}
    with open_matcher(device=device) as matcher:
        tell(report, "runs on", matcher.runs_on)
        if isinstance(matcher, DeviceMatcher):
            held = [matcher.prepare(array) for array in arrays]
            group = [(held[i], held[j]) for i, j in (every * PAIRS_A_LAUNCH)[:PAIRS_A_LAUNCH]]
            took = float(np.median([kernel_ms(matcher, group) for _ in range(ROUNDS)]))
            tell(report, "kernel us a pair", took / len(group) * 1e3)
            tell(report, "kernel TFLOP/s", 2 * points * points * dim * len(group) / took / 1e9)
        rates = [matcher_rate(matcher, arrays, pairs) for _ in range(ROUNDS)]
        tell(report, "matcher pairs/s", float(np.median(rates)))
    if files is not None:
        tell(report, "match_pairs pairs/s", file_rates(files, arrays, pairs, device))
    if json_path:
        json_path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
