"""What files cost: `superpoint extract` on JPEG files against `extract_many` from arrays, with the same model.

    python benchmarks/bulk_extract.py PHOTOS [--images 5000] [--size 640x480] [--repeats 3] [--model M] [--batch-size B]
        [--work FOLDER] [--only steps,loaders,alone,arrays,files] [--json OUT.json]

PHOTOS is a folder of photographs; the files are cut from them at random places. Without PHOTOS they are cut from the
photograph in the package, with noise, so that each file differs.

steps    each step alone, in one thread: CPU ms for an image
loaders  reading, decoding and preparing alone, by more and more threads: images/s, and user and system CPU ms for an
         image, which stay equal if threads do not stand in each other's way
alone    each part of a run alone, with the threads that it has in a run: images/s. The slowest is the limit.
arrays   `extract_many` from gray arrays (the fastest way there is), and from RGB arrays, as they are decoded
files    `extract`: JPEG files to features.h5. The first rate is that of the extraction, as the command prints it; the
         second one also counts the merge

The ways take turns; medians of the repeats. `CPUs busy` is CPU seconds over wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable

import cv2
import numpy as np

from superpoint_trt import Keypoints, SuperPoint, packaged
from superpoint_trt.core.files import file_sha256
from superpoint_trt.core.image import find_images, load_image, to_gray
from superpoint_trt.core.image_file import read_image_file
from superpoint_trt.pipeline.extract import ExtractOptions, extract
from superpoint_trt.pipeline.inputs import Item
from superpoint_trt.pipeline.merge import merge
from superpoint_trt.pipeline.packed import PackedWriter
from superpoint_trt.pipeline.shards import Manifest, Shard, ShardFolder
from superpoint_trt.pipeline.workers import WorkOptions, _Source, _Writer, as_stored, usable_cpus

JPEG_QUALITY = 92
SHARD_SIZE, GROUP_SIZE = 64, 8
MOST_ARRAYS = 1000
"""Arrays that are in memory at once; they are used again for more images."""
MOST_STEPS = 64
"""Images of the steps alone."""
DISK_NBYTES = 1 << 30

Spent = dict[str, float]


def main() -> None:
    """Makes the files, measures, and prints each figure as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="?")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", default="640x480", help="WIDTHxHEIGHT of the files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-keypoints", type=int, default=1024)
    parser.add_argument("--work", type=Path, help="folder for the files; default: the temporary one")
    parser.add_argument("--jpegs", type=Path, help="keep the files here, and use what an earlier call has made")
    parser.add_argument("--only", default="steps,loaders,alone,arrays,files")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=args.work))
    report: dict[str, Any] = {"images": args.images, "size": args.size, "CPUs": usable_cpus(), "folder": str(work)}
    try:
        measure(args, work, report)
    finally:
        shutil.rmtree(work)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


def measure(args: argparse.Namespace, work: Path, report: dict[str, Any]) -> None:
    """Measures what was asked for."""
    wanted = args.only.split(",")
    with told(report, "making the files, s"):
        paths = make_files(args, args.jpegs or work / "jpegs")
    report["JPEG kB"] = round(sum(path.stat().st_size for path in paths) / len(paths) / 1e3, 1)
    if not wanted[0]:
        return
    settings = {"max_keypoints": args.max_keypoints}
    options = ExtractOptions(args.model, settings, batch_size=args.batch_size)
    with timed() as opening:
        SuperPoint(args.model, half_descriptors=True, **settings).close()
    with SuperPoint(args.model, half_descriptors=True, **settings) as superpoint:
        tell(report, "ran on", str(superpoint.runtime))
        some = in_threads(load_image, paths[:MOST_ARRAYS])
        found = kept(superpoint.extract_many(some[:MOST_STEPS], args.batch_size))
        tell(report, "keypoints an image", round(sum(map(len, found)) / len(found)))
        if "steps" in wanted:
            tell(report, "CPU ms an image", steps(superpoint, paths[:MOST_STEPS], work))
        if "loaders" in wanted:
            tell(report, "loaders", loaders(superpoint, paths[:MOST_ARRAYS]))
        if "alone" in wanted:
            tell(report, "alone, images/s", alone(superpoint, paths, found, work))
        arrays: dict[str, list[Any]] = {}
        if "arrays" in wanted:
            gray = in_threads(lambda image: np.round(to_gray(image) * 255).astype(np.uint8), some)
            arrays = {"gray arrays": gray, "RGB arrays": some}
        rounds: dict[str, list[Spent]] = {name: [] for name in (*arrays, "files")}
        for _ in range(args.repeats):
            for name in rounds if "files" in wanted else arrays:
                spent = (
                    run_files(paths, work, options, opening["cpu"])
                    if name == "files"
                    else run_arrays(superpoint, arrays[name], args)
                )
                rounds[name].append(spent)
                print(f"{name}: {args.images / spent['wall']:.1f} images/s in this round", flush=True)
    for name, spent in rounds.items():
        if spent:
            tell(report, name, summed_up(args.images, spent))
    for name in arrays if "files" in wanted else ():
        tell(report, f"files against {name}, %", compared(report["files"], report[name]))


