"""Converts ONNX to a TensorRT engine (the guide's step 2)."""

from superpoint_trt.cli import script
from superpoint_trt.guide import convert_to_tensorrt

if __name__ == "__main__":
    script(convert_to_tensorrt)()
