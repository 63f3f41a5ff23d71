"""The build half: checkpoint -> .onnx -> typed .onnx -> TensorRT plan."""