def run_arrays(superpoint: SuperPoint, arrays: list[Any], args: argparse.Namespace) -> Spent:
    """`extract_many` from arrays."""
    with timed() as spent:
        for _ in superpoint.extract_many((arrays[i % len(arrays)] for i in range(args.images)), args.batch_size):
            pass
    return spent


def run_files(paths: list[Path], work: Path, options: ExtractOptions, opening_cpu: float) -> Spent:
    """`extract` from files."""
    output, merge_begins = work / "features.h5", Spent()

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "extracting" and done == total:
            merge_begins.update(wall=time.perf_counter(), cpu=time.process_time())

    cpu = time.process_time()
    with timed() as whole:
        summary = extract([paths[0].parent], output, options, progress)
    merging = time.perf_counter() - merge_begins["wall"]
    assert summary.done == len(paths), summary
    output.unlink()
    return {
        "wall": summary.seconds,
        "cpu": merge_begins["cpu"] - cpu - opening_cpu,
        "merging": merging,
        "whole wall": summary.seconds + merging,
        "whole cpu": whole["cpu"] - opening_cpu,
    }


def summed_up(count: int, rounds: list[Spent]) -> Spent:
    """Medians of the rounds."""
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    found = {
        "images/s": count / median["wall"],
        "CPU ms an image": 1e3 * median["cpu"] / count,
        "CPUs busy": statistics.median(one["cpu"] / one["wall"] for one in rounds),
    }
    if "merging" in median:
        found["images/s with the merge"] = count / median["whole wall"]
        found["CPU ms an image with the merge"] = 1e3 * median["whole cpu"] / count
        found["merge, s"] = median["merging"]
    return {name: round(value, 3) for name, value in found.items()}


# ------------------------------------------------------------------------------------------------------------- profile


def steps(superpoint: SuperPoint, paths: list[Path], work: Path) -> Spent:
    """Each step of the pipeline alone, in one thread: CPU ms for an image."""
    spent: Spent = {}

    def step(name: str, run: Callable[[], Any], count: int = len(paths)) -> Any:
        with timed() as took:
            result = run()
        spent[name] = round(1e3 * took["cpu"] / count, 3)
        return result

    cv2.setNumThreads(1)
    step("read the file", lambda: [path.read_bytes() for path in paths])
    images = step("read and decode", lambda: [read_image_file(path) for path in paths])
    step("gray, prepare", lambda: [superpoint.load(image) for image in images])
    found = step("run (with read, decode, prepare)", lambda: kept(superpoint.extract_many(paths)))
    stored = step("transpose", lambda: [as_stored(one, 1, np.dtype(np.float16)) for one in found])
    many = kept(stored) * 8  # so that it is about writing, not about opening a file
    step("write shard", lambda: write_packed(work / "steps.packed", many), len(many))
    step("hash (when written, and when merged)", lambda: file_sha256(work / "steps.packed"), len(many))
    (work / "steps.packed").unlink()
    cv2.setNumThreads(-1)
    return spent


def loaders(superpoint: SuperPoint, paths: list[Path]) -> dict[str, Spent]:
    """Reading, decoding and preparing by 1, 2, 4, ... threads, up to one for each CPU."""
    cpus, found, count = usable_cpus(), {}, 1
    while True:
        begun = os.times()
        with timed() as took, ThreadPoolExecutor(count) as pool:
            deque(pool.map(lambda path: superpoint.load(path) and None, paths), maxlen=0)
        ended = os.times()
        found[f"{count} threads"] = {
            "images/s": round(len(paths) / took["wall"], 1),
            "user CPU ms": round(1e3 * (ended.user - begun.user) / len(paths), 3),
            "system CPU ms": round(1e3 * (ended.system - begun.system) / len(paths), 3),
        }
        if count == cpus:
            return found
        count = min(2 * count, cpus)


def alone(superpoint: SuperPoint, paths: list[Path], found: list[Keypoints], work: Path) -> Spent:
    """Each part of a run alone, with the threads that it has in a run: images/s."""
    rates: Spent = {}
    with timed() as took:
        in_threads(lambda path: superpoint.load(path) and None, paths)
    rates[f"read, decode and prepare, {usable_cpus()} threads"] = len(paths) / took["wall"]
    count = len(paths) // SHARD_SIZE * SHARD_SIZE
    if count:
        names = [f"{index:06d}.jpg" for index in range(count)]
        folder = ShardFolder(work / "alone.h5")
        folder.begin(Manifest("alone", {"dtype": "float16"}, "", count, SHARD_SIZE, True), range(count))
        with timed() as took:
            write_shards(superpoint, folder, names, found)
        rates["write shards, with fsync and hash"] = count / took["wall"]
        nbytes = sum(path.stat().st_size for path in folder.folder.glob("*.packed"))
        with timed() as took:
            merge(work / "alone.h5")
        rates["merge"] = count / took["wall"]
        (work / "alone.h5").unlink()
        rates[f"disk, {nbytes / count / 1e6:.2f} MB an image"] = disk_rate(work) / (nbytes / count)
    return {name: round(value, 1) for name, value in rates.items()}


