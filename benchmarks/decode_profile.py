"""The CUDA decode of one 640x480 image, a few times over: for ncu, and for a first figure without TensorRT.

    python benchmarks/decode_profile.py [CALLS]

Heads are made up: ridges that give about as many survivors as a photograph does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "gpu")]

from heads import download, logits_of, upload  # noqa: E402

from superpoint_trt.core.types import DecodeOptions, Sampling  # noqa: E402
from superpoint_trt.gpu import arrays, cuda  # noqa: E402
from superpoint_trt.gpu.kernels.decode import Decoder, _head  # noqa: E402


def main(calls: int) -> None:
    """Prints medians and p95 of single graph replays and of 20 decodes in one graph, by batch, type and layout."""
    rng = np.random.default_rng(0)
    for batch in (1, 8):
        for head, multiple in (("float16", 8), ("float16", 0), ("float32", 0)):
            layout = "channels-last" if multiple else "linear"
            logits = upload(logits_of("image-like", 1, (batch, 65, 60, 80)).astype(head), multiple=multiple)
            coarse = upload(rng.normal(0, 1, (batch, 256, 60, 80)).astype(head), multiple=multiple)
            decoder = Decoder(_head(logits), _head(coarse), DecodeOptions(max_keypoints=1024), Sampling.HALF_PIXEL)
            rows = decoder.rows(half=True)
            block = cuda.DeviceMemory(rows.nbytes)
            job = upload(np.frombuffer(rows.job(block.address, [(640, 480)] * batch), np.uint8))
            stream = cuda.Stream()
            decoder.queue(job.address, rows, stream)
            stream.synchronize()
            survivors = arrays.DeviceArray(block.address, (batch,), np.dtype(np.int32), 0, block)
            events = [cuda.call("cudaEventCreate") for _ in range(2)]
            for times in (1, 20):
                with stream.capture() as recorded:
                    for _ in range(times):
                        decoder.queue(job.address, rows, stream)
                graph, spans = recorded(), []
                for _ in range(calls + 20):
                    cuda.call("cudaEventRecord", events[0], stream.handle)
                    graph.launch(stream)
                    cuda.call("cudaEventRecord", events[1], stream.handle)
                    stream.synchronize()
                    spans.append(float(cuda.call("cudaEventElapsedTime", *events)) / times * 1e3)
                median, p95 = np.percentile(spans[20:], [50, 95])
                print(
                    f"batch {batch} {head} {layout}, {int(download(survivors)[0])} points, {times} in a graph: "
                    f"{median:.2f} us a decode, p95 {p95:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
