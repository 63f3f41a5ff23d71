"""Converts ONNX to a TensorRT engine (the guide's step 2)."""

from superpoint_trt.__main__ import main

if __name__ == "__main__":
    main("superpoint_trt.cli.guide", "convert_to_tensorrt")
