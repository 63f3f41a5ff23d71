"""Converts a SuperPoint checkpoint to ONNX (the guide's step 1)."""

from superpoint_trt.__main__ import main

if __name__ == "__main__":
    main("superpoint_trt.cli.guide", "convert_to_onnx")
