"""A training step as one CUDA graph: a small network's kernels take less time than launching them one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_STEPS = 4
"""Run before the capture: torch.compile compiles, cuDNN chooses its algorithms, the optimizer makes its state."""


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Runs `step` `WARM_STEPS` times, then records it.

    Args:
        step: reads and writes tensors that stay where they are, and neither waits for the GPU nor copies from the host.
            Random numbers of the default generator are drawn anew at each replay.

    Returns:
        what replays the step.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay
