"""What files cost: `superpoint extract` on photographs against `extract_many` from arrays, with the same model.

    python benchmarks/bulk_extract.py PHOTOS [--limit 100] [--repeats 3] [--model M] [--batch-size B] [--size 640x480]
    python benchmarks/bulk_extract.py PHOTOS --limit 625 --copies 8 --size 640x480 --model heads.engine --batch-size 8

Both ways alternate. Times are wall seconds from the first image to the last (reading, decoding, extraction, writing;
the rest is told apart), and CPU seconds of the process, which say more on a machine that others use, too. Opening the
model and merging are among the CPU seconds. In the end each step runs alone in one thread: its CPU ms for an image
tell which one is the limit.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import cv2
import numpy as np

from superpoint_trt import Keypoints, SuperPoint
from superpoint_trt.core.files import file_sha256
from superpoint_trt.core.image import find_images, load_image
from superpoint_trt.core.image_file import read_image_file
from superpoint_trt.pipeline.extract import ExtractOptions, extract
from superpoint_trt.pipeline.feature_files import FeatureWriter
from superpoint_trt.pipeline.packed import PackedWriter
from superpoint_trt.pipeline.workers import as_stored, usable_cpus

WRITTEN = 512
"""Entries at least, of the steps that write."""


def main() -> None:
    """Run both ways in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--copies", type=int, default=1, help="how often each photograph is used")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-keypoints", type=int, default=1024)
    parser.add_argument("--size", help="cut and shrink photographs to WIDTHxHEIGHT first, as JPEG of quality 92")
    parser.add_argument("--work", type=Path, help="folder for the files; default: the temporary one")
    args = parser.parse_args()
    settings = {"max_keypoints": args.max_keypoints}
    work = Path(tempfile.mkdtemp(dir=args.work))
    paths = prepared(find_images(args.photos, args.limit), args, work / "photos")
    options = ExtractOptions(args.model, settings, batch_size=args.batch_size)
    rows: dict[str, list[tuple[float, float]]] = {"arrays": [], "files": [], "merge": []}
    with SuperPoint(args.model, half_descriptors=True, **settings) as superpoint:
        arrays = [load_image(path) for path in paths]
        print(f"{len(paths)} images, {usable_cpus()} CPUs, {superpoint.runtime}", flush=True)
        for image in arrays[:5]:
            superpoint.extract(image)
        print_steps(superpoint, paths[:64], work)
        for _ in range(args.repeats):
            started, cpu = time.perf_counter(), time.process_time()
            found = sum(len(one) for one in superpoint.extract_many(arrays, args.batch_size))
            rows["arrays"].append((time.perf_counter() - started, time.process_time() - cpu))
            started, cpu = time.perf_counter(), time.process_time()
            summary = extract([work / "photos"], work / "features.h5", options)
            whole = time.perf_counter() - started
            rows["files"].append((summary.seconds, time.process_time() - cpu))
            rows["merge"].append((whole - summary.seconds, 0.0))
            size = (work / "features.h5").stat().st_size / 1e6
            assert summary.done == len(paths), summary
            (work / "features.h5").unlink()
            print({name: [round(value, 2) for value in times[-1]] for name, times in rows.items()}, flush=True)
    shutil.rmtree(work)
    wall = {name: statistics.median(one[0] for one in times) for name, times in rows.items()}
    cpu_s = {name: statistics.median(one[1] for one in times) for name, times in rows.items()}
    per_s = {name: len(paths) / wall[name] for name in ("arrays", "files")}
    print(f"{found / len(paths):.0f} keypoints an image, {size:.0f} MB")
    ratios = 100 * per_s["files"] / per_s["arrays"], 100 * cpu_s["arrays"] / cpu_s["files"]
    print(f"arrays {per_s['arrays']:.2f} images/s, files {per_s['files']:.2f} images/s")
    print(f"files against arrays: {ratios[0]:.1f} % (wall), {ratios[1]:.1f} % (CPU)")
    print(f"open, list and merge: {wall['merge']:.2f} s")


def print_steps(superpoint: SuperPoint, paths: list[Path], work: Path) -> None:
    """Run each step of the pipeline alone, and print its CPU ms for an image."""
    spent: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Any], count: int = len(paths)) -> Any:
        started = time.process_time()
        result = step()
        spent[name] = 1e3 * (time.process_time() - started) / count
        return result

    def write(found: list[Keypoints]) -> None:
        with PackedWriter(work / "steps.packed", np.dtype(np.float16)) as writer:
            for index, entry in enumerate(found):
                writer.write(f"images/{index}.jpg", entry, entry.image_size, 2.0)

    def merge() -> None:
        with FeatureWriter(work / "steps.h5") as writer:
            writer.add_packed(work / "steps.packed")

    images = timed("read and decode", lambda: [read_image_file(path) for path in paths])
    timed("prepare", lambda: [superpoint.load(image) for image in images])
    found = timed("decode again, prepare, run", lambda: list(superpoint.extract_many(paths)))
    stored = timed("transpose", lambda: [as_stored(one, 1, np.dtype(np.float16)) for one in found])
    # As often as it takes to be about files, not about opening one.
    many = [one for one in stored if isinstance(one, Keypoints)] * -(-WRITTEN // len(stored))
    timed("write shard", lambda: write(many), len(many))
    timed("hash", lambda: file_sha256(work / "steps.packed"), len(many))
    FeatureWriter(work / "steps.h5").abandon()  # imports what it needs
    timed("merge to .h5", merge, len(many))
    for name in ("steps.packed", "steps.h5"):
        (work / name).unlink()
    print("CPU ms an image:", ", ".join(f"{name} {value:.2f}" for name, value in spent.items()), flush=True)


def prepared(paths: list[Path], args: argparse.Namespace, folder: Path) -> list[Path]:
    """The photographs under names of their own, cut to size if asked for."""
    folder.mkdir()
    made = []
    for copy in range(args.copies):
        for index, path in enumerate(paths):
            target = folder / f"{copy}_{index:05d}{path.suffix}"
            if args.size:
                width, height = map(int, args.size.split("x"))
                target = target.with_suffix(".jpg")
                image = cv2.imread(str(path))
                scale = max(width / image.shape[1], height / image.shape[0])
                image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
                cv2.imwrite(str(target), image[:height, :width], [cv2.IMWRITE_JPEG_QUALITY, 92])
            else:
                shutil.copy(path, target)
            made.append(target)
    return sorted(made)


if __name__ == "__main__":
    main()
