"""fp32 .onnx -> Q/DQ .onnx: ranges, equalization, rounding, Q/DQ pairs."""
