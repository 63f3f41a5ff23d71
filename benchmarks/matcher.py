"""Times a learned matcher: its .onnx on the CPU, and its engines on the GPU here if there is one.

python benchmarks/matcher.py --weights runs/matcher/matcher.safetensors                      # onnxruntime, N 512
python benchmarks/matcher.py --weights runs/matcher/matcher.safetensors --operators              # and where it goes
python benchmarks/matcher.py --weights runs/matcher/matcher.safetensors --engine --keypoints 1024

Without --weights the network's weights are random: its speed does not depend on them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import click
import numpy as np
import onnx
from common import machine
from onnx import TensorProto, helper, numpy_helper

from superpoint_trt.checkpoint.matcher import MatcherShape, load_matcher
from superpoint_trt.convert.export_matcher import MatcherExportOptions, matcher_to_onnx
from superpoint_trt.core.matcher import INPUTS
from superpoint_trt.core.types import Precision

WARM_UP = 20


def weights_of(path: str | None, width: int, heads: int, layers: int):
    """The file's weights, or random ones."""
    if path:
        return load_matcher(path)
    from superpoint_trt.checkpoint.matcher_network import MatcherNet

    return MatcherNet(MatcherShape((256,), width, heads, layers)).weights()


def feed_of(rows: int, dim: int, batch: int) -> dict[str, np.ndarray]:
    """Random points of both images."""
    rng = np.random.default_rng(0)
    feed: dict[str, np.ndarray] = {}
    for image in (0, 1):
        descriptors = rng.normal(size=(batch, rows, dim)).astype(np.float32)
        descriptors /= np.linalg.norm(descriptors, axis=-1, keepdims=True)
        xy = (rng.random((batch, rows, 2)) * (640, 480)).astype(np.float32)
        arrays = (xy, rng.random((batch, rows), np.float32), descriptors, np.full(batch, rows, np.int32))
        sizes = np.full((batch, 2), (640, 480), np.float32)
        feed.update({f"{name}{image}": array for name, array in zip(INPUTS, (*arrays, sizes))})
    return feed


def timed(run, iterations: int) -> tuple[float, float, float]:
    """Least, median and 95th percentile, ms."""
    for _ in range(WARM_UP if iterations > WARM_UP else 3):
        run()
    times = []
    for _ in range(iterations):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return min(times), float(np.median(times)), float(np.percentile(times, 95))


def on_gpu(model: onnx.ModelProto, folder: Path, feed: dict[str, np.ndarray], iterations: int) -> None:
    """Builds the engine and times the network alone, then with the copies."""
    from superpoint_trt.convert.matcher_engine import build_matcher
    from superpoint_trt.gpu.matcher_engine import MatcherEngine

    (folder / "m.onnx").write_bytes(model.SerializeToString())
    started = time.perf_counter()
    build_matcher(folder / "m.onnx", folder / "m.engine")
    print(f"built in {time.perf_counter() - started:.0f} s, {(folder / 'm.engine').stat().st_size / 1e6:.1f} MB")
    engine = MatcherEngine(folder / "m.engine")
    engine.infer(feed)
    for name, run in (("network alone", engine.run), ("with copies", lambda: engine.infer(feed))):
        least, median, late = timed(run, iterations)
        print(f"{engine.tensorrt} on {engine.device}, {name}: {median:.3f} ms (least {least:.3f}, p95 {late:.3f})")
    engine.close()


def on_cpu(model: onnx.ModelProto, feed: dict[str, np.ndarray], threads: int, iterations: int) -> None:
    """Times onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    least, median, late = timed(lambda: session.run(None, feed), iterations)
    print(
        f"onnxruntime {onnxruntime.__version__}, {threads} threads: {median:.1f} ms (least {least:.1f}, p95 {late:.1f})"
    )


def on_cpu_by_operator(model: onnx.ModelProto, feed: dict[str, np.ndarray], threads: int, folder: Path) -> None:
    """Prints the least time of each operator's nodes, and that of the products at this machine's best rate."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for _ in range(WARM_UP * 3):
        session.run(None, feed)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event["name"].endswith("_kernel_time"):
            times[event["args"]["op_name"], event["name"]].append(event["dur"] / 1e3)
    least, nodes = Counter(), Counter()
    for (operator, _), found in times.items():
        least[operator] += min(found)
        nodes[operator] += 1
    for operator, total in least.most_common(12):
        print(f"{operator:20} {nodes[operator]:4} nodes {total:7.2f} ms")
    rate, work = sgemm_rate(threads), products(model)
    bound = f"products {work / 1e9:.2f} GFLOP, {work / rate * 1e3:.1f} ms at {rate / 1e9:.0f} GFLOP/s"
    print(f"all {sum(least.values()):.1f} ms; {bound}")


def products(model: onnx.ModelProto) -> int:
    """Floating-point operations of the products of matrices, of a graph of fixed sizes."""
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        shapes[value.name] = [size.dim_value for size in value.type.tensor_type.shape.dim]
    made = [node for node in model.graph.node if node.op_type == "MatMul"]
    return sum(2 * int(np.prod(shapes[node.output[0]])) * shapes[node.input[0]][-1] for node in made)


def sgemm_rate(threads: int) -> float:
    """FLOP/s of a product of the matcher's own size, at best."""
    import onnxruntime

    weight = numpy_helper.from_array(np.ones((256, 256), np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1024, 256]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "product", ends[:1], ends[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows = np.ones((1024, 256), np.float32)
    least, _, _ = timed(lambda: session.run(None, {"x": rows}), 500)
    return 2 * 1024 * 256 * 256 / (least / 1e3)


@click.command()
@click.option("--weights", help="Matcher.  [default: random]")
@click.option("--width", default=128, help="Without --weights.")
@click.option("--heads", default=4, help="Without --weights.")
@click.option("--layers", default=6, help="Only the first so many.")
@click.option("--keypoints", default=512)
@click.option("--precision", type=click.Choice(["fp32", "fp16"]), default="fp16")
@click.option("--half-softmax", is_flag=True)
@click.option("--engine", is_flag=True, help="TensorRT on the GPU here instead of onnxruntime on the CPU.")
@click.option("--operators", is_flag=True, help="On the CPU: also the time by operator, and the products' bound.")
@click.option("--threads", default=2)
@click.option("--iterations", default=50)
def main(
    weights: str | None,
    width: int,
    heads: int,
    layers: int,
    keypoints: int,
    precision: str,
    half_softmax: bool,
    engine: bool,
    operators: bool,
    threads: int,
    iterations: int,
) -> None:
    """Times one matcher."""
    loaded = weights_of(weights, width, heads, layers)
    kind = Precision(precision) if engine else Precision.FP32
    options = MatcherExportOptions(keypoints, layers, precision=kind, half_softmax=half_softmax)
    model = matcher_to_onnx(loaded, options)
    print(machine())
    print(f"{layers} layers, {loaded.parameters / 1e6:.2f} M numbers, {keypoints} points of each image, {kind.value}")
    feed = feed_of(keypoints, loaded.shape.descriptor_dims[0], 1)
    with tempfile.TemporaryDirectory() as folder:
        if engine:
            on_gpu(model, Path(folder), feed, iterations)
        else:
            on_cpu(model, feed, threads, iterations)
            if operators:
                on_cpu_by_operator(model, feed, threads, Path(folder))


if __name__ == "__main__":
    main()
