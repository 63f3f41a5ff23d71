"""CUDA and TensorRT as they are: calls, arrays, engines, kernels."""
