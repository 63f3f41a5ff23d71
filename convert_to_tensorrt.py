"""Converts ONNX to a TensorRT engine (the guide's step 2)."""

from superpoint_trt.cli.guide import convert_to_tensorrt
from superpoint_trt.cli.main import script

if __name__ == "__main__":
    script(convert_to_tensorrt)()
