"""Quantizes a network to int8 and prints the evidence, as `superpoint build --precision int8` does.

    superpoint export --type heads --output heads.onnx
    python examples/05_int8.py heads.onnx FOLDER [heads_int8.engine]

FOLDER holds 100 or more photographs like those to come. Without an engine's name only the .onnx is written, which
needs no TensorRT.
"""

from __future__ import annotations

import sys

from superpoint_trt.int8 import LowPrecisionOptions, quantize_and_verify

OUTPUT = "example_int8.onnx"


def main(onnx: str, images: str, engine: str | None = None) -> int:
    """Writes the model and returns the exit code: 1 if it loses more than its gates allow."""
    result = quantize_and_verify(onnx, LowPrecisionOptions(images), output=OUTPUT, engine=engine)

    for warning in result.warnings:
        print(f"warning: {warning}")
    print(f"wrote {', '.join(str(path) for path in (result.ranges, result.onnx, result.engine) if path)}")
    print(f"fp16 layers: {' '.join(result.kept_layers)}")
    if result.verification is None:
        print("not verified: too few images")
        return 0
    for gate in result.verification.gates:
        value = "not defined" if gate.value is None else f"{gate.value:.4f}"
        print(f"{gate.name:<26}{value:>12}  limit {gate.limit:<6g}{'passed' if gate.passed else 'FAILED'}")
    return 0 if result.passed else 1


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
