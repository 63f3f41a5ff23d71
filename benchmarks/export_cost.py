"""Wall time and peak memory of `superpoint export`, the whole process with its imports."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import click
from common import machine, verdict, weights_option

from superpoint_trt.checkpoint.layouts import load, save
from superpoint_trt.core.types import OutputType

MOST_SECONDS = 5.0
MOST_GIB = 1.0


def cost(weights: str, output: Path, kind: str) -> tuple[float, float]:
    """Seconds and GiB of one export in a process of its own."""
    command = [sys.executable, "-m", "superpoint_trt", "export", "--weights", weights]
    command += ["--output", str(output), "--type", kind]
    started = time.perf_counter()
    silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=silent)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20  # ru_maxrss: KiB on Linux


@click.command()
@weights_option
def main(weights: str) -> None:
    """Export each type from the checkpoint as it is, and from safetensors, which needs no torch."""
    print(machine())
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        plain = str(save(load(weights), Path(folder) / "plain.safetensors"))
        for source in (weights, plain):
            for kind in OutputType:
                seconds, gib = cost(source, Path(folder) / "m.onnx", kind.value)
                print(f"  {Path(source).suffix:<14}{kind.value:<12}{seconds:6.2f} s  {gib:6.3f} GiB peak")
                if seconds > MOST_SECONDS or gib > MOST_GIB:
                    failed.append(f"{kind.value} from {Path(source).name}: {seconds:.2f} s, {gib:.3f} GiB")
    verdict(failed)


if __name__ == "__main__":
    main()
