"""The best PyTorch way from a host image to host keypoints, for the table beside ours.

    python benchmarks/torch_decode.py --weights CHECKPOINT [--ready FILE --go FILE]

With --ready everything is compiled first, then FILE is written; with --go timing waits for FILE: compilation takes
minutes, which another process may use.

eager reference: checkpoint/reference.py's SuperPoint in float32, as its users run it. compiled: fp16 channels-last
network and a decode of fixed shape under torch.compile, with both copies in one CUDA graph. That decode keeps the four
best of each 8x8 cell before the top-k (not exact on plateaus, which favours it).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from superpoint_trt.checkpoint import layouts
from superpoint_trt.checkpoint.reference import SuperPoint, SuperPointNet
from superpoint_trt.core.image import synthetic_photograph

N, RADIUS, BORDER, THRESHOLD = 1024, 4, 4, 0.005
SIZE_HW = (480, 640)


def window_max(x: torch.Tensor) -> torch.Tensor:
    """Rows, then columns."""
    x = F.max_pool2d(x, (1, 2 * RADIUS + 1), 1, (0, RADIUS))
    return F.max_pool2d(x, (2 * RADIUS + 1, 1), 1, (RADIUS, 0))


def decode(logits: torch.Tensor, coarse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fixed shapes throughout: (N, 2), (N,) with 0 where there is none, (N, D) float16."""
    scores = F.pixel_shuffle(logits.float().softmax(1)[:, :-1], 8)
    kept = scores == window_max(scores)
    for _ in range(2):
        near = window_max(kept.to(scores.dtype)) > 0
        rest = torch.where(near, 0.0, scores)
        kept = kept | ((rest == window_max(rest)) & ~near)
    inside = torch.zeros_like(kept)
    inside[..., BORDER:-BORDER, BORDER:-BORDER] = True
    best = torch.where(kept & inside & (scores > THRESHOLD), scores, 0.0)
    height, width = best.shape[2:]
    pixel = torch.arange(height * width, device=best.device).view(1, 1, height, width)
    cells = F.pixel_unshuffle(best, 8)[0].permute(1, 2, 0).reshape(-1, 64)
    pixels = F.pixel_unshuffle(pixel, 8)[0].permute(1, 2, 0).reshape(-1, 64)
    four, place = cells.topk(4, dim=1, sorted=False)
    found, order = four.flatten().topk(N)
    at = pixels.gather(1, place).flatten()[order]
    xy = torch.stack([at % width, at // width], 1).float()
    unit = F.normalize(coarse.float(), dim=1)
    grid = ((xy + 0.5) / xy.new_tensor([width, height]) * 2 - 1)[None, None]
    sampled = F.grid_sample(unit, grid, mode="bilinear", align_corners=False)[0, :, 0]
    return xy, found, F.normalize(sampled, dim=0).T.half()


def median_p95(step: Callable[[int], object], calls: int) -> str:
    """Of calls that end with their results on the host."""
    times = []
    for index in range(calls + 50):
        started = time.perf_counter()
        step(index)
        times.append((time.perf_counter() - started) * 1e3)
    median, p95 = np.percentile(times[50:], [50, 95])
    return f"{median:.3f} ms, p95 {p95:.3f}"


def graph_alone(graph: torch.cuda.CUDAGraph, calls: int) -> str:
    """By events around each replay."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    spans = []
    for _ in range(calls):
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        spans.append(events[0].elapsed_time(events[1]))
    return f"median {np.median(spans):.3f} ms"


def main(weights: str, calls: int, ready: Path | None, go: Path | None) -> None:
    """Prints one line a way."""
    torch.set_num_threads(1)  # nothing here is worth a pool of threads, and waking one takes time
    checkpoint = layouts.load(weights)
    picture = synthetic_photograph(*SIZE_HW)
    images = [np.ascontiguousarray(np.roll(picture, 24 * index, axis=1)) for index in range(8)]
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}: host uint8 -> host keypoints, N {N}, 640x480")

    reference = SuperPoint(max_num_keypoints=N)
    reference._adopt(checkpoint)
    reference = reference.cuda().eval()

    def eager(index: int) -> object:
        with torch.inference_mode():
            image = torch.from_numpy(images[index % 8]).cuda()[None, None].float() / 255
            return {name: [part.cpu() for part in value] for name, value in reference({"image": image}).items()}

    torch.backends.cudnn.allow_tf32 = False
    ways: dict[str, Callable[[int], object]] = {"eager reference, fp32": eager}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}

    net = SuperPointNet.from_checkpoint(checkpoint).cuda().eval().half().to(memory_format=torch.channels_last)
    for mode in ("default", "max-autotune-no-cudagraphs"):

        def step(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with torch.no_grad():
                image = (pixels.float() / 255).half().to(memory_format=torch.channels_last)
                return decode(*net(image))

        compiled = torch.compile(step, dynamic=False, mode=mode)
        staging = torch.empty((1, 1, *SIZE_HW), dtype=torch.uint8).pin_memory()
        pixels = staging.cuda()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(4):
                results = compiled(pixels)
            hosts = [torch.empty(part.shape, dtype=part.dtype).pin_memory() for part in results]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pixels.copy_(staging, non_blocking=True)
            for host, part in zip(hosts, compiled(pixels)):
                host.copy_(part, non_blocking=True)
        view = staging.numpy()[0, 0]

        shown = [host.numpy() for host in hosts]

        def replay(index: int, view=view, graph=graph, shown=shown) -> object:
            np.copyto(view, images[index % 8])
            graph.replay()
            torch.cuda.synchronize()
            return [part.copy() for part in shown]  # the caller's own, as ours are

        replay(0)
        graphs[mode] = graph
        ways[f"torch.compile ({mode}) + CUDA graph, fp16"] = replay
        print(f"compiled: {mode}", flush=True)
    if ready:
        ready.write_text("")
    while go and not go.exists():
        time.sleep(0.05)
    for name, way in ways.items():
        print(f"  {name}: {median_p95(way, calls)}", flush=True)
    for mode, graph in graphs.items():
        print(f"  graph alone ({mode}): {graph_alone(graph, calls)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--ready", type=Path)
    parser.add_argument("--go", type=Path)
    main(**vars(parser.parse_args()))