def write_shards(superpoint: SuperPoint, folder: ShardFolder, names: list[str], found: list[Keypoints]) -> None:
    """Writes shards as a run does."""
    with _Writer(folder, WorkOptions(None, {}), superpoint) as writer:
        for number in range(len(names) // SHARD_SIZE):
            items = [Item(name, name) for name in names[number * SHARD_SIZE : (number + 1) * SHARD_SIZE]]
            shard = Shard(number, items)
            for start in range(0, SHARD_SIZE, GROUP_SIZE):
                group = range(start, start + GROUP_SIZE)
                writer.add([_Source(shard, items[i], 1, 1.0) for i in group], [found[i % len(found)] for i in group])
        writer.wait()


def write_packed(path: Path, entries: list[Keypoints]) -> None:
    """Writes one shard's file."""
    with PackedWriter(path, np.dtype(np.float16)) as writer:
        for index, entry in enumerate(entries):
            writer.write(f"{index}.jpg", entry, entry.image_size, 2.0)


def disk_rate(work: Path) -> float:
    """Bytes a second of one plain file, with its fsync."""
    block = np.random.default_rng(0).bytes(1 << 26)
    with timed() as took, open(work / "disk", "wb", buffering=0) as file:
        for _ in range(DISK_NBYTES // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    (work / "disk").unlink()
    return DISK_NBYTES / took["wall"]


# --------------------------------------------------------------------------------------------------------------- files


def make_files(args: argparse.Namespace, folder: Path) -> list[Path]:
    """Cuts JPEG files from photographs at random places, as many at once as there are CPUs."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = map(int, args.size.split("x"))
    sources = find_images(args.photos) if args.photos else [packaged.PHOTO]
    per_photo = -(-args.images // len(sources))

    def cut(number: int) -> list[Path]:
        rng, made, photo = np.random.default_rng(number), [], None
        for index in range(number * per_photo, min((number + 1) * per_photo, args.images)):
            made.append(folder / f"{index:06d}.jpg")
            if made[-1].exists():
                continue
            photo = enlarged(cv2.imread(str(sources[number])), width, height) if photo is None else photo
            top, left = rng.integers(photo.shape[0] - height + 1), rng.integers(photo.shape[1] - width + 1)
            piece = photo[top : top + height, left : left + width]
            if not args.photos:
                piece = np.clip(piece + rng.normal(0, 4, piece.shape), 0, 255).astype(np.uint8)
            cv2.imwrite(str(made[-1]), piece, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        return made

    return [path for made in in_threads(cut, range(len(sources))) for path in made]


def enlarged(photo: Any, width: int, height: int) -> Any:
    """A photograph a quarter larger than a file at least."""
    scale = max(1.25 * width / photo.shape[1], 1.25 * height / photo.shape[0])
    return photo if scale <= 1 else cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)


# -------------------------------------------------------------------------------------------------------------- timing


def in_threads(work: Callable[[Any], Any], values: Iterable[Any]) -> list[Any]:
    """Work on each value, with a thread for each CPU."""
    with ThreadPoolExecutor(usable_cpus()) as pool:
        return list(pool.map(work, values))


@contextmanager
def timed() -> Iterator[Spent]:
    """Wall and CPU seconds of what runs inside."""
    spent: Spent = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent.update(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


@contextmanager
def told(report: dict[str, Any], name: str) -> Iterator[Spent]:
    """Tells the wall seconds of what runs inside."""
    with timed() as spent:
        yield spent
    tell(report, name, round(spent["wall"], 2))


def tell(report: dict[str, Any], name: str, value: Any) -> None:
    """Prints a figure, and keeps it."""
    report[name] = value
    print(f"{name}: {json.dumps(value, indent=1) if isinstance(value, dict) else value}", flush=True)


def kept(results: Iterable[Any]) -> list[Keypoints]:
    """The results that are no errors."""
    return [one for one in results if isinstance(one, Keypoints)]


def compared(files: Spent, arrays: Spent) -> Spent:
    """Files against arrays, in percent."""
    return {
        "wall": round(100 * files["images/s"] / arrays["images/s"], 1),
        "wall with the merge": round(100 * files["images/s with the merge"] / arrays["images/s"], 1),
        "CPU": round(100 * arrays["CPU ms an image"] / files["CPU ms an image"], 1),
    }


if __name__ == "__main__":
    main()
