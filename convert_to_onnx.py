"""Converts a SuperPoint checkpoint to ONNX (the guide's step 1)."""

from superpoint_trt.cli import script
from superpoint_trt.guide import convert_to_onnx

if __name__ == "__main__":
    script(convert_to_onnx)()
