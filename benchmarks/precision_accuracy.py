"""Precision against accuracy: each checkpoint in fp32, int8, ... through onnxruntime, on pairs with known homographies.

    python benchmarks/precision_accuracy.py --dataset FOLDER --calibration-images FOLDER [--weights FILE ...]
        [--precision fp32 --precision int8 ...] [--rounding feedback|nearest] [--ransac-orders 20]
        [--keep-fp16 PATTERN ...] [--json FILE]

The models are `heads` of 640x480. Points within 1 px (the smaller of both directions) and cosine are the gates of
`superpoint verify` against fp32, on up to 12 of the dataset's images. MMA@3, H@3 and repeatability are those of
`superpoint evaluate` with its default protocol, homographies averaged over the orders of the matches. Ranges are
99.99th percentiles, as `superpoint quantize` takes them; a .calibration.json beside the weights is used instead of
measuring. Exit code 1 if a model loses more than MOST_LOST or finds fewer points than LEAST_FOUND.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click

from superpoint_trt import packaged
from superpoint_trt.convert.cast import cast
from superpoint_trt.convert.export import ExportOptions, export
from superpoint_trt.convert.onnx_file import QUANTIZED_TYPES, load_onnx
from superpoint_trt.convert.quantize.calibrate import calibrate, split_images
from superpoint_trt.convert.quantize.gptq import round_weights
from superpoint_trt.convert.quantize.options import CalibrationOptions, QuantizeOptions
from superpoint_trt.convert.quantize.qdq import quantize
from superpoint_trt.convert.quantize.ranges_file import load_calibration, ranges_path
from superpoint_trt.core.types import OutputType, Precision
from superpoint_trt.prove.datasets import load_pairs
from superpoint_trt.prove.evaluate import evaluate
from superpoint_trt.prove.protocol import Protocol
from superpoint_trt.prove.verify import verify

PROOF_IMAGES = 12
MOST_LOST = 0.02
"""Most that homography correctness and mean matching accuracy at 3 px may fall below fp32's."""
LEAST_FOUND = 0.90
"""Smallest share of the points within 1 px."""
COLUMNS = ("weights", "precision", "within 1 px", "cosine median", "cosine p1", "rep.", "MMA@3", "H@3")


def model_of(weights: str, precision: Precision, ranges, keep, folder: Path) -> Path:
    """The `heads` .onnx of a checkpoint in a precision."""
    full, path = folder / "fp32.onnx", folder / f"{precision.value}.onnx"
    if not full.exists():
        export(weights, full, ExportOptions(OutputType.HEADS))
    if precision in QUANTIZED_TYPES:
        path.write_bytes(quantize(load_onnx(full), ranges, QuantizeOptions(precision, tuple(keep))).SerializeToString())
    elif precision is not Precision.FP32:
        cast(full, path, precision)
    return path


def ranges_of(weights: str, images: str, count: int, rounding: str, folder: Path):
    """The ranges that lie beside the checkpoint, or else new ones."""
    known = ranges_path(weights)
    if known.exists():
        print(f"ranges of {known}", flush=True)
        return load_calibration(known)
    started = time.perf_counter()
    chosen = split_images(images, count)
    found = calibrate(folder / "fp32.onnx", chosen.calibration, CalibrationOptions(count=count))
    if rounding == "feedback":
        found = round_weights(folder / "fp32.onnx", found, chosen.calibration)
    print(f"{found.summary()}, in {time.perf_counter() - started:.0f} s", flush=True)
    return found


def proof_of(dataset: str) -> list[Path]:
    """The images that fp32 and a model are compared on."""
    paths = sorted({path for pair in load_pairs(dataset).pairs for path in (pair.first, pair.second)})
    return paths[:: max(1, len(paths) // PROOF_IMAGES)][:PROOF_IMAGES]


def measure(model: Path, reference: Path, dataset: str, orders: int, device: str = "cpu") -> dict[str, float]:
    """The figures of one row of the table."""
    gates = {gate.name: gate.value for gate in verify(model, reference, proof_of(dataset), device=device).gates}
    total = evaluate(model, dataset, Protocol(ransac_orders=orders), device).to_json()["total"]
    return {
        "within 1 px": gates["keypoints_found_share"],
        "cosine median": gates["descriptor_cosine_median"],
        "cosine p1": gates["descriptor_cosine_p1"],
        "rep.": total["repeatability"],
        "MMA@3": total["mma"]["3"],
        "H@3": total["homography"]["3"],
    }


def faults(row: dict, full: dict) -> list[str]:
    """What is worse than allowed, in words; empty if nothing is."""
    lost = [f"{name} {row[name] - full[name]:+.4f}" for name in ("MMA@3", "H@3") if full[name] - row[name] > MOST_LOST]
    few = [f"within 1 px {row['within 1 px']:.4f}"] if row["within 1 px"] < LEAST_FOUND else []
    return lost + few


@click.command()
@click.option("--weights", multiple=True, default=[str(packaged.WEIGHTS)], show_default="the packaged ones")
@click.option("--precision", "precisions", multiple=True, default=["fp32", "int8"], show_default=True)
@click.option("--dataset", required=True)
@click.option("--calibration-images", required=True)
@click.option("--calibration-count", default=200, show_default=True)
@click.option("--rounding", type=click.Choice(["feedback", "nearest"]), default="feedback", show_default=True)
@click.option("--keep-fp16", multiple=True)
@click.option("--ransac-orders", default=20, show_default=True)
@click.option("--json", "json_path")
def main(
    weights, precisions, dataset, calibration_images, calibration_count, rounding, keep_fp16, ransac_orders, json_path
):
    """Measures, and prints a Markdown table as it goes."""
    rows, failed = [], []
    for file in weights:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            full = model_of(file, Precision.FP32, None, (), folder)
            ranges = ranges_of(file, calibration_images, calibration_count, rounding, folder)
            for precision in dict.fromkeys(["fp32", *precisions]):
                model = model_of(file, Precision(precision), ranges, keep_fp16, folder)
                row = {"weights": Path(file).stem, "precision": precision}
                rows.append({**row, **measure(model, full, dataset, ransac_orders)})
                first = next(r for r in rows if r["weights"] == row["weights"])
                failed += [f"{row['weights']} {precision}: {fault}" for fault in faults(rows[-1], first)]
                print_row(rows[-1], first=len(rows) == 1)
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=1))
    print("\n".join(failed) or "all within the limits", flush=True)
    sys.exit(bool(failed))


def print_row(row: dict, first: bool) -> None:
    """Prints one line of the table, before the first also the head."""
    if first:
        print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    shown = [f"{row[c]:.4f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS]
    print("| " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
