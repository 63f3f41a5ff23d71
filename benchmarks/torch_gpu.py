"""Times PyTorch on the GPU at hand, for the table beside the engines: eager, and torch.compile in a CUDA graph.

    python benchmarks/torch_gpu.py [--weights CHECKPOINT] [--batch 1 --batch 8]

From an image that is on the GPU already to score map and unit descriptors there. Medians of --calls calls, each
waited for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import numpy as np
import torch
from common import weights_option

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.reference import SuperPointNet, dense
from superpoint_trt.core.image import synthetic_photograph

SIZE_HW = (480, 640)


def median_ms(step: Callable[[], object], calls: int) -> float:
    """Of calls that are each waited for, after a warm-up."""
    times = []
    for index in range(calls + 20):
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if index >= 20:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def graphed(step: Callable[[torch.Tensor], object], image: torch.Tensor) -> Callable[[], object]:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            step(image)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(image)
    return graph.replay


@click.command()
@weights_option
@click.option("--batch", "batches", type=int, multiple=True, default=[1, 8])
@click.option("--precision", "precisions", multiple=True, default=["fp32", "tf32", "fp16"])
@click.option("--calls", default=200, show_default=True)
def main(weights, batches, precisions, calls) -> None:
    """Prints one line a way and batch."""
    checkpoint = layouts.load(weights)
    picture = synthetic_photograph(*SIZE_HW).astype(np.float32) / np.float32(255)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; median of {calls} calls, ms; dense outputs")
    for batch in batches:
        image = torch.from_numpy(np.stack([picture] * batch)[:, None]).cuda()
        for name in precisions:
            tf32, dtype = name != "fp32", torch.float16 if name == "fp16" else None
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
            net = SuperPointNet.from_checkpoint(checkpoint).cuda().eval().to(memory_format=torch.channels_last)
            source = image
            if dtype is not None:
                net, source = net.to(dtype), image.to(dtype)
            source = source.to(memory_format=torch.channels_last)

            def step(x, net=net):
                with torch.inference_mode():
                    logits, coarse = net(x)
                    return dense(logits.float(), coarse.float())

            eager = median_ms(lambda step=step, source=source: step(source), calls)
            replay = graphed(step, source)
            in_graph = median_ms(replay, calls)
            compiled = torch.compile(step, dynamic=False)
            compiled_graph = median_ms(graphed(compiled, source), calls)
            print(
                f"batch {batch} {name}: eager {eager:.3f}, eager + CUDA graph {in_graph:.3f}, "
                f"torch.compile + CUDA graph {compiled_graph:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
