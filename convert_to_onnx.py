"""Converts a SuperPoint checkpoint to ONNX (the guide's step 1)."""

from superpoint_trt.cli.guide import convert_to_onnx
from superpoint_trt.cli.main import script

if __name__ == "__main__":
    script(convert_to_onnx)()
