"""`extract` against the bare onnxruntime session it runs on, and against the PyTorch eager reference, on this CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort
import torch
from common import alternate, machine, photograph, verdict, weights_option

from superpoint_trt import SuperPoint
from superpoint_trt.checkpoint.reference import SuperPoint as Reference
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.core.types import OutputType

HEIGHT, WIDTH = 480, 640
MOST_OVERHEAD = 1.10
LEAST_SPEEDUP = 2.5


@click.command()
@weights_option
@click.option("--iterations", default=20, show_default=True)
@click.option("--threads", type=int, default=None, help="CPU threads of onnxruntime and torch alike.")
def main(weights: str, iterations: int, threads: int | None) -> None:
    """Time each model type's extract, its bare session, and the reference, in turn."""
    image = photograph(HEIGHT, WIDTH)
    tensor = image[None, None].astype(np.float32) / 255
    reference = Reference.from_file(weights, max_num_keypoints=1024)
    if threads:
        torch.set_num_threads(threads)

    def eager() -> object:
        with torch.inference_mode():
            return reference({"image": torch.from_numpy(image[None, None].astype(np.float32) / 255)})

    runs = {"torch eager reference": eager}
    with tempfile.TemporaryDirectory() as folder:
        for kind in OutputType:
            path = export(weights, Path(folder) / f"{kind.value}.onnx", ExportOptions(kind, HEIGHT, WIDTH))
            options = ort.SessionOptions()
            options.intra_op_num_threads = threads or 0
            session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
            superpoint = SuperPoint(path, max_keypoints=1024, threads=threads)
            runs[f"{kind.value}: bare session"] = lambda s=session: s.run(None, {"image": tensor})
            runs[f"{kind.value}: extract"] = lambda s=superpoint: s.extract(image)
        times = alternate(runs, iterations)

    print(f"{machine()}; onnxruntime {ort.__version__}, torch {torch.__version__}, {threads or 'default'} threads")
    print(
        f"{WIDTH}x{HEIGHT}, batch 1, {len(superpoint.extract(image))} keypoints, median (p95) of {iterations}, in turn"
    )
    for name, values in times.items():
        print(f"  {name:<24}{np.median(values):8.1f} ms ({np.percentile(values, 95):.1f})")
    failed = []
    eager_ms = np.median(times["torch eager reference"])
    for kind in OutputType:
        extract_ms = np.median(times[f"{kind.value}: extract"])
        overhead = extract_ms / np.median(times[f"{kind.value}: bare session"])
        speedup = eager_ms / extract_ms
        print(f"  {kind.value:<12} extract / session {overhead:.3f}   reference / extract {speedup:.2f}")
        if overhead > MOST_OVERHEAD:
            failed.append(f"{kind.value} overhead {overhead:.3f} > {MOST_OVERHEAD}")
        if speedup < LEAST_SPEEDUP:
            failed.append(f"{kind.value} speed-up {speedup:.2f} < {LEAST_SPEEDUP}")
    verdict(failed)


if __name__ == "__main__":
    main()
