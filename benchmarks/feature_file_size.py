"""Opening a feature file, reading one entry and adding one: do they take longer in a file of 100,000 than of 1,000?

    python benchmarks/feature_file_size.py [--entries 1000 100000] [--repeats 15]

Entries are small (8 keypoints, 16 numbers each), so that what is timed is finding the place, not the bytes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from superpoint_trt import Keypoints
from superpoint_trt.pipeline.feature_files import FeatureFile, FeatureWriter


def main() -> None:
    """Write the files, then time each step of each file in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    keypoints = Keypoints(np.zeros((8, 2)), np.ones(8), np.ones((8, 16)), (640, 480))
    times: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in args.entries:
            started = time.perf_counter()
            with FeatureWriter(path_of(folder, count)) as writer:
                for index in range(count):
                    writer.write(name_of(index), keypoints, (640, 480))
            seconds = time.perf_counter() - started
            print(f"{count} entries written in {seconds:.1f} s, {1e6 * seconds / count:.0f} us each", flush=True)
        for repeat in range(args.repeats):
            for count in args.entries:
                path = path_of(folder, count)
                steps = [time.perf_counter()]
                with FeatureFile(path) as features:
                    steps.append(time.perf_counter())
                    _ = features[name_of(7919 * (repeat + 1) % count)]
                    steps.append(time.perf_counter())
                with FeatureWriter(path, append=True) as writer:
                    writer.write(f"new/{repeat}.jpg", keypoints, (640, 480))
                steps.append(time.perf_counter())
                for name, start, end in zip(("open", "read one", "add one"), steps, steps[1:]):
                    times.setdefault((name, count), []).append(end - start)
    for (name, count), seconds_each in times.items():
        print(f"{name:9} {count:7} entries: median {1e3 * statistics.median(seconds_each):7.2f} ms, "
              f"least {1e3 * min(seconds_each):7.2f} ms")  # fmt: skip


def path_of(folder: str, count: int) -> Path:
    """The file of so many entries."""
    return Path(folder) / f"{count}.h5"


def name_of(index: int) -> str:
    """All in one folder, which is the harder case."""
    return f"images/{index:07d}.jpg"


if __name__ == "__main__":
    main()
